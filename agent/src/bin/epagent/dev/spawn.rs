//! Starting a program: what happens between fork and exec.
//!
//! ```text
//!  fork ─▶ own session ─▶ [view of DIR] ─▶ [user, no new privileges] ─▶ die with the parent ─▶ sockets ─▶ exec
//! ```
//!
//! The steps in brackets are for the unprivileged parts. The order matters: mounting needs root; the parent-death
//! signal is cleared by a change of user, so it comes after that; and the parent may have died before it was set,
//! so it is looked for afterwards.

use std::convert::Infallible;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sys::prctl::{set_no_new_privs, set_pdeathsig};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{
    Gid, Pid, Uid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, fexecve, getpid, getppid, setgroups,
    setresgid, setresuid, setsid,
};

use super::part::Program;
use super::sys::{self, Child, StepError};
use super::view;

/// Starts `program` with its output going to `log`.
pub fn spawn(program: &Program<'_>, state: &Path, log: &File) -> Result<Child, StepError> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(OFlag::O_CLOEXEC.bits())
        .open(&program.file)
        .map_err(|error| StepError::new(format!("open {}", program.file.display()), error))?;
    let null = File::open("/dev/null").map_err(|error| StepError::new("open /dev/null", error))?;
    let parent = getpid();
    sys::spawn(|| become_program(program, state, parent, file.as_fd(), null.as_fd(), log.as_fd()))
}

fn become_program(
    program: &Program<'_>,
    state: &Path,
    parent: Pid,
    file: BorrowedFd<'_>,
    null: BorrowedFd<'_>,
    log: BorrowedFd<'_>,
) -> Result<Infallible, StepError> {
    // A Ctrl-C in the terminal is the supervisor's to handle, so its children are no part of that process group.
    step("setsid", setsid())?;
    step("chdir /", chdir("/"))?;
    step("stdin", dup2_stdin(null))?;
    step("stdout", dup2_stdout(log))?;
    step("stderr", dup2_stderr(log))?;
    raise_descriptor_limit()?;
    if let Some(user) = program.user {
        view::enter(state)?;
        become_user(user)?;
    }
    step("die with the parent", set_pdeathsig(Signal::SIGKILL))?;
    if getppid() != parent {
        return Err(StepError::new("look for the parent", io::Error::from(io::ErrorKind::NotFound)));
    }
    let environment = program.environment(std::process::id(), |name| std::env::var(name).ok());
    let sockets: Vec<BorrowedFd<'_>> = program.sockets.iter().map(|(_, fd)| *fd).collect();
    let file = sys::place_descriptors(file, &sockets)?;
    sys::reset_signals()?;
    step("exec", fexecve(file.as_fd(), &program.argv(), &environment))
}

/// The user, the group of the same number, and nothing else: the capabilities go with uid 0.
fn become_user(user: u32) -> Result<(), StepError> {
    let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
    step("setgroups", setgroups(&[]))?;
    step("setresgid", setresgid(gid, gid, gid))?;
    step("setresuid", setresuid(uid, uid, uid))?;
    step("no new privileges", set_no_new_privs())?;
    umask(Mode::from_bits_truncate(0o077));
    Ok(())
}

/// A balancer needs two descriptors per connection; the usual soft limit is 1024.
fn raise_descriptor_limit() -> Result<(), StepError> {
    let (_, hard) = step("getrlimit", getrlimit(Resource::RLIMIT_NOFILE))?;
    step("setrlimit", setrlimit(Resource::RLIMIT_NOFILE, hard, hard))
}

fn step<T>(name: &str, result: nix::Result<T>) -> Result<T, StepError> {
    result.map_err(|errno| StepError::new(name, errno))
}
