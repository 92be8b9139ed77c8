//! The core behind a door that does anything a door may: arbitrary bytes decide what completes, in which order
//! and how. What the core asks for must stay within the contract of `core::io`, and once every connection is
//! gone, nothing may be left.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use epagent_balancer::control::protocol::Counters;
use epagent_balancer::core::chunk::Chunk;
use epagent_balancer::core::config::Config;
use epagent_balancer::core::engine::Core;
use epagent_balancer::core::io::{
    Completion, Errno, ListenerId, Op, RawSocket, RecvEnd, RecvMode, SendMode, SockId,
};
use epagent_balancer::core::listen::{Listen, Mode};
use epagent_balancer::core::secure::{Names, Secured, TlsFault};
use epagent_balancer::table::Table;

/// Most sockets accepted in one run.
const ACCEPTED_MAX: i32 = 40;

/// What clients and apps may say, so that arbitrary bytes get beyond the first parser.
const REQUESTS: [&[u8]; 10] = [
    b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n",
    b"POST /x HTTP/1.1\r\nHost: b.example\r\nContent-Length: 5\r\n\r\nhello",
    b"POST / HTTP/1.1\r\nHost: b.example\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
    b"0\r\n\r\n",
    b"GET /ws HTTP/1.1\r\nHost: b.example\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"HEAD / HTTP/1.0\r\nHost: b.example\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: page.example\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n",
    b"DELETE / HTTP/1.1\r\nHost: b.example\r\n\r\nGET / HTTP/1.1\r\nHost: a.example\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: ",
    b"garbage\r\n\r\n",
];
const RESPONSES: [&[u8]; 8] = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\nuntil the end",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"HTTP/1.1 503 Busy\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nnot all",
];
const HEADERS: [&[u8]; 4] = [
    b"PROXY TCP4 192.0.2.1 198.51.100.1 1 2\r\n",
    b"PROXY UNKNOWN\r\n",
    b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0",
    b"PROXY TCP5",
];
/// A ClientHello for `db.e`, and one that is cut short.
const HELLOS: [&[u8]; 2] = [
    b"\x16\x03\x01\x00\x3c\x01\x00\x00\x38\x03\x03................................\x00\x00\x02\x13\x01\x01\x00\
      \x00\x0d\x00\x00\x00\x09\x00\x07\x00\x00\x04db.e",
    b"\x16\x03\x01\x00\x3c\x01\x00\x00\x38\x03\x03",
];

/// A socket as the door has it.
#[derive(Default)]
struct Sock {
    /// What its far side may say, the preface first.
    preface: &'static [&'static [u8]],
    words: &'static [&'static [u8]],
    connecting: bool,
    recv: Option<RecvMode>,
    send: Option<(usize, SendMode)>,
    handshake: bool,
    secure: bool,
    goodbye: bool,
    fin: bool,
}

/// The bytes that decide.
struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::from(self.next().unwrap_or(0)) % bound.max(1)
    }

    fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }
}

struct Door<'a> {
    choices: Choices<'a>,
    core: Core,
    now: u64,
    accepting: BTreeMap<ListenerId, bool>,
    unadopted: Vec<(i32, ListenerId)>,
    accepted: i32,
    socks: BTreeMap<SockId, Sock>,
}

/// Runs the core on completions that these bytes choose; what came of it.
pub fn completions(bytes: &[u8]) -> Counters {
    let config = Config { connections_max: 12, access_log: true, ..Config::default() };
    let mut door = Door {
        choices: Choices(bytes),
        core: Core::new(config),
        now: 1,
        accepting: BTreeMap::new(),
        unadopted: Vec::new(),
        accepted: 0,
        socks: BTreeMap::new(),
    };
    door.core.set_table(1, &table(1, 0));
    let modes = [Mode::Http, Mode::Tcp { port: 5432 }, Mode::Sni, Mode::Http, Mode::Http];
    for (index, mode) in modes.into_iter().enumerate() {
        let listen = Listen { mode, tls: index == 4, trusted: index == 3, proxy_protocol: index >= 3 };
        let local = Some(SocketAddr::from(([198, 51, 100, 1], 80)));
        door.core.add_listener(ListenerId(index as u32), listen, local);
    }
    door.batch();
    while let Some(choice) = door.choices.next() {
        door.step(choice);
    }
    door.wind_down()
}

