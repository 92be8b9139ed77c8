//! A data-path thread: one core, one door, and a queue of commands from the control thread.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::access_log::AccessLog;
use crate::control::connections::Connection;
use crate::core::acme::Challenge;
use crate::core::config::Config;
use crate::core::engine::{Core, Snapshot};
use crate::core::histogram::Micros;
use crate::core::io::{ListenerId, Millis, SockId};
use crate::core::listen::Listen;
use crate::core::memory::Limits;
use crate::door::Door;
use crate::doors::{DoorError, Doors};
use crate::remark::Remark;
use crate::table::{ListenerLimits, Table};
use crate::tls::acme::Question;

/// Most commands waiting for a thread. The control thread waits for each answer, so few ever do.
const COMMANDS_MAX: usize = 256;

/// What the control thread may ask of a data-path thread. It is looked at between two batches.
pub enum Command {
    /// Route by this table; answered when it does.
    SetTable(Arc<Table>, Sender<()>),
    /// Accept on these too.
    AddListeners(Vec<Opened>),
    RemoveListener(ListenerId),
    /// Accept nothing more for now; answered when no accept is left.
    YieldAccepting(Sender<()>),
    /// Accept again.
    ResumeAccepting,
    /// What it has counted; with `latency` also how long things took.
    Status {
        latency: bool,
        reply: Sender<Snapshot>,
    },
    /// Open client connections from this slot on, and where to go on.
    Connections {
        from: u32,
        limit: usize,
        routes: BTreeSet<String>,
        reply: Sender<(Vec<Connection>, Option<u32>)>,
    },
    /// Which routes starve.
    Starving(Sender<Vec<String>>),
    /// Let go of every listener, finish what is under way, give idle clients their usual time, then end.
    Drain,
    /// Accept nothing more, finish what is under way, let idle clients go soon, then end.
    Stop,
    /// Reset whoever is left.
    Abort,
    /// What the file of a challenge says, which this client waits for.
    Challenge(SockId, Option<Vec<u8>>),
    /// Say that the loop comes round, by writing this number down.
    Beat(u64),
}

/// A listening socket, as a thread is told of it.
#[derive(Debug, Clone)]
pub struct Opened {
    pub id: ListenerId,
    pub listen: Listen,
    pub local: Option<SocketAddr>,
    pub limits: Option<ListenerLimits>,
    pub socket: Arc<OwnedFd>,
}

/// A running data-path thread.
pub struct Worker {
    commands: SyncSender<Command>,
    waker: Arc<EventFd>,
    thread: JoinHandle<io::Result<()>>,
    facts: Arc<Facts>,
}

/// What a thread leaves for the control thread to see.
#[derive(Debug, Default)]
struct Facts {
    /// The last [`Command::Beat`].
    beat: AtomicU64,
    /// What it had counted when it ended.
    last: OnceLock<Snapshot>,
}

/// How a data-path thread calls the control thread.
#[derive(Clone)]
pub struct Notices {
    /// It has ended, for whatever reason.
    pub ended: Arc<EventFd>,
    /// A route of its has begun to starve. Never waits.
    pub starved: Arc<EventFd>,
    /// Lines for the log, which another thread writes; what it does not take in time is dropped.
    pub remarks: SyncSender<Remark>,
    /// Questions for the files of ACME challenges, where there is a folder of them.
    pub challenges: Option<SyncSender<Question>>,
}

