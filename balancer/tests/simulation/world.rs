//! The network, and what changes in it. Each batch brings a random part of what could have happened.

mod door;

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::rc::Rc;

use epagent_balancer::core::chunk::Chunk;
use epagent_balancer::core::config::Config;
use epagent_balancer::core::engine::Core;
use epagent_balancer::core::io::{Completion, ListenerId, Op, RecvMode, SockId};
use epagent_balancer::core::memory::Limits;
use epagent_balancer::core::outbox::PATIENCE_MS;
use epagent_balancer::table::Table;

use self::door::{DoorListener, DoorSock};
use crate::actors::{Client, PAGE, Rng};
use crate::far::{Conn, Far, StreamEnd};
use crate::judging::Judging;
use crate::ledger::Ledger;
use crate::prefaces::Prefaces;

pub const HTTP: usize = 0;
const TCP: usize = 1;
pub const TCP_PORT: u16 = 5432;
pub const APPS: usize = 4;
const CLIENTS: usize = 8;
const STREAMS: usize = 4;
/// More steps than any run needs; reaching it means something is stuck.
const STEPS_MAX: u64 = 200_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Calm,
    Deploys,
    Crashes,
    /// Deploys, and balancers that drain until a successor takes their place.
    Handovers,
    /// Deploys, health checks, ejections, limits and policies; apps that fall sick and get well.
    Judged,
}

pub struct App {
    pub listening: bool,
    pub state: &'static str,
}

pub struct World {
    pub rng: Rng,
    pub mode: Mode,
    core: Core,
    config: Config,
    now: u64,
    version: u64,
    holding: bool,
    holding_since: u64,
    /// Route a shows a page.
    parked: bool,
    apps: Vec<App>,
    pub clients: Vec<Client>,
    pub conns: Vec<(Conn, Far)>,
    pub socks: BTreeMap<SockId, DoorSock>,
    ready: Vec<Completion>,
    pub listeners: [DoorListener; 2],
    unadopted: HashMap<i32, usize>,
    live: Rc<Cell<usize>>,
    pub served: HashMap<u64, u32>,
    /// Since when few buffers are left to lend.
    scarce_since: Option<u64>,
    traced: bool,
    /// The most there were at a time.
    sockets_max: usize,
    /// How much each stream carries: from the client, and back.
    pub stream_sizes: HashMap<u64, (usize, usize)>,
    pub prefaces: Prefaces,
    pub judging: Judging,
    ledger: Ledger,
}

impl World {
    pub fn new(seed: u64, mode: Mode) -> Self {
        let mut rng = Rng(seed);
        let apps = (0..APPS).map(|_| App { listening: true, state: "up" }).collect();
        let hosts = [
            "a.example",
            "a.example",
            "b.example",
            "b.example",
            "x.wild.example",
            "other.example",
            "page.example",
            "moved.example",
            "empty.example",
        ];
        let clients = (0..CLIENTS).map(|n| Client::new(&mut rng, 100 * n as u64, &hosts)).collect();
        let memory = Limits {
            lent_max: rng.below(12) as usize,
            pressed_bytes: 1 + rng.below(400_000) as usize,
            ..Limits::default()
        };
        let config = Config {
            connections_max: 1 + rng.below(12),
            overload_grace_ms: u64::MAX,
            access_log: true,
            memory,
            ..Config::default()
        };
        let prefaces = Prefaces::new(&mut rng);
        let judging = Judging::new(&mut rng, mode);
        let mut world = Self {
            rng,
            mode,
            core: Core::new(config.clone()),
            config,
            now: 1,
            version: 0,
            holding: false,
            holding_since: 0,
            parked: false,
            apps,
            clients,
            conns: Vec::new(),
            socks: BTreeMap::new(),
            ready: Vec::new(),
            listeners: Default::default(),
            unadopted: HashMap::new(),
            live: Rc::default(),
            served: HashMap::new(),
            stream_sizes: HashMap::new(),
            prefaces,
            judging,
            ledger: Ledger::default(),
            scarce_since: None,
            traced: std::env::var_os("SIMULATION_TRACE").is_some(),
            sockets_max: 0,
        };
        world.begin();
        for client in 0..CLIENTS {
            world.dial(HTTP, Far::Client(client));
        }
        for id in 1..=STREAMS as u64 {
            let end = StreamEnd::client(&mut world.rng, id, &mut world.stream_sizes);
            world.dial(TCP, Far::StreamClient(end));
        }
        world
    }