fn table(version: u64, kind: usize) -> Table {
    let up = |port: u16, more: &str| {
        format!(
            r#"{{"proxy":{{"upstreams":[{{"id":"a{port}","address":"10.0.0.1:{port}"{more}}},
               {{"id":"b{port}","address":"10.0.0.2:{port}"{more}}}]}}}}"#
        )
    };
    let told = r#","proxy_protocol":true"#;
    let hold = r#"{"hold":{}}"#.to_owned();
    let page = r#"{"static":{"body":"page"}}"#.to_owned();
    let (a, port, sni) = match kind {
        0 => (up(80, ""), up(81, told), up(82, "")),
        1 => (hold.clone(), hold.clone(), hold),
        2 => (page.clone(), up(81, told), up(82, "")),
        _ => return serde_json::from_str(&format!(r#"{{"version":{version}}}"#)).expect("a table"),
    };
    let text = format!(
        r#"{{"version":{version},"defaults":{{"hold":{{"max_requests":3,"max_age_ms":500}}}},"routes":[
          {{"id":"a","match":{{"host":"a.example"}},"action":{a}}},
          {{"id":"b","match":{{"host":"b.example"}},"action":{}}},
          {{"id":"p","match":{{"host":"page.example"}},"action":{page}}},
          {{"id":"t","match":{{"port":5432}},"action":{port}}},
          {{"id":"s","match":{{"sni":"*"}},"action":{sni}}}]}}"#,
        up(80, "")
    );
    serde_json::from_str(&text).expect("a table")
}

