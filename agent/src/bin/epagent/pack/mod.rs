//! The operator's files, packed into the streams the agent takes.
//!
//! The command opens them with the operator's own rights; the agent only ever sees bytes.
//!
//! | module | |
//! |---|---|
//! | [`tree`] | a folder, looked through before anything is sent, then streamed as a tar |
//! | [`ignore`] | `.epagentignore` |
//! | [`archive`] | a tar, plain or compressed: what lies at its root |
//! | [`oci`] | an OCI layout, as the layers of one platform |
//! | [`stream`] | from a writing thread to the body of a request |

pub mod archive;
pub mod ignore;
pub mod oci;
pub mod stream;
pub mod tree;

use std::io;
use std::path::PathBuf;

use crate::failure::{Failure, status};

#[derive(Debug, thiserror::Error)]
pub enum PackError {
    #[error("{} can't be read", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is {what}, which can't be packed", path.display())]
    Kind { path: PathBuf, what: &'static str },
    #[error("{} has more than {max} entries", path.display())]
    TooMany { path: PathBuf, max: usize },
    #[error("{} became shorter while it was being read", path.display())]
    Changed { path: PathBuf },
    #[error("the pattern {pattern:?} in {} (line {line}) is not valid: {reason}", path.display())]
    Pattern { path: PathBuf, line: usize, pattern: String, reason: &'static str },
    #[error("{} is not a whole archive", path.display())]
    Archive { path: PathBuf, source: io::Error },
    #[error("{} is not a usable OCI layout: {why}", path.display())]
    Layout { path: PathBuf, why: String },
    #[error("the stream can't be written")]
    Write { source: io::Error },
}

impl From<PackError> for Failure {
    fn from(error: PackError) -> Failure {
        let message = match std::error::Error::source(&error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        };
        let hint = match &error {
            PackError::Kind { .. } | PackError::TooMany { .. } => {
                "nothing was changed; leave it out by naming it in .epagentignore"
            }
            PackError::Archive { .. } => "an archive is a tar, plain or packed with gzip or zstd",
            PackError::Write { .. } => "",
            _ => "nothing was changed",
        };
        Failure::new(status::FAILED, "pack_failed", message, hint)
    }
}
