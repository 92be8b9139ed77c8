//! Who changed what: one line per change in the log, and the last ones for who asks.
//!
//! Only what changes something is kept (tables, reloads), also when it was refused. Asking leaves no trace, and
//! neither does a table that says what the running one says. A process keeps its own: what was changed before
//! a handover is in the log.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::protocol::ErrorCode;

/// How many changes are kept.
pub const ENTRIES_MAX: usize = 200;
/// How many upstreams one entry names; the others are counted.
pub const UPSTREAMS_NAMED_MAX: usize = 20;

/// `audit` takes no arguments.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditQuery {}

/// The last changes, the oldest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Audit {
    pub entries: Vec<Entry>,
}

/// One change, or an attempt at one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Milliseconds since 1970.
    pub time_ms: u64,
    pub by: Actor,
    /// What was asked: `set_table` and the like.
    pub request: String,
    /// Of the table, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    /// Why it changed nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<ErrorCode>,
    #[serde(default)]
    pub changes: Changes,
}

/// Who asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Actor {
    /// A peer of the control socket, by its credentials when it connected.
    Peer { uid: u32, pid: i32 },
    /// A signal, or the process itself.
    Process,
}

/// What one table changes of another.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Changes {
    pub routes_added: usize,
    pub routes_removed: usize,
    pub routes_changed: usize,
    /// Upstreams whose state or place changed, as `id: up → draining`; at most [`UPSTREAMS_NAMED_MAX`].
    pub upstreams: Vec<String>,
    /// How many more there are.
    pub upstreams_more: usize,
    /// Parts that could not be put into effect.
    pub problems: usize,
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Actor::Peer { uid, pid } => write!(f, "uid {uid} pid {pid}"),
            Actor::Process => write!(f, "the process itself"),
        }
    }
}

/// One line for the log.
impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "audit: {}", self.request)?;
        if let Some(version) = self.version {
            write!(f, " version {version}")?;
        }
        write!(f, " by {}", self.by)?;
        if let Some(code) = self.refused {
            return write!(f, ": refused, {code:?}");
        }
        let Changes { routes_added, routes_removed, routes_changed, upstreams, upstreams_more, problems } =
            &self.changes;
        if self.version.is_some() {
            write!(f, ": routes +{routes_added} -{routes_removed} ~{routes_changed}")?;
        }
        if !upstreams.is_empty() {
            write!(f, "; {}", upstreams.join(", "))?;
        }
        if *upstreams_more > 0 {
            write!(f, " and {upstreams_more} more")?;
        }
        if *problems > 0 {
            write!(f, "; {problems} problems")?;
        }
        Ok(())
    }
}