impl Door<'_> {
    /// One thing happens.
    fn step(&mut self, choice: u8) {
        match choice % 16 {
            0 => self.accept(),
            1..=5 if choice < 200 => self.batch(),
            3 => {
                self.now += [1, 20, 60, 1_000, 20_000][self.choices.below(5)];
                self.batch();
            }
            4 if choice > 220 => {
                let kind = self.choices.below(4);
                self.core.set_table(self.now, &table(self.now, kind));
            }
            5 if choice > 240 && self.choices.below(8) == 0 => self.core.drain(self.now),
            5 if choice > 220 && self.choices.below(8) == 0 => self.core.stop(self.now),
            _ => self.complete(),
        }
    }

    fn tell(&mut self, completion: Completion) {
        self.core.handle(self.now, completion);
    }

    fn accept(&mut self) {
        let listener = ListenerId(self.choices.below(5) as u32);
        let Some(stopping) = self.accepting.get(&listener).copied() else { return };
        if stopping || self.choices.below(9) == 8 {
            self.accepting.remove(&listener);
            let error = (!stopping).then_some(Errno(libc::EMFILE));
            return self.tell(Completion::AcceptEnded { listener, error });
        }
        if self.accepted < ACCEPTED_MAX {
            self.accepted += 1;
            self.unadopted.push((self.accepted, listener));
            let peer = Some(SocketAddr::from(([192, 0, 2, 1], 1000)));
            self.tell(Completion::Accepted { listener, raw: RawSocket(self.accepted), peer });
            self.batch();
        }
    }

    /// Something that is under way on one socket ends, or goes on.
    fn complete(&mut self) {
        let at = self.choices.below(self.socks.len());
        let Some(sock) = self.socks.keys().nth(at).copied() else { return };
        let fault = self.choices.below(24) == 23;
        let state = self.socks.get_mut(&sock).expect("known");
        let gone = Errno(libc::ECONNRESET);
        if std::mem::take(&mut state.connecting) {
            let failed = Completion::ConnectFailed { sock, error: Errno(libc::ECONNREFUSED) };
            self.tell(if fault { failed } else { Completion::Connected { sock } });
        } else if std::mem::take(&mut state.handshake) {
            state.secure = !fault;
            let names = Arc::new(Names::default());
            let secured = Secured { server_name: None, names, by_default: false, resumed: false };
            let last_words = Chunk::owned(self.choices.take(3).to_vec());
            let failed = Completion::SecureFailed { sock, fault: TlsFault::Broken, last_words };
            self.tell(if fault { failed } else { Completion::Secured { sock, secured: Box::new(secured) } });
        } else if std::mem::take(&mut state.goodbye) {
            state.secure = false;
            let failed = Completion::SendFailed { sock, error: gone };
            self.tell(if fault { failed } else { Completion::TlsEnded { sock } });
        } else if let Some((offered, mode)) = state.send.filter(|_| self.choices.below(2) == 0) {
            state.send = None;
            let least = usize::from(mode != SendMode::Try).min(offered);
            let bytes = least + self.choices.below(4) * offered / 3;
            let failed = Completion::SendFailed { sock, error: gone };
            self.tell(if fault { failed } else { Completion::Sent { sock, bytes: bytes.min(offered) } });
        } else if let Some(mode) = state.recv {
            self.receive(sock, mode, fault);
        }
    }

    fn receive(&mut self, sock: SockId, mode: RecvMode, fault: bool) {
        let kind = self.choices.below(32);
        let state = self.socks.get_mut(&sock).expect("known");
        let words = std::mem::take(&mut state.preface);
        let words = if words.is_empty() { state.words } else { words };
        let said: &[u8] = match kind {
            0..=21 => words[self.choices.below(words.len())],
            22..=26 => {
                let count = self.choices.below(64);
                self.choices.take(count)
            }
            _ => b"",
        };
        let said = match mode {
            RecvMode::Once { limit_bytes } => &said[..said.len().min(limit_bytes as usize)],
            RecvMode::Many => said,
        };
        if !said.is_empty() {
            self.tell(Completion::Received { sock, chunk: Chunk::owned(said.to_vec()) });
        }
        let why = match kind {
            _ if fault && kind < 4 => RecvEnd::Failed(Errno(libc::ECONNRESET)),
            28 if fault || self.choices.below(3) == 0 => RecvEnd::Eof,
            29 if self.socks.get(&sock).is_some_and(|sock| sock.secure) => RecvEnd::Cut,
            30 => RecvEnd::NoBuffers,
            _ if mode == RecvMode::Many && kind.is_multiple_of(2) => return,
            _ => RecvEnd::Ended,
        };
        if let Some(state) = self.socks.get_mut(&sock) {
            state.recv = None;
            self.tell(Completion::RecvEnded { sock, why });
        }
    }

    fn batch(&mut self) {
        self.core.finish_batch(self.now);
        for op in self.core.ops().drain(..).collect::<Vec<_>>() {
            self.perform(op);
        }
        assert!(self.unadopted.is_empty(), "accepted sockets are left lying about");
        drop(self.core.take_access());
        drop(self.core.take_remarks());
    }

    fn sock(&mut self, sock: SockId) -> &mut Sock {
        self.socks.get_mut(&sock).expect("an operation on an open socket")
    }

    fn perform(&mut self, op: Op) {
        match op {
            Op::Accept(id) => assert!(self.accepting.insert(id, false).is_none(), "accept is armed twice"),
            Op::StopAccept(id) => *self.accepting.get_mut(&id).expect("an armed accept") = true,
            Op::Adopt { raw, sock } => {
                let preface: &'static [&'static [u8]] = match self.settle_raw(raw).0 {
                    2 => &HELLOS,
                    3.. => &HEADERS,
                    _ => &[],
                };
                let state = Sock { preface, words: &REQUESTS, ..Sock::default() };
                assert!(self.socks.insert(sock, state).is_none(), "an id is used twice");
            }
            Op::Refuse { raw } => drop(self.settle_raw(raw)),
            Op::Connect { sock, .. } => {
                let state = Sock { connecting: true, words: &RESPONSES, ..Sock::default() };
                assert!(self.socks.insert(sock, state).is_none(), "an id is used twice");
            }
            Op::Recv { sock, mode } => {
                let state = self.sock(sock);
                assert!(state.recv.is_none() && !state.handshake && !state.connecting, "a receive too many");
                state.recv = Some(mode);
            }
            Op::StopRecv { sock } => {
                if self.sock(sock).recv.take().is_some() {
                    self.tell(Completion::RecvEnded { sock, why: RecvEnd::Ended });
                }
            }
            Op::Send { sock, chunks, mode, .. } => {
                let state = self.sock(sock);
                let clear = state.send.is_none() && !state.handshake && !state.connecting;
                assert!(clear && !state.goodbye && !state.fin, "a send too many");
                let offered = chunks.iter().map(|chunk| chunk.len()).sum();
                assert!(offered > 0, "nothing is sent");
                state.send = Some((offered, mode));
            }
            Op::StopSend { sock } => {
                if self.sock(sock).send.take().is_some() {
                    self.tell(Completion::Sent { sock, bytes: 0 });
                }
            }
            Op::StartTls { sock, .. } => {
                let state = self.sock(sock);
                assert!(!state.secure && !state.handshake && state.recv.is_none() && state.send.is_none());
                state.handshake = true;
            }
            Op::EndTls { sock } => {
                let state = self.sock(sock);
                assert!(state.secure && state.send.is_none() && !state.goodbye, "a goodbye out of turn");
                state.goodbye = true;
            }
            Op::ShutdownWrite { sock } => {
                let state = self.sock(sock);
                assert!(!state.secure && state.send.is_none() && !state.fin, "FIN out of turn");
                state.fin = true;
            }
            Op::Close { sock, .. } => {
                assert!(self.socks.remove(&sock).is_some(), "a socket is closed twice");
            }
        }
    }

    fn settle_raw(&mut self, raw: RawSocket) -> ListenerId {
        let at = self.unadopted.iter().position(|(known, _)| *known == raw.0);
        self.unadopted.swap_remove(at.expect("adopted or refused once")).1
    }

    /// Everybody hangs up, and time passes.
    fn wind_down(&mut self) -> Counters {
        self.core.stop(self.now);
        for _ in 0..60 {
            self.batch();
            let gone = Errno(libc::ECONNRESET);
            for sock in self.socks.keys().copied().collect::<Vec<_>>() {
                let Some(state) = self.socks.get_mut(&sock) else { continue };
                if std::mem::take(&mut state.connecting) {
                    self.tell(Completion::ConnectFailed { sock, error: gone });
                } else if std::mem::take(&mut state.handshake) {
                    let last_words = Chunk::owned(Vec::new());
                    self.tell(Completion::SecureFailed { sock, fault: TlsFault::Gone, last_words });
                } else if std::mem::take(&mut state.goodbye) || state.send.take().is_some() {
                    state.secure = false;
                    self.tell(Completion::SendFailed { sock, error: gone });
                } else if state.recv.take().is_some() {
                    self.tell(Completion::RecvEnded { sock, why: RecvEnd::Failed(gone) });
                }
            }
            for listener in self.accepting.keys().copied().collect::<Vec<_>>() {
                if self.accepting[&listener] {
                    self.accepting.remove(&listener);
                    self.tell(Completion::AcceptEnded { listener, error: None });
                }
            }
            self.now += 20_000;
        }
        self.batch();
        let snapshot = self.core.snapshot(self.now, false);
        assert_eq!((self.core.socket_count(), self.socks.len()), (0, 0), "sockets are left open");
        let counters = &snapshot.counters;
        assert_eq!((counters.connections_open, counters.upstream_connections_open), (0, 0));
        assert!(snapshot.routes.iter().all(|route| route.held == 0 && route.active == 0));
        for upstream in &snapshot.upstreams {
            let busy = (upstream.active_requests, upstream.active_connections, upstream.idle_connections);
            assert_eq!(busy, (0, 0, 0), "{} still counts something", upstream.id);
        }
        snapshot.counters
    }
}
