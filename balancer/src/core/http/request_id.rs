//! Names for requests, by which an operator finds one in the balancer's log, the app's and a user's mail.
//!
//! A name is 32 hexadecimal digits: half of them a thread's own, half a counter that has been scrambled
//! without losing that no two are alike. So no two requests get the same, nobody learns from one how many
//! there have been, and the same seeds give the same names.

use crate::core::random::mix;

/// Longest name taken over from a trusted client.
pub const GIVEN_BYTES_MAX: usize = 128;

/// The names one thread gives.
#[derive(Debug, Clone, Default)]
pub struct RequestIds {
    thread: u64,
    scramble: u64,
    count: u64,
}

/// A name that was made here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestId(u64, u64);

impl RequestIds {
    pub fn new([thread, scramble]: [u64; 2]) -> Self {
        Self { thread, scramble, count: 0 }
    }

    pub fn make(&mut self) -> RequestId {
        self.count += 1;
        RequestId(self.thread, mix(self.count ^ self.scramble))
    }
}

impl RequestId {
    /// Its digits.
    pub fn digits(self) -> [u8; 32] {
        let mut digits = [0; 32];
        for (half, bits) in digits.chunks_exact_mut(16).zip([self.0, self.1]) {
            for (place, digit) in half.iter_mut().enumerate() {
                *digit = b"0123456789abcdef"[(bits >> (60 - 4 * place)) as usize & 15];
            }
        }
        digits
    }
}

/// Whether a name that was given may be passed on: one word that means nothing anywhere it may be written.
pub fn is_valid(given: &[u8]) -> bool {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"-_.:/+=@~".contains(b);
    (1..=GIVEN_BYTES_MAX).contains(&given.len()) && given.iter().all(plain)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_are_alike_for_the_same_seed_only() {
        let names = |seed| -> Vec<[u8; 32]> {
            let mut ids = RequestIds::new(seed);
            (0..10_000).map(|_| ids.make().digits()).collect()
        };
        assert_eq!(names([1, 2]), names([1, 2]));
        let all: HashSet<_> = [names([1, 2]), names([2, 2]), names([3, 7])].concat().into_iter().collect();
        assert_eq!(all.len(), 30_000);
        assert!(all.iter().flatten().all(|digit| digit.is_ascii_digit() || (b'a'..=b'f').contains(digit)));
        assert_eq!(&RequestId(0xFEDC_BA98_7654_3210, 1).digits(), b"fedcba98765432100000000000000001");
    }

    #[test]
    fn only_plain_words_are_taken_over() {
        assert!(is_valid(b"req-1.a:b/c+d=e@f~_") && is_valid(&[b'x'; GIVEN_BYTES_MAX]));
        for bad in [&b""[..], b"a b", b"a\"b", b"a,b", b"<a>", b"\xe9", &[b'x'; GIVEN_BYTES_MAX + 1]] {
            assert!(!is_valid(bad));
        }
    }
}
