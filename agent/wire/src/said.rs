//! What a daemon said: its last log records, for who sends them on.
//!
//! Asked of the runner by [`crate::runner::Request::Said`], with the number of the last record that was seen. The
//! answer says how many are gone, so that nothing is lost without a word.

use serde::{Deserialize, Serialize};

/// The most that the records of one answer take together, as [`Record::bytes`] counts: with JSON's escapes they
/// still fit a packet.
pub const SAID_BYTES_MAX: usize = 48 << 10;

/// As syslog numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    Error,
    Warning,
    Info,
    Debug,
}

impl Severity {
    /// Of RFC 5424, table 2; the journal's `PRIORITY` is the same.
    pub fn number(self) -> u8 {
        match self {
            Severity::Error => 3,
            Severity::Warning => 4,
            Severity::Info => 6,
            Severity::Debug => 7,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Microseconds since 1970.
    pub at_us: u64,
    pub severity: Severity,
    pub message: String,
    /// `app`, `deploy`, `instance` and whatever else was said with it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fields: Vec<(String, String)>,
}

impl Record {
    /// What it takes, with what goes around it.
    pub fn bytes(&self) -> usize {
        let fields: usize = self.fields.iter().map(|(name, value)| name.len() + value.len() + 8).sum();
        64 + self.message.len() + fields
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Said {
    /// Another one after each start of the process; numbers then begin again.
    pub run: u64,
    /// The number of the last of these records.
    pub last: u64,
    /// Records between the one that was asked from and the first of these that are gone.
    pub lost: u64,
    pub records: Vec<Record>,
}
