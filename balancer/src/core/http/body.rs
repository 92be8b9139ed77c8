//! Where a body ends (RFC 9112 §6, §7). The bytes are passed on as they are; this only counts and checks.
//!
//! ```text
//! chunked:  Size ─ext─▶ Ext ─┐
//!            │  ▲           ▼
//!            └──┼──CR──▶ SizeLf ─n>0─▶ Data ▶ DataCr ▶ DataLf ─┐
//!               │           │                                  │
//!               └───────────┼──────────────────────────────────┘
//!                           └─n=0─▶ LineStart ⇄ Trailer ▶ TrailerLf
//!                                       └─CR─▶ EndLf ─▶ done
//! ```

use std::ops::Range;

use super::head::{is_text_byte, is_token_byte};

/// Most bytes of one chunk's extensions. Nobody uses them; they are checked, passed on and bounded.
const EXTENSION_BYTES_MAX: u32 = 256;
/// Most bytes of all trailer fields.
const TRAILER_BYTES_MAX: u32 = 8 * 1024;
/// Most hexadecimal digits of a chunk size; 2^60 is enough for anyone and cannot overflow.
const SIZE_DIGITS_MAX: u8 = 15;

/// How far a body has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// This many bytes are still to come; 0 is done.
    Length(u64),
    /// The chunked coding.
    Chunked(Chunked),
    /// It ends with the connection (responses only).
    UntilClose,
}

/// The chunk framing is broken; nothing after this point can be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the chunked body is malformed")]
pub struct BadChunk;

/// Where in the chunked coding the next byte falls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunked {
    state: State,
    /// Data bytes of this chunk still to come.
    left: u64,
    digits: u8,
    extension_bytes: u32,
    trailer_bytes: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Size,
    Ext,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    LineStart,
    TrailerName,
    TrailerValue,
    TrailerLf,
    EndLf,
    Done,
}

impl Body {
    /// No body at all.
    pub const NONE: Body = Body::Length(0);

    /// A chunked body of which nothing has come yet.
    pub fn chunked() -> Self {
        Body::Chunked(Chunked {
            state: State::Size,
            left: 0,
            digits: 0,
            extension_bytes: 0,
            trailer_bytes: 0,
        })
    }

    pub fn is_done(&self) -> bool {
        match self {
            Body::Length(left) => *left == 0,
            Body::Chunked(chunked) => chunked.state == State::Done,
            Body::UntilClose => false,
        }
    }

    /// Takes in what belongs to the body and returns how much that was: less than all of it only when the
    /// body is done. The ranges of plain data, without framing, are added to `data` when asked for.
    pub fn feed(&mut self, input: &[u8], data: Option<&mut Vec<Range<usize>>>) -> Result<usize, BadChunk> {
        let taken = match self {
            Body::Length(left) => {
                let taken = input.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= taken as u64;
                taken
            }
            Body::UntilClose => input.len(),
            Body::Chunked(chunked) => return chunked.feed(input, data),
        };
        if let Some(data) = data {
            data.push(0..taken);
        }
        Ok(taken)
    }
}

impl Chunked {
    fn feed(&mut self, input: &[u8], mut data: Option<&mut Vec<Range<usize>>>) -> Result<usize, BadChunk> {
        let mut at = 0;
        while at < input.len() && self.state != State::Done {
            if self.state == State::Data {
                let taken = (input.len() - at).min(usize::try_from(self.left).unwrap_or(usize::MAX));
                if let Some(data) = data.as_deref_mut() {
                    data.push(at..at + taken);
                }
                at += taken;
                self.left -= taken as u64;
                if self.left == 0 {
                    self.state = State::DataCr;
                }
                continue;
            }
            self.state = self.step(input[at])?;
            at += 1;
        }
        Ok(at)
    }

