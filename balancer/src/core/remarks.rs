//! What an operator should see in the log without having asked: a line now and then, however often it happens.
//!
//! Counters count everything; a remark shows one case of it. Whoever can cause one can cause a million, so
//! there is at most one a second, which says how many were left out.

use super::io::Millis;
use crate::remark::Remark;

/// At most one remark in this time.
const INTERVAL_MS: Millis = 1_000;

/// The remarks of one core that have not been taken.
#[derive(Debug, Default)]
pub struct Remarks {
    lines: Vec<Remark>,
    /// Until then, nothing is said.
    quiet_until: Millis,
    left_out: u64,
}

impl Remarks {
    /// Says something, unless something was said a moment ago.
    pub fn add(&mut self, now: Millis, remark: impl FnOnce() -> Remark) {
        if now < self.quiet_until {
            self.left_out += 1;
            return;
        }
        self.quiet_until = now + INTERVAL_MS;
        let mut remark = remark();
        match std::mem::take(&mut self.left_out) {
            0 => {}
            count => remark.message.push_str(&format!(" (and {count} remarks were left out)")),
        }
        self.lines.push(remark);
    }

    /// What has been said since the last call.
    pub fn take(&mut self) -> Vec<Remark> {
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
            remarks.add(now, || format!("at {now}").into());
        }
        let left_out = |count| format!(" (and {count} remarks were left out)");
        let expected =
            ["at 0".to_owned(), format!("at 1000{}", left_out(999)), format!("at 2000{}", left_out(999))];
        let said: Vec<String> = remarks.take().into_iter().map(|remark| remark.message).collect();
        assert_eq!(said, expected);
        assert!(remarks.take().is_empty());
    }
}
