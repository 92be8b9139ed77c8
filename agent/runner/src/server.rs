//! The loop: one thread, one epoll set, nothing that waits.
//!
//! ```text
//!  packet ─▶ parse ─▶ (objects busy? park) ─▶ check ─▶ plan ─┬─▶ answer
//!                                                            ├─▶ a monitor's answer, at most a second
//!                                                            └─▶ forked child ─▶ tables ─▶ launch ─▶ answer
//!  monitor ─▶ event ─▶ tables ─▶ event to all that said hello
//! ```
//!
//! This file has the set, what wakes it, and the queue; [`crate::connections`] reads and answers, [`crate::acts`]
//! carries plans out, [`crate::watch`] follows the monitors.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use epagent_isolation::cgroup::CgroupRoot;
use epagent_log::Recent;
use epagent_storage::Pool;
use epagent_wire::name::JailId;
use epagent_wire::runner::{Refusal, RefusalCode, Request};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::app_sockets::AppSockets;
use crate::config::Config;
use crate::disk::Disk;
use crate::launch::{Binaries, Ground, Sockets};
use crate::observe::Figures;
use crate::order::Order;
use crate::packet::{Kind, kind};
use crate::peers::{PeerId, Peers, To};
use crate::requests::keys::{Busy, Keys, keys};
use crate::requests::{View, check, parse};
use crate::tables::Tables;
use crate::watch::Monitor;
use crate::work::{Site, Work};
use crate::worker::{WORKERS_MAX, Worker};

/// Requests that wait for busy objects or for a free child.
const PARKED_MAX: usize = 512;
/// How often what is only looked at now and then is looked at.
const TICK: Duration = Duration::from_millis(1_000);
/// How often the host's network is looked after: uplinks come late, and others flush packet filters.
const NETWORK_EVERY: Duration = Duration::from_secs(5);

/// What stands behind a number in the epoll set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Token {
    Listener,
    Peer(u64),
    /// A connection to a monitor.
    Monitor(u64),
    /// A monitor's process, to be reaped.
    Process(u64),
    Worker(u64),
}

impl Token {
    pub fn number(self) -> u64 {
        match self {
            Token::Listener => 0,
            Token::Peer(serial) => serial << 3 | 1,
            Token::Monitor(serial) => serial << 3 | 2,
            Token::Process(serial) => serial << 3 | 3,
            Token::Worker(serial) => serial << 3 | 4,
        }
    }

    fn of(number: u64) -> Option<Token> {
        Some(match (number & 7, number >> 3) {
            (0, 0) => Token::Listener,
            (1, serial) => Token::Peer(serial),
            (2, serial) => Token::Monitor(serial),
            (3, serial) => Token::Process(serial),
            (4, serial) => Token::Worker(serial),
            _ => return None,
        })
    }
}

/// Something to be done once its objects are free.
#[derive(Debug)]
pub enum Task {
    Ask(Ask),
    /// The runner's own: after a job's or a monitor's end.
    Own {
        work: Work,
        keys: Keys,
    },
}

impl Task {
    /// Instances are stopped and looked at also while all children are busy, or stuck on a disk.
    fn needs_child(&self) -> bool {
        let Task::Ask(ask) = self else { return true };
        !matches!(
            ask.request,
            Request::Hello { .. }
                | Request::Observe
                | Request::Said { .. }
                | Request::Stop { .. }
                | Request::Exec { .. }
                | Request::ExecResize { .. }
                | Request::ExecKill { .. }
                | Request::Inspect { .. }
                | Request::LogOpen { .. }
                | Request::SocketOpen { .. }
        )
    }
}

#[derive(Debug)]
pub struct Ask {
    pub to: To,
    pub request: Request,
    pub descriptors: Vec<OwnedFd>,
}

/// A child at work, and what is to come after it.
#[derive(Debug)]
pub struct Running {
    pub worker: Worker,
    pub work: Work,
    pub keys: Keys,
    pub then: Then,
}

#[derive(Debug)]
pub enum Then {
    Answer(To),
    Launch {
        to: To,
        order: Box<Order>,
        descriptors: Vec<OwnedFd>,
    },
    /// It undid what could not be done.
    Refuse {
        to: To,
        refusal: Refusal,
    },
    Nothing,
}

