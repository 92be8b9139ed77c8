//! The host's device nodes that an instance gets.
//!
//! They are bound, not made: a user namespace cannot make nodes, and a tmpfs it mounts would not honour them. Each
//! is opened once and verified by its device number, so that what masks /proc files is the null device and not what
//! somebody put in its place (CVE-2025-31133).

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};

use super::bind;
use crate::sys;

/// Name, major, minor: Documentation/admin-guide/devices.txt of the kernel.
const NODES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

#[derive(Debug)]
pub(super) struct HostDevices(Vec<(&'static str, OwnedFd)>);

impl HostDevices {
    pub(super) fn open() -> io::Result<HostDevices> {
        NODES.iter().map(|node| open_verified(*node)).collect::<io::Result<_>>().map(HostDevices)
    }

    /// A detached mount of one node.
    pub(super) fn clone_of(&self, name: &str) -> io::Result<OwnedFd> {
        let node = self.0.iter().find(|(known, _)| *known == name);
        let (_, node) = node.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let mount = bind(node.as_fd())?;
        let flags = sys::mount::MOUNT_ATTR_NOSUID | sys::mount::MOUNT_ATTR_NOEXEC;
        sys::mount::set_attributes(mount.as_fd(), false, flags, None)?;
        Ok(mount)
    }
}

fn open_verified((name, major, minor): (&'static str, u32, u32)) -> io::Result<(&'static str, OwnedFd)> {
    let path = format!("/dev/{name}");
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let node = rustix::fs::openat2(rustix::fs::CWD, &path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)
        .map_err(|errno| io::Error::other(format!("open the host's {path}: {errno}")))?;
    let stat = rustix::fs::fstat(&node)?;
    let right = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)) == (major, minor);
    if !right {
        return Err(io::Error::other(format!(
            "the host's {path} is not the character device {major}:{minor}"
        )));
    }
    Ok((name, node))
}
