//! Numbers that look random and are not: the same seed gives the same ones, so that a run replays.
//!
//! splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014). Good enough to
//! spread load and to keep checks from falling into step; of no use for secrets.

/// A source of such numbers.
#[derive(Debug, Clone, Default)]
pub struct Random {
    state: u64,
}

impl Random {
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.state)
    }

    /// A number below `bound`, which is not 0. The bias is at most `bound` in 2^64.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.draw() % bound.max(1)
    }
}

/// Spreads every bit of a number over all of them.
pub fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

/// A number for some bytes, the same on every machine and in every process: FNV-1a, then mixed, since FNV's
/// upper bits alone are poor for short keys.
pub fn hash(bytes: &[u8]) -> u64 {
    let fnv = bytes
        .iter()
        .fold(0xCBF2_9CE4_8422_2325, |sum: u64, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01B3));
    mix(fnv)
}
