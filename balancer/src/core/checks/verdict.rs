//! What an upstream's checks have come to.
//!
//! ```text
//!             rise passes in a row
//!  Unproven ─────────────────────────▶ Passing ◀──────────────────┐
//!     │                                   │ fall failures in a row │ rise passes in a row
//!     │ a failure                         ▼                        │
//!     └────────────────────────────────▶ Failing ─────────────────┘
//! ```

/// Whether an upstream may be given traffic, as far as its checks go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// New: it has passed so many in a row, and failed none.
    Unproven { passes: u16 },
    /// It may, and has failed so many in a row.
    Passing { failures: u16 },
    /// It may not, and has passed so many in a row.
    Failing { passes: u16 },
}

/// What one check did to the verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Same,
    /// It may be given traffic from now on.
    Rose,
    /// It may no longer.
    Fell,
}

impl Verdict {
    /// Takes in the end of one check.
    pub fn take(&mut self, passed: bool, rise: u16, fall: u16) -> Change {
        let (next, change) = match (*self, passed) {
            (Verdict::Unproven { passes } | Verdict::Failing { passes }, true) if passes + 1 >= rise => {
                (Verdict::Passing { failures: 0 }, Change::Rose)
            }
            (Verdict::Unproven { passes }, true) => (Verdict::Unproven { passes: passes + 1 }, Change::Same),
            (Verdict::Failing { passes }, true) => (Verdict::Failing { passes: passes + 1 }, Change::Same),
            (Verdict::Unproven { .. } | Verdict::Failing { .. }, false) => {
                (Verdict::Failing { passes: 0 }, Change::Same)
            }
            (Verdict::Passing { .. }, true) => (Verdict::Passing { failures: 0 }, Change::Same),
            (Verdict::Passing { failures }, false) if failures + 1 >= fall => {
                (Verdict::Failing { passes: 0 }, Change::Fell)
            }
            (Verdict::Passing { failures }, false) => {
                (Verdict::Passing { failures: failures + 1 }, Change::Same)
            }
        };
        *self = next;
        change
    }

    pub fn is_passing(self) -> bool {
        matches!(self, Verdict::Passing { .. })
    }

    /// It has failed no check, and not passed enough.
    pub fn is_unproven(self) -> bool {
        matches!(self, Verdict::Unproven { .. })
    }

    /// It gets no traffic, and the last check gave reason to think that it soon will.
    pub fn is_rising(self) -> bool {
        matches!(self, Verdict::Unproven { passes: 1.. } | Verdict::Failing { passes: 1.. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes checks given as `+` and `-`, and tells what each changed: `=`, `r` or `f`.
    fn run(mut verdict: Verdict, checks: &str) -> String {
        let change = |check| match verdict.take(check == '+', 2, 3) {
            Change::Same => '=',
            Change::Rose => 'r',
            Change::Fell => 'f',
        };
        checks.chars().map(change).collect()
    }

    #[test]
    fn it_takes_as_many_in_a_row_as_was_said() {
        let unproven = Verdict::Unproven { passes: 0 };
        for (checks, changes) in [
            ("++", "=r"),
            ("+-++", "===r"),
            ("-++", "==r"),
            ("++--+---", "=r=====f"),
            ("++---+-++---", "=r==f===r==f"),
        ] {
            assert_eq!(run(unproven, checks), changes, "{checks}");
        }
    }

    #[test]
    fn one_is_enough_where_one_was_said() {
        let mut verdict = Verdict::Unproven { passes: 0 };
        assert_eq!(verdict.take(true, 1, 1), Change::Rose);
        assert_eq!(verdict.take(false, 1, 1), Change::Fell);
    }
}
