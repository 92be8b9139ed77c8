//! The balancer as a process: data-path threads, and the control thread that feeds them.
//!
//! The control thread owns the table. It binds and releases listeners, saves the table, hands it to every
//! thread and answers when all of them route by it. It ends when it is told to (SIGTERM, SIGINT), when it has
//! handed over (SIGUSR2, or `reload` on the control socket) and drained, or when a data-path thread has ended,
//! so that whoever supervises the process starts it anew.

mod audit;
mod certificates;
mod connections;
mod life;
mod memory;
mod reread;
mod say;
mod status;
mod succession;
mod system;
mod tables;
mod waits;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signalfd::SignalFd;

use self::audit::Trail;
use self::certificates::Reader;
use self::life::Life;
use self::memory::Setup;
use self::reread::ConfigSource;
pub use self::say::{chain, log};
use self::system::{connections_by_descriptors, random_seed, watch_signals};
pub use self::waits::poll_timeout;
use crate::access_log::{Format, LogOptions, RunningLog};
use crate::config_file::ConfigFile;
use crate::control::protocol::{Request, Response};
use crate::control::said::LINES;
use crate::control::server::{ControlServer, Reply};
use crate::core::config::Config;
use crate::core::io::ListenerId;
use crate::doors::{BufferSizes, DoorError, Doors, Io, IoChoice};
use crate::handover::HandoverError;
use crate::handover::giving::Giving;
use crate::handover::launch::Program;
use crate::handover::predecessors::Predecessors;
use crate::handover::taking::Taking;
use crate::listeners::{Bind, ListenError, Listeners};
use crate::metrics::server::MetricsServer;
use crate::notify::Notifier;
use crate::remark::Remark;
use crate::ring::inherit::Inherited;
use crate::saved::Saved;
use crate::table::Table;
use crate::tls::acme::{self, AcmeError};
use crate::tls::context::Context;
use crate::unix::{FolderError, UnixSockets};
use crate::watchdog::Watchdog;
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
    /// Below it, tenants have unix sockets that are upstreams.
    pub unix_root: Option<PathBuf>,
    /// Where an ACME client puts its challenges.
    pub acme_dir: Option<PathBuf>,
    /// Certificates for TLS listeners, with their keys.
    pub tls_dir: Option<PathBuf>,
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
    /// Where metrics are asked for.
    pub metrics: Option<OwnedFd>,
    /// Listeners to bind at start.
    pub bind: Vec<Bind>,
    /// How to log requests and connections, if at all.
    pub access_log: Option<LogOptions>,
    /// The table to start with where none is saved.
    pub table: Table,
    /// A file to go by, for the table and for more listeners to bind: it is read again on SIGHUP, and goes
    /// before a table that is handed over.
    pub config_file: Option<(PathBuf, ConfigFile)>,
    /// How long to go on for clients that are being served when told to stop.
    pub stop_timeout: Duration,
    /// How long to go on for them after a handover.
    pub drain_timeout: Duration,
    /// What to execute to hand over.
    pub program: Program,
    /// The way to a process that hands over to us, and its table.
    pub handed: Option<(Taking, Table)>,
}

