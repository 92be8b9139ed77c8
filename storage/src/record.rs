//! Intent records: one small file per slot in `records/`, locked while somebody works on the slot.
//!
//! ```text
//!  absent ──lock──▶ empty, locked ──write──▶ intent, locked ──close──▶ absent
//!                        │ killed                │ killed (or a staging area at rest)
//!                        ▼                       ▼
//!                  empty, unlocked         intent, unlocked ──lock──▶ …
//! ```
//!
//! The lock is a flock, which dies with its holder, so a sweep can tell a running operation from one cut short without
//! clocks or process ids. An empty (or torn) record means that nothing else had been done yet.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::place::Slot;
use crate::plan::Intent;

/// Format of the record files; a newer one is left alone.
const FORMAT: u32 = 1;
/// How often a record may vanish between opening and locking it before we call it contended.
const ATTEMPTS_MAX: u32 = 16;
/// How long an operation waits for a record somebody else holds.
const WAIT: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(5);

#[derive(Serialize, Deserialize)]
struct Stored {
    format: u32,
    #[serde(flatten)]
    intent: Intent,
}

/// The folder of records.
#[derive(Debug)]
pub(crate) struct Records {
    dir: OwnedFd,
}

/// A locked record. Dropping it unlocks and leaves the file as it is.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) slot: Slot,
    file: File,
    /// What the record said when it was locked, or what was written since.
    pub(crate) intent: Option<Intent>,
}

impl Records {
    pub(crate) fn new(dir: OwnedFd) -> Self {
        Self { dir }
    }

    /// Locks the record of `slot`, making it where there is none. [`Error::Busy`] when another process works on it for
    /// longer than a sweep looks at it.
    pub(crate) fn lock(&self, slot: &Slot) -> Result<Held> {
        match wait(|| self.try_lock(slot, OFlags::CREATE))? {
            Some(held) => Ok(held),
            None => Err(Error::Busy { what: slot.to_string() }),
        }
    }

    /// Locks the record of `slot` if there is one; waits like [`Records::lock`].
    pub(crate) fn lock_existing(&self, slot: &Slot) -> Result<Option<Held>> {
        wait(|| self.try_lock(slot, OFlags::empty()))
    }

    /// For the sweep, which comes again: locks the record of `slot`, or is told at once that it is busy.
    pub(crate) fn lock_idle(&self, slot: &Slot) -> Result<Held> {
        match self.try_lock(slot, OFlags::CREATE)? {
            Some(held) => Ok(held),
            None => Err(Error::Busy { what: slot.to_string() }),
        }
    }

    fn try_lock(&self, slot: &Slot, create: OFlags) -> Result<Option<Held>> {
        let name = slot.file();
        for _ in 0..ATTEMPTS_MAX {
            let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | create;
            let file = match rustix::fs::openat(&self.dir, name.as_str(), flags, Mode::RUSR | Mode::WUSR) {
                Err(rustix::io::Errno::NOENT) => return Ok(None),
                other => File::from(other.map_err(|e| Error::io("open the record of", slot, e))?),
            };
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(rustix::io::Errno::WOULDBLOCK) => return Err(Error::Busy { what: slot.to_string() }),
                other => other.map_err(|e| Error::io("lock the record of", slot, e))?,
            }
            let stat = rustix::fs::fstat(&file).map_err(|e| Error::io("stat the record of", slot, e))?;
            if stat.st_nlink > 0 {
                return read(slot, file).map(Some);
            }
        }
        Err(Error::Busy { what: slot.to_string() })
    }

    /// The slots that have a record, in name order; files that are no slots are not ours to judge.
    pub(crate) fn slots(&self) -> Result<Vec<Slot>> {
        let names = crate::dirs::names(&self.dir)?;
        Ok(names.iter().filter_map(|name| Slot::parse(name)).collect())
    }

    /// Makes `intent` the durable content of the record.
    pub(crate) fn write(&self, held: &mut Held, intent: &Intent) -> Result<()> {
        let failed = |e| Error::io("write the record of", &held.slot, e);
        let text = serde_json::to_vec(&Stored { format: FORMAT, intent: intent.clone() })
            .map_err(|e| failed(e.into()))?;
        held.file.set_len(0).map_err(failed)?;
        held.file.rewind().map_err(failed)?;
        held.file.write_all(&text).map_err(failed)?;
        held.file.sync_all().map_err(failed)?;
        rustix::fs::fsync(&self.dir).map_err(|e| failed(e.into()))?;
        held.intent = Some(intent.clone());
        Ok(())
    }

    /// The operation is complete: no record.
    pub(crate) fn close(&self, held: &Held) -> Result<()> {
        match rustix::fs::unlinkat(&self.dir, held.slot.file(), AtFlags::empty()) {
            Err(rustix::io::Errno::NOENT) => Ok(()),
            other => other.map_err(|e| Error::io("close the record of", &held.slot, e)),
        }
    }
}

fn wait<T>(lock: impl Fn() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + WAIT;
    loop {
        match lock() {
            Err(Error::Busy { .. }) if Instant::now() < deadline => sleep(POLL),
            other => return other,
        }
    }
}

fn read(slot: &Slot, mut file: File) -> Result<Held> {
    let mut text = Vec::new();
    file.as_fd()
        .try_clone_to_owned()
        .map(File::from)
        .and_then(|copy| copy.take(64 << 10).read_to_end(&mut text))
        .and_then(|_| file.rewind())
        .map_err(|e| Error::io("read the record of", slot, e))?;
    let intent = match serde_json::from_slice::<Stored>(&text) {
        Ok(stored) if stored.format > FORMAT => {
            return Err(Error::PoolFormat { found: stored.format, known: FORMAT });
        }
        Ok(stored) => Some(stored.intent),
        // Torn by a power cut before the first fsync returned, so before anything else was done.
        Err(_) => None,
    };
    Ok(Held { slot: slot.clone(), file, intent })
}