    pub fn run(mut self) {
        for step in 0.. {
            assert!(step < STEPS_MAX, "stuck: {}", self.picture());
            self.all_act();
            if self.mode != Mode::Calm && self.rng.one_in(40) {
                self.change_the_world();
            }
            self.now += if self.rng.one_in(4) { self.rng.below(60) } else { 0 };
            self.batch();
            if self.clients.iter().all(|client| client.vanished || client.is_done())
                && self.all_clients_gone()
            {
                break;
            }
        }
        self.check_answers();
        self.wind_down();
    }

    /// Clients that are done hang up; the run is over when the core has seen it.
    fn all_clients_gone(&self) -> bool {
        let is_client = |far: &Far| matches!(far, Far::Client(_) | Far::StreamClient(_));
        self.conns.iter().all(|(conn, far)| !is_client(far) || conn.core_closed)
    }

    fn check_answers(&self) {
        for client in &self.clients {
            if self.mode == Mode::Judged {
                assert!(client.is_done(), "unanswered: {:?}", client.waiting.front().map(|asked| asked.id));
            } else if self.mode != Mode::Crashes {
                assert!(client.is_done(), "unanswered: {:?}", client.waiting.front().map(|asked| asked.id));
                for (id, status) in &client.answered {
                    assert!(matches!(status, 200 | 204 | 299 | 307 | 410), "request {id} got {status}");
                }
            }
            for (id, status) in &client.answered {
                let judged = self.mode == Mode::Judged && matches!(status, 429 | 500);
                let known = judged || matches!(status, 200 | 204 | 299 | 307 | 410 | 502 | 503);
                assert!(known, "request {id} got {status}");
            }
        }
        for (id, times) in &self.served {
            assert!(*times == 1, "request {id} must not be repeated, and was served {times} times");
        }
    }

    /// With the clients gone, only idle connections may be left, and those not for long.
    fn wind_down(mut self) {
        self.judging.rest();
        self.push_table();
        for _ in 0..200 {
            self.now += 100;
            self.all_act();
            self.batch();
        }
        assert_eq!(self.core.socket_count(), 0, "sockets are left open");
        assert_eq!(self.core.memory().status().kept_bytes, 0, "nobody is left, but something counts as kept");
        assert_eq!(self.core.source_counts().1, 0, "a source still has something");
        self.check_nothing_is_left();
        drop(std::mem::take(&mut self.ready));
        self.socks.clear();
        assert_eq!(self.live.get(), 0, "lent buffers were not given back");
    }

    /// A drained core ends, as its process would; another one takes the listening sockets over.
    fn succeed(&mut self) {
        assert!(self.unadopted.is_empty(), "an accepted client is lost");
        assert!(self.listeners.iter().all(|listener| !listener.accepting), "it ends while it accepts");
        let sockets: Vec<SockId> = self.socks.keys().copied().collect();
        for sock in sockets {
            self.apply(Op::Close { sock, reset: false });
        }
        self.ready.clear();
        std::mem::take(&mut self.ledger).check(&self.core.snapshot(self.now, true));
        self.core = Core::new(self.config.clone());
        self.begin();
    }

    fn begin(&mut self) {
        self.push_table();
        for listener in [HTTP, TCP] {
            let listen = self.prefaces.listen(&mut self.rng, listener);
            let local = SocketAddr::from(([198, 51, 100, 1], 80));
            self.core.add_listener(ListenerId(listener as u32), listen, Some(local));
        }
    }

    fn check_nothing_is_left(&self) {
        let snapshot = self.core.snapshot(self.now, true);
        for upstream in &snapshot.upstreams {
            let busy = (upstream.active_requests, upstream.active_connections, upstream.idle_connections);
            assert_eq!(busy, (0, 0, 0), "{} still counts something", upstream.id);
        }
        assert!(snapshot.routes.iter().all(|route| route.held == 0), "something is still held");
        assert!(snapshot.routes.iter().all(|route| route.active == 0), "a route still counts something");
        assert_eq!((snapshot.counters.connections_open, snapshot.counters.upstream_connections_open), (0, 0));
        self.ledger.check(&snapshot);
    }