/// Why the process could not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("cannot open the door to the network")]
    Door(#[from] DoorError),
    #[error(transparent)]
    UnixRoot(#[from] FolderError),
    #[error("cannot start a data-path thread")]
    Worker(#[from] StartError),
    #[error("cannot use a listener")]
    Listen(#[from] ListenError),
    #[error(transparent)]
    Acme(#[from] AcmeError),
    #[error("cannot set up TLS")]
    Tls(#[from] rustls::Error),
    #[error("cannot open the access log")]
    AccessLog(#[source] std::io::Error),
    #[error("cannot start the thread that writes the log")]
    Log(#[source] std::io::Error),
    #[error("cannot use the socket for metrics")]
    Metrics(#[source] std::io::Error),
    #[error("cannot use the control socket")]
    Control(#[source] std::io::Error),
    #[error("cannot watch signals and threads")]
    Watch(#[source] Errno),
    #[error("cannot take over from the old process")]
    Handover(#[from] HandoverError),
    #[error("data-path thread {index} ended: {why}")]
    WorkerEnded { index: usize, why: String },
}

/// A running balancer.
pub struct Server {
    io: Io,
    unix: UnixSockets,
    certificates: Reader,
    workers: Vec<Worker>,
    listeners: Listeners,
    control: Option<ControlServer>,
    metrics: Option<MetricsServer>,
    saved: Option<Saved>,
    config_source: Option<ConfigSource>,
    table: Arc<Table>,
    signals: SignalFd,
    worker_ended: Arc<EventFd>,
    /// How many threads have said that they end.
    ending: u64,
    /// Written by a thread when a route of its begins to starve.
    starved: Arc<EventFd>,
    /// How often that has happened, as far as it was seen here.
    sequence: u64,
    /// Routes that have begun to starve in processes that drain, since the table was changed last.
    elders_starve: BTreeSet<String>,
    life: Life,
    program: Program,
    /// A peer of the control socket asks for a handover.
    reload_wanted: bool,
    /// A successor that is not ready yet.
    giving: Option<Giving>,
    predecessors: Predecessors,
    notifier: Notifier,
    watchdog: Option<Watchdog>,
    started: Instant,
    /// What the bound of its memory follows from.
    setup: Setup,
    log: Option<RunningLog>,
    /// Who changed what.
    trail: Trail,
    stop_timeout: Duration,
    drain_timeout: Duration,
}

impl Server {
    /// Starts threads and listeners. Signals are blocked in the calling thread, and in those it starts.
    pub fn start(options: Options) -> Result<Self, ServerError> {
        let signals = watch_signals().map_err(ServerError::Watch)?;
        let worker_ended = Arc::new(noticing().map_err(ServerError::Watch)?);
        let starved = Arc::new(noticing().map_err(ServerError::Watch)?);
        let (io, missing) = options.io.decide(options.buffers)?;
        match missing {
            Some(why) => {
                log(Remark::warning(format!("using epoll, since io_uring is not to be had: {}", chain(&why))))
            }
            None => log(format!("using {io}")),
        }
        let unix = UnixSockets::below(options.unix_root.as_deref())?;
        let tls = Arc::new(Context::new()?);
        let certificates = Reader::new(tls.clone(), options.tls_dir);
        let doors = Doors { io, buffers: options.buffers, unix: unix.clone(), tls };
        let threads = options.threads.max(1);
        let connections_max = options.connections_max.unwrap_or_else(connections_by_descriptors);
        let config = Config {
            connections_max: connections_max.div_ceil(u64::from(threads)),
            threads,
            acme: options.acme_dir.is_some(),
            seed: random_seed(),
            access_log: options.access_log.is_some(),
            access_log_sample: options.access_log.as_ref().map_or(1, |log| log.sample),
            access_log_agent: options.access_log.as_ref().is_some_and(|log| log.format == Format::Combined),
            ..options.config
        };
        let setup = Setup::new(threads, &config, options.buffers, certificates.is_in_use());
        let log =
            options.access_log.as_ref().map(RunningLog::start).transpose().map_err(ServerError::AccessLog)?;
        let remarks = say::start_remarking().map_err(ServerError::Log)?;
        let near_end = || log.as_ref().map(RunningLog::near_end);
        let challenges = options.acme_dir.as_deref().map(acme::start).transpose()?;
        let notices = Notices { ended: worker_ended.clone(), starved: starved.clone(), remarks, challenges };
        let start = |index| {
            let config = Config { request_id_seed: [random_seed(), random_seed()], ..config.clone() };
            Worker::start(index, doors.clone(), config, near_end(), notices.clone())
        };
        let workers = (0..threads).map(start).collect::<Result<Vec<_>, _>>()?;
        let mut listeners = Listeners::new(options.port_address);
        for inherited in options.inherited {
            listeners.inherit(inherited)?;
        }
        let file = options.config_file.as_ref().map(|(_, file)| file);
        let more = file.map(ConfigFile::binds).unwrap_or_default();
        for bind in options.bind.into_iter().chain(more) {
            listeners.bind(bind)?;
        }
        let control = options.control.map(|socket| ControlServer::new(socket, options.control_uid));
        let control = control.transpose().map_err(ServerError::Control)?;
        let metrics = options.metrics.map(MetricsServer::new).transpose().map_err(ServerError::Metrics)?;
        let saved = options.state_dir.map(|dir| Saved::new(&dir));
        let handed_over = options.handed.is_some();
        let (taking, handed) = options.handed.unzip();
        let table = match file {
            Some(file) => file.table_after(&handed.unwrap_or_else(Table::empty)),
            None => handed.or_else(|| saved.as_ref().and_then(load_saved)).unwrap_or(options.table),
        };
        let mut server = Self {
            io,
            unix,
            certificates,
            workers,
            listeners,
            control,
            metrics,
            saved,
            config_source: options.config_file.map(|(path, file)| ConfigSource::new(path, &file)),
            table: Arc::new(table),
            signals,
            worker_ended,
            ending: 0,
            starved,
            sequence: 0,
            elders_starve: BTreeSet::new(),
            life: Life::Serving,
            program: options.program,
            reload_wanted: false,
            giving: None,
            predecessors: Predecessors::default(),
            notifier: Notifier::from_environment(),
            watchdog: Watchdog::from_environment(handed_over, Instant::now()),
            stop_timeout: options.stop_timeout,
            drain_timeout: options.drain_timeout,
            started: Instant::now(),
            setup,
            log,
            trail: Trail::default(),
        };
        server.begin(taking)?;
        Ok(server)
    }

    /// Serves until told to stop, or until it has handed over and drained, or until a thread fails.
    pub fn run(mut self) -> Result<(), ServerError> {
        let ended = self.live();
        if let Some(log) = self.log.take() {
            log.finish();
        }
        ended
    }

    fn live(&mut self) -> Result<(), ServerError> {
        loop {
            self.wait();
            if self.obey_signals() {
                return Ok(());
            }
            self.look_after_handover();
            self.look_after_successor();
            self.predecessors.look();
            self.serve_control();
            self.serve_metrics();
            self.reload_for_peers();
            self.feed_watchdog();
            self.look_at_certificates();
            if self.live_on()? {
                return Ok(());
            }
        }
    }

    /// Puts the first table and the listeners into effect; after a handover not before it is our turn.
    fn begin(&mut self, taking: Option<Taking>) -> Result<(), ServerError> {
        let mut problems = self.listeners.bind_for(&self.table).1;
        problems.extend(self.unix.problems(&self.table));
        for problem in &problems {
            log(say::of_problem(problem));
        }
        self.listeners.forget_kept();
        self.spread(&self.table);
        if let Some(taking) = taking {
            self.await_turn(taking)?;
        }
        let ids: Vec<ListenerId> = self.listeners.iter().map(|(id, _)| id).collect();
        self.open(&ids);
        self.store(&ids);
        for listener in self.listeners.status() {
            log(Remark::info(format!("listening: {} on {}", listener.name, listener.address))
                .with("listener", &listener.name));
        }
        let serving = format!("serving table {} with {} routes", self.table.version, self.table.routes.len());
        log(format!("memory: at most {}", self.memory_bound()));
        self.notifier.say(&format!("READY=1\nSTATUS={serving}"));
        log(serving);
        Ok(())
    }

    fn wait(&self) {
        let control = self.control.iter().flat_map(ControlServer::polled);
        let fixed = [self.signals.as_fd(), self.worker_ended.as_fd(), self.starved.as_fd()];
        let handover = self.giving.iter().map(AsFd::as_fd).chain(self.predecessors.descriptors());
        let watched = fixed.into_iter().chain(handover).chain(self.life.successor().map(AsFd::as_fd));
        let watched = watched.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        let metrics = self.metrics.iter().flat_map(MetricsServer::polled);
        let mut polled: Vec<PollFd<'_>> = watched.chain(control).chain(metrics).collect();
        let hang_up_at = self.metrics.as_ref().and_then(MetricsServer::next_deadline);
        let tell_at = self.control.as_ref().and_then(ControlServer::next_deadline);
        let beat_at = self.watchdog.as_ref().map(Watchdog::due);
        let give_up_at = self.giving.as_ref().map(Giving::deadline);
        let life = [self.life.look_at(), self.look_for_ended_at()];
        let duties = [tell_at, hang_up_at, beat_at, give_up_at, self.look_at_certificates_at()];
        let timeout = match life.into_iter().chain(duties).flatten().min() {
            Some(at) => poll_timeout(at),
            None => PollTimeout::NONE,
        };
        // An error here is EINTR or a passing shortage; everything is looked at anyway.
        let _ = poll(&mut polled, timeout);
    }

    fn serve_control(&mut self) {
        let Some(mut control) = self.control.take() else { return };
        self.tell_waiting(&mut control);
        control.serve(|actor, request| match request {
            Request::SetTable(table) => Reply::Now(self.change_table(actor, table)),
            Request::Metrics(_) => Reply::Now(self.metrics_response()),
            Request::Connections(query) => Reply::Now(self.connections(&query)),
            Request::Audit(_) => Reply::Now(Response::Audit(self.trail.show())),
            Request::Said(query) => Reply::Now(Response::Said(LINES.after(query))),
            Request::Status(query) => Reply::Now(self.status(&query)),
            Request::Wait(query) => self.wait_for(query),
            Request::ReloadCertificates(_) => {
                self.trail.add_request(actor, "reload_certificates");
                Reply::Now(self.reload_certificates())
            }
            Request::Reload(_) => {
                self.trail.add_request(actor, "reload");
                self.reload_wanted = true;
                Reply::AtHandover
            }
        });
        self.control = Some(control);
    }

    fn feed_watchdog(&mut self) {
        let beats = self.workers.iter().map(Worker::beat);
        let looked = self.watchdog.as_mut().and_then(|watchdog| watchdog.look(Instant::now(), beats));
        let Some((alive, next)) = looked else { return };
        if alive {
            self.notifier.say("WATCHDOG=1");
        }
        self.tell_all(|| Command::Beat(next));
    }

    /// A command that needs no answer. A thread that cannot take it has ended, which is noticed elsewhere.
    fn tell_all(&self, command: impl Fn() -> Command) {
        for worker in &self.workers {
            worker.send(command());
        }
    }
}

/// A count that threads add to, and that reading never waits for.
fn noticing() -> nix::Result<EventFd> {
    EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
}

fn load_saved(saved: &Saved) -> Option<Table> {
    match saved.load() {
        Ok(table) => table,
        Err(error) => {
            log(Remark::error(format!("starting without a table: {}", chain(&error))));
            None
        }
    }
}
