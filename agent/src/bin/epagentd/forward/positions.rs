//! How far each source has been sent: a small file in the agent's state, replaced as a whole.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use epagent_core::name::JailId;
use serde::{Deserialize, Serialize};

/// In the state folder.
pub const FILE: &str = "syslog.json";
/// How much may be sent again after a restart.
const SAVE_EVERY: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Positions {
    /// What apps printed before that is history: the time at which sending was first configured, in RFC 3339.
    pub since: String,
    /// Of this very process: of no use to the next.
    #[serde(skip)]
    pub agent: Seen,
    pub runner: Seen,
    pub balancer: Seen,
    pub jails: BTreeMap<JailId, Place>,
    #[serde(skip)]
    saved: Saved,
}

/// The last record of a process that was sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    pub run: u64,
    pub last: u64,
}

/// The first byte of a log that was not sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Which file: they are renamed when they are full.
    pub inode: u64,
    pub offset: u64,
}

#[derive(Debug, Clone, Default)]
struct Saved {
    at: Option<Instant>,
    text: String,
}

impl Positions {
    pub fn since(time: String) -> Positions {
        Positions { since: time, ..Positions::default() }
    }

    /// None when there are none yet, or when they can't be understood: then nothing is sent twice for it.
    pub fn read(path: &Path) -> io::Result<Option<Positions>> {
        match fs::read(path) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Saves them, unless that was done a moment ago or nothing has changed.
    pub fn save_when_due(&mut self, path: &Path) -> io::Result<()> {
        if self.saved.at.is_some_and(|at| at.elapsed() < SAVE_EVERY) {
            return Ok(());
        }
        let text = serde_json::to_string(self)?;
        if text != self.saved.text {
            let next = path.with_extension("next");
            File::create(&next)?.write_all(text.as_bytes())?;
            // Not synced: what a power cut loses is sent again.
            fs::rename(&next, path)?;
            self.saved.text = text;
        }
        self.saved.at = Some(Instant::now());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        assert!(Positions::read(&path).unwrap().is_none());
        let mut positions = Positions::since("2026-11-22T03:15:00.000000Z".to_owned());
        positions.runner = Seen { run: 7, last: 9 };
        positions.jails.insert("shop-abcdefgh".parse().unwrap(), Place { inode: 5, offset: 1 << 40 });
        positions.save_when_due(&path).unwrap();
        let read = Positions::read(&path).unwrap().unwrap();
        assert_eq!((read.runner, &read.jails), (positions.runner, &positions.jails));
        assert_eq!(read.since, positions.since);
        fs::write(&path, "{").unwrap();
        assert!(Positions::read(&path).unwrap().is_none());
    }
}
