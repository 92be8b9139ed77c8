//! mount_setattr(2), which rustix lacks.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::checked;

pub(crate) use libc::{MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY};

/// Sets flags on the mount that `mount` refers to (and, if `recursive`, on those below), and maps its ids by the
/// user namespace `idmap`.
///
/// It becomes private too. A clone of a mount stays a peer of the original, which under systemd is shared: nothing
/// may spread between an instance and the host, and pivot_root(2) refuses a new root that is shared.
pub(crate) fn set_attributes(
    mount: BorrowedFd<'_>,
    recursive: bool,
    set: u64,
    idmap: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    let attributes = libc::mount_attr {
        attr_set: set | idmap.map_or(0, |_| libc::MOUNT_ATTR_IDMAP),
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: idmap.map_or(0, |fd| fd.as_raw_fd() as u64),
    };
    // SAFETY: the path is a static empty C string, `attributes` lives through the call and its true size is passed;
    // the kernel only reads both.
    checked(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    })
    .map(drop)
}
