//! What a completion says about itself: 64 bits of kind, generation and index.

use crate::core::io::{GENERATION_BITS, SockId};

/// What an operation in the ring was for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    /// Nobody waits for it.
    Ignored,
    /// The wake-up descriptor.
    Wake,
    Accept {
        listener: u32,
    },
    Connect(SockId),
    Recv(SockId),
    /// A slot of the table of sends.
    Send {
        slot: u32,
    },
}

const KIND_SHIFT: u32 = 32 + GENERATION_BITS;
const GENERATION_MASK: u64 = (1 << GENERATION_BITS) - 1;

impl Token {
    pub fn pack(self) -> u64 {
        let (kind, generation, index) = match self {
            Token::Ignored => (0, 0, 0),
            Token::Wake => (1, 0, 0),
            Token::Accept { listener } => (2, 0, listener),
            Token::Connect(sock) => (3, sock.generation, sock.index),
            Token::Recv(sock) => (4, sock.generation, sock.index),
            Token::Send { slot } => (5, 0, slot),
        };
        (kind << KIND_SHIFT) | (u64::from(generation) << 32) | u64::from(index)
    }

    pub fn unpack(bits: u64) -> Self {
        let index = bits as u32;
        let generation = ((bits >> 32) & GENERATION_MASK) as u32;
        match bits >> KIND_SHIFT {
            1 => Token::Wake,
            2 => Token::Accept { listener: index },
            3 => Token::Connect(SockId { index, generation }),
            4 => Token::Recv(SockId { index, generation }),
            5 => Token::Send { slot: index },
            _ => Token::Ignored,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_ring() {
        let sock = SockId { index: u32::MAX, generation: (1 << GENERATION_BITS) - 1 };
        let all = [Token::Ignored, Token::Wake, Token::Accept { listener: 7 }, Token::Connect(sock)];
        for token in all.into_iter().chain([Token::Recv(sock), Token::Send { slot: 9 }]) {
            assert_eq!(Token::unpack(token.pack()), token);
        }
    }
}
