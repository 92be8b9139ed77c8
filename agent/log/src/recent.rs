//! The last records, numbered: who asks for those after a number learns how many of them are gone already.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use epagent_wire::said::{Record, SAID_BYTES_MAX, Said};

/// Records that are kept...
const RECORDS_MAX: usize = 2_048;
/// ...and what they may take together, as [`Record::bytes`] counts.
const BYTES_MAX: usize = 1 << 20;

/// Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Recent(Arc<Mutex<Ring>>);

struct Ring {
    run: u64,
    records: VecDeque<Record>,
    bytes: usize,
    /// The number of the next record; numbers begin with 1.
    next: u64,
}

impl Recent {
    #[allow(clippy::new_without_default, reason = "no two of them are the same")]
    pub fn new() -> Recent {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let run = u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
        Recent(Arc::new(Mutex::new(Ring { run, records: VecDeque::new(), bytes: 0, next: 1 })))
    }

    /// Which run of this process it is: no two have the same.
    pub fn run(&self) -> u64 {
        self.lock().run
    }

    /// Keeps one more, and forgets the oldest for it.
    pub fn push(&self, record: Record) {
        let mut ring = self.lock();
        ring.next += 1;
        ring.bytes += record.bytes();
        ring.records.push_back(record);
        while ring.records.len() > RECORDS_MAX || ring.bytes > BYTES_MAX {
            let Some(oldest) = ring.records.pop_front() else { return };
            ring.bytes -= oldest.bytes();
        }
    }

    /// Those after number `after` of the run `run`, or of all when that is another one: as many as one answer holds.
    pub fn after(&self, run: u64, after: u64) -> Said {
        let ring = self.lock();
        let first = ring.next - ring.records.len() as u64;
        let wanted = if run == ring.run { after.saturating_add(1).min(ring.next) } else { 1 };
        let from = wanted.max(first);
        let mut left = SAID_BYTES_MAX;
        let records: Vec<Record> = ring
            .records
            .iter()
            .skip((from - first) as usize)
            .take_while(|record| {
                let fits = left >= record.bytes();
                left = left.saturating_sub(record.bytes());
                fits
            })
            .cloned()
            .collect();
        Said { run: ring.run, last: from + records.len() as u64 - 1, lost: from - wanted, records }
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use epagent_wire::said::Severity;

    use super::*;

    fn record(number: usize) -> Record {
        Record { at_us: 0, severity: Severity::Info, message: number.to_string(), fields: Vec::new() }
    }

    #[test]
    fn every_record_is_given_once_and_those_that_are_gone_are_counted() {
        let recent = Recent::new();
        let nothing = recent.after(0, 0);
        assert_eq!((nothing.last, nothing.lost, nothing.records.len()), (0, 0, 0));
        for number in 1..=3 {
            recent.push(record(number));
        }
        let said = recent.after(nothing.run, nothing.last);
        assert_eq!((said.last, said.lost, said.records.len()), (3, 0, 3));
        assert!(recent.after(said.run, 3).records.is_empty());
        // Another run of the process that asks, or of this one: everything there is.
        assert_eq!(recent.after(said.run + 1, 9).records.len(), 3);

        let (mut after, mut seen, mut lost) = (3, 0, 0);
        for number in 4..=3 + 2 * RECORDS_MAX {
            recent.push(record(number));
        }
        loop {
            let said = recent.after(said.run, after);
            (seen, lost, after) = (seen + said.records.len(), lost + said.lost, said.last);
            if said.records.is_empty() {
                break;
            }
        }
        assert_eq!((seen, lost), (RECORDS_MAX, RECORDS_MAX as u64));
    }

    #[test]
    fn long_records_are_bounded_in_memory_and_fit_an_answer() {
        let recent = Recent::new();
        for _ in 0..1_000 {
            recent.push(Record { message: "x".repeat(super::super::TEXT_BYTES_MAX), ..record(1) });
        }
        assert!(recent.lock().bytes <= BYTES_MAX);
        let said = recent.after(0, 0);
        assert!(!said.records.is_empty() && said.lost > 0);
        assert!(said.records.iter().map(Record::bytes).sum::<usize>() <= SAID_BYTES_MAX);
    }
}
