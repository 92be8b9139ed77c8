//! The network and the door. Each batch brings a random part of what could have happened.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use epagent_balancer::core::chunk::{Chunk, Chunks, SharedBuffer};
use epagent_balancer::core::config::Config;
use epagent_balancer::core::engine::Core;
use epagent_balancer::core::io::{
    AfterSend, Completion, Errno, ListenerId, Op, RawSocket, RecvEnd, RecvMode, SendMode, SockId,
};
use epagent_balancer::core::memory::Limits;
use epagent_balancer::core::outbox::PATIENCE_MS;
use epagent_balancer::table::{Address, Table};

use crate::actors::{AppConn, Client, PAGE, Rng, take_front};
use crate::far::{Conn, Far, StreamEnd};
use crate::judging::Judging;
use crate::ledger::Ledger;
use crate::prefaces::Prefaces;
use crate::secure::{self, DoorTls};

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

/// A socket as the door has it.
#[derive(Default)]
pub struct DoorSock {
    pub conn: usize,
    pub recv: Option<RecvMode>,
    stopping: bool,
    pub waiting_send: Option<(Chunks, SendMode)>,
    /// What was taken of a send that waits for all of it, and whether it is being stopped.
    taken: usize,
    send_stopping: bool,
    waits_since: u64,
    /// A send that does not wait, whose completion comes with the next batch.
    pub trying: bool,
    /// What its end comes to, when nothing follows from it: it is told with whatever completes next.
    untold: Option<Completion>,
    /// The bytes of the last send, when FIN is to follow as soon as they are taken.
    last_bytes: Option<usize>,
    pub tls: DoorTls,
}

/// A listener as the door has it.
#[derive(Default)]
pub struct DoorListener {
    accepting: bool,
    stopping: bool,
    pub queue: VecDeque<usize>,
}

pub struct App {
    pub listening: bool,
    pub state: &'static str,
}

/// A lent buffer; counts itself.
struct Lent {
    bytes: Vec<u8>,
    live: Rc<Cell<usize>>,
}

