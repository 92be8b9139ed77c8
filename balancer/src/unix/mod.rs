//! Connecting to unix sockets: an operator's, by an absolute path, and tenants', below one folder.
//!
//! What stands below the folder is the tenants' to change at any time, so a path there is never resolved by
//! string:
//!
//! ```text
//!   folder (held open) ── openat2, no symlink on the way, never out of it, O_PATH ──▶ the inode
//!     the inode ── a socket? with one name? ──▶ connect through /proc/self/fd
//! ```
//!
//! What was looked at is what is connected to: swapping the path after that changes nothing. A hard link to
//! a socket of the host's would be the same inode, so one with a second name is refused; the kernel does not
//! let tenants make one either (`fs.protected_hardlinks`, and a mount of its own for each).
//!
//! Mounts may be crossed: a tenant cannot mount anything the host sees, and an operator may well give each
//! folder a file system of its own, for its quota.
//!
//! A connect takes no time: the listener's queue has room, or is full (EAGAIN). It is a system call in both
//! doors; in the ring, a full queue would keep a worker thread of the kernel's waiting.

pub mod rights;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, open, openat2};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::{Deserialize, Serialize};

use crate::control::protocol::Problem;
use crate::core::refusal::Refusal;
use crate::table::{Address, Route, Table, UnixPath};

/// How unix sockets are connected to. Cloned for each thread.
#[derive(Debug, Clone, Default)]
pub struct UnixSockets {
    folder: Option<Arc<OwnedFd>>,
    tenants: TenantSockets,
}

/// Whether sockets below the tenants' folder are connected to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TenantSockets {
    /// No: `--unix-root` names no folder.
    #[default]
    NoFolder,
    /// No: the kernel (before 6.16) has no SO_PASSRIGHTS, so that a tenant could stop a thread for as long
    /// as it likes.
    Unprotected,
    /// Yes.
    Open,
}

/// The folder of the tenants' cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the folder of unix sockets {}", path.display())]
pub struct FolderError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl UnixSockets {
    /// With tenants' sockets below `folder`, where there is one.
    pub fn below(folder: Option<&Path>) -> Result<Self, FolderError> {
        let Some(path) = folder else { return Ok(Self::default()) };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = open(path, flags, Mode::empty())
            .map_err(|error| FolderError { path: path.to_owned(), source: error.into() })?;
        let tenants = match stream_socket().and_then(rights::refuse) {
            Ok(()) => TenantSockets::Open,
            Err(_) => TenantSockets::Unprotected,
        };
        Ok(Self { folder: Some(Arc::new(folder)), tenants })
    }

    /// Whether tenants' sockets are connected to.
    pub fn tenants(&self) -> TenantSockets {
        self.tenants
    }

    /// The routes of a table that cannot reach a tenant's socket, and why.
    pub fn problems(&self, table: &Table) -> Vec<Problem> {
        let refusal = match self.tenants {
            TenantSockets::NoFolder => Refusal::NoFolder,
            TenantSockets::Unprotected => Refusal::Unprotected,
            TenantSockets::Open => return Vec::new(),
        };
        let problem = |route: &Route| {
            let is_tenants = |address: &Address| matches!(address, Address::Unix(path) if path.is_tenants());
            let upstream = route.upstreams().iter().find(|upstream| is_tenants(&upstream.address))?;
            let message = format!("cannot reach {} at {}: {refusal}", upstream.id, upstream.address);
            Some(Problem { route: Some(route.id.clone()), message })
        };
        table.routes.iter().filter_map(problem).collect()
    }

    /// A connected socket, which does not block. Besides the errors of connect(2) there are those of
    /// [`Refusal`].
    pub fn connect(&self, path: &UnixPath) -> rustix::io::Result<OwnedFd> {
        let socket = stream_socket()?;
        let protected = rights::refuse(&socket);
        if !path.is_tenants() {
            connect(&socket, &SocketAddrUnix::new(path.as_str())?)?;
            return Ok(socket);
        }
        let folder = self.folder.as_ref().ok_or(errno(Refusal::NoFolder))?;
        protected.map_err(|_| errno(Refusal::Unprotected))?;
        let inode = find(folder, path)?;
        connect(&socket, &SocketAddrUnix::new(format!("/proc/self/fd/{}", inode.as_raw_fd()))?)?;
        Ok(socket)
    }
}

/// The socket that a tenant's path leads to.
fn find(folder: &OwnedFd, path: &UnixPath) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let inode = openat2(folder, path.as_str(), flags, Mode::empty(), within)?;
    let found = fstat(&inode)?;
    match FileType::from_raw_mode(found.st_mode) {
        FileType::Socket if found.st_nlink > 1 => Err(errno(Refusal::SeveralNames)),
        FileType::Socket => Ok(inode),
        // One on the way is an error of the kernel's; one in the last place is found by O_PATH|O_NOFOLLOW.
        FileType::Symlink => Err(errno(Refusal::Symlink)),
        _ => Err(errno(Refusal::NoSocket)),
    }
}

fn errno(refusal: Refusal) -> Errno {
    Errno::from_raw_os_error(refusal.errno().0)
}

fn stream_socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}
