//! A token bucket: so many per second in the long run, and a few more at once after a quiet time.

use super::super::io::Millis;

/// What a bucket is filled at, and holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    per_second: u32,
    burst: u32,
    /// Over how many threads it is spread, each having an equal part.
    shares: u32,
}

/// What is left of a rate. Counted in thousandths of a token, so that a millisecond is worth `per_second` of
/// them and nothing is lost by rounding.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bucket {
    /// Taken out, and not yet filled up again.
    taken: u64,
    at: Millis,
}

impl Rate {
    pub fn new(per_second: u32, burst: Option<u32>, shares: u32) -> Self {
        Self { per_second, burst: burst.unwrap_or(per_second), shares: shares.max(1) }
    }

    /// What one token costs: a thread has a part of the tokens, which is to say that each is dearer.
    fn price(&self) -> u64 {
        1_000 * u64::from(self.shares)
    }

    fn room(&self) -> u64 {
        // At least one fits, however many threads share it.
        (1_000 * u64::from(self.burst)).max(self.price())
    }
}

impl Bucket {
    /// Takes a token; or says after how many milliseconds there will be one.
    pub fn take(&mut self, rate: &Rate, now: Millis) -> Result<(), Millis> {
        // A rate that was lowered: more than this one holds was never taken out of it.
        self.taken = self.taken.min(rate.room());
        let filled = now.saturating_sub(self.at).saturating_mul(u64::from(rate.per_second));
        self.taken = self.taken.saturating_sub(filled);
        self.at = now;
        let after = self.taken + rate.price();
        if after <= rate.room() {
            self.taken = after;
            return Ok(());
        }
        Err((after - rate.room()).div_ceil(u64::from(rate.per_second.max(1))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many are taken when one is tried every `step_ms` for `for_ms`.
    fn taken(rate: &Rate, step_ms: u64, for_ms: u64) -> usize {
        let mut bucket = Bucket::default();
        (0..for_ms).step_by(step_ms as usize).filter(|at| bucket.take(rate, 5_000 + at).is_ok()).count()
    }

    #[test]
    fn the_long_run_is_the_rate_and_the_start_is_the_burst() {
        for (rate, burst, due) in
            [(10, Some(5), 5 + 99), (10, None, 10 + 99), (1, Some(1), 1 + 9), (500, Some(1), 5_000)]
        {
            let got = taken(&Rate::new(rate, burst, 1), 1, 10_000);
            assert!(got.abs_diff(due) <= 1, "{rate} per second, burst {burst:?}: {got}, not {due}");
        }
    }

    #[test]
    fn shares_add_up_to_the_whole() {
        for shares in [1, 2, 3, 8] {
            let got = taken(&Rate::new(24, Some(24), shares), 1, 10_000) * shares as usize;
            assert!((255..=270).contains(&got), "{shares} shares have {got}");
        }
        assert_eq!(taken(&Rate::new(1, Some(1), 4), 1, 100), 1, "a part of one is one, at first");
    }

    #[test]
    fn a_rate_that_is_lowered_is_kept_to_at_once_and_pays_for_nothing_before() {
        let mut bucket = Bucket::default();
        let before = Rate::new(100_000, None, 1);
        while bucket.take(&before, 1_000).is_ok() {}
        let after = Rate::new(1, None, 1);
        assert_eq!(bucket.take(&after, 1_000), Err(1_000), "the burst of before is used up");
        assert_eq!(bucket.take(&after, 2_000), Ok(()));
    }

    #[test]
    fn the_wait_it_names_is_enough_and_not_too_long() {
        let rate = Rate::new(3, Some(2), 2);
        let (mut bucket, mut now) = (Bucket::default(), 1_000);
        for _ in 0..50 {
            if let Err(wait_ms) = bucket.take(&rate, now) {
                assert!(bucket.take(&rate, now + wait_ms - 1).is_err());
                now += wait_ms;
                assert_eq!(bucket.take(&rate, now), Ok(()));
            }
        }
    }
}
