//! Failures of the library: which operation, on what, and the kernel's answer as source.

use std::io;
use std::path::PathBuf;

use crate::id::IdError;
use crate::spec::SpecError;

/// Why something on this host could not be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("jail spec refused")]
    Spec(#[from] SpecError),
    #[error("name refused")]
    Id(#[from] IdError),
    /// A system call that is about no path.
    #[error("{operation}")]
    Call {
        operation: &'static str,
        #[source]
        source: io::Error,
    },
    /// A system call about a path or a named object.
    #[error("{operation} {path}")]
    Path {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Something other than a system call said no.
    #[error("{operation}: {reason}")]
    Refused { operation: &'static str, reason: String },
}

impl Error {
    /// An [`Error::Path`] maker for `map_err`.
    pub fn path<E: Into<io::Error>>(
        operation: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(E) -> Error {
        let path = path.into();
        move |source| Error::Path { operation, path, source: source.into() }
    }

    /// An [`Error::Call`] maker for `map_err`.
    pub fn call<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> Error {
        move |source| Error::Call { operation, source: source.into() }
    }

    /// The whole chain in one line, for records and logs.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        text
    }
}
