//! Making processes, and what a process does to itself before it executes another program.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use super::checked;

/// clone3 flags that may be given to [`fork`].
pub(crate) const NEW_USER: u64 = libc::CLONE_NEWUSER as u64;
pub(crate) const NEW_MOUNT: u64 = libc::CLONE_NEWNS as u64;
pub(crate) const NEW_PID: u64 = libc::CLONE_NEWPID as u64;
pub(crate) const NEW_IPC: u64 = libc::CLONE_NEWIPC as u64;
pub(crate) const NEW_UTS: u64 = libc::CLONE_NEWUTS as u64;
pub(crate) const NEW_NET: u64 = libc::CLONE_NEWNET as u64;

/// linux/sched.h; libc's constant is cut to 32 bits, that is to 0.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Proof that this process has one thread. Only `epagent-jail`'s main can make it; nothing there starts a thread.
#[derive(Debug)]
pub(crate) struct SingleThreaded(());

impl SingleThreaded {
    /// Counts the threads of this process.
    pub(crate) fn check() -> io::Result<SingleThreaded> {
        let threads = std::fs::read_dir("/proc/self/task")?.count();
        if threads != 1 {
            return Err(io::Error::other(format!("{threads} threads where one was expected")));
        }
        Ok(SingleThreaded(()))
    }
}

/// Which side of a [`fork`] this is.
#[derive(Debug)]
pub(crate) enum Fork {
    Child,
    Parent { pid: i32, pidfd: OwnedFd },
}

/// clone3 without CLONE_VM: a copy of this process in new namespaces and, if given, in another cgroup (a descriptor
/// of its v2 directory).
pub(crate) fn fork(_: &SingleThreaded, flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Fork> {
    // SAFETY: the process has one thread (the token), so the child's copy of memory is consistent and no lock in it
    // is held by a thread that does not exist there.
    unsafe { clone(flags, cgroup) }
}

/// SAFETY: in a process with several threads the child may only make async-signal-safe calls.
unsafe fn clone(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Fork> {
    let mut pidfd: RawFd = -1;
    // SAFETY: all-zero is a valid clone_args: every field is an integer that is "absent" when 0.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags | libc::CLONE_PIDFD as u64;
    args.pidfd = &raw mut pidfd as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: `args` and the `pidfd` it points to outlive the call, the true size is passed, and without CLONE_VM
    // the child runs on its own copy of the stack.
    let pid =
        checked(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>()) })?;
    if pid == 0 {
        return Ok(Fork::Child);
    }
    // SAFETY: clone3 succeeded with CLONE_PIDFD, so it stored a new descriptor that nobody else owns.
    Ok(Fork::Parent { pid: pid as i32, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } })
}

/// The first descriptor number a [`spawn`]ed program finds its descriptors at.
pub(crate) const FIRST_FD: RawFd = 3;

/// A program to start from a process that may have threads.
#[derive(Debug)]
pub(crate) struct Spawn<'a> {
    pub executable: BorrowedFd<'a>,
    pub argv: &'a [&'a CStr],
    /// Becomes stdin, stdout and stderr.
    pub null: BorrowedFd<'a>,
    /// Become descriptors 3, 4, …; no other is open in the program. Each must be numbered above all of those.
    pub fds: &'a [BorrowedFd<'a>],
    pub cgroup: BorrowedFd<'a>,
}

