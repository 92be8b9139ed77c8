//! What of /proc an instance does not see or cannot write.
//!
//! Everything is reached from the descriptor of our own new procfs, never by the path `/proc`.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::devices::HostDevices;
use super::{attach, bind, tmpfs};
use crate::sys;

/// Sysctls of the new network namespace. Nobody routes to it, so it believes no router.
const NETWORK: [(&str, &str); 12] = [
    ("ipv6/conf/all/accept_ra", "0"),
    ("ipv6/conf/default/accept_ra", "0"),
    ("ipv6/conf/eth0/accept_ra", "0"),
    ("ipv6/conf/eth0/autoconf", "0"),
    ("ipv6/conf/eth0/accept_dad", "0"),
    ("ipv6/conf/eth0/addr_gen_mode", "1"),
    ("ipv6/conf/all/accept_redirects", "0"),
    ("ipv6/conf/eth0/accept_redirects", "0"),
    ("ipv4/conf/all/accept_redirects", "0"),
    ("ipv4/conf/eth0/accept_redirects", "0"),
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/eth0/send_redirects", "0"),
];

/// Sets them. A file may be missing: a kernel without IPv6, an instance without a link.
pub(super) fn set_network_sysctls(proc: BorrowedFd<'_>) -> io::Result<()> {
    for (name, value) in NETWORK {
        match open(proc, &format!("sys/net/{name}"), OFlags::WRONLY) {
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(io::Error::other(format!("{name}: {errno}"))),
            Ok(file) => File::from(file).write_all(value.as_bytes())?,
        }
    }
    Ok(())
}

/// Covers a file with the null device. A kernel may lack the file.
pub(super) fn mask_file(proc: BorrowedFd<'_>, name: &str, devices: &HostDevices) -> io::Result<()> {
    let Some(target) = find(proc, name)? else { return Ok(()) };
    attach(&devices.clone_of("null")?, target.as_fd())
}

/// Covers a directory with an empty, read-only tmpfs.
pub(super) fn mask_dir(proc: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let Some(target) = find(proc, name)? else { return Ok(()) };
    let empty = tmpfs(4096, 0o555, true)?;
    sys::mount::set_attributes(empty.as_fd(), false, sys::mount::MOUNT_ATTR_RDONLY, None)?;
    attach(&empty, target.as_fd())
}

/// Covers a directory with a read-only view of itself.
pub(super) fn make_read_only(proc: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let Some(target) = find(proc, name)? else { return Ok(()) };
    let view = bind(target.as_fd())?;
    let flags = sys::mount::MOUNT_ATTR_RDONLY
        | sys::mount::MOUNT_ATTR_NOSUID
        | sys::mount::MOUNT_ATTR_NODEV
        | sys::mount::MOUNT_ATTR_NOEXEC;
    sys::mount::set_attributes(view.as_fd(), false, flags, None)?;
    attach(&view, target.as_fd())
}

fn find(proc: BorrowedFd<'_>, name: &str) -> io::Result<Option<OwnedFd>> {
    match open(proc, name, OFlags::PATH | OFlags::NOFOLLOW) {
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno.into()),
        Ok(found) => Ok(Some(found)),
    }
}

/// Inside this procfs and nowhere else. `sys/net` is reached without crossing: it is a directory of procfs.
fn open(proc: BorrowedFd<'_>, name: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    rustix::fs::openat2(proc, name, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
}
