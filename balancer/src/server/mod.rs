//! The balancer as a process: data-path threads, and the control thread that feeds them.
//!
//! The control thread owns the table. It binds and releases listeners, saves the table, hands it to every
//! thread and answers when all of them route by it. It ends when it is told to (SIGTERM, SIGINT), or when a
//! data-path thread has ended, so that whoever supervises the process starts it anew.

mod say;
mod status;
mod system;
mod tables;
mod waits;

use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signalfd::SignalFd;

pub use self::say::{chain, log};
use self::system::{connections_by_descriptors, random_seed, watch_signals};
use crate::access_log::AccessLog;
use crate::control::protocol::Request;
use crate::control::server::{ControlServer, Reply};
use crate::core::config::Config;
use crate::core::io::ListenerId;
use crate::doors::{BufferSizes, DoorError, Io, IoChoice};
use crate::listeners::{Bind, ListenError, Listeners};
use crate::ring::inherit::Inherited;
use crate::saved::Saved;
use crate::table::Table;
use crate::worker::{Command, Notices, StartError, Worker};

/// How long a thread may take to answer the control thread.
const THREAD_TIMEOUT: Duration = Duration::from_secs(1);

/// How a balancer is set up.
pub struct Options {
    pub threads: u32,
    pub config: Config,
    /// Most client connections of the process; by default what the descriptor limit allows.
    pub connections_max: Option<u64>,
    pub buffers: BufferSizes,
    /// io_uring, epoll, or what is to be had.
    pub io: IoChoice,
    /// Where the table is kept; without it, nothing survives the process.
    pub state_dir: Option<PathBuf>,
    /// Where listeners for routes by port are bound.
    pub port_address: IpAddr,
    /// Besides root, the uid that may use the control socket.
    pub control_uid: Option<u32>,
    /// The control socket, bound or inherited.
    pub control: Option<OwnedFd>,
    /// Inherited listeners.
    pub inherited: Vec<Inherited>,
    /// Listeners to bind at start.
    pub bind: Vec<Bind>,
    /// Where to log requests, one JSON object per line.
    pub access_log: Option<PathBuf>,
    /// The table to start with where none is saved.
    pub table: Table,
    /// How long to go on for clients that are being served when told to stop.
    pub stop_timeout: Duration,
}

