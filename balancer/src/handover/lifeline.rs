//! Dying with the supervisor, across generations.
//!
//! A supervisor that starts us with a parent-death signal (`epagent dev` does; systemd has cgroups for that)
//! wants no process of ours to outlive it. The signal does not survive a fork, and is sent when the *parent*
//! dies, which for a launched process is the launcher, at first. So a successor is told which signal that was
//! and who the supervisor is, and sets it anew once that one has adopted it.

use nix::sys::prctl::{get_pdeathsig, set_pdeathsig};
use nix::sys::signal::{Signal, raise};
use nix::unistd::{Pid, getppid};
use serde::{Deserialize, Serialize};

/// Whom to die with, and of what; of nothing where there is no parent-death signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lifeline {
    parent: i32,
    signal: Option<i32>,
}

impl Lifeline {
    /// What holds for this process, which was started or adopted by its supervisor.
    pub fn of_this_process() -> Self {
        let signal = get_pdeathsig().ok().flatten().map(|signal| signal as i32);
        Self { parent: getppid().as_raw(), signal }
    }

    /// Makes the same hold for this process. The launcher is gone, so it has been adopted.
    pub fn hold(self) {
        let Some(signal) = self.signal.and_then(|number| Signal::try_from(number).ok()) else { return };
        // Without it we might outlive our supervisor, who would find us at its next start.
        let _ = set_pdeathsig(signal);
        if getppid() != Pid::from_raw(self.parent) {
            // It died before the signal was set.
            let _ = raise(signal);
        }
    }
}
