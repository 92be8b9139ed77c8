//! What the balancer said last, for who sends it on: the lines of its log, numbered.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::remark::{Remark, Severity};

/// Lines that are kept, and the longest of them.
const LINES_MAX: usize = 512;
const LINE_BYTES_MAX: usize = 1 << 10;
/// Lines of one answer.
const ANSWER_MAX: usize = 64;

/// Asks for the lines after number `after` of the process's run `run`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SaidQuery {
    pub run: u64,
    pub after: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Said {
    /// Another one for each process; numbers then begin again.
    pub run: u64,
    /// The number of the last of these lines.
    pub last: u64,
    /// Lines that would have come before them and are gone.
    pub lost: u64,
    pub records: Vec<Record>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Microseconds since 1970.
    pub at_us: u64,
    pub severity: Severity,
    pub message: String,
    /// `route`, `upstream` and whatever else it was about.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fields: Vec<(String, String)>,
}

/// The lines of this process.
pub static LINES: Lines = Lines(Mutex::new(Ring { run: 0, next: 1, lines: VecDeque::new() }));

/// The last lines, numbered from 1.
pub struct Lines(Mutex<Ring>);

struct Ring {
    /// When the first line was said, in microseconds since 1970.
    run: u64,
    next: u64,
    lines: VecDeque<Record>,
}

impl Lines {
    pub fn push(&self, remark: Remark) {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let at_us = u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
        let Remark { severity, mut message, facts } = remark;
        message.truncate(message.floor_char_boundary(LINE_BYTES_MAX));
        let fields = facts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let mut ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if ring.next == 1 {
            ring.run = at_us;
        }
        ring.next += 1;
        ring.lines.push_back(Record { at_us, severity, message, fields });
        if ring.lines.len() > LINES_MAX {
            ring.lines.pop_front();
        }
    }

    pub fn after(&self, query: SaidQuery) -> Said {
        let ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let first = ring.next - ring.lines.len() as u64;
        let wanted = if query.run == ring.run { query.after.saturating_add(1).min(ring.next) } else { 1 };
        let from = wanted.max(first);
        let records: Vec<Record> =
            ring.lines.iter().skip((from - first) as usize).take(ANSWER_MAX).cloned().collect();
        Said { run: ring.run, last: from + records.len() as u64 - 1, lost: from - wanted, records }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_given_once_and_those_that_are_gone_are_counted() {
        let lines = Lines(Mutex::new(Ring { run: 0, next: 1, lines: VecDeque::new() }));
        let total = 2 * LINES_MAX + 10;
        for number in 1..=total {
            lines.push(format!("{number} {}", "ü".repeat(LINE_BYTES_MAX)).into());
        }
        let (mut run, mut after, mut seen, mut lost) = (0, 0, Vec::new(), 0);
        loop {
            let said = lines.after(SaidQuery { run, after });
            (run, after, lost) = (said.run, said.last, lost + said.lost);
            if said.records.is_empty() {
                break;
            }
            seen.extend(said.records);
        }
        assert_eq!((seen.len() as u64 + lost, after), (total as u64, total as u64));
        assert!(seen[0].message.starts_with(&format!("{} ", lost + 1)));
        assert!(seen.iter().all(|record| record.message.len() <= LINE_BYTES_MAX));
    }
}
