//! A data-path thread: one core, one door, and a queue of commands from the control thread.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;

use crate::access_log::AccessLog;
use crate::core::config::Config;
use crate::core::engine::{Core, Snapshot};
use crate::core::histogram::Micros;
use crate::core::io::{ListenerId, Millis};
use crate::core::listen::Listen;
use crate::door::Door;
use crate::doors::{AnyDoor, BufferSizes, DoorError, Io};
use crate::table::Table;

/// Most commands waiting for a thread. The control thread waits for each answer, so few ever do.
const COMMANDS_MAX: usize = 256;

/// What the control thread may ask of a data-path thread. It is looked at between two batches.
pub enum Command {
    /// Route by this table; answered when it does.
    SetTable(Arc<Table>, Sender<()>),
    AddListener {
        id: ListenerId,
        listen: Listen,
        local: Option<SocketAddr>,
        socket: Arc<OwnedFd>,
    },
    RemoveListener(ListenerId),
    /// What it has counted; with `latency` also how long things took.
    Status {
        latency: bool,
        reply: Sender<Snapshot>,
    },
    /// Which routes starve.
    Starving(Sender<Vec<String>>),
    /// Accept nothing more, finish what is under way, give idle clients their usual time, then end.
    Drain,
    /// As [`Command::Drain`], but idle clients are let go soon.
    Stop,
    /// Reset whoever is left.
    Abort,
}

/// A running data-path thread.
pub struct Worker {
    commands: SyncSender<Command>,
    waker: Arc<EventFd>,
    thread: JoinHandle<io::Result<()>>,
}

/// How a data-path thread calls the control thread.
#[derive(Clone)]
pub struct Notices {
    /// It has ended, for whatever reason.
    pub ended: Arc<EventFd>,
    /// A route of its has begun to starve. Never waits.
    pub starved: Arc<EventFd>,
    /// Lines for the log, which another thread writes; what it does not take in time is dropped.
    pub remarks: SyncSender<String>,
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
        io: Io,
        config: Config,
        buffers: BufferSizes,
        log: Option<AccessLog>,
        notices: Notices,
    ) -> Result<Self, StartError> {
        let waker = Arc::new(EventFd::new().map_err(StartError::Waker)?);
        let (commands, inbox) = mpsc::sync_channel(COMMANDS_MAX);
        let (started, start) = mpsc::channel();
        let door_waker = waker.clone();
        let body = move || {
            let _notice = EndNotice(notices.ended);
            // A door belongs to the thread that makes it.
            let door = match AnyDoor::open(io, buffers, door_waker) {
                Ok(door) => door,
                Err(error) => {
                    // The starter is waiting for it.
                    let _ = started.send(Err(error));
                    return Ok(());
                }
            };
            let _ = started.send(Ok(()));
            run(door, Core::new(config), &inbox, log.as_ref(), &notices.starved, &notices.remarks)
        };
        let thread = std::thread::Builder::new()
            .name(format!("{io}-{index}"))
            .spawn(body)
            .map_err(StartError::Thread)?;
        start.recv().map_err(|_| StartError::Ended)??;
        Ok(Self { commands, waker, thread })
    }

    /// Hands over a command; false when the thread is gone or does not keep up.
    pub fn send(&self, command: Command) -> bool {
        let sent = self.commands.try_send(command).is_ok();
        sent && self.waker.write(1).is_ok()
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
    starved: &EventFd,
    remarks: &SyncSender<String>,
) -> io::Result<()> {
    let start = Instant::now();
    let clock = || start.elapsed().as_micros() as Micros;
    let mut completions = Vec::new();
    while !core.is_finished() {
        let timeout =
            core.next_deadline().map(|at| Duration::from_millis(at.saturating_sub(clock() / 1_000)));
        door.wait(timeout, &mut completions)?;
        let now_us = clock();
        let now: Millis = now_us / 1_000;
        core.tick(now_us);
        for completion in completions.drain(..) {
            core.handle(now, completion);
        }
        while let Ok(command) = commands.try_recv() {
            obey(command, &mut core, &mut door, now);
        }
        core.finish_batch(now);
        door.apply(core.ops())?;
        if core.take_starved() {
            // Fails only when the count is full, and then the control thread has been told often enough.
            let _ = starved.write(1);
        }
        for remark in core.take_remarks() {
            let _ = remarks.try_send(remark);
        }
        let ended = core.take_access();
        if let Some(log) = log.filter(|_| !ended.is_empty()) {
            let dropped = log.add(ended);
            core.count_dropped_access(dropped);
        }
    }
    Ok(())
}

fn obey(command: Command, core: &mut Core, door: &mut impl Door, now: Millis) {
    match command {
        Command::SetTable(table, done) => {
            core.set_table(now, &table);
            // The asker may have stopped waiting.
            let _ = done.send(());
        }
        Command::AddListener { id, listen, local, socket } => {
            door.add_listener(id, socket);
            core.add_listener(id, listen, local);
        }
        Command::RemoveListener(id) => {
            core.remove_listener(id);
            door.remove_listener(id);
        }
        Command::Status { latency, reply } => {
            let _ = reply.send(core.snapshot(now, latency));
        }
        Command::Starving(reply) => {
            let _ = reply.send(core.starving());
        }
        Command::Drain => core.drain(now),
        Command::Stop => core.stop(now),
        Command::Abort => core.abort(now),
    }
}
