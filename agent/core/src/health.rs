//! When checks make an instance healthy: `rise` successes in a row, and `fall` failures in a row undo it.
//!
//! ```text
//!  unproven ── rise × ok ──▶ healthy ── fall × failure ──▶ unhealthy ── rise × ok ──▶ healthy
//! ```

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// Has not passed its first checks; gets no requests.
    Unproven,
    Healthy,
    /// Was healthy and is not; gets no requests while another instance is.
    Unhealthy,
}

/// The health of one instance, with the run of equal results that led to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tracker {
    health: Health,
    run: u32,
    last_ok: bool,
}

impl Default for Tracker {
    fn default() -> Self {
        Self { health: Health::Unproven, run: 0, last_ok: false }
    }
}

impl Tracker {
    /// A tracker of an instance that was healthy when the agent last saw it.
    pub fn proven() -> Self {
        Self { health: Health::Healthy, run: 0, last_ok: true }
    }

    pub fn health(&self) -> Health {
        self.health
    }

    /// Takes one check's result and returns the health after it.
    pub fn record(&mut self, ok: bool, rise: u32, fall: u32) -> Health {
        self.run = if ok == self.last_ok { self.run.saturating_add(1) } else { 1 };
        self.last_ok = ok;
        if ok && self.run >= rise {
            self.health = Health::Healthy;
        } else if !ok && self.run >= fall && self.health == Health::Healthy {
            self.health = Health::Unhealthy;
        }
        self.health
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failure_among_successes_changes_nothing() {
        let mut tracker = Tracker::default();
        assert_eq!(tracker.record(true, 2, 3), Health::Unproven);
        assert_eq!(tracker.record(true, 2, 3), Health::Healthy);
        assert_eq!(tracker.record(false, 2, 3), Health::Healthy);
        assert_eq!(tracker.record(true, 2, 3), Health::Healthy);
        assert_eq!(tracker.record(false, 2, 3), Health::Healthy);
        assert_eq!(tracker.record(false, 2, 3), Health::Healthy);
        assert_eq!(tracker.record(false, 2, 3), Health::Unhealthy);
        assert_eq!(tracker.record(true, 2, 3), Health::Unhealthy);
        assert_eq!(tracker.record(true, 2, 3), Health::Healthy);
    }

    #[test]
    fn an_unproven_instance_stays_unproven_when_it_fails() {
        let mut tracker = Tracker::default();
        for _ in 0..10 {
            assert_eq!(tracker.record(false, 1, 3), Health::Unproven);
        }
    }
}
