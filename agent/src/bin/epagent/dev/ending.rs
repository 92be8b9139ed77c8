//! The orderly end.
//!
//! ```text
//!   agent ─▶ balancer (finishes what it carries) ─▶ runner ─▶ teardown (instances, with their grace) ─▶ lease
//! ```
//!
//! Each is asked by SIGTERM and killed past its time. A second signal hurries: nobody is given time any more, and
//! every instance is killed at once, but everything is still taken down.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signalfd::SignalFd;
use rustix::process::{Signal, pidfd_send_signal};

use super::error::DevError;
use super::logs::Log;
use super::part::{self, Part};
use super::spawn::spawn;
use super::supervise::{Node, Slot, State, reap, timeout};
use super::sys::Child;
use super::{leftovers, node, say, view};

/// How long a part may take to end by itself. The balancer finishes requests in flight for up to 5 s.
const GRACE: Duration = Duration::from_secs(10);
/// How long the teardown may take; it bounds the instances' own grace itself.
const TEARDOWN_MAX: Duration = Duration::from_secs(120);
/// How long a killed process may take to be gone.
const KILLED_WAIT_MAX: Duration = Duration::from_secs(5);

/// Stops everything; says what was left behind if something was.
pub fn end(node: Node<'_>, signals: &SignalFd, mut slots: Vec<Slot>) -> Result<(), DevError> {
    let mut ending = Ending { signals, node: node.node, hurried: false };
    ending.stop(&mut slots, Part::Agent);
    node.sockets.refuse_api();
    ending.stop(&mut slots, Part::Balancer);
    ending.stop(&mut slots, Part::Runner);
    ending.teardown(node, &slots);
    ending.stop(&mut slots, Part::Lease);
    // Empty by now: the teardown has unmounted what was below it.
    view::unshare_apps(node.layout.root());
    let left = leftovers::find(node.layout, node.node);
    if !left.is_empty() {
        return Err(DevError::LeftBehind { what: left });
    }
    for name in ["unclean", "processes"] {
        let _ = fs::remove_file(node.layout.path(name));
    }
    Ok(())
}

struct Ending<'a> {
    signals: &'a SignalFd,
    node: node::Node,
    hurried: bool,
}

impl Ending<'_> {
    fn stop(&mut self, slots: &mut [Slot], part: Part) {
        let now = Instant::now();
        for slot in slots.iter_mut().filter(|slot| slot.part == part) {
            let state = std::mem::replace(&mut slot.state, State::Waiting { until: now });
            let mut children = std::mem::take(&mut slot.elders);
            if let State::Running { child, .. } = state {
                children.push(child);
            }
            for child in &children {
                let _ = pidfd_send_signal(&child.pidfd, Signal::TERM);
            }
            for child in &children {
                self.await_end(child, part.name(), GRACE);
            }
        }
    }

    fn teardown(&mut self, node: Node<'_>, slots: &[Slot]) {
        let Some(log) = slots.iter().find(|slot| slot.part == Part::Runner).map(|slot| &slot.log) else {
            return;
        };
        let log_from = log.len();
        match spawn(&part::teardown(node.layout, node.binaries), node.layout.root(), log.file()) {
            Ok(child) => {
                let ended = self.await_end(&child, "the teardown", TEARDOWN_MAX);
                if ended.is_none_or(|how| how != "exit code 0") {
                    tell_why(log, log_from);
                }
            }
            Err(error) => say(&format!("the teardown can't be started: {}: {}", error.step, error.source)),
        }
    }

    /// Waits for a child's end, and kills it past its time. A second signal ends all patience.
    fn await_end(&mut self, child: &Child, name: &str, patience: Duration) -> Option<String> {
        // The teardown is never killed for hurry's sake: it is what cleans up.
        let mut deadline = Instant::now() + patience;
        let mut killed = false;
        loop {
            if let Some(how) = reap(child) {
                return Some(how);
            }
            if self.hurried && !killed && patience == GRACE {
                deadline = Instant::now();
            }
            if Instant::now() >= deadline {
                if killed {
                    say(&format!("{name} (process {}) does not even die of SIGKILL", child.pid));
                    return None;
                }
                if !self.hurried {
                    say(&format!("{name} did not end within {} s and is killed", patience.as_secs()));
                }
                let _ = pidfd_send_signal(&child.pidfd, Signal::KILL);
                killed = true;
                deadline = Instant::now() + KILLED_WAIT_MAX;
            }
            let mut fds = [
                PollFd::new(child.pidfd.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            ];
            let _ = poll(&mut fds, timeout(deadline));
            if matches!(self.signals.read_signal(), Ok(Some(_))) && !self.hurried {
                self.hurried = true;
                say("hurrying: instances are killed");
            }
            if self.hurried {
                kill_instances(Path::new("/sys/fs/cgroup"), self.node);
            }
        }
    }
}

fn tell_why(log: &Log, from: u64) {
    let line = log.last_line_since(from).unwrap_or_else(|| "it said nothing".to_owned());
    say(&format!("the teardown failed: {line} ({})", log.path().display()));
}

/// Kills what runs in the instances, by the v2 hierarchy, which a hybrid system has beside the others. Their
/// monitors are left to see it and to report.
fn kill_instances(mount: &Path, node: node::Node) {
    let roots = [mount.join(node.cgroup()), mount.join("unified").join(node.cgroup())];
    for instance in roots.iter().filter_map(|root| fs::read_dir(root).ok()).flatten().flatten() {
        // It may have ended meanwhile.
        let _ = fs::write(instance.path().join("app/cgroup.kill"), "1");
    }
}
