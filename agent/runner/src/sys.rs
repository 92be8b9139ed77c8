//! The one door to what the compiler can't check: forking without exec, and descriptors known by number alone.
//!
//! The runner has one thread and never starts another, which is what makes a fork without exec sound: no lock
//! can be held by a thread that does not exist in the child.

#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::sys::signal::Signal;
use nix::unistd::{ForkResult, Pid, fork, getppid};

/// Where the descriptors of socket activation begin, sd_listen_fds(3).
pub const LISTEN_FDS_START: RawFd = 3;

/// Runs `child` in a forked process, which ends with the status it returns. It dies with the runner.
pub fn fork_child(child: impl FnOnce() -> i32) -> nix::Result<Pid> {
    let parent = nix::unistd::getpid();
    // SAFETY: the runner is single-threaded (see the module's header), so the child may use everything the parent
    // could have used: no lock is held and no allocation half done.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let tied = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).is_ok();
            // The parent may have died before the line above; its signal would then never come.
            let status = if tied && getppid() == parent { child() } else { 1 };
            // Ends here, so that nothing of the loop is run or dropped twice.
            std::process::exit(status)
        }
    }
}

/// The numbers of all descriptors this process has.
pub fn open_fds() -> BTreeSet<RawFd> {
    let entries = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let mut numbers: BTreeSet<RawFd> =
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    // The folder itself was among them and is closed by now.
    numbers.retain(|number| std::fs::read_link(format!("/proc/self/fd/{number}")).is_ok());
    numbers
}

/// The descriptor of that number, which nobody else in this process may own.
pub fn inherited_fd(number: RawFd) -> nix::Result<OwnedFd> {
    // Fails with EBADF when there is none, and makes it close-on-exec, as it would have been from birth.
    nix::fcntl::fcntl(
        // SAFETY: the borrow ends with this call, and the number is only looked up.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(number) },
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
    )?;
    // SAFETY: it is open, and by the protocol of socket activation it is ours; it is called once per number, at
    // the start, before anything else in the process opens descriptors.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Has the kernel refuse every descriptor that the socket's peer sends along with bytes: closing one of them may take as
/// long as its sender has set. SO_PASSRIGHTS, Linux 6.16; ENOPROTOOPT before.
pub fn refuse_rights(socket: &impl std::os::fd::AsRawFd) -> nix::Result<()> {
    /// From include/uapi/asm-generic/socket.h; no crate here knows it yet.
    const SO_PASSRIGHTS: nix::libc::c_int = 83;
    let off: nix::libc::c_int = 0;
    let length = size_of_val(&off) as nix::libc::socklen_t;
    // SAFETY: the value is an int, as the option wants it, and outlives the call, which takes a copy.
    let done = unsafe {
        nix::libc::setsockopt(
            socket.as_raw_fd(),
            nix::libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            (&raw const off).cast(),
            length,
        )
    };
    nix::errno::Errno::result(done).map(drop)
}

/// Takes the ownership of a descriptor that a system call has just returned as a number.
pub fn own(fresh: RawFd) -> OwnedFd {
    // SAFETY: callers pass what accept4 returned a moment ago; nothing else knows the number.
    unsafe { OwnedFd::from_raw_fd(fresh) }
}
