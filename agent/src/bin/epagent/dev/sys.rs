//! The unsafe door of `epagent dev`: fork, and putting descriptors at the numbers the protocol wants.
//!
//! `epagent dev` is single-threaded by design, so that a forked child may go on running ordinary Rust: no other
//! thread can have held a lock at the moment of the fork.

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::{ForkResult, Pid, dup2_raw, fork, pipe2};
use rustix::process::{PidfdFlags, pidfd_open};

/// A child, as its parent holds it.
#[derive(Debug)]
pub struct Child {
    pub pid: Pid,
    pub pidfd: OwnedFd,
}

/// What a child could not do, as it tells its parent.
#[derive(Debug)]
pub struct StepError {
    pub step: String,
    pub source: io::Error,
}

impl StepError {
    pub fn new(step: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self { step: step.into(), source: source.into() }
    }
}

/// The first descriptor of the socket-activation protocol (SD_LISTEN_FDS_START).
const FIRST: RawFd = 3;
/// The most descriptors that are placed.
const DESCRIPTORS_MAX: RawFd = 256;
/// The longest message of a failing child, in bytes; a pipe takes that much at once.
const MESSAGE_BYTES_MAX: usize = 1024;

/// Forks, and runs `become_program` in the child, which must end in an exec. Returns when it has: then everything
/// went well, or the child has told at which step it failed and is gone.
pub fn spawn(become_program: impl FnOnce() -> Result<Infallible, StepError>) -> Result<Child, StepError> {
    let (told, low) = pipe2(OFlag::O_CLOEXEC).map_err(|errno| StepError::new("pipe", errno))?;
    // Out of the way of `place_descriptors`. One write end only, or the parent would wait for itself.
    let tells = lift(low.as_fd(), FIRST + DESCRIPTORS_MAX)?;
    drop(low);
    debug_assert!(is_single_threaded(), "fork from a process with threads");
    // SAFETY: this process has one thread (asserted above, and main starts no runtime for this verb), so the child
    // has a consistent copy of every lock and allocator and may run any code.
    match unsafe { fork() }.map_err(|errno| StepError::new("fork", errno))? {
        ForkResult::Child => {
            drop(told);
            let Err(failed) = become_program();
            let code = failed.source.raw_os_error().unwrap_or(0);
            let step: String = failed.step.chars().take(MESSAGE_BYTES_MAX / 8).collect();
            let mut message = code.to_ne_bytes().to_vec();
            message.extend_from_slice(step.as_bytes());
            let _ = File::from(tells).write_all(&message);
            // SAFETY: _exit(2) ends the child without running the parent's destructors or exit handlers.
            unsafe { libc::_exit(126) }
        }
        ForkResult::Parent { child } => {
            drop(tells);
            let mut message = Vec::new();
            // The pipe closes at the exec, or when the child is gone.
            let read = File::from(told).take(MESSAGE_BYTES_MAX as u64).read_to_end(&mut message);
            match (read, message.split_at_checked(4)) {
                (Ok(0), _) => {}
                (Ok(_), Some((code, step))) => {
                    let _ = nix::sys::wait::waitpid(child, None);
                    let code = i32::from_ne_bytes(code.try_into().unwrap_or_default());
                    let step = String::from_utf8_lossy(step).into_owned();
                    return Err(StepError { step, source: io::Error::from_raw_os_error(code) });
                }
                (Ok(_), None) => return Err(StepError::new("start", Errno::EIO)),
                (Err(error), _) => return Err(StepError::new("start", error)),
            }
            // Our own child, not waited for yet: the number is still its.
            let pid = rustix::process::Pid::from_raw(child.as_raw())
                .ok_or_else(|| StepError::new("pid", Errno::ESRCH))?;
            let pidfd =
                pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| StepError::new("pidfd_open", errno))?;
            Ok(Child { pid: child, pidfd })
        }
    }
}

/// In a child about to exec: default handling of SIGPIPE (Rust ignores it) and no blocked signal.
pub fn reset_signals() -> Result<(), StepError> {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: no handler is installed, only the default one.
    unsafe { sigaction(Signal::SIGPIPE, &default) }.map_err(|errno| StepError::new("sigaction", errno))?;
    SigSet::empty().thread_set_mask().map_err(|errno| StepError::new("sigmask", errno))
}

/// In a child about to exec: copies of `descriptors` at 3, 4, 5… that stay open over the exec. Returns `exec` as a
/// copy out of their way, which closes at the exec.
pub fn place_descriptors(exec: BorrowedFd<'_>, descriptors: &[BorrowedFd<'_>]) -> Result<OwnedFd, StepError> {
    debug_assert!(descriptors.len() <= DESCRIPTORS_MAX as usize);
    // What our own caller left open is nothing to hand on. Ours close at an exec by themselves.
    // SAFETY: only flags are changed, and no descriptor is closed now.
    let closed = unsafe {
        let flags = libc::CLOSE_RANGE_CLOEXEC as libc::c_uint;
        libc::syscall(libc::SYS_close_range, FIRST as libc::c_uint, libc::c_uint::MAX, flags)
    };
    Errno::result(closed).map_err(|errno| StepError::new("close_range", errno))?;
    // First all of them above the numbers wanted, so that placing one never covers another.
    let above = FIRST + descriptors.len() as RawFd;
    let exec = lift(exec, above)?;
    let lifted = descriptors.iter().map(|fd| lift(*fd, above)).collect::<Result<Vec<_>, _>>()?;
    for (target, fd) in (FIRST..).zip(&lifted) {
        // SAFETY: whatever had the number `target` belonged to the parent; this is its forked copy, which execs or
        // exits without using that descriptor again. The new owner is forgotten, so that it stays open.
        let placed =
            unsafe { dup2_raw(fd.as_fd(), target) }.map_err(|errno| StepError::new("dup2", errno))?;
        std::mem::forget(placed);
    }
    Ok(exec)
}

fn lift(fd: BorrowedFd<'_>, at_least: RawFd) -> Result<OwnedFd, StepError> {
    let copy =
        fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(at_least)).map_err(|errno| StepError::new("dup", errno))?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

fn is_single_threaded() -> bool {
    std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1)
}
