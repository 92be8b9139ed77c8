//! What comes before a client's first request: a PROXY header where the listener requires one, and a
//! ClientHello where connections are routed by the name in it.
//!
//! ```text
//! accepted ─┬─ proxy_protocol ─▶ Header ──complete──┐
//!           └─────────────────────────────────────┐ │ what was read beyond it goes on
//!                                                 ▼ ▼
//!                                 mode http:  HTTP client                            \ after TLS,
//!                                 mode tcp:   TCP client, by the route of the port   / where it is asked for
//!                                 mode sni:   Hello ──complete──▶ TCP client, by the route of the name
//!
//! Header, malformed or late ──▶ reset          Hello, malformed, late or without a route ──▶ alert, FIN
//! ```
//!
//! Both are read with receives that end by themselves, and looked at when one has ended: so when the socket
//! becomes something else, no bytes are on their way that were meant for what it was.

pub mod client_hello;
pub mod proxy;

use std::net::{Ipv4Addr, SocketAddr};

use self::client_hello::{Alert, HelloError};
use self::proxy::{Ends, Said};
use super::chunk::Chunk;
use super::engine::Core;
use super::flow::Flow;
use super::histogram::Micros;
use super::io::{Millis, SockId};
use super::listen::{Listen, Mode};
use super::session::{Finish, HttpClient, Role, Sock, TcpClient, Wait};
use super::slab::RouteKey;

/// Where a connection came in, and between whom it is: as the sockets say, or a PROXY header.
#[derive(Debug, Clone, Copy)]
pub struct Origin {
    pub listen: Listen,
    /// The client.
    pub source: Option<SocketAddr>,
    /// What the client connected to, or where the listener listens.
    pub destination: Option<SocketAddr>,
}

/// A client that has not yet said what it has to say first.
#[derive(Debug)]
pub struct Preface {
    pub origin: Origin,
    pub since: Millis,
    pub stage: Stage,
    /// What has come; at most what is read at a time beyond the bounds of the two.
    pub inbuf: Vec<u8>,
    /// There is nothing to be found in less than this.
    wants_bytes: usize,
}

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// A PROXY header.
    Header,
    /// A ClientHello.
    Hello,
    /// Nothing: it was turned away.
    Refused,
}

impl Core {
    /// What a connection is at first; none when no route takes it.
    pub(super) fn first_role(&self, origin: Origin) -> Option<Role> {
        if origin.listen.proxy_protocol {
            return Some(Role::Preface(Box::new(Preface::new(origin, Stage::Header, self.now))));
        }
        self.client_role(origin)
    }

    /// What a connection is once it is known whose it is.
    fn client_role(&self, origin: Origin) -> Option<Role> {
        match origin.listen.mode {
            Mode::Http => Some(Role::Http(Box::new(HttpClient::new(origin, self.now)))),
            Mode::Tcp { port } => self
                .routes
                .by_port(port)
                .map(|route| Role::Tcp(Box::new(TcpClient::new(origin, route, self.now_us())))),
            Mode::Sni => Some(Role::Preface(Box::new(Preface::new(origin, Stage::Hello, self.now)))),
        }
    }

    /// Begins to serve a client, of which `said` has been read already.
    pub(super) fn begin_client(&mut self, id: SockId, listen: Listen, said: Vec<u8>) {
        self.touch(id);
        if !self.admit_source(id) {
            return self.shed_source(id);
        }
        if listen.tls {
            return self.start_tls(id, Chunk::owned(said));
        }
        match self.socks.get_mut(id).map(|sock| &mut sock.role) {
            Some(Role::Http(http)) if !said.is_empty() => {
                http.inbuf = said;
                self.runnable.push_back(id);
            }
            Some(Role::Tcp(tcp)) => {
                tcp.flow.bytes_in += said.len() as u64;
                tcp.inbuf = said;
                self.admit(id);
            }
            Some(Role::Preface(preface)) => {
                preface.inbuf = said;
                self.read_preface(id);
            }
            _ => {}
        }
    }

    /// Looks at what has come of a preface.
    pub(super) fn read_preface(&mut self, id: SockId) {
        let Some(preface) = self.socks.get_mut(id).and_then(Sock::preface) else { return };
        if preface.inbuf.len() < preface.wants_bytes {
            return;
        }
        match preface.stage {
            Stage::Header => self.read_header(id),
            Stage::Hello => self.read_hello(id),
            Stage::Refused => {}
        }
    }

    /// A client has said all it will before its preface was complete.
    pub(super) fn preface_ends(&mut self, id: SockId) {
        let Some(preface) = self.socks.get_mut(id).and_then(Sock::preface) else { return };
        match preface.stage {
            // Nothing at all is how others look whether we are there.
            _ if preface.inbuf.is_empty() => self.close_client(id, false),
            Stage::Header => self.refuse_header(id, &proxy::HeaderError::Missing),
            Stage::Hello => self.refuse_hello(id, HelloError::Malformed),
            Stage::Refused => {}
        }
    }