pub struct Server {
    pub config: Config,
    pub tables: Tables,
    pub disk: Disk,
    pub pool: Pool,
    pub cgroups: CgroupRoot,
    pub binaries: Binaries,
    pub sockets: Sockets,
    pub app_sockets: AppSockets,
    pub boot: String,
    pub peers: Peers,
    pub monitors: BTreeMap<JailId, Monitor>,
    /// Monitors that are children of this very process.
    pub processes: BTreeMap<u64, OwnedFd>,
    pub running: BTreeMap<u64, Running>,
    pub figures: Figures,
    /// What was logged last.
    pub recent: Recent,
    /// Jails whose monitor is gone and of which the rest is being killed.
    pub reaping: BTreeSet<JailId>,
    /// Commands that were hung up and are killed when they are still there at this time.
    pub hung_up: VecDeque<(Instant, JailId, u32)>,
    parked: VecDeque<Task>,
    resuming: bool,
    /// Something was parked or has ended since parked tasks were last gone through.
    stirred: bool,
    busy: Busy,
    /// What was open before the loop began: all that a child needs.
    base_fds: BTreeSet<RawFd>,
    pub epoll: Epoll,
    pub listener: OwnedFd,
    serial: u64,
    next_tick: Instant,
    network_at: Instant,
    /// What is wrong with looking after the network, told once.
    pub network_fault: Option<String>,
    /// The service manager wants to hear from the loop, every few seconds (`WatchdogSec=`).
    is_watched: bool,
}

/// What is opened before the loop can begin.
pub struct Parts {
    pub config: Config,
    pub tables: Tables,
    pub disk: Disk,
    pub pool: Pool,
    pub cgroups: CgroupRoot,
    pub binaries: Binaries,
    pub sockets: Sockets,
    pub app_sockets: AppSockets,
    pub boot: String,
    pub listener: OwnedFd,
}

