//! The loop that keeps the parts alive.
//!
//! It waits for few things only: a signal (as a descriptor), the end of a part (its pidfd), what the balancer says,
//! and time. It adopts orphans: a balancer that hands over leaves its successor to us, and a runner its monitors.
//!
//! ```text
//!   balancer in charge ──MAINPID=──▶ elder, finishes what it carries ──▶ buried without a word
//!                 its successor is in charge: when that dies, another is started
//! ```

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use epagent_wire::api::Version;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{Id, WaitPidFlag, waitid as waitid_of};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{PidfdFlags, WaitId, WaitIdOptions, pidfd_open, waitid};

use super::ending;
use super::error::DevError;
use super::keeper::{Heard, Keeper};
use super::layout::{Layout, Users};
use super::logs::Log;
use super::node;
use super::part::Part;
use super::probe::Probe;
use super::restart::Restarts;
use super::sockets::Sockets;
use super::spawn::spawn;
use super::sys::Child;
use super::{say, stale};

/// How often logs are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// After this long without an answer of the API the operator is told where to look.
const SLOW_START: Duration = Duration::from_secs(15);

/// What the parts are started from.
#[derive(Debug, Clone, Copy)]
pub struct Node<'a> {
    pub layout: &'a Layout,
    pub node: node::Node,
    pub users: Users,
    pub binaries: &'a Path,
    pub sockets: &'a Sockets,
}

/// One part and how it is.
#[derive(Debug)]
pub struct Slot {
    pub part: Part,
    pub log: Log,
    pub state: State,
    /// Processes that have handed over and finish what they carry.
    pub elders: Vec<Child>,
    restarts: Restarts,
    /// The length of the log when it was started last.
    log_from: u64,
}

#[derive(Debug)]
pub enum State {
    Running {
        child: Child,
        since: Instant,
    },
    /// Started again at this moment.
    Waiting {
        until: Instant,
    },
}

#[derive(Debug)]
pub struct Supervisor<'a> {
    node: Node<'a>,
    signals: SignalFd,
    /// SIGCHLD, apart from those that ask for the end.
    deaths: SignalFd,
    keeper: Keeper,
    slots: Vec<Slot>,
    probe: Probe,
    started: Instant,
    told_slow: bool,
    /// What `DIR/ready` links to, once the API answers.
    ready: Option<File>,
}

/// SIGINT, SIGTERM and SIGHUP, as a descriptor.
pub fn catch_signals() -> Result<SignalFd, DevError> {
    catch(&[Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP])
}

fn catch(signals: &[Signal]) -> Result<SignalFd, DevError> {
    let mut set = SigSet::empty();
    signals.iter().for_each(|signal| set.add(*signal));
    let caught = set
        .thread_block()
        .and_then(|()| SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK));
    caught.map_err(|source| DevError::Wait { source })
}

impl<'a> Supervisor<'a> {
    pub fn start(node: Node<'a>, signals: SignalFd) -> Result<Self, DevError> {
        let now = Instant::now();
        let mut slots = Vec::with_capacity(Part::ALL.len());
        for part in Part::ALL {
            let log = Log::open(node.layout, part.name())?;
            let state = State::Waiting { until: now };
            let elders = Vec::new();
            slots.push(Slot { part, log, state, elders, restarts: Restarts::default(), log_from: 0 });
        }
        // From here on there may be something to take down.
        let path = node.layout.path("unclean");
        fs::write(&path, "").map_err(|source| DevError::Folder { path, source })?;
        let probe = Probe::new(node.sockets.admin_path(), now);
        let keeper = Keeper::new(node.layout, node.users, node.binaries)?;
        let deaths = catch(&[Signal::SIGCHLD])?;
        set_child_subreaper(true).map_err(|source| DevError::Wait { source })?;
        Ok(Self { node, signals, deaths, keeper, slots, probe, started: now, told_slow: false, ready: None })
    }

    /// Keeps the parts alive until a signal asks for the end, then ends them.
    pub fn run(mut self) -> Result<(), DevError> {
        let lived = self.keep_alive();
        if lived.is_ok() {
            say("ending; Ctrl-C again to hurry");
        }
        let _ = fs::remove_file(self.node.layout.path("ready"));
        lived.and(ending::end(self.node, &self.signals, self.slots))
    }

    fn keep_alive(&mut self) -> Result<(), DevError> {
        let mut next_look = self.started + LOOK_EVERY;
        loop {
            let now = Instant::now();
            self.start_due(now)?;
            if let Some(version) = self.probe.advance(now) {
                self.announce(&version);
            }
            self.tell_if_slow(now);
            if now >= next_look {
                next_look = now + LOOK_EVERY;
                for slot in &self.slots {
                    // A full disk is the parts' trouble too, and they will say so.
                    let _ = slot.log.bound();
                }
            }
            if self.wait(next_look)? {
                return Ok(());
            }
            self.hear(Instant::now())?;
            self.bury(Instant::now())?;
            self.bury_orphans();
        }
    }

