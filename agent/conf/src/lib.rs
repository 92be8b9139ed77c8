//! The configuration of a node's daemons, in layers.
//!
//! ```text
//!  /etc/epagent/runner.toml      what `epagent init` wrote              ─┐
//!  /etc/epagent/conf.d/10-a.toml the tables [runner…] and [epagentd…],   ├─▶ one table ─▶ the daemon's own type
//!  /etc/epagent/conf.d/20-b.toml in the order of their names            ─┘        └─▶ where each value came from
//! ```
//!
//! A later file takes the place of an earlier one key by key; an array is one value. Every file belongs to root, or to
//! whoever reads it, and is writable by nobody else: a limit that others can change is none. An unknown key is an
//! error that names file and line, because a limit with a typo in it would be none either.

#![forbid(unsafe_code)]

mod merge;
mod read;
mod show;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize, Serializer};

pub use show::Setting;

/// Beside the main file: the folder of the files that change it.
pub const FOLDER: &str = "conf.d";
/// The largest file.
pub const FILE_BYTES_MAX: u64 = 256 << 10;
/// The most files in the folder.
pub const FILES_MAX: usize = 64;

/// Whose configuration it is. In the folder each has a table of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Daemon {
    Runner,
    Agent,
}

impl Daemon {
    pub const ALL: [Daemon; 2] = [Daemon::Runner, Daemon::Agent];

    /// The name of its table, and of its main file without `.toml`.
    pub fn name(self) -> &'static str {
        match self {
            Daemon::Runner => "runner",
            Daemon::Agent => "epagentd",
        }
    }
}

/// A configuration that was read, and where each value of it stands.
#[derive(Debug, Clone)]
pub struct Loaded<T> {
    pub config: T,
    pub origins: Origins,
}

/// Where values stand, by their dotted keys.
#[derive(Debug, Clone, Default)]
pub struct Origins {
    places: BTreeMap<String, Place>,
}

impl Origins {
    /// None for what no file says.
    pub fn of(&self, key: &str) -> Option<&Place> {
        self.places.get(key)
    }
}

/// A line of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub path: PathBuf,
    /// None: somewhere in the file.
    pub line: Option<usize>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}", self.path.display()),
            None => write!(f, "{}", self.path.display()),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ConfError {
    #[error("read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error(
        "{path} belongs to uid {uid} with mode {mode:o}; it has to belong to root and be writable by root alone"
    )]
    Owner { path: PathBuf, uid: u32, mode: u32 },
    #[error("{path} is larger than {} KiB", FILE_BYTES_MAX >> 10)]
    TooLarge { path: PathBuf },
    #[error("{path} has more than {FILES_MAX} files")]
    TooMany { path: PathBuf },
    #[error("{place}: {why}")]
    Syntax { place: Place, why: String },
    #[error("{place}: {key}: {why}")]
    Value { place: Place, key: String, why: String },
}

/// Reads a daemon's configuration: `main`, and what the folder beside it changes.
pub fn load<T: DeserializeOwned>(daemon: Daemon, main: &Path) -> Result<Loaded<T>, ConfError> {
    merge::merge(daemon, &read::read(main)?)
}

impl<T> Loaded<T> {
    /// A fault in the value of `key` that its type does not show.
    pub fn fault(&self, main: &Path, key: &str, why: String) -> ConfError {
        let place = self.origins.of(key).cloned();
        let place = place.unwrap_or_else(|| Place { path: main.to_owned(), line: None });
        ConfError::Value { place, key: key.to_owned(), why }
    }
}

/// A value that is never shown, whatever it holds: what an operator gives to builds may be a password.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Private(String);

impl Private {
    /// What stands where the value would.
    pub const SHOWN: &str = "(not shown)";

    /// For who has to have it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Private {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::SHOWN)
    }
}

impl Serialize for Private {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(Self::SHOWN)
    }
}
