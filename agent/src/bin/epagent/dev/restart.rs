//! When a part that died is started again: at once the first time, then later and later while it keeps dying.

/// The wait after the second death in a row.
const FIRST_WAIT_MS: u64 = 100;
/// The longest wait.
const WAIT_MS_MAX: u64 = 5_000;
/// A part that lived this long begins anew.
const FORGIVEN_AFTER_MS: u64 = 5_000;

/// The deaths of one part.
#[derive(Debug, Clone, Copy, Default)]
pub struct Restarts {
    in_a_row: u32,
}

impl Restarts {
    /// The wait before it is started again, after a life of `lived_ms`.
    pub fn after_death_ms(&mut self, lived_ms: u64) -> u64 {
        if lived_ms >= FORGIVEN_AFTER_MS {
            self.in_a_row = 0;
        }
        let wait_ms = match self.in_a_row.checked_sub(1) {
            None => 0,
            Some(waited) => (FIRST_WAIT_MS << waited.min(16)).min(WAIT_MS_MAX),
        };
        self.in_a_row = self.in_a_row.saturating_add(1);
        wait_ms
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_restart_is_immediate_and_later_ones_wait() {
        let mut restarts = Restarts::default();
        let waits: Vec<u64> = (0..9).map(|_| restarts.after_death_ms(10)).collect();
        assert_eq!(waits, [0, 100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000]);
        assert_eq!(restarts.after_death_ms(FORGIVEN_AFTER_MS), 0);
        assert_eq!(restarts.after_death_ms(0), 100);
    }
}