    /// Starts what is due. A program that can't be started waits like one that died.
    fn start_due(&mut self, now: Instant) -> Result<(), DevError> {
        let mut changed = false;
        for slot in &mut self.slots {
            if !matches!(slot.state, State::Waiting { until } if until <= now) {
                continue;
            }
            let Node { layout, users, binaries, sockets, .. } = self.node;
            let mut program = slot.part.program(layout, users, binaries, sockets);
            if slot.part == Part::Balancer {
                program.sockets.extend(self.keeper.descriptors());
                program.notify = Some(self.keeper.address());
            }
            slot.log_from = slot.log.len();
            match spawn(&program, layout.root(), slot.log.file()) {
                Ok(child) => {
                    slot.state = State::Running { child, since: now };
                    changed = true;
                }
                Err(error) => {
                    let name = slot.part.name();
                    let error = DevError::Spawn { name, step: error.step, source: error.source };
                    say(&crate::failure::Failure::from(error).to_string());
                    slot.state = State::Waiting { until: now + slot.next_wait(0) };
                }
            }
        }
        if changed { self.note() } else { Ok(()) }
    }

    /// Notes which processes run, for a supervisor that comes after a killed one.
    fn note(&self) -> Result<(), DevError> {
        let path = self.node.layout.path("processes");
        let running = self.slots.iter().flat_map(|slot| {
            let elders = slot.elders.iter().map(|child| (slot.part.name(), child.pid.as_raw()));
            slot.pid().map(|pid| (slot.part.name(), pid)).into_iter().chain(elders)
        });
        stale::note(self.node.layout, running).map_err(|source| DevError::Folder { path, source })
    }

    /// Takes in what the balancer says, and follows it when another process of it is in charge.
    fn hear(&mut self, now: Instant) -> Result<(), DevError> {
        let Some(slot) = self.slots.iter_mut().find(|slot| slot.part == Part::Balancer) else {
            return Ok(());
        };
        let mut changed = false;
        while let Some(in_charge) = slot.pid()
            && let Some(Heard::MainPid(pid)) = self.keeper.hear(in_charge)
        {
            match adopted(pid) {
                Some(child) => {
                    say(&format!("{} hands over from process {in_charge} to {pid}", slot.part.name()));
                    let state = State::Running { child, since: now };
                    if let State::Running { child, .. } = std::mem::replace(&mut slot.state, state) {
                        slot.elders.push(child);
                    }
                    changed = true;
                }
                // It goes by the one that is known; whether that one lives is seen anyway.
                None => say(&format!("{} names process {pid}, which is none of ours", slot.part.name())),
            }
        }
        if changed { self.note() } else { Ok(()) }
    }

