//! The clocks that [`epagent_core::clock`] speaks of, and the wall clock in the two forms the agent keeps it:
//! milliseconds since the epoch inside, RFC 3339 outside.

use std::time::{SystemTime, UNIX_EPOCH};

use epagent_core::clock::Moment;
use nix::time::{ClockId, clock_gettime};

pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// What the steady clock shows.
pub fn steady_ms() -> u64 {
    // Linux has had this clock since 2.6.39, and it cannot fail for want of anything.
    let since_boot = clock_gettime(ClockId::CLOCK_BOOTTIME).map(std::time::Duration::from);
    since_boot.map_or(0, |since| since.as_millis() as u64)
}

/// What both show.
pub fn moment() -> Moment {
    Moment { wall_ms: now_ms(), steady_ms: steady_ms() }
}

/// `2026-11-22T03:06:19.123Z`.
pub fn rfc3339(at_ms: u64) -> String {
    let at = jiff::Timestamp::from_millisecond(i64::try_from(at_ms).unwrap_or(i64::MAX));
    at.map_or_else(|_| String::new(), |at| format!("{at:.3}"))
}

/// A random number that no tenant can foresee.
pub fn random_u64() -> u64 {
    let mut bytes = [0; 8];
    // Linux's getrandom can't fail once the pool is ready, which it was before any service started.
    getrandom::fill(&mut bytes).unwrap_or_else(|_| bytes = now_ms().to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_steady_clock_goes_on() {
        let before = super::steady_ms();
        std::thread::sleep(std::time::Duration::from_millis(20));
        let passed = super::steady_ms() - before;
        assert!(before > 0 && (20..10_000).contains(&passed), "{passed} ms");
    }

    #[test]
    fn times_are_written_in_utc_with_milliseconds() {
        assert_eq!(super::rfc3339(1_700_000_000_123), "2023-11-14T22:13:20.123Z");
        assert_eq!(super::rfc3339(0), "1970-01-01T00:00:00.000Z");
    }
}
