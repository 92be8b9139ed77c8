//! Ciphertext on its way out, and how much of the core's plain text it carries.
//!
//! A record that has been made must be sent whole and in its turn, whatever the socket takes at a time. So
//! what a send was asked to carry counts as sent record by record, when the last byte of one was taken;
//! what was made beyond that is *ahead*, and is what the core offers first when it sends again.

use std::collections::VecDeque;

use crate::core::chunk::{Chunk, Chunks};

/// The queue of one connection.
#[derive(Default)]
pub struct Outgoing {
    chunks: VecDeque<Chunk>,
    records: VecDeque<Record>,
    ahead_bytes: usize,
}

/// A run of ciphertext that counts as a whole.
struct Record {
    cipher_left: usize,
    /// How much of the core's it carries; nothing, for what the protocol says itself.
    plain: usize,
}

impl Outgoing {
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Plain text that is in the queue and not yet taken.
    pub fn ahead_bytes(&self) -> usize {
        self.ahead_bytes
    }

    /// What to send.
    pub fn chunks(&self) -> Chunks {
        self.chunks.iter().cloned().collect()
    }

    /// Appends ciphertext, of which each record is given by its ends in both.
    pub fn push(&mut self, cipher: Vec<u8>, records: impl IntoIterator<Item = (usize, usize)>) {
        for (cipher_left, plain) in records {
            self.ahead_bytes += plain;
            self.records.push_back(Record { cipher_left, plain });
        }
        if !cipher.is_empty() {
            self.chunks.push_back(Chunk::owned(cipher));
        }
    }

    /// Appends what the protocol has to say itself.
    pub fn push_own(&mut self, cipher: Vec<u8>) {
        let len = cipher.len();
        self.push(cipher, (len > 0).then_some((len, 0)));
    }

    /// The socket took this much; how much of the core's that completed.
    pub fn taken(&mut self, mut bytes: usize) -> usize {
        let mut left = bytes;
        while let Some(front) = self.chunks.front_mut() {
            if front.len() > left {
                front.advance(left);
                break;
            }
            left -= front.len();
            self.chunks.pop_front();
        }
        let mut plain = 0;
        while let Some(record) = self.records.front_mut() {
            if record.cipher_left > bytes {
                record.cipher_left -= bytes;
                break;
            }
            bytes -= record.cipher_left;
            plain += record.plain;
            self.records.pop_front();
        }
        self.ahead_bytes -= plain;
        plain
    }

    /// Everything in it, to be sent by somebody else.
    pub fn into_bytes(self) -> Vec<u8> {
        self.chunks.iter().flat_map(|chunk| chunk.iter().copied()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_text_counts_when_the_last_byte_of_its_record_is_taken() {
        let mut out = Outgoing::default();
        out.push_own(vec![0; 5]);
        out.push(vec![1; 30], [(10, 4), (20, 9)]);
        assert_eq!(out.ahead_bytes(), 13);
        assert_eq!((out.taken(14), out.taken(1), out.taken(0)), (0, 4, 0));
        assert_eq!((out.ahead_bytes(), out.chunks().len(), out.chunks()[0].len()), (9, 1, 20));
        assert_eq!((out.taken(20), out.is_empty(), out.chunks().len()), (9, true, 0));
    }
}