    /// Waits for whatever comes first. True: a signal asks for the end.
    fn wait(&self, until: Instant) -> Result<bool, DevError> {
        let (answer, answer_due) = self.probe.waits_for();
        let due = self.slots.iter().filter_map(|slot| match slot.state {
            State::Waiting { until } => Some(until),
            State::Running { .. } => None,
        });
        let until = due.chain(answer_due).fold(until, Instant::min);
        let watched = [self.signals.as_fd(), self.deaths.as_fd(), self.keeper.as_fd()];
        let mut fds: Vec<PollFd<'_>> =
            watched.into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        fds.extend(answer.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        fds.extend(self.slots.iter().filter_map(|slot| match &slot.state {
            State::Running { child, .. } => Some(PollFd::new(child.pidfd.as_fd(), PollFlags::POLLIN)),
            State::Waiting { .. } => None,
        }));
        match poll(&mut fds, timeout(until)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(source) => return Err(DevError::Wait { source }),
        }
        while let Ok(Some(_)) = self.deaths.read_signal() {}
        Ok(matches!(self.signals.read_signal(), Ok(Some(_))))
    }

    /// Takes note of the parts that ended and when they are to be started again.
    fn bury(&mut self, now: Instant) -> Result<(), DevError> {
        let ended = |slot: &Slot| matches!(&slot.state, State::Running { child, .. } if has_ended(child));
        if self.slots.iter().any(ended) {
            // What it said before it ended comes first: it may have handed over.
            self.hear(now)?;
        }
        for slot in &mut self.slots {
            slot.elders.retain(|child| reap(child).is_none());
            let State::Running { child, since } = &slot.state else {
                continue;
            };
            let Some(end) = reap(child) else {
                continue;
            };
            let lived = now.saturating_duration_since(*since);
            let wait = slot.next_wait(u64::try_from(lived.as_millis()).unwrap_or(u64::MAX));
            let when = match wait.as_millis() {
                0 => "restarting it now".to_owned(),
                ms => format!("restarting it in {ms} ms"),
            };
            say(&format!("{} ended: {end}; {when}", slot.part.name()));
            if let Some(line) = slot.log.last_line_since(slot.log_from) {
                say(&format!("  its last words: {line}"));
            }
            slot.state = State::Waiting { until: now + wait };
        }
        Ok(())
    }

    /// Buries children of children that ended after those: nobody else can.
    fn bury_orphans(&self) {
        let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
        while let Ok(status) = waitid_of(Id::All, look | WaitPidFlag::WNOWAIT)
            && let Some(pid) = status.pid()
        {
            let is_of = |slot: &Slot| {
                slot.pid() == Some(pid.as_raw()) || slot.elders.iter().any(|child| child.pid == pid)
            };
            if self.slots.iter().any(is_of) {
                // It ended just now: the next round takes note of it.
                return;
            }
            let _ = waitid_of(Id::Pid(pid), look);
        }
    }

    fn announce(&mut self, version: &Version) {
        let layout = self.node.layout;
        let (socket, http) = (self.node.sockets.admin_path(), self.node.sockets.http_address());
        let ready = serde_json::json!({
            "version": version.version, "node": version.node, "socket": socket, "http": http,
        });
        match mark_ready(&layout.path("ready"), &ready.to_string()) {
            Ok(mark) => self.ready = Some(mark),
            Err(error) => say(&format!("{} can't be made: {error}", layout.path("ready").display())),
        }
        let text = format!(
            "epagent {} is up: node {}, state in {}\n\n  \
               apps   http://{http} (by host name)\n  \
               API    {socket}\n\n  \
               export EPAGENT_SOCKET={socket}\n  \
               epagent deploy ./app\n\n\
             Ctrl-C stops every app and takes everything down; images, releases and volumes stay in the folder.\n",
            version.version,
            version.node,
            layout.root().display(),
            socket = socket.display(),
        );
        let _ = std::io::stdout().write_all(text.as_bytes());
        let _ = std::io::stdout().flush();
    }

    fn tell_if_slow(&mut self, now: Instant) {
        let waiting = !matches!(self.probe.waits_for(), (None, None));
        if waiting && !self.told_slow && now.saturating_duration_since(self.started) >= SLOW_START {
            self.told_slow = true;
            say(&format!("the API does not answer yet; {}/log tells why", self.node.layout.root().display()));
        }
    }
}

/// Makes the mark that others wait for: a link to a file in our own memory, by way of /proc. Unlike a file it is
/// gone the moment we are, also when we are killed; whoever waits for the next start never sees that of the last.
fn mark_ready(path: &Path, text: &str) -> std::io::Result<File> {
    let mut mark = File::from(memfd_create("epagent-ready", MemfdFlags::CLOEXEC)?);
    writeln!(mark, "{text}")?;
    std::os::unix::fs::symlink(format!("/proc/{}/fd/{}", std::process::id(), mark.as_raw_fd()), path)?;
    Ok(mark)
}

impl Slot {
    /// The process that is in charge, if one is.
    fn pid(&self) -> Option<i32> {
        match &self.state {
            State::Running { child, .. } => Some(child.pid.as_raw()),
            State::Waiting { .. } => None,
        }
    }

    fn next_wait(&mut self, lived_ms: u64) -> Duration {
        Duration::from_millis(self.restarts.after_death_ms(lived_ms))
    }
}

/// Until `until`, rounded up, so that it has passed when poll returns.
pub fn timeout(until: Instant) -> PollTimeout {
    let left = until.saturating_duration_since(Instant::now());
    PollTimeout::try_from(left.as_nanos().div_ceil(1_000_000)).unwrap_or(PollTimeout::MAX)
}

/// A process that has become our child.
fn adopted(pid: i32) -> Option<Child> {
    let pidfd = pidfd_open(rustix::process::Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    waitid(WaitId::PidFd(pidfd.as_fd()), options).ok()?;
    Some(Child { pid: nix::unistd::Pid::from_raw(pid), pidfd })
}

fn has_ended(child: &Child) -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    matches!(waitid(WaitId::PidFd(child.pidfd.as_fd()), options), Ok(Some(_)))
}

/// How a child ended, in words, if it has.
pub fn reap(child: &Child) -> Option<String> {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    let status = waitid(WaitId::PidFd(child.pidfd.as_fd()), options).ok()??;
    if let Some(code) = status.exit_status() {
        return Some(format!("exit code {code}"));
    }
    let number = status.terminating_signal().unwrap_or(0);
    Some(match Signal::try_from(number) {
        Ok(signal) => format!("killed by {signal}"),
        Err(_) => format!("killed by signal {number}"),
    })
}