impl Server {
    pub fn new(parts: Parts, recent: Recent) -> nix::Result<Server> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let Parts { config, tables, disk, pool, cgroups, binaries, sockets, app_sockets, boot, listener } =
            parts;
        epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, Token::Listener.number()))?;
        Ok(Server {
            figures: Figures::new(&pool, &cgroups, &app_sockets),
            recent,
            config,
            tables,
            disk,
            pool,
            cgroups,
            binaries,
            sockets,
            app_sockets,
            boot,
            listener,
            peers: Peers::default(),
            monitors: BTreeMap::new(),
            processes: BTreeMap::new(),
            running: BTreeMap::new(),
            reaping: BTreeSet::new(),
            hung_up: VecDeque::new(),
            parked: VecDeque::new(),
            resuming: false,
            stirred: false,
            busy: Busy::default(),
            base_fds: crate::sys::open_fds(),
            epoll,
            serial: 0,
            next_tick: Instant::now(),
            // It was set up a moment ago.
            network_at: Instant::now() + NETWORK_EVERY,
            network_fault: None,
            is_watched: sd_notify::watchdog_enabled().is_some(),
        })
    }

    /// Serves until the process is killed, which it may be at any time.
    pub fn serve(mut self) -> nix::Result<std::convert::Infallible> {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            let count = match self.epoll.wait(&mut events, self.timeout()) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(error) => return Err(error),
            };
            for event in &events[..count] {
                if let Some(token) = Token::of(event.data()) {
                    self.wake(token, event.events());
                }
            }
            self.check_time();
        }
    }

    fn timeout(&self) -> EpollTimeout {
        let deadlines = self.running.values().filter_map(|running| running.worker.deadline());
        let next = deadlines.chain([self.next_tick]).min().unwrap_or(self.next_tick);
        let wait = next.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        EpollTimeout::try_from(wait.min(TICK)).unwrap_or(EpollTimeout::ZERO)
    }

    fn wake(&mut self, token: Token, flags: EpollFlags) {
        match token {
            Token::Listener => self.accept(),
            Token::Peer(id) => self.serve_peer(id, flags),
            Token::Monitor(serial) => self.serve_monitor(serial),
            Token::Process(serial) => self.reap(serial),
            Token::Worker(serial) => self.worker_ended(serial),
        }
    }

    fn check_time(&mut self) {
        let now = Instant::now();
        for running in self.running.values_mut() {
            running.worker.check_deadline(now);
        }
        if now >= self.next_tick {
            self.next_tick = now + TICK;
            self.look_after_monitors();
            self.answer_late_observers(now);
            self.kill_hung_up(now);
            self.look_after_network(now);
            self.show_alive();
        }
    }

    /// By a child, one at a time.
    fn look_after_network(&mut self, now: Instant) {
        let at_it = self.running.values().any(|running| matches!(running.work, Work::KeepNetwork(_)));
        if now >= self.network_at && !at_it && self.running.len() < WORKERS_MAX {
            self.network_at = now + NETWORK_EVERY;
            self.work(Work::KeepNetwork(Box::new(self.config.clone())), Vec::new(), Then::Nothing);
        }
    }

    /// Said from this loop and nowhere else: one that hangs is started anew.
    fn show_alive(&self) {
        if self.is_watched {
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
        }
    }

    pub fn watch(&mut self, fd: &impl AsFd, token: Token) -> nix::Result<()> {
        self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, token.number()))
    }

    pub fn unwatch(&mut self, fd: &impl AsFd) {
        let _ = self.epoll.delete(fd);
    }

    pub fn next_serial(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    pub fn site(&self) -> Site<'_> {
        Site {
            pool: &self.pool,
            disk: &self.disk,
            cgroups: &self.cgroups,
            sockets: self.sockets.path(),
            app_sockets: self.app_sockets.path(),
            reader_gid: self.config.brain_uid,
        }
    }

    pub fn ground(&self) -> Ground<'_> {
        Ground {
            config: &self.config,
            binaries: &self.binaries,
            cgroups: &self.cgroups,
            pool: &self.pool,
            sockets: self.sockets.path(),
            app_sockets: &self.app_sockets,
        }
    }

    // Requests.

    pub fn packet(&mut self, peer: PeerId, bytes: &[u8], descriptors: Vec<OwnedFd>) {
        let call = match parse(bytes) {
            Ok(call) => call,
            Err((call, refusal)) => return self.answer(To { peer, call }, Err(refusal)),
        };
        let to = To { peer, call: call.id };
        let greeted = self.peers.get(peer).is_some_and(|peer| peer.greeted);
        if !greeted && !matches!(call.request, Request::Hello { .. }) {
            let message = "the first request of a connection is hello".to_owned();
            return self.answer(to, Err(Refusal { code: RefusalCode::BadRequest, message }));
        }
        self.admit(Task::Ask(Ask { to, request: call.request, descriptors }));
    }

    /// Begins with it, or parks it behind what works on the same objects.
    pub fn admit(&mut self, task: Task) {
        let parked = self.parked.len();
        if let Task::Ask(ask) = &task
            && parked >= PARKED_MAX
        {
            let (to, message) = (ask.to, format!("{PARKED_MAX} requests wait already; try again later"));
            return self.answer(to, Err(Refusal { code: RefusalCode::Exhausted, message }));
        }
        self.parked.push_back(task);
        self.resume();
    }

    /// Goes through what is parked, in order, and begins with all whose objects nobody before them holds or waits for.
    /// What is begun may itself end or park something; then it is gone through again, and not within itself.
    pub fn resume(&mut self) {
        self.stirred = true;
        if self.resuming {
            return;
        }
        self.resuming = true;
        while std::mem::take(&mut self.stirred) {
            let mut waiting = Busy::default();
            let mut kept = VecDeque::new();
            for task in std::mem::take(&mut self.parked) {
                let keys = self.keys_of(&task);
                let free = !self.busy.conflicts(&keys) && !waiting.conflicts(&keys);
                if free && (self.running.len() < WORKERS_MAX || !task.needs_child()) {
                    self.begin(task, keys);
                } else {
                    waiting.take(&keys);
                    kept.push_back(task);
                }
            }
            // What was parked meanwhile came later.
            kept.append(&mut self.parked);
            self.parked = kept;
        }
        self.resuming = false;
    }

    fn keys_of(&self, task: &Task) -> Keys {
        match task {
            Task::Ask(ask) => keys(&ask.request, &self.tables),
            Task::Own { keys, .. } => keys.clone(),
        }
    }

    fn begin(&mut self, task: Task, keys: Keys) {
        let ask = match task {
            Task::Own { work, keys } => return self.work(work, keys, Then::Nothing),
            Task::Ask(ask) => ask,
        };
        let kinds: Vec<Kind> = ask.descriptors.iter().map(kind).collect();
        let view = View {
            tables: &self.tables,
            config: &self.config,
            now_ms: crate::now_ms(),
            boot: &self.boot,
            salt: crate::draw(),
        };
        match check(&ask.request, &kinds, view) {
            Ok(plan) => self.carry_out(plan, ask.to, ask.descriptors, keys),
            Err(refusal) => self.answer(ask.to, Err(refusal)),
        }
    }

    // Children.

    /// Has a child do it. What can't even be begun fails like what can't be done.
    pub fn work(&mut self, work: Work, keys: Keys, then: Then) {
        let serial = self.next_serial();
        let started = Worker::start(&work, &self.site(), &self.base_fds, Instant::now())
            .and_then(|worker| Ok(self.watch(&worker, Token::Worker(serial)).map(|()| worker)?));
        self.busy.take(&keys);
        match started {
            Ok(worker) => drop(self.running.insert(serial, Running { worker, work, keys, then })),
            Err(error) => {
                let message = format!("{}: start a child for it: {error}", work.name());
                self.busy.release(&keys);
                self.worked(work, then, keys, Err(Refusal { code: RefusalCode::System, message }));
            }
        }
    }

    fn worker_ended(&mut self, serial: u64) {
        let Some(Running { worker, work, keys, then }) = self.running.remove(&serial) else { return };
        self.unwatch(&worker);
        let result = worker.finish(&work.name());
        self.busy.release(&keys);
        self.worked(work, then, keys, result);
        self.resume();
    }
}