impl SharedBuffer for Lent {
    fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.live.set(self.live.get() - 1);
    }
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

    fn accept_some(&mut self, index: usize, groups: &mut Vec<Vec<Completion>>) {
        let mut group = Vec::new();
        let id = ListenerId(index as u32);
        let listener = &mut self.listeners[index];
        while listener.accepting && self.rng.one_in(2) {
            let Some(conn) = listener.queue.pop_front() else { break };
            self.unadopted.insert(conn as i32, conn);
            let peer = Some(SocketAddr::from(([192, 0, 2, conn as u8], 1024 + conn as u16)));
            group.push(Completion::Accepted { listener: id, raw: RawSocket(conn as i32), peer });
        }
        let failed = listener.accepting && self.rng.one_in(200);
        if listener.stopping || failed {
            (listener.accepting, listener.stopping) = (false, false);
            let error = failed.then_some(Errno(libc::EMFILE));
            group.push(Completion::AcceptEnded { listener: id, error });
        }
        groups.push(group);
    }

    fn complete_recv(&mut self, id: SockId, group: &mut Vec<Completion>) {
        let Some(sock) = self.socks.get_mut(&id) else { return };
        let (rng, conn) = (&mut self.rng, &mut self.conns[sock.conn].0);
        let Some(mode) = sock.recv else { return };
        if !rng.one_in(2) && !sock.stopping {
            return;
        }
        let (mut end, before) = (None, group.len());
        let (bounded, mut left) = match mode {
            RecvMode::Many => (false, usize::MAX),
            RecvMode::Once { limit_bytes } => (true, limit_bytes as usize),
        };
        for _ in 0..1 + rng.below(8) {
            if conn.reset || conn.to_core.is_empty() {
                break;
            }
            if rng.one_in(30) {
                end = Some(RecvEnd::NoBuffers);
                break;
            }
            let most = if rng.one_in(3) { 20 } else { 16_384 }.min(left);
            let size = 1 + rng.below(most as u64) as usize;
            let bytes = take_front(&mut conn.to_core, size);
            left -= bytes.len();
            self.live.set(self.live.get() + 1);
            let chunk = Chunk::shared(Rc::new(Lent { bytes, live: self.live.clone() }));
            group.push(Completion::Received { sock: id, chunk });
            if left == 0 || rng.one_in(if bounded { 3 } else { 30 }) {
                end = Some(RecvEnd::Ended);
                break;
            }
        }
        if bounded && group.len() > before {
            end = end.or(Some(RecvEnd::Ended));
        }
        if end.is_none() {
            if conn.reset {
                end = Some(RecvEnd::Failed(Errno(libc::ECONNRESET)));
            } else if conn.to_core_fin && conn.to_core.is_empty() {
                end = Some(secure::end_of_stream(rng, self.mode, sock.tls));
            } else if sock.stopping {
                end = Some(RecvEnd::Ended);
            }
        }
        if let Some(why) = end {
            (sock.recv, sock.stopping) = (None, false);
            group.push(Completion::RecvEnded { sock: id, why });
        }
    }

    fn complete_send(&mut self, id: SockId, group: &mut Vec<Completion>) {
        let Some(sock) = self.socks.get_mut(&id) else { return };
        sock.trying = sock.untold.is_some();
        let (rng, conn) = (&mut self.rng, &mut self.conns[sock.conn].0);
        let room = conn.window.saturating_sub(conn.to_far.len());
        let failed = conn.reset || conn.core_closed;
        let stopping = sock.send_stopping;
        if !(failed || stopping || (room > 0 && rng.one_in(2))) {
            return;
        }
        let Some((mut chunks, mode)) = sock.waiting_send.take() else { return };
        if failed {
            group.push(Completion::SendFailed { sock: id, error: Errno(libc::EPIPE) });
            return;
        }
        let bytes = if stopping && rng.one_in(2) { 0 } else { take_some(rng, conn, &chunks, room) };
        sock.taken += bytes;
        advance(&mut chunks, bytes);
        // Waiting for all of it, a door goes on by itself; it may as well end with less.
        if mode == SendMode::WaitAll && !chunks.is_empty() && !stopping && !rng.one_in(10) {
            sock.waiting_send = Some((chunks, mode));
            return;
        }
        group.push(Completion::Sent { sock: id, bytes: std::mem::take(&mut sock.taken) });
        sock.send_stopping = false;
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Accept(id) => {
                let listener = &mut self.listeners[id.0 as usize];
                assert!(!std::mem::replace(&mut listener.accepting, true), "accept is armed twice");
            }
            Op::StopAccept(id) => {
                let listener = &mut self.listeners[id.0 as usize];
                assert!(listener.accepting, "stopping an accept that is not armed");
                listener.stopping = true;
            }
            Op::Adopt { raw, sock } => {
                let conn = self.unadopted.remove(&raw.0).expect("adopted once");
                self.insert(sock, conn);
            }
            Op::Refuse { raw } => {
                let conn = self.unadopted.remove(&raw.0).expect("refused once");
                (self.conns[conn].0.reset, self.conns[conn].0.core_closed) = (true, true);
            }
            Op::Connect { sock, address } => self.connect(sock, address),
            Op::Recv { sock, mode } => {
                let sock = self.socks.get_mut(&sock).expect("receiving from an open socket");
                assert!(sock.recv.is_none(), "a receive is armed twice");
                assert!(sock.tls != DoorTls::Handshake, "a receive during the handshake");
                sock.recv = Some(mode);
            }
            Op::StopRecv { sock } => {
                // It may have ended by itself in this batch.
                let sock = self.socks.get_mut(&sock).expect("stopping an open socket");
                sock.stopping = sock.recv.is_some();
            }
            Op::Send { sock, chunks, mode, after } => self.send(sock, chunks, mode, after),
            Op::StopSend { sock } => {
                let sock = self.socks.get_mut(&sock).expect("stopping a send of an open socket");
                sock.send_stopping = sock.waiting_send.is_some();
            }
            Op::StartTls { sock, said, .. } => self.start_tls(sock, &said),
            Op::EndTls { sock } => self.end_tls(sock),
            Op::ShutdownWrite { sock } => {
                let sock = &self.socks[&sock];
                assert!(sock.tls == DoorTls::Off, "FIN without a goodbye");
                assert!(sock.waiting_send.is_none() && !sock.trying, "FIN overtakes a send");
                self.conns[sock.conn].0.to_far_fin = true;
            }
            Op::Close { sock, reset } => {
                let sock = self.socks.remove(&sock).expect("closing an open socket");
                let conn = &mut self.conns[sock.conn].0;
                conn.core_closed = true;
                // As the kernel does: unread data turns the close into a reset, and so does a cut send.
                if reset || !conn.to_core.is_empty() || sock.waiting_send.is_some() {
                    conn.reset = true;
                    conn.to_far.clear();
                }
                conn.to_far_fin = true;
            }
        }
    }

    fn insert(&mut self, id: SockId, conn: usize) {
        let sock = DoorSock { conn, ..DoorSock::default() };
        assert!(self.socks.insert(id, sock).is_none(), "a socket id is used twice");
    }

    fn connect(&mut self, sock: SockId, address: Address) {
        let Address::Tcp(address) = address else { panic!("an address of no app: {address}") };
        let IpAddr::V4(ip) = address.ip() else { panic!("an address of no app: {address}") };
        let app = usize::from(ip.octets()[3]);
        let state = self.apps[app].state;
        let open = self.judging.fails_open() && state == "down";
        assert!(state == "up" || open, "a connect to an app that is {state}");
        let window = 64 + self.rng.below(100_000) as usize;
        let far = match ip.octets()[2] {
            0 => Far::App { app, conn: AppConn { ups: self.judging.ups(app), ..AppConn::default() } },
            _ => Far::StreamApp { app, end: StreamEnd::default() },
        };
        self.conns.push((Conn { window, ..Conn::default() }, far));
        self.insert(sock, self.conns.len() - 1);
        // Short of descriptors, or the queue of a unix socket is full: neither says that the app is gone.
        let passing = [libc::EMFILE, libc::EAGAIN].into_iter().find(|_| self.rng.one_in(100));
        self.ready.push(if self.apps[app].listening && passing.is_none() {
            Completion::Connected { sock }
        } else {
            let error = Errno(passing.unwrap_or(libc::ECONNREFUSED));
            self.conns.last_mut().expect("just pushed").0.reset = true;
            Completion::ConnectFailed { sock, error }
        });
    }

    fn send(&mut self, id: SockId, chunks: Chunks, mode: SendMode, after: AfterSend) {
        let sock = self.socks.get_mut(&id).expect("sending on an open socket");
        assert!(sock.waiting_send.is_none() && !sock.trying, "two sends at a time");
        assert!(matches!(sock.tls, DoorTls::Off | DoorTls::On), "a send in state {:?}", sock.tls);
        let conn = &mut self.conns[sock.conn].0;
        assert!(!conn.to_far_fin, "a send after FIN");
        sock.last_bytes = (after == AfterSend::Fin).then(|| chunks.iter().map(|chunk| chunk.len()).sum());
        if mode != SendMode::Try {
            (sock.waiting_send, sock.taken, sock.waits_since) = (Some((chunks, mode)), 0, self.now);
            return;
        }
        sock.trying = true;
        let room = conn.window.saturating_sub(conn.to_far.len());
        let offered: usize = chunks.iter().map(|chunk| chunk.len()).sum();
        let over = if conn.reset {
            Completion::SendFailed { sock: id, error: Errno(libc::ECONNRESET) }
        } else {
            Completion::Sent { sock: id, bytes: take_some(&mut self.rng, conn, &chunks, room) }
        };
        // What failed, or was taken in part, is told at once.
        let whole = matches!(over, Completion::Sent { bytes, .. } if bytes == offered);
        match whole && after == AfterSend::Nothing && self.rng.one_in(2) {
            true => sock.untold = Some(over),
            false => self.ready.push(over),
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

/// Drops the first bytes.
fn advance(chunks: &mut Chunks, mut bytes: usize) {
    while let Some(first) = chunks.first_mut() {
        if first.len() > bytes {
            return first.advance(bytes);
        }
        bytes -= first.len();
        chunks.remove(0);
    }
}

/// Takes what fits, or a random part of it.
fn take_some(rng: &mut Rng, conn: &mut Conn, chunks: &[Chunk], room: usize) -> usize {
    let mut bytes = Vec::new();
    chunks.iter().for_each(|chunk| bytes.extend_from_slice(chunk));
    let most = bytes.len().min(room);
    let count = if rng.one_in(4) { rng.below(most as u64 + 1) as usize } else { most };
    conn.to_far.extend_from_slice(&bytes[..count]);
    count
}
