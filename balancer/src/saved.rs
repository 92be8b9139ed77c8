//! The table on disk: what is served at start, before anybody has said anything.
//!
//! Written whole to a new file, synced, renamed over the old one, and the folder synced: after a power cut
//! there is the old table or the new one.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use crate::control::protocol::LINE_BYTES_MAX;
use crate::table::{Table, TableError};

const NAME: &str = "table.json";

/// The folder the table is kept in.
#[derive(Debug, Clone)]
pub struct Saved {
    dir: PathBuf,
}

/// What went wrong with the saved table.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    #[error("cannot {what} {path}")]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the saved table {path} does not parse")]
    Garbled {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("the saved table {path} is not valid")]
    Invalid {
        path: PathBuf,
        #[source]
        source: TableError,
    },
}

impl Saved {
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// The saved table, if there is one.
    pub fn load(&self) -> Result<Option<Table>, SavedError> {
        let path = self.dir.join(NAME);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(SavedError::Io { what: "open", path, source }),
        };
        let mut text = Vec::new();
        let read = file.take(LINE_BYTES_MAX as u64).read_to_end(&mut text);
        read.map_err(|source| SavedError::Io { what: "read", path: path.clone(), source })?;
        let table: Table = serde_json::from_slice(&text)
            .map_err(|source| SavedError::Garbled { path: path.clone(), source })?;
        table.validate().map_err(|source| SavedError::Invalid { path, source })?;
        Ok(Some(table))
    }

    /// Replaces the saved table.
    pub fn save(&self, table: &Table) -> Result<(), SavedError> {
        let path = self.dir.join(NAME);
        let draft = self.dir.join(".table.json.new");
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| SavedError::Io { what, path, source }
        };
        let text =
            serde_json::to_vec(table).map_err(|source| SavedError::Garbled { path: path.clone(), source })?;
        let mut file = File::create(&draft).map_err(failed("create", &draft))?;
        file.write_all(&text).map_err(failed("write", &draft))?;
        file.sync_all().map_err(failed("sync", &draft))?;
        fs::rename(&draft, &path).map_err(failed("rename over", &path))?;
        let synced = File::open(&self.dir).and_then(|dir| dir.sync_all());
        synced.map_err(failed("sync", &self.dir))
    }
}
