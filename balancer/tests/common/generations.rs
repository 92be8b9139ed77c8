//! A balancer that hands over: who is in charge is known by its control socket, and who has ended by being
//! the one that adopts them, as a supervisor does.

use std::ops::Deref;
use std::path::PathBuf;
use std::time::Duration;

use epagent_balancer::control::client::{Client as Control, ClientError};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::{Balancer, until};

/// A balancer and its successors. Every one of them is killed when this is dropped.
pub struct Generations {
    first: Balancer,
}

impl Generations {
    pub fn start(arguments: &[&str]) -> Self {
        Self::of(|| Balancer::start(arguments))
    }

    /// From a copy of the program (see [`Balancer::start_copy`]).
    pub fn start_copy(arguments: &[&str]) -> Self {
        Self::of(|| Balancer::start_copy(arguments, |_| {}))
    }

    /// As one that was started otherwise.
    pub fn of(start: impl FnOnce() -> Balancer) -> Self {
        adopt();
        Self { first: start() }
    }

    /// The program that is executed at a reload.
    pub fn program(&self) -> PathBuf {
        self.dir.path().join("balancer")
    }

    /// Who is in charge.
    pub fn pid(&self) -> u32 {
        self.status().pid
    }

    /// Has it hand over; the pid of the new one.
    pub fn reload(&self) -> Result<u32, ClientError> {
        let mut control = Control::connect(&self.control_path(), Duration::from_secs(20))?;
        control.reload().map(|reloaded| reloaded.pid)
    }
}

impl Deref for Generations {
    type Target = Balancer;

    fn deref(&self) -> &Balancer {
        &self.first
    }
}

impl Drop for Generations {
    fn drop(&mut self) {
        for pid in living() {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
            until("it is dead", || !lives(pid));
        }
    }
}

/// From now on orphans of this process's children are its own.
fn adopt() {
    nix::sys::prctl::set_child_subreaper(true).expect("orphans can be adopted");
}

/// Whether a child or adopted orphan of this process has not ended. One that has is buried.
pub fn lives(pid: u32) -> bool {
    matches!(waitpid(Pid::from_raw(pid as i32), Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive))
}

/// Every child of this process that has not ended, adopted ones included.
pub fn living() -> Vec<u32> {
    let tasks = std::fs::read_dir("/proc/self/task").expect("our threads").flatten();
    let texts = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let text = texts.collect::<Vec<_>>().concat();
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).filter(|pid| lives(*pid)).collect()
}

/// Open descriptors of a process.
pub fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors").count()
}

/// Resident memory of a process, in KiB.
pub fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
    line.split_whitespace().nth(1).expect("a size").parse().expect("a number")
}
