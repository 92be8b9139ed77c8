//! What a launching process leaves to the monitor it starts: one sealed memfd, and where each descriptor is.
//!
//! Both ends are of one build (the executable is loaded once by the launching process), so this has no versions.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::spec::JailSpec;

/// Largest sealed document: a spec or a set of secrets.
pub(crate) const DOCUMENT_BYTES_MAX: u64 = 2 << 20;

/// The order, and the places of descriptors in the list that [`crate::sys::process::spawn`] hands over. The
/// handover itself is the first of that list.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Handover {
    pub spec: JailSpec,
    pub cgroup_root: String,
    pub control: usize,
    pub root: Option<usize>,
    pub mounts: Vec<usize>,
    pub program: Option<usize>,
    pub secrets: Option<usize>,
    pub logs: Option<usize>,
    pub stdin: Option<usize>,
    pub lease: Option<usize>,
}

/// A memfd with these bytes, that nobody can change any more.
pub(crate) fn sealed(name: &str, bytes: &[u8], flags: MemfdFlags) -> Result<OwnedFd, Error> {
    let memfd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | flags)
        .map_err(Error::path("create memfd", name))?;
    let mut file = File::from(memfd);
    file.write_all(bytes).map_err(Error::path("fill memfd", name))?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals).map_err(Error::path("seal memfd", name))?;
    Ok(file.into())
}

/// The whole content of a sealed document, whatever its file position. Refuses one that could still change.
pub(crate) fn read_sealed(memfd: OwnedFd) -> io::Result<Vec<u8>> {
    let seals = rustix::fs::fcntl_get_seals(memfd.as_fd())?;
    if !seals.contains(SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the memfd is not sealed"));
    }
    let file = File::from(memfd);
    let size = file.metadata()?.len();
    if size > DOCUMENT_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the sealed document is too large"));
    }
    let mut bytes = vec![0; size as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}
