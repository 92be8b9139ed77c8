//! Processes of a supervisor that was killed.
//!
//! They die with it, by their parent-death signal, but a moment later. Each start notes what it started, so that
//! the next one can wait for that moment, and end what was missed, before two of a kind meet on one state.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::layout::Layout;

/// How long they may take to be gone.
const WAIT_MAX: Duration = Duration::from_secs(5);

/// Notes the processes that run: a line each, `NAME PID START`, where START is the time of its start in clock
/// ticks, which together with the pid names one process for as long as the machine is up.
pub fn note<'a>(layout: &Layout, running: impl Iterator<Item = (&'a str, i32)>) -> std::io::Result<()> {
    let mut text = String::new();
    for (name, pid) in running {
        if let Some(start) = start_ticks(pid) {
            text.push_str(&format!("{name} {pid} {start}\n"));
        }
    }
    fs::write(layout.path("processes"), text)
}

/// Waits until none of the noted processes lives, and ends those that stay.
pub fn await_end(layout: &Layout) {
    let Ok(text) = fs::read_to_string(layout.path("processes")) else {
        return;
    };
    let deadline = Instant::now() + WAIT_MAX;
    for process in text.lines().filter_map(still_living) {
        // Not a question of patience: whoever should have ended it is dead.
        let _ = pidfd_send_signal(&process, Signal::KILL);
        let left_ms = deadline.saturating_duration_since(Instant::now()).as_millis();
        let timeout = PollTimeout::try_from(left_ms).unwrap_or(PollTimeout::ZERO);
        let _ = poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], timeout);
    }
}

fn still_living(line: &str) -> Option<OwnedFd> {
    let mut words = line.split_whitespace().skip(1);
    let pid: i32 = words.next()?.parse().ok()?;
    let start: u64 = words.next()?.parse().ok()?;
    let process = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
    // Asked after it was opened: so the descriptor is that process and not a later one of the same number.
    (start_ticks(pid) == Some(start)).then_some(process)
}

/// Field 22 of /proc/PID/stat, counted behind the name in parentheses, which may hold anything.
fn start_ticks(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, behind_name) = stat.rsplit_once(") ")?;
    behind_name.split(' ').nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_noted_process_is_ended_and_a_later_one_of_its_number_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::open(dir.path()).unwrap();
        let mut noted = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let mut other = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        note(&layout, [("x", noted.id() as i32)].into_iter()).unwrap();
        let mut text = fs::read_to_string(layout.path("processes")).unwrap();
        text.push_str(&format!("y {} 1\nnonsense\n", other.id()));
        fs::write(layout.path("processes"), text).unwrap();
        await_end(&layout);
        assert!(noted.try_wait().unwrap().is_some());
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
