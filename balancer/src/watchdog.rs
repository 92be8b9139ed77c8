//! The service manager's watchdog: told that we live only while every data-path thread does.
//!
//! ```text
//!   every third of the period:  did all threads write down the last number? ── yes ──▶ WATCHDOG=1
//!                               ask them for the next one                    └─ no ──▶ nothing: we are restarted
//! ```
//!
//! A timer alone would go on telling while a thread is stuck, and its clients with it.

use std::time::{Duration, Instant};

/// When to ask, and whether the answers came.
#[derive(Debug)]
pub struct Watchdog {
    every: Duration,
    due: Instant,
    asked: u64,
}

impl Watchdog {
    /// By `WATCHDOG_USEC`, if it is meant for this process: `WATCHDOG_PID` names it, or nobody, or we were
    /// handed over to by whom it named.
    pub fn from_environment(handed_over: bool, now: Instant) -> Option<Self> {
        let usec: u64 = std::env::var("WATCHDOG_USEC").ok()?.parse().ok().filter(|usec| *usec > 0)?;
        let whose = std::env::var("WATCHDOG_PID").ok();
        let ours = whose.is_none_or(|pid| pid == std::process::id().to_string());
        (ours || handed_over).then(|| Self::new(Duration::from_micros(usec), now))
    }

    fn new(period: Duration, now: Instant) -> Self {
        Self { every: period / 3, due: now, asked: 0 }
    }

    /// When to look next.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Looks at what the threads wrote down. Returns whether to tell the manager, and the number to ask for.
    pub fn look(&mut self, now: Instant, beats: impl Iterator<Item = u64>) -> Option<(bool, u64)> {
        if now < self.due {
            return None;
        }
        let asked = self.asked;
        let alive = beats.into_iter().all(|beat| beat == asked);
        if alive {
            self.asked += 1;
        }
        self.due = now + self.every;
        Some((alive, self.asked))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_does_not_come_round_silences_the_watchdog() {
        let start = Instant::now();
        let mut watchdog = Watchdog::new(Duration::from_secs(3), start);
        assert_eq!(watchdog.look(start, [0, 0].into_iter()), Some((true, 1)));
        assert_eq!(watchdog.look(start, [1, 1].into_iter()), None, "not due");
        let second = |n| start + Duration::from_secs(n);
        assert_eq!(watchdog.look(second(1), [1, 1].into_iter()), Some((true, 2)));
        assert_eq!(watchdog.look(second(2), [2, 1].into_iter()), Some((false, 2)));
        assert_eq!(watchdog.look(second(3), [2, 1].into_iter()), Some((false, 2)));
        assert_eq!(watchdog.look(second(4), [2, 2].into_iter()), Some((true, 3)));
    }
}
