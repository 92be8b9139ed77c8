//! What can go wrong, each naming the operation that failed and what it was done to.

use std::io;
use std::path::PathBuf;

use crate::name::NameError;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed storage operation. [`Error::code`] is stable; the message is for people and does not repeat the source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Name(#[from] NameError),

    #[error("{} is not on btrfs (file system type {magic:#x}); give a path on btrfs, or a loop file to create", path.display())]
    NotBtrfs { path: PathBuf, magic: u64 },
    #[error("{} does not exist or is not a directory", path.display())]
    NoSuchPool {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the pool {} is used by another agent; stop it, or give this one a pool of its own", path.display())]
    PoolLocked { path: PathBuf },
    #[error("{} is mounted with something else than the pool file {}", mount_point.display(), file.display())]
    MountPointTaken { mount_point: PathBuf, file: PathBuf },
    #[error("pool file {}: no room to allocate {size_bytes} bytes; free space there, or make the pool smaller", file.display())]
    NoRoomForPool {
        file: PathBuf,
        size_bytes: u64,
        #[source]
        source: io::Error,
    },
    #[error(
        "a pool of {size_bytes} bytes with {reserve_bytes} reserved leaves too little; at least {least_bytes} are needed"
    )]
    PoolTooSmall { size_bytes: u64, reserve_bytes: u64, least_bytes: u64 },
    #[error("mkfs.btrfs on {}: {detail}", file.display())]
    Mkfs { file: PathBuf, detail: String },
    #[error("the pool at {} is still in use and could not be unmounted", mount_point.display())]
    PoolBusy {
        mount_point: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("quotas are off on the file system of {}: {advice}", path.display())]
    QuotaOff { path: PathBuf, advice: &'static str },
    #[error("this pool's format is version {found}; this agent knows up to {known}")]
    PoolFormat { found: u32, known: u32 },

    #[error("no {what}")]
    NotFound { what: String },
    #[error("{what} exists already and is not the same: {detail}")]
    Conflict { what: String, detail: String },
    #[error("{what} is being changed by another operation; try again")]
    Busy { what: String },
    #[error("image {image} is in use by a release; destroy the release first")]
    ImageInUse { image: String },
    #[error("{op} {what}: the pool is full")]
    PoolFull {
        op: &'static str,
        what: String,
        #[source]
        source: io::Error,
    },
    #[error("{op} {what}: the quota is used up")]
    QuotaFull {
        op: &'static str,
        what: String,
        #[source]
        source: io::Error,
    },
    #[error("{op} {what}: more than {bound} nested subvolumes")]
    TooManyNested { op: &'static str, what: String, bound: usize },

    #[error("{op} {what}")]
    Io {
        op: &'static str,
        what: String,
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// A failed system call on `what`; a full pool and a full quota become variants of their own.
    pub(crate) fn io(op: &'static str, what: impl ToString, source: impl Into<io::Error>) -> Self {
        let (what, source) = (what.to_string(), source.into());
        match source.raw_os_error() {
            Some(libc::ENOSPC) => Error::PoolFull { op, what, source },
            Some(libc::EDQUOT) => Error::QuotaFull { op, what, source },
            _ => Error::Io { op, what, source },
        }
    }

    /// A short stable code for each kind of failure.
    pub fn code(&self) -> &'static str {
        match self {
            Error::Name(_) => "storage-bad-name",
            Error::NotBtrfs { .. } => "storage-not-btrfs",
            Error::NoSuchPool { .. } => "storage-no-such-pool",
            Error::PoolLocked { .. } => "storage-pool-locked",
            Error::MountPointTaken { .. } => "storage-mount-point-taken",
            Error::NoRoomForPool { .. } => "storage-no-room-for-pool",
            Error::PoolTooSmall { .. } => "storage-pool-too-small",
            Error::Mkfs { .. } => "storage-mkfs",
            Error::PoolBusy { .. } => "storage-pool-busy",
            Error::QuotaOff { .. } => "storage-quota-off",
            Error::PoolFormat { .. } => "storage-pool-format",
            Error::NotFound { .. } => "storage-not-found",
            Error::Conflict { .. } => "storage-conflict",
            Error::Busy { .. } => "storage-busy",
            Error::ImageInUse { .. } => "storage-image-in-use",
            Error::PoolFull { .. } => "storage-pool-full",
            Error::QuotaFull { .. } => "storage-quota-full",
            Error::TooManyNested { .. } => "storage-too-many-nested",
            Error::Io { .. } => "storage-io",
        }
    }
}
