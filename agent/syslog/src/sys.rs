//! The one question that has no safe wrapper.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

nix::ioctl_read_bad!(
    /// SIOCOUTQ of tcp(7).
    siocoutq,
    nix::libc::TIOCOUTQ,
    nix::libc::c_int
);

/// How many bytes that were written to a TCP socket its peer's kernel has not acknowledged.
pub fn unacknowledged(socket: impl AsFd) -> io::Result<usize> {
    let mut bytes = 0;
    // SAFETY: the descriptor is open for the length of the call, and the kernel writes one int to a live one.
    unsafe { siocoutq(socket.as_fd().as_raw_fd(), &mut bytes) }?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}
