//! A forked child that does one piece of [`Work`] while the loop goes on.
//!
//! The child is tied to the runner (it dies with it) and has a deadline. Its result comes in a memfd made before the
//! fork, so that it never waits for a reader; that it has ended is seen on its pidfd. A child that is past its deadline
//! is killed, and counts as at work until the kernel has let go of it: one stuck on a disk can't be killed, and
//! nobody else may touch its objects meanwhile.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use epagent_wire::runner::{Refusal, RefusalCode};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, pidfd_open};

use crate::sys::{fork_child, open_fds};
use crate::work::{Outcome, Site, Work, perform};

/// How many children work at once.
pub const WORKERS_MAX: usize = 8;
/// How long one may take, below the two minutes for which the agent waits. Removing a large tree is the longest: btrfs hands most of it to its own cleaner.
const DEADLINE: Duration = Duration::from_secs(100);
/// A result is a few figures per object; the tables bound the objects.
const RESULT_BYTES_MAX: u64 = 4 << 20;

/// A child at work.
#[derive(Debug)]
pub struct Worker {
    pid: Pid,
    pidfd: OwnedFd,
    result: File,
    deadline: Instant,
    killed: bool,
}

impl Worker {
    /// `keep` is what the child needs open. Everything else is closed in it: the other end of a connection or of an
    /// upload has to see when the loop lets go of its end.
    pub fn start(work: &Work, site: &Site<'_>, keep: &BTreeSet<RawFd>, now: Instant) -> io::Result<Worker> {
        let result = File::from(memfd_create("result", MFdFlags::MFD_CLOEXEC)?);
        let pid = fork_child(|| {
            for fd in open_fds().into_iter().filter(|fd| !keep.contains(fd) && *fd != result.as_raw_fd()) {
                let _ = nix::unistd::close(fd);
            }
            let outcome = perform(work, site).map_err(|error| error.refusal());
            let text = serde_json::to_vec(&outcome).unwrap_or_default();
            i32::from((&result).write_all(&text).is_err())
        })?;
        // Not reaped yet, so the number can't be another process's.
        let pidfd = rustix::process::Pid::from_raw(pid.as_raw())
            .ok_or(rustix::io::Errno::SRCH)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()));
        match pidfd {
            Ok(pidfd) => Ok(Worker { pid, pidfd, result, deadline: now + DEADLINE, killed: false }),
            Err(error) => {
                let _ = kill(pid, Signal::SIGKILL);
                let _ = waitpid(pid, None);
                Err(error.into())
            }
        }
    }

    pub fn deadline(&self) -> Option<Instant> {
        (!self.killed).then_some(self.deadline)
    }

    /// Kills it when it is past its deadline.
    pub fn check_deadline(&mut self, now: Instant) {
        if !self.killed && now >= self.deadline {
            self.killed = true;
            let _ = kill(self.pid, Signal::SIGKILL);
        }
    }

    /// Its result, once its descriptor is readable.
    pub fn finish(mut self, what: &str) -> Result<Outcome, Refusal> {
        let failed = |why: String| Refusal { code: RefusalCode::System, message: format!("{what}: {why}") };
        let status = waitpid(self.pid, None);
        if self.killed {
            let seconds = DEADLINE.as_secs();
            return Err(failed(format!("not done within {seconds} s and given up; is the disk stuck?")));
        }
        match status {
            Ok(WaitStatus::Exited(_, 0)) => {}
            status => return Err(failed(format!("the child that did it ended with {status:?}"))),
        }
        let mut text = Vec::new();
        let read =
            self.result.rewind().and_then(|()| self.result.take(RESULT_BYTES_MAX).read_to_end(&mut text));
        read.map_err(|error| failed(error.to_string()))?;
        serde_json::from_slice(&text)
            .unwrap_or_else(|error| Err(failed(format!("its result can't be read: {error}"))))
    }
}

impl AsFd for Worker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}