/// Starts it and returns once it runs, with its pid and pidfd; an exec that fails is an error here.
pub(crate) fn spawn(spawn: &Spawn<'_>) -> io::Result<(i32, OwnedFd)> {
    let last = FIRST_FD + spawn.fds.len() as RawFd;
    let low = spawn.fds.iter().chain([&spawn.executable, &spawn.null]).any(|fd| fd.as_raw_fd() < last);
    if low {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a descriptor in the range to be filled"));
    }
    let mut argv: Vec<*const libc::c_char> = spawn.argv.iter().map(|arg| arg.as_ptr()).collect();
    argv.push(std::ptr::null());
    let environment = [std::ptr::null::<libc::c_char>()];
    let (failed, low) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    // Out of the way of the numbers to be filled.
    let report = rustix::io::fcntl_dupfd_cloexec(&low, last)?;
    drop(low);
    // SAFETY: the child only calls `become_program`, which makes system calls on memory prepared above and ends in
    // exec or _exit.
    match unsafe { clone(0, Some(spawn.cgroup))? } {
        Fork::Child => {
            // SAFETY: `argv` and `environment` are null-terminated arrays of C strings that live on in this copy.
            let error = unsafe { become_program(spawn, argv.as_ptr(), environment.as_ptr()) };
            let errno = error.to_ne_bytes();
            // SAFETY: writes 4 bytes of a live array to an open pipe, then ends without running any exit handler.
            unsafe {
                libc::write(report.as_raw_fd(), errno.as_ptr().cast(), errno.len());
                libc::_exit(125)
            }
        }
        Fork::Parent { pid, pidfd } => {
            drop(report);
            let mut errno = [0; 4];
            match nix::unistd::read(&failed, &mut errno)? {
                4 => {
                    rustix::process::waitid(
                        rustix::process::WaitId::PidFd(std::os::fd::AsFd::as_fd(&pidfd)),
                        rustix::process::WaitIdOptions::EXITED,
                    )?;
                    Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno)))
                }
                _ => Ok((pid, pidfd)),
            }
        }
    }
}

/// Arranges the descriptors and executes; returns errno if it could not.
///
/// SAFETY: async-signal-safe. `argv` and `environment` must be null-terminated arrays of C strings.
unsafe fn become_program(
    spawn: &Spawn<'_>,
    argv: *const *const libc::c_char,
    environment: *const *const libc::c_char,
) -> i32 {
    let last = FIRST_FD + spawn.fds.len() as RawFd;
    // SAFETY: plain system calls on descriptors and on memory the caller vouches for. The report pipe and the
    // executable are close-on-exec, as everything at or above `last` is made here.
    unsafe {
        for number in 0..FIRST_FD {
            if libc::dup2(spawn.null.as_raw_fd(), number) < 0 {
                return *libc::__errno_location();
            }
        }
        for (fd, number) in spawn.fds.iter().zip(FIRST_FD..) {
            if libc::dup2(fd.as_raw_fd(), number) < 0 {
                return *libc::__errno_location();
            }
        }
        libc::syscall(libc::SYS_close_range, last, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
        libc::syscall(
            libc::SYS_execveat,
            spawn.executable.as_raw_fd(),
            c"".as_ptr(),
            argv,
            environment,
            libc::AT_EMPTY_PATH,
        );
        *libc::__errno_location()
    }
}

/// Marks every descriptor from `first` on close-on-exec.
pub(crate) fn close_on_exec_from(first: RawFd) -> io::Result<()> {
    // SAFETY: changes a flag of descriptors, no ownership.
    checked(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) })
        .map(drop)
}

/// Takes over the descriptors `FIRST_FD .. FIRST_FD + count` that [`spawn`] placed, close-on-exec from now on.
///
/// To be called once, before anything else is opened; it fails if one of them is not open.
pub(crate) fn take_inherited(_: &SingleThreaded, count: usize) -> io::Result<Vec<OwnedFd>> {
    let numbers = FIRST_FD..FIRST_FD + count as RawFd;
    for number in numbers.clone() {
        // SAFETY: fcntl on a number that may or may not be open; it answers EBADF then.
        checked(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) }.into())?;
    }
    // SAFETY: each is open (checked above) and was placed for us by the parent; nothing else in this process knows
    // it, since this runs first.
    Ok(numbers.map(|number| unsafe { OwnedFd::from_raw_fd(number) }).collect())
}

/// Ignores these signals.
pub(crate) fn ignore_signals(signals: &[i32]) {
    for &signal in signals {
        // SAFETY: installs no handler.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Gives every signal its default disposition: what a program expects to be started with.
pub(crate) fn default_signals() {
    for signal in 1..=64 {
        // SAFETY: installs no handler; SIGKILL, SIGSTOP and libc's own signals are refused harmlessly.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Ends the process without running exit handlers of the program it was copied from.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: does not return and touches no memory.
    unsafe { libc::_exit(code) }
}