    fn step(&mut self, byte: u8) -> Result<State, BadChunk> {
        match (self.state, byte) {
            (State::Size, _) if byte.is_ascii_hexdigit() => self.size_digit(byte),
            (State::Size, b'\r') if self.digits > 0 => Ok(State::SizeLf),
            (State::Size, b';') if self.digits > 0 => Ok(State::Ext),
            (State::Ext, b'\r') => Ok(State::SizeLf),
            (State::Ext, _) if is_text_byte(byte) => {
                self.extension_bytes += 1;
                bounded(self.extension_bytes, EXTENSION_BYTES_MAX, State::Ext)
            }
            (State::SizeLf, b'\n') => {
                (self.digits, self.extension_bytes) = (0, 0);
                Ok(if self.left > 0 { State::Data } else { State::LineStart })
            }
            (State::DataCr, b'\r') => Ok(State::DataLf),
            (State::DataLf, b'\n') => Ok(State::Size),
            (State::LineStart, b'\r') => Ok(State::EndLf),
            (State::LineStart | State::TrailerName, _) if is_token_byte(byte) => {
                self.trailer(State::TrailerName)
            }
            (State::TrailerName, b':') => self.trailer(State::TrailerValue),
            (State::TrailerValue, b'\r') => Ok(State::TrailerLf),
            (State::TrailerValue, _) if is_text_byte(byte) => self.trailer(State::TrailerValue),
            (State::TrailerLf, b'\n') => Ok(State::LineStart),
            (State::EndLf, b'\n') => Ok(State::Done),
            _ => Err(BadChunk),
        }
    }

    fn size_digit(&mut self, byte: u8) -> Result<State, BadChunk> {
        let digit = (byte as char).to_digit(16).ok_or(BadChunk)?;
        self.left = if self.digits == 0 { 0 } else { self.left << 4 } | u64::from(digit);
        self.digits += 1;
        bounded(self.digits, SIZE_DIGITS_MAX, State::Size)
    }

    fn trailer(&mut self, next: State) -> Result<State, BadChunk> {
        self.trailer_bytes += 1;
        bounded(self.trailer_bytes, TRAILER_BYTES_MAX, next)
    }
}

fn bounded<N: PartialOrd>(count: N, most: N, next: State) -> Result<State, BadChunk> {
    if count <= most { Ok(next) } else { Err(BadChunk) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds the input in pieces of each size, and checks the data, the rest, and that all ways agree.
    fn check(input: &str, expected: Result<(&str, &str), BadChunk>) {
        for piece in 1..=input.len() {
            let mut body = Body::chunked();
            let (mut data, mut taken) = (String::new(), 0);
            let mut outcome = Ok(());
            for part in input.as_bytes().chunks(piece) {
                let mut ranges = Vec::new();
                match body.feed(part, Some(&mut ranges)) {
                    Ok(count) => taken += count,
                    Err(error) => {
                        outcome = Err(error);
                        break;
                    }
                }
                data.extend(ranges.into_iter().map(|range| std::str::from_utf8(&part[range]).unwrap()));
            }
            match expected {
                Ok((plain, rest)) => {
                    assert_eq!(outcome, Ok(()), "{input:?} in pieces of {piece}");
                    assert!(body.is_done(), "{input:?} in pieces of {piece}");
                    assert_eq!((data.as_str(), &input[taken..]), (plain, rest));
                }
                Err(error) => assert_eq!(outcome, Err(error), "{input:?} in pieces of {piece}"),
            }
        }
    }

    #[test]
    fn chunked_bodies_end_where_they_say() {
        check("0\r\n\r\n", Ok(("", "")));
        check("5\r\nhello\r\n0\r\n\r\nGET", Ok(("hello", "GET")));
        check("a;x=y\r\n0123456789\r\n00\r\nA: b\r\n\r\n", Ok(("0123456789", "")));
    }

    #[test]
    fn ambiguous_chunk_framing_is_refused() {
        for bad in [
            "\r\n",
            "g\r\n",
            "0x5\r\nhello",
            "5 \r\nhello",
            " 5\r\nhello",
            "5\nhello",
            "5\r\nhellox\r\n",
            "5\r\nhello\n0\r\n\r\n",
            "5;a\nb\r\nhello",
            "-1\r\n",
            "1234567890123456\r\n",
            "0\r\nbad trailer\r\n\r\n",
            "0\r\n: x\r\n\r\n",
            "0\r\nA: b\n\r\n",
            "0\r\n\n",
            "5\r\rhello",
            "+5\r\nhello",
            "5;\x01\r\nhello",
        ] {
            check(bad, Err(BadChunk));
        }
    }

    #[test]
    fn a_length_ends_where_it_says() {
        let mut body = Body::Length(5);
        assert_eq!(body.feed(b"hel", None), Ok(3));
        assert_eq!(body.feed(b"loGET", None), Ok(2));
        assert!(body.is_done());
    }
}