/// Why a thread could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("cannot start a data-path thread")]
    Thread(#[source] io::Error),
    #[error("cannot make the wake-up descriptor of a data-path thread")]
    Waker(#[source] nix::Error),
    #[error(transparent)]
    Door(#[from] DoorError),
    #[error("a data-path thread ended while it started")]
    Ended,
}

impl Worker {
    /// Starts a thread with a door of its own.
    pub fn start(
        index: u32,
        doors: Doors,
        config: Config,
        log: Option<AccessLog>,
        notices: Notices,
    ) -> Result<Self, StartError> {
        let waker = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(StartError::Waker)?);
        let (commands, inbox) = mpsc::sync_channel(COMMANDS_MAX);
        let (started, start) = mpsc::channel();
        let door_waker = waker.clone();
        let facts = Arc::<Facts>::default();
        let shared = facts.clone();
        let caller = Caller { commands: commands.clone(), waker: waker.clone() };
        let io = doors.io;
        let memory = Limits::of_thread(doors.buffers.count, doors.buffers.size_bytes, config.threads);
        let config = Config { memory, ..config };
        let body = move || {
            let _notice = EndNotice(notices.ended.clone());
            // A door belongs to the thread that makes it.
            let door = match doors.open(door_waker) {
                Ok(door) => door,
                Err(error) => {
                    // The starter is waiting for it.
                    let _ = started.send(Err(error));
                    return Ok(());
                }
            };
            let _ = started.send(Ok(()));
            run(door, Core::new(config), &inbox, log.as_ref(), &notices, &caller, &shared)
        };
        let thread = std::thread::Builder::new()
            .name(format!("{io}-{index}"))
            .spawn(body)
            .map_err(StartError::Thread)?;
        start.recv().map_err(|_| StartError::Ended)??;
        Ok(Self { commands, waker, thread, facts })
    }

    /// Hands over a command; false when the thread is gone or does not keep up.
    pub fn send(&self, command: Command) -> bool {
        let sent = self.commands.try_send(command).is_ok();
        sent && self.waker.write(1).is_ok()
    }

    /// The last [`Command::Beat`] that its loop came round to.
    pub fn beat(&self) -> u64 {
        self.facts.beat.load(Ordering::Relaxed)
    }

    /// What it has counted; `None` when it does not answer in time. One that has ended says what it ended with.
    pub fn snapshot(&self, latency: bool, patience: Duration) -> Option<Snapshot> {
        let (reply, answer) = mpsc::channel();
        self.send(Command::Status { latency, reply });
        match answer.recv_timeout(patience) {
            Ok(snapshot) => Some(snapshot),
            Err(RecvTimeoutError::Disconnected) => self.facts.last.get().cloned(),
            Err(RecvTimeoutError::Timeout) => None,
        }
    }

    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for the thread's end, and says why it ended if it should not have.
    pub fn join(self) -> Result<(), String> {
        match self.thread.join() {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(format!("the door failed: {error}")),
            Err(_) => Err("it panicked".to_owned()),
        }
    }
}

/// Tells the control thread that this thread has ended, also when it panics.
struct EndNotice(Arc<EventFd>);

impl Drop for EndNotice {
    fn drop(&mut self) {
        let _ = self.0.write(1);
    }
}

/// The thread's loop: wait, take in, decide, do.
fn run(
    mut door: impl Door,
    mut core: Core,
    commands: &Receiver<Command>,
    log: Option<&AccessLog>,
    notices: &Notices,
    caller: &Caller,
    facts: &Facts,
) -> io::Result<()> {
    let start = Instant::now();
    let clock = || start.elapsed().as_micros() as Micros;
    let mut completions = Vec::new();
    let mut yielding = None;
    let mut now: Millis = 0;
    while !core.is_finished() {
        // From when the last batch began: what it took is far less than a deadline.
        let timeout = core.next_deadline().map(|at| Duration::from_millis(at.saturating_sub(now)));
        door.wait(timeout, &mut completions)?;
        let now_us = clock();
        now = now_us / 1_000;
        core.tick(now_us);
        for completion in completions.drain(..) {
            core.handle(now, completion);
        }
        while let Ok(command) = commands.try_recv() {
            obey(command, &mut core, &mut door, &mut yielding, facts, now);
        }
        core.finish_batch(now);
        if ask_for_challenges(&mut core, notices, caller, now) {
            core.finish_batch(now);
        }
        door.apply(core.ops())?;
        if let Some(done) = yielding.take_if(|_| !core.accepts()) {
            // The asker may have stopped waiting.
            let _ = done.send(());
        }
        if core.take_starved() {
            // Fails only when the count is full, and then the control thread has been told often enough.
            let _ = notices.starved.write(1);
        }
        for remark in core.take_remarks() {
            let _ = notices.remarks.try_send(remark);
        }
        let ended = core.take_access();
        if let Some(log) = log.filter(|_| !ended.is_empty()) {
            log.add(ended);
        }
    }
    // Before the inbox goes, so that whoever sees that gone finds this.
    let _ = facts.last.set(core.snapshot(clock() / 1_000, true));
    Ok(())
}

/// How this thread is called.
struct Caller {
    commands: SyncSender<Command>,
    waker: Arc<EventFd>,
}

/// Has files read that are wanted. True when some cannot be, and the core has been told so.
fn ask_for_challenges(core: &mut Core, notices: &Notices, caller: &Caller, now: Millis) -> bool {
    let mut told = false;
    for Challenge { sock, token } in core.take_challenges() {
        let (commands, waker) = (caller.commands.clone(), caller.waker.clone());
        let answer = Box::new(move |contents| {
            // Fails only where the thread has ended, and then nobody waits any more.
            let _ = commands.send(Command::Challenge(sock, contents)).map(|()| waker.write(1));
        });
        let asked = notices.challenges.as_ref().map(|queue| queue.try_send(Question { token, answer }));
        if !matches!(asked, Some(Ok(()))) {
            core.challenge_read(now, sock, None);
            told = true;
        }
    }
    told
}

fn obey(
    command: Command,
    core: &mut Core,
    door: &mut impl Door,
    yielding: &mut Option<Sender<()>>,
    facts: &Facts,
    now: Millis,
) {
    match command {
        Command::SetTable(table, done) => {
            core.set_table(now, &table);
            // The asker may have stopped waiting.
            let _ = done.send(());
        }
        Command::AddListeners(listeners) => {
            for Opened { id, listen, local, limits, socket } in listeners {
                door.add_listener(id, socket);
                core.add_listener(id, listen, local);
                if let Some(limits) = limits {
                    core.limit_listener(id, limits);
                }
            }
        }
        Command::YieldAccepting(done) => {
            core.yield_accepting(true);
            *yielding = Some(done);
        }
        Command::ResumeAccepting => {
            core.yield_accepting(false);
            *yielding = None;
        }
        Command::RemoveListener(id) => {
            core.remove_listener(id);
            door.remove_listener(id);
        }
        Command::Status { latency, reply } => {
            let _ = reply.send(core.snapshot(now, latency));
        }
        Command::Connections { from, limit, routes, reply } => {
            let _ = reply.send(core.connections(now, from, limit, &routes));
        }
        Command::Starving(reply) => {
            let _ = reply.send(core.starving());
        }
        Command::Drain => {
            for id in core.remove_listeners() {
                door.remove_listener(id);
            }
            core.drain(now);
        }
        Command::Stop => core.stop(now),
        Command::Abort => core.abort(now),
        Command::Challenge(sock, contents) => core.challenge_read(now, sock, contents),
        Command::Beat(number) => facts.beat.store(number, Ordering::Relaxed),
    }
}
