//! SO_PASSRIGHTS (Linux 6.16): whether a unix socket's peer may send it descriptors.
//!
//! Off, a peer's sendmsg with SCM_RIGHTS fails with EPERM. On, which is the default, the descriptors travel
//! with the bytes, and whoever receives the bytes without asking for them closes them, in his own time: for
//! a TCP socket with SO_LINGER and unsent data that is as long as the peer has set, in the middle of a
//! plain receive. [tried: 8 s]
//!
//! No crate here knows the option yet; hence the one unsafe call.

#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

/// From include/uapi/asm-generic/socket.h.
const SO_PASSRIGHTS: libc::c_int = 83;

/// Has every descriptor refused that the socket's peer sends. ENOPROTOOPT before Linux 6.16.
pub fn refuse(socket: impl AsFd) -> rustix::io::Result<()> {
    let off: libc::c_int = 0;
    let len = size_of_val(&off) as libc::socklen_t;
    // SAFETY: the value is an int, as the option wants it, which outlives the call; the descriptor is open.
    let done = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            (&raw const off).cast(),
            len,
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::NOPROTOOPT)),
    }
}