    fn push_table(&mut self) {
        self.version += 1;
        self.judging.told(self.apps.iter().map(|app| app.state == "up"));
        let upstream = |n: usize| {
            let (state, weight) = (self.apps[n].state, self.judging.weight(n));
            format!(r#"{{"id":"app{n}","address":"10.0.0.{n}:80","state":"{state}","weight":{weight}}}"#)
        };
        let upstreams = (0..APPS).map(upstream).collect::<Vec<_>>().join(",");
        let proxy = format!(r#"{{"proxy":{{{}"upstreams":[{upstreams}]}}}}"#, self.judging.settings());
        let streams =
            format!(r#"{{"proxy":{{{}"upstreams":[{upstreams}]}}}}"#, self.judging.stream_settings());
        let or_hold = |action: &str| if self.holding { r#"{"hold":{}}"# } else { action }.to_owned();
        let (action, streams, limits) = (or_hold(&proxy), or_hold(&streams), self.judging.limits());
        let page = format!(r#"{{"static":{{"status":299,"body":"{PAGE}"}}}}"#);
        let first = if self.parked { &page } else { &action };
        let text = format!(
            r#"{{"version":{},"routes":[
              {{"id":"a","match":{{"host":"a.example"}},{limits}"action":{first}}},
              {{"id":"o","match":{{"host":"other.example"}},"action":{{"alias":{{"host":"a.example"}}}}}},
              {{"id":"p","match":{{"host":"page.example"}},"action":{page}}},
              {{"id":"m","match":{{"host":"moved.example"}},
                "action":{{"redirect":{{"to":"https://new.example","status":307}}}}}},
              {{"id":"e","match":{{"host":"empty.example"}},"action":{{"empty":{{"status":410}}}}}},
              {{"id":"b","match":{{"host":"b.example"}},{limits}"action":{proxy}}},
              {{"id":"w","match":{{"host":"*.wild.example"}},"action":{proxy}}},
              {{"id":"t","match":{},"action":{}}}]}}"#,
            self.version,
            self.prefaces.stream_match(),
            // The same instances listen for streams at addresses of their own.
            streams
                .replace("10.0.0.", "10.0.1.")
                .replace("\"id\":\"app", "\"id\":\"stream")
                .replace("\"state\"", &format!("\"proxy_protocol\":{},\"state\"", self.prefaces.told))
        );
        let table: Table = serde_json::from_str(&text).expect("a table");
        table.validate().expect("a valid table");
        self.core.set_table(self.now, &table);
    }

    /// A deploy step or a crash.
    fn change_the_world(&mut self) {
        if self.mode == Mode::Handovers && self.rng.one_in(3) {
            return self.core.drain(self.now);
        }
        let app = self.rng.below(APPS as u64) as usize;
        match self.rng.below(if self.mode == Mode::Crashes { 5 } else { 4 }) {
            0 if self.rng.one_in(2) => self.parked = !self.parked && self.rng.one_in(2),
            0 => {
                self.holding = !self.holding && self.rng.one_in(2);
                self.holding_since = self.now;
            }
            1 if self.mode == Mode::Judged && self.rng.one_in(2) => {
                self.judging.sick[app] = !self.judging.sick[app];
            }
            1 => self.apps[app].state = "up",
            2 => self.apps[app].state = ["draining", "down"][self.rng.below(2) as usize],
            // A restart: nothing listens for a while. Without crashes, only of an app that has drained.
            3 => {
                let empty = !self.has_work(app);
                self.apps[app].listening = !(self.apps[app].listening && empty);
            }
            _ => {
                self.apps[app].listening = self.rng.one_in(2);
                for (conn, far) in &mut self.conns {
                    if far.is_of(app) && self.rng.one_in(2) {
                        conn.reset = true;
                    }
                }
            }
        }
        // Nothing is held for so long that it ages out.
        self.holding &= self.now < self.holding_since + 10_000;
        // Something comes back before long, or every request would only age out.
        if self.apps.iter().all(|app| app.state != "up" || !app.listening) {
            self.apps[app] = App { listening: true, state: "up" };
            self.judging.sick[app] = false;
        }
        self.push_table();
    }

    fn has_work(&self, app: usize) -> bool {
        self.conns.iter().any(|(conn, far)| far.is_of(app) && !conn.core_closed)
    }

    fn batch(&mut self) {
        let mut groups: Vec<Vec<Completion>> = self.ready.drain(..).map(|one| vec![one]).collect();
        self.accept_some(HTTP, &mut groups);
        self.accept_some(TCP, &mut groups);
        let ids: Vec<SockId> = self.socks.keys().copied().collect();
        for id in ids {
            let mut group = Vec::new();
            self.complete_send(id, &mut group);
            self.complete_tls(id, &mut group);
            self.complete_recv(id, &mut group);
            groups.push(group);
        }
        if groups.iter().any(|group| !group.is_empty()) {
            for sock in self.socks.values_mut().filter(|sock| sock.untold.is_some()) {
                sock.trying = false;
                groups.push(sock.untold.take().into_iter().collect());
            }
        }
        self.rng.shuffle(&mut groups);
        let mut fin_due = Vec::new();
        for completion in groups.into_iter().flatten() {
            self.trace(&completion);
            if let Completion::Sent { sock: id, bytes } = completion
                && let Some(sock) = self.socks.get_mut(&id)
                && sock.last_bytes.take() == Some(bytes)
            {
                fin_due.push(id);
            }
            self.core.handle(self.now, completion);
        }
        self.core.finish_batch(self.now);
        self.ledger.note(&self.core.take_access());
        let ops: Vec<Op> = self.core.ops().drain(..).collect();
        for op in ops {
            self.trace(&op);
            self.apply(op);
        }
        // Until then the kernel may keep the last bytes back.
        for sock in fin_due.iter().filter_map(|id| self.socks.get(id)) {
            assert!(self.conns[sock.conn].0.to_far_fin, "no FIN after the last send");
        }
        if self.core.is_finished() {
            self.succeed();
        }
        // What may bring much is called back as soon as much waits.
        let is_stream = |sock: &DoorSock| matches!(self.conns[sock.conn].1, Far::StreamApp { .. });
        let unbounded =
            |sock: &&DoorSock| sock.recv == Some(RecvMode::Many) && !sock.stopping && is_stream(sock);
        let pressed = self.core.memory().is_pressed();
        assert!(
            !pressed || self.socks.values().find(unbounded).is_none(),
            "{} still bring all they can",
            self.now
        );
        // A batch may close sockets after it has set timers.
        let timers = self.core.timer_count();
        self.sockets_max = self.sockets_max.max(self.core.socket_count());
        assert!(timers <= 4 * self.sockets_max + Config::TIMERS_SLACK, "{timers} timers");
        let scarce = self.core.memory().is_lending_scarce();
        self.scarce_since = scarce.then(|| self.scarce_since.unwrap_or(self.now));
        self.check_lent_buffers();
    }

    /// From batch to batch no more buffers are kept than may be lent, and when few are left none for long.
    fn check_lent_buffers(&self) {
        let (memory, trying) = (self.core.memory(), self.socks.values().any(|sock| sock.trying));
        assert!(memory.lent() <= memory.limits().lent_max, "{} buffers are lent", memory.lent());
        let kept = self.live.get();
        assert!(trying || kept <= memory.lent(), "{kept} buffers are kept, of {} lent", memory.lent());
        for sock in self.socks.values().filter(|_| self.scarce_since.is_some()) {
            let Some((chunks, _)) = &sock.waiting_send else { continue };
            let since = sock.waits_since.max(self.scarce_since.unwrap_or(self.now));
            let late = since + PATIENCE_MS + Config::LENT_TICK_MS;
            let lends = chunks.iter().any(Chunk::is_shared);
            assert!(!lends || sock.send_stopping || self.now <= late, "buffers are lent for too long");
        }
    }

    /// With `SIMULATION_TRACE` set, says everything that passes between core and door.
    fn trace(&self, what: &dyn std::fmt::Debug) {
        if self.traced {
            eprintln!("{} {what:?}", self.now);
        }
    }

    fn picture(&self) -> String {
        let clients: Vec<String> = self
            .clients
            .iter()
            .map(|c| format!("{}/{}/{}", c.todo.len(), c.waiting.len(), c.answered.len()))
            .collect();
        format!("clients {clients:?}, {} sockets, now {}, {:?}", self.socks.len(), self.now, self.core)
    }
}
