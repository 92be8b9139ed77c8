//! Why an archive was refused; each reason with an exit code of its own, so that whoever ran the unpacker in a jail
//! knows the reason without reading text a jail printed.

use std::io;

/// The stable exit codes of `epagent-unpack`. 0 is success and 2 a wrong command line.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    #[error("{name}: the name leads out of the archive with ..")]
    ParentName { name: String },
    #[error("{name}: the name is absolute")]
    AbsoluteName { name: String },
    #[error("{name}: a symbolic link is on the way to it")]
    ThroughSymlink { name: String },
    #[error("{name}: the symbolic link leads out, to {target}")]
    SymlinkOut { name: String, target: String },
    #[error("{name}: the hard link to {target} {why}")]
    BadHardLink { name: String, target: String, why: &'static str },
    #[error("{name}: devices, pipes and sockets are not unpacked ({kind})")]
    SpecialFile { name: String, kind: &'static str },
    #[error("{name}: its size is {header} in one header and {extended} in another")]
    SizeMismatch { name: String, header: u64, extended: u64 },
    #[error("more than {max_bytes} bytes when unpacked")]
    TooManyBytes { max_bytes: u64 },
    #[error("more than {max_entries} entries")]
    TooManyEntries { max_entries: u64 },
    #[error("the archive ends early, at {at}")]
    Truncated { at: String },
    #[error("layer {layer}: its {which} is {found}, not {expected}")]
    WrongDigest { layer: u32, which: &'static str, expected: String, found: String },
    #[error("not a valid archive: {what}")]
    Malformed { what: String },
    #[error("{name}: {why}")]
    BadName { name: String, why: &'static str },
    #[error("{name}: no room left (the quota is used up)")]
    NoRoom {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("{name}: owner {id} is above 65535")]
    IdOutOfRange { name: String, id: u64 },
    #[error("not supported: {what}")]
    Unsupported { what: String },
    #[error("{op} {}", name.as_deref().unwrap_or("the stream"))]
    Io {
        op: &'static str,
        name: Option<String>,
        #[source]
        source: io::Error,
    },
}

impl UnpackError {
    pub(super) fn io(op: &'static str, name: impl ToString, source: impl Into<io::Error>) -> Self {
        let (name, source) = (name.to_string(), source.into());
        match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => UnpackError::NoRoom { name, source },
            Some(libc::ENAMETOOLONG) => UnpackError::BadName { name, why: "the name is too long" },
            _ => UnpackError::Io { op, name: Some(name), source },
        }
    }

    pub fn exit_code(&self) -> u8 {
        match self {
            UnpackError::ParentName { .. } => 10,
            UnpackError::AbsoluteName { .. } => 11,
            UnpackError::ThroughSymlink { .. } => 12,
            UnpackError::SymlinkOut { .. } => 13,
            UnpackError::BadHardLink { .. } => 14,
            UnpackError::SpecialFile { .. } => 15,
            UnpackError::SizeMismatch { .. } => 16,
            UnpackError::TooManyBytes { .. } => 17,
            UnpackError::TooManyEntries { .. } => 18,
            UnpackError::Truncated { .. } => 19,
            UnpackError::WrongDigest { .. } => 20,
            UnpackError::Malformed { .. } => 21,
            UnpackError::BadName { .. } => 22,
            UnpackError::NoRoom { .. } => 23,
            UnpackError::IdOutOfRange { .. } => 24,
            UnpackError::Unsupported { .. } => 25,
            UnpackError::Io { .. } => 30,
        }
    }
}
