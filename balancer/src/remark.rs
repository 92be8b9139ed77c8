//! What an operator should read without having asked: a line of the log, and its facts apart from it.

use std::fmt::Display;

use serde::{Deserialize, Serialize};

/// The longest value of a fact; what is longer is cut.
const FACT_BYTES_MAX: usize = 256;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Something is refused or given up, and stays so until somebody mends it.
    Error,
    /// Something does not work as it should; it may mend itself.
    Warning,
    /// A change of state.
    Info,
}

impl Severity {
    /// Of RFC 5424, table 2; the journal's `PRIORITY` is the same.
    pub fn number(self) -> u8 {
        match self {
            Severity::Error => 3,
            Severity::Warning => 4,
            Severity::Info => 6,
        }
    }
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remark {
    pub severity: Severity,
    pub message: String,
    /// What it is about, to search by: `route` and its id.
    pub facts: Vec<(&'static str, String)>,
}

impl Remark {
    pub fn error(message: impl Into<String>) -> Self {
        Self { severity: Severity::Error, message: message.into(), facts: Vec::new() }
    }

    pub fn warning(message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(message) }
    }

    pub fn info(message: impl Into<String>) -> Self {
        Self { severity: Severity::Info, ..Self::error(message) }
    }

    /// With a fact, named in small letters and underscores.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Display) -> Self {
        let mut value = value.to_string();
        value.truncate(value.floor_char_boundary(FACT_BYTES_MAX));
        self.facts.push((name, value));
        self
    }
}

impl From<&str> for Remark {
    fn from(message: &str) -> Self {
        Self::info(message)
    }
}

impl From<String> for Remark {
    fn from(message: String) -> Self {
        Self::info(message)
    }
}
