//! The one unsafe step of socket activation: a number from the environment becomes an owned descriptor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

static CLAIMED: AtomicBool = AtomicBool::new(false);

/// The right to take the handed-over descriptors. There is one per process, ever, and it hands out each
/// descriptor once.
pub(super) struct Claim {
    next: RawFd,
}

impl Claim {
    pub(super) fn new() -> Option<Self> {
        (!CLAIMED.swap(true, Ordering::SeqCst)).then_some(Self { next: super::FIRST })
    }

    /// Takes `fd`, which must be the next one in order, and keeps it from our own children.
    pub(super) fn adopt(&mut self, fd: RawFd) -> io::Result<OwnedFd> {
        if fd != self.next {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.next += 1;
        // SAFETY: the borrow ends before this function does, and only asks the kernel about the number; if it is
        // not open, fcntl says EBADF and nothing is adopted.
        let probe = unsafe { BorrowedFd::borrow_raw(fd) };
        fcntl(probe.as_fd(), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        // SAFETY: the protocol makes us the owner of this descriptor; it is open (just asked), and `Claim` is
        // unique in the process and never goes back, so that nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}