    /// A preface took too long.
    pub(super) fn preface_is_late(&mut self, id: SockId) {
        let Some(preface) = self.socks.get_mut(id).and_then(Sock::preface) else { return };
        let source = preface.origin.source;
        match preface.stage {
            Stage::Header => {
                self.counters.proxy_header_slow += 1;
                self.turn_away(source, "proxy_header_slow");
            }
            Stage::Hello => {
                self.counters.hello_slow += 1;
                self.turn_away(source, "hello_slow");
            }
            Stage::Refused => {}
        }
        self.close_client(id, true);
    }

    fn read_header(&mut self, id: SockId) {
        let Some(preface) = self.socks.get_mut(id).and_then(Sock::preface) else { return };
        let (bytes, said) = match proxy::scan(&preface.inbuf) {
            proxy::Scan::Complete { bytes, said } => (bytes, said),
            proxy::Scan::Partial => return,
            proxy::Scan::Malformed(error) => return self.refuse_header(id, &error),
        };
        let rest = preface.inbuf.split_off(bytes);
        let mut origin = preface.origin;
        if let Said::Ends(Ends { source, destination }) = said {
            (origin.source, origin.destination) = (Some(source), Some(destination));
        }
        match self.client_role(origin) {
            Some(role) => self.become_client(id, role, origin.listen, rest),
            None => {
                self.counters.tcp_unrouted += 1;
                self.turn_away(origin.source, "unrouted");
                self.close_client(id, true);
            }
        }
    }

    fn read_hello(&mut self, id: SockId) {
        let Some(preface) = self.socks.get_mut(id).and_then(Sock::preface) else { return };
        let server_name = match client_hello::scan(&preface.inbuf) {
            client_hello::Scan::Complete { server_name } => server_name,
            client_hello::Scan::Partial { wants_bytes } => return preface.wants_bytes = wants_bytes,
            client_hello::Scan::Malformed(error) => return self.refuse_hello(id, error),
        };
        let (origin, said) = (preface.origin, std::mem::take(&mut preface.inbuf));
        // A client that names nobody is as one whose name nobody has: only a catch-all takes it.
        let name = server_name.unwrap_or_default();
        let now_us = self.now_us();
        match self.routes.by_server_name(&name) {
            Some(route) => {
                let client =
                    TcpClient { server_name: Some(name.into()), ..TcpClient::new(origin, route, now_us) };
                self.become_client(id, Role::Tcp(Box::new(client)), origin.listen, said);
            }
            None => {
                self.counters.sni_unrouted += 1;
                self.turn_away(origin.source, "sni_unrouted");
                self.alert(id, Alert::UnrecognizedName);
            }
        }
    }

    fn become_client(&mut self, id: SockId, role: Role, listen: Listen, said: Vec<u8>) {
        if let Some(sock) = self.socks.get_mut(id) {
            sock.role = role;
        }
        self.begin_client(id, listen, said);
    }

    fn refuse_header(&mut self, id: SockId, error: &proxy::HeaderError) {
        self.counters.proxy_header_refused += 1;
        if let Some(preface) = self.socks.get_mut(id).and_then(Sock::preface) {
            let origin = preface.origin;
            self.remarks.add(self.now, || format!("{} was reset: {error}", origin.describe()).into());
            self.turn_away(origin.source, "proxy_header_refused");
        }
        self.close_client(id, true);
    }

    fn refuse_hello(&mut self, id: SockId, error: HelloError) {
        self.counters.hello_refused += 1;
        let source = self.socks.get_mut(id).and_then(Sock::preface).and_then(|preface| preface.origin.source);
        self.turn_away(source, "hello_refused");
        self.alert(id, error.alert());
    }

    /// Turns a client away with a TLS alert.
    fn alert(&mut self, id: SockId, alert: Alert) {
        let now = self.now;
        let Some(sock) = self.socks.get_mut(id) else { return };
        if let Some(preface) = sock.preface() {
            (preface.stage, preface.inbuf) = (Stage::Refused, Vec::new());
        }
        sock.finish = Finish::Linger { until: None };
        sock.push(now, Chunk::owned(alert.write()));
        self.touch(id);
    }
}

impl Preface {
    fn new(origin: Origin, stage: Stage, now: Millis) -> Self {
        Self { origin, since: now, stage, inbuf: Vec::new(), wants_bytes: 1 }
    }
}

impl Origin {
    /// Both ends, when they are known. One that listens on every address is told as that address, of the
    /// client's family.
    pub fn ends(&self) -> Option<Ends> {
        let (source, mut destination) = (self.source?, self.destination?);
        if destination.ip().is_unspecified() && source.ip().to_canonical().is_ipv4() {
            destination.set_ip(Ipv4Addr::UNSPECIFIED.into());
        }
        Some(Ends { source, destination })
    }

    /// For a log: who, and where.
    fn describe(&self) -> String {
        let source = self.source.map(|source| SocketAddr::new(source.ip().to_canonical(), source.port()));
        let source = source.map_or_else(|| "an unnamed client".to_owned(), |source| source.to_string());
        format!("a connection of {source} on {}", self.listen)
    }
}

impl TcpClient {
    fn new(origin: Origin, route: RouteKey, now_us: Micros) -> Self {
        let wait = Wait::at(route);
        Self { origin, flow: Flow::new(origin.source, now_us), server_name: None, wait, inbuf: Vec::new() }
    }
}
