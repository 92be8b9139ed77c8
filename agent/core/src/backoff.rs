//! How long to wait before a crashed instance is started again.
//!
//! The first crashes are most often accidents, so the first three restarts are immediate; what keeps crashing
//! waits twice as long each time, up to five minutes. An instance that then runs for ten minutes is forgiven.

/// Restarts that happen at once.
pub const QUICK_RESTARTS: u32 = 3;
/// The first wait after those.
pub const FIRST_WAIT_MS: u64 = 2_000;
/// The longest wait.
pub const WAIT_MS_MAX: u64 = 300_000;
/// An instance that lived this long starts again from zero.
pub const FORGIVEN_AFTER_MS: u64 = 600_000;

/// The wait before restart number `restarts + 1`, `restarts` having happened in a row.
pub fn wait_ms(restarts: u32) -> u64 {
    match restarts.checked_sub(QUICK_RESTARTS) {
        None => 0,
        Some(slow) => FIRST_WAIT_MS.saturating_mul(1 << slow.min(20)).min(WAIT_MS_MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_end() {
        assert_eq!([0, 1, 2, 3, 4, 5].map(wait_ms), [0, 0, 0, 2_000, 4_000, 8_000]);
        assert_eq!(wait_ms(u32::MAX), WAIT_MS_MAX);
        assert!((0..64).all(|n| wait_ms(n) <= wait_ms(n + 1)));
    }
}
