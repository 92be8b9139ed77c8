//! Upstreams whose traffic fails get none for a while.
//!
//! ```text
//!             failures in a row, and few enough are ejected
//!   In use ─────────────────────────────────────────────────▶ Ejected
//!     ▲                                                          │
//!     └───────────── ejection_ms × 2^n, up to a cap ─────────────┘
//! ```
//!
//! n is how often it was ejected again within the time that its last ejection had taken. What is bounded by
//! a part of the route's upstreams cannot take the route down: when everything fails it is seldom the upstreams'
//! fault one by one, and somebody has to answer.

use super::super::config::Config;
use super::super::io::Millis;
use crate::table::Passive;

/// What one candidate's traffic came to lately.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outlier {
    failures: u16,
    /// Ejected until then; or was, last.
    until: Millis,
    /// How long that was.
    lasted_ms: Millis,
}

impl Outlier {
    pub fn is_ejected(&self, now: Millis) -> bool {
        now < self.until
    }

    /// How long it will still be, in milliseconds.
    pub fn left_ms(&self, now: Millis) -> Millis {
        self.until.saturating_sub(now)
    }

    pub fn succeeded(&mut self) {
        self.failures = 0;
    }

    /// True when it has failed as often in a row as it may.
    pub fn failed(&mut self, passive: &Passive) -> bool {
        self.failures = self.failures.saturating_add(1);
        self.failures >= passive.failures
    }

    /// Ejects it; for how long.
    pub fn eject(&mut self, passive: &Passive, now: Millis) -> Millis {
        let again = self.lasted_ms > 0 && now < self.until + self.lasted_ms;
        let most = passive.ejection_ms * Config::EJECTION_TIMES_MAX;
        self.lasted_ms = if again { (2 * self.lasted_ms).min(most) } else { passive.ejection_ms };
        self.until = now + self.lasted_ms;
        self.failures = 0;
        self.lasted_ms
    }
}

/// Whether one more may be ejected when so many of so many get nothing already, ejected or failing their checks.
pub fn may_eject(passive: &Passive, away: usize, of: usize) -> bool {
    let most = of * usize::from(passive.ejected_max_percent) / 100;
    away < most.min(of.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSIVE: Passive = Passive { failures: 3, ejection_ms: 100, ejected_max_percent: 50 };

    #[test]
    fn only_failures_in_a_row_count() {
        let mut outlier = Outlier::default();
        assert!(!outlier.failed(&PASSIVE) && !outlier.failed(&PASSIVE));
        outlier.succeeded();
        assert!(!outlier.failed(&PASSIVE) && !outlier.failed(&PASSIVE) && outlier.failed(&PASSIVE));
    }

    #[test]
    fn ejections_grow_to_a_cap_and_are_forgiven() {
        let (mut outlier, mut now, mut lasted) = (Outlier::default(), 1_000, Vec::new());
        for _ in 0..7 {
            lasted.push(outlier.eject(&PASSIVE, now));
            assert!(outlier.is_ejected(now) && !outlier.is_ejected(now + lasted[lasted.len() - 1]));
            now += lasted[lasted.len() - 1] + 1;
        }
        assert_eq!(lasted, [100, 200, 400, 800, 1_000, 1_000, 1_000]);
        now += 1_000;
        assert_eq!(outlier.eject(&PASSIVE, now), 100);
    }

    #[test]
    fn a_part_of_them_stays_and_one_always() {
        let may = |percent, ejected, of| {
            may_eject(&Passive { ejected_max_percent: percent, ..PASSIVE }, ejected, of)
        };
        assert!(may(50, 0, 2) && !may(50, 1, 2));
        assert!(may(100, 3, 5) && !may(100, 4, 5), "never all");
        assert!(!may(100, 0, 1) && !may(0, 0, 9) && !may(50, 0, 0));
    }
}
