//! Who runs on this machine, read from /proc.
//!
//! Processes are known by their executable and their parent: those started from a descriptor have a number for a
//! name (`comm`), and a pid alone may be another process by the time it is looked at.

use std::fs;
use std::path::PathBuf;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// One process, as it was when it was read.
#[derive(Debug, Clone)]
pub struct Process {
    pub pid: i32,
    pub parent: i32,
    pub uid: u32,
    pub state: char,
    pub exe: Option<PathBuf>,
    pub arguments: String,
}

/// All processes of this machine that this pid namespace shows.
pub fn all() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter_map(read).collect()
}

/// None when it does not exist (any more).
pub fn read(pid: i32) -> Option<Process> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.split_whitespace().next())
    };
    Some(Process {
        pid,
        parent: field("PPid")?.parse().ok()?,
        uid: field("Uid")?.parse().ok()?,
        state: field("State")?.chars().next()?,
        exe: fs::read_link(format!("/proc/{pid}/exe")).ok(),
        arguments: fs::read(format!("/proc/{pid}/cmdline"))
            .map(|bytes| String::from_utf8_lossy(&bytes).replace('\0', " "))
            .unwrap_or_default(),
    })
}

/// Whether it exists and is not a zombie.
pub fn is_alive(pid: i32) -> bool {
    read(pid).is_some_and(|process| process.state != 'Z' && process.state != 'X')
}

/// Whether all threads of a process have ended. A leader is a zombie while others still run, and what they hold, a
/// ring that accepts connections for one, is at work until the last is gone.
pub fn has_ended(pid: i32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    threads == 0 || (threads == 1 && !is_alive(pid))
}

/// The processes below `ancestor`, any number of steps.
pub fn descendants(ancestor: i32) -> Vec<Process> {
    let everyone = all();
    let mut family = vec![ancestor];
    let mut found: Vec<Process> = Vec::new();
    loop {
        let next: Vec<Process> = everyone
            .iter()
            .filter(|process| family.contains(&process.parent) && !family.contains(&process.pid))
            .cloned()
            .collect();
        if next.is_empty() {
            return found;
        }
        family.extend(next.iter().map(|process| process.pid));
        found.extend(next);
    }
}

impl Process {
    /// The file name of its executable. A binary that was replaced on disk, or that runs from a sealed copy in
    /// memory, is still known by its name.
    pub fn executable(&self) -> &str {
        let name = self.exe.as_ref().and_then(|exe| exe.file_name()?.to_str()).unwrap_or("");
        let name = name.strip_suffix(" (deleted)").unwrap_or(name);
        name.strip_prefix("memfd:").unwrap_or(name)
    }
}

/// Sends a signal to a process that this test started (or that was started for it).
#[track_caller]
pub fn signal(pid: i32, signal: Signal) {
    assert!(pid > 1, "no process of ours has the pid {pid}");
    kill(Pid::from_raw(pid), signal).unwrap_or_else(|error| panic!("signal {signal} to {pid}: {error}"));
}

/// `kill -9`.
#[track_caller]
pub fn kill_hard(pid: i32) {
    signal(pid, Signal::SIGKILL);
}

/// `kill -9` for the cleaning up, where it does not matter whether it still ran.
pub fn signal_if_alive(pid: i32) {
    if pid > 1 {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// Asks a process to end, if it still runs.
pub fn terminate_if_alive(pid: i32) {
    if pid > 1 {
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
}