/// Why the process could not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("cannot open the door to the network")]
    Door(#[from] DoorError),
    #[error("cannot start a data-path thread")]
    Worker(#[from] StartError),
    #[error("cannot use a listener")]
    Listen(#[from] ListenError),
    #[error("cannot open the access log")]
    AccessLog(#[source] std::io::Error),
    #[error("cannot start the thread that writes the log")]
    Log(#[source] std::io::Error),
    #[error("cannot use the control socket")]
    Control(#[source] std::io::Error),
    #[error("cannot watch signals and threads")]
    Watch(#[source] Errno),
    #[error("data-path thread {index} ended: {why}")]
    WorkerEnded { index: usize, why: String },
}

/// A running balancer.
pub struct Server {
    io: Io,
    workers: Vec<Worker>,
    listeners: Listeners,
    control: Option<ControlServer>,
    saved: Option<Saved>,
    table: Arc<Table>,
    signals: SignalFd,
    worker_ended: Arc<EventFd>,
    /// Written by a thread when a route of its begins to starve.
    starved: Arc<EventFd>,
    /// How often that has happened, as far as it was seen here.
    sequence: u64,
    stop_timeout: Duration,
}

impl Server {
    /// Starts threads and listeners. Signals are blocked in the calling thread, and in those it starts.
    pub fn start(options: Options) -> Result<Self, ServerError> {
        let signals = watch_signals().map_err(ServerError::Watch)?;
        let worker_ended = Arc::new(EventFd::new().map_err(ServerError::Watch)?);
        let starved = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).map_err(ServerError::Watch)?);
        let (io, missing) = options.io.decide(options.buffers)?;
        match missing {
            Some(why) => log(&format!("using epoll, since io_uring is not to be had: {}", chain(&why))),
            None => log(&format!("using {io}")),
        }
        let threads = options.threads.max(1);
        let connections_max = options.connections_max.unwrap_or_else(connections_by_descriptors);
        let config = Config {
            connections_max: connections_max.div_ceil(u64::from(threads)),
            threads,
            seed: random_seed(),
            access_log: options.access_log.is_some(),
            ..options.config
        };
        let log =
            options.access_log.as_deref().map(AccessLog::open).transpose().map_err(ServerError::AccessLog)?;
        let remarks = say::start_remarking().map_err(ServerError::Log)?;
        let notices = Notices { ended: worker_ended.clone(), starved: starved.clone(), remarks };
        let start =
            |index| Worker::start(index, io, config.clone(), options.buffers, log.clone(), notices.clone());
        let workers = (0..threads).map(start).collect::<Result<Vec<_>, _>>()?;
        let mut listeners = Listeners::new(options.port_address);
        for inherited in options.inherited {
            listeners.inherit(inherited)?;
        }
        for bind in options.bind {
            listeners.bind(bind)?;
        }
        let control = options.control.map(|socket| ControlServer::new(socket, options.control_uid));
        let control = control.transpose().map_err(ServerError::Control)?;
        let saved = options.state_dir.map(|dir| Saved::new(&dir));
        let table = Arc::new(saved.as_ref().and_then(load_saved).unwrap_or(options.table));
        let stop_timeout = options.stop_timeout;
        let sequence = 0;
        let mut server = Self {
            io,
            workers,
            listeners,
            control,
            saved,
            table,
            signals,
            worker_ended,
            starved,
            sequence,
            stop_timeout,
        };
        server.begin();
        Ok(server)
    }

    /// Serves until told to stop, or until a thread fails.
    pub fn run(mut self) -> Result<(), ServerError> {
        let mut stop_at: Option<Instant> = None;
        loop {
            self.wait(stop_at);
            if self.is_told_to_stop() {
                if stop_at.is_some() {
                    log("told to stop again: ending at once");
                    return Ok(());
                }
                log("stopping: finishing what is under way");
                stop_at = Some(Instant::now() + self.stop_timeout);
                self.tell_all(|| Command::Stop);
            }
            if let Some(at) = stop_at {
                let all_ended = self.workers.iter().all(Worker::has_ended);
                if all_ended || Instant::now() >= at {
                    log(if all_ended { "stopped" } else { "stopped; some clients were still being served" });
                    return Ok(());
                }
            } else if let Some(index) = self.workers.iter().position(Worker::has_ended) {
                let why = self.workers.swap_remove(index).join().err();
                let why = why.unwrap_or_else(|| "without a reason".to_owned());
                return Err(ServerError::WorkerEnded { index, why });
            }
            self.serve_control();
        }
    }

    /// Puts the first table and the listeners into effect.
    fn begin(&mut self) {
        let table = self.table.clone();
        let (_, problems) = self.listeners.bind_for(&table);
        for problem in &problems {
            log(&format!("route {}: {}", problem.route.as_deref().unwrap_or("-"), problem.message));
        }
        self.spread(&table);
        let ids: Vec<ListenerId> = self.listeners.iter().map(|(id, _)| id).collect();
        self.open(&ids);
        for listener in self.listeners.status() {
            log(&format!("listening: {} on {}", listener.name, listener.address));
        }
        log(&format!("serving table {} with {} routes", table.version, table.routes.len()));
    }

    fn wait(&self, stop_at: Option<Instant>) {
        let control = self.control.iter().flat_map(ControlServer::polled);
        let fixed = [self.signals.as_fd(), self.worker_ended.as_fd(), self.starved.as_fd()];
        let fixed = fixed.into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        let mut polled: Vec<PollFd<'_>> = fixed.chain(control).collect();
        // While stopping, threads end one after the other; looking now and then is enough for that.
        let look_at = stop_at.map(|at| at.min(Instant::now() + Duration::from_millis(20)));
        let tell_at = self.control.as_ref().and_then(ControlServer::next_deadline);
        let timeout = match [look_at, tell_at].into_iter().flatten().min() {
            Some(at) => waits::poll_timeout(at),
            None => PollTimeout::NONE,
        };
        // An error here is EINTR or a passing shortage; everything is looked at anyway.
        let _ = poll(&mut polled, timeout);
    }

    fn is_told_to_stop(&mut self) -> bool {
        let mut told = false;
        while let Ok(Some(_)) = self.signals.read_signal() {
            told = true;
        }
        told
    }

    fn serve_control(&mut self) {
        let Some(mut control) = self.control.take() else { return };
        self.tell_waiting(&mut control);
        control.serve(|request| match request {
            Request::SetTable(table) => Reply::Now(self.set_table(table)),
            Request::Status(query) => Reply::Now(self.status(&query)),
            Request::Wait(query) => self.wait_for(query),
        });
        self.control = Some(control);
    }

    /// A command that needs no answer. A thread that cannot take it has ended, which is noticed elsewhere.
    fn tell_all(&self, command: impl Fn() -> Command) {
        for worker in &self.workers {
            worker.send(command());
        }
    }
}

fn load_saved(saved: &Saved) -> Option<Table> {
    match saved.load() {
        Ok(table) => table,
        Err(error) => {
            log(&format!("starting without a table: {}", chain(&error)));
            None
        }
    }
}
