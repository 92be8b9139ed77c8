//! What an operator should see in the log without having asked: a line now and then, however often it happens.
//!
//! Counters count everything; a remark shows one case of it. Whoever can cause one can cause a million, so
//! there is at most one a second, which says how many were left out.

use super::io::Millis;

/// At most one remark in this time.
const INTERVAL_MS: Millis = 1_000;

/// The remarks of one core that have not been taken.
#[derive(Debug, Default)]
pub struct Remarks {
    lines: Vec<String>,
    /// Until then, nothing is said.
    quiet_until: Millis,
    left_out: u64,
}

impl Remarks {
    /// Says something, unless something was said a moment ago.
    pub fn add(&mut self, now: Millis, line: impl FnOnce() -> String) {
        if now < self.quiet_until {
            self.left_out += 1;
            return;
        }
        self.quiet_until = now + INTERVAL_MS;
        let line = match std::mem::take(&mut self.left_out) {
            0 => line(),
            count => format!("{} (and {count} remarks were left out)", line()),
        };
        self.lines.push(line);
    }

    /// What has been said since the last call.
    pub fn take(&mut self) -> Vec<String> {
        std::mem::take(&mut self.lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_remarks_is_one_a_second() {
        let mut remarks = Remarks::default();
        for now in 0..2_500 {
            remarks.add(now, || format!("at {now}"));
        }
        let left_out = |count| format!(" (and {count} remarks were left out)");
        let expected =
            ["at 0".to_owned(), format!("at 1000{}", left_out(999)), format!("at 2000{}", left_out(999))];
        assert_eq!(remarks.take(), expected);
        assert!(remarks.take().is_empty());
    }
}
