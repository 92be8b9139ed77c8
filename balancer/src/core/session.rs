//! What the core knows of each socket.
//!
//! ```text
//! HTTP client:   Head ──head read──▶ Waiting ──upstream ready──▶ Exchange ──response passed on──┐
//!                 ▲                  (held, or connecting)          │                          │
//!                 ├──────────── keep-alive ─────────────────────────┼──────────────────────────┘
//!                 │                                                 ▼ 101
//!                 └─ otherwise ▶ Done (send the rest, close)      Tunnel
//!                Head ──▶ Dropping (the route answers by itself) ──▶ Head or Done
//! preface:       Header, Hello ──read──▶ HTTP or TCP client    (drawn in `preface`)
//! TCP client:    Waiting ──upstream ready──▶ Tunnel
//! upstream:      Connecting ──▶ Exchange ⇄ Idle        Connecting or Exchange ──▶ Tunnel
//! ```
//!
//! A client and the upstream connection that serves it name each other as `peer`; nothing else links them.

use std::net::SocketAddr;
use std::ops::Range;
use std::rc::Rc;

use super::actions::Reply;
use super::checks::CheckConn;
use super::chunk::Chunk;
use super::flow::Flow;
use super::http::body::Body;
use super::http::head::Version;
use super::io::{ListenerId, Millis, SockId};
use super::listen::Listen;
use super::memory::{Budget, Kept};
use super::outbox::Outbox;
use super::preface::{Origin, Preface};
use super::secure::{Secured, Tls};
use super::slab::{RouteKey, SourceKey, UpstreamKey};

/// One open socket.
#[derive(Debug)]
pub struct Sock {
    pub role: Role,
    /// The other side.
    pub peer: Option<SockId>,
    /// The listener a client is counted at, and the source it is counted as there.
    pub listener: Option<ListenerId>,
    pub source: Option<SourceKey>,
    /// The route a client is counted on, and the source it is counted as there.
    pub on_route: Option<RouteKey>,
    pub on_route_as: Option<SourceKey>,
    pub out: Outbox,
    /// The socket takes nothing more; what would be sent is dropped.
    pub out_dead: bool,
    /// Counts what it keeps; none while that is nothing.
    pub kept: Option<Kept>,
    pub recv: Recv,
    /// The armed receive ends by itself.
    pub bounded: bool,
    /// More came from here than the other side takes at once: receive so much at a time.
    pub cautious: bool,
    /// Bytes that came since the receive was armed.
    pub taken_bytes: u32,
    /// The peer sent FIN.
    pub read_closed: bool,
    /// What to do once everything queued is sent.
    pub finish: Finish,
    pub fin_sent: bool,
    pub tls: Tls,
    /// Where a client came in.
    pub listen: Option<Listen>,
    pub made_at: Millis,
    /// When bytes last moved, either way.
    pub moved_at: Millis,
    /// The earliest entry in the timers.
    pub timer_at: Option<Millis>,
    /// Already on the list of sockets to settle.
    pub touched: bool,
    /// Already on the list of sockets to which shared buffers are lent.
    pub lending: bool,
}

/// Whether a receive is armed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recv {
    Off,
    Armed,
    Stopping,
}

/// What follows when a socket's outbox is empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// Nothing: it stays open.
    No,
    /// FIN, once; the other direction goes on.
    Fin,
    /// FIN, then read and drop for a while, then close.
    Linger { until: Option<Millis> },
    /// Close.
    Close,
}

/// What a socket is for.
#[derive(Debug)]
pub enum Role {
    /// A client that has something to say before its first request.
    Preface(Box<Preface>),
    Http(Box<HttpClient>),
    /// A plain TCP client that waits for its upstream.
    Tcp(Box<TcpClient>),
    Upstream(UpstreamConn),
    /// A health check of an upstream.
    Check(Box<CheckConn>),
    /// Bytes both ways; `upstream` on the upstream's side.
    Tunnel {
        upstream: Option<UpstreamKey>,
        /// On the client's side.
        flow: Option<Box<Flow>>,
    },
}

/// A client's place in the search for an upstream.
#[derive(Debug, Clone, Copy)]
pub struct Wait {
    pub route: RouteKey,
    /// Since when it has been waiting, once it had to.
    pub since: Option<Millis>,
    /// In the route's hold queue now.
    pub queued: bool,
    /// Connects that failed for it since it was last held.
    pub tries: u8,
}

impl Wait {
    pub fn at(route: RouteKey) -> Self {
        Self { route, since: None, queued: false, tries: 0 }
    }
}

/// A plain TCP client, until its upstream stands.
#[derive(Debug)]
pub struct TcpClient {
    pub origin: Origin,
    /// What it was routed by, if not by its port: the name in its ClientHello, empty when it had none.
    pub server_name: Option<Box<str>>,
    pub flow: Flow,
    pub wait: Wait,
    /// What it said meanwhile.
    pub inbuf: Vec<u8>,
}

/// A client that speaks HTTP.
#[derive(Debug)]
pub struct HttpClient {
    pub address: Option<SocketAddr>,
    pub listen: Listen,
    /// What TLS proved, where the client speaks it.
    pub secured: Option<Box<Secured>>,
    pub phase: Phase,
    /// Bytes not yet used: an unfinished head, a body that has nowhere to go yet, later requests.
    pub inbuf: Vec<u8>,
    /// How far `inbuf` has been searched for the end of a head.
    pub scanned: usize,
    /// When the unfinished head began, or when the client was last done with something.
    pub head_since: Option<Millis>,
    pub idle_since: Millis,
    pub requests: u64,
    pub request: Option<Request>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Head,
    Waiting,
    Exchange,
    /// The route answers by itself, once the request's body has been read and dropped.
    Dropping,
    Done,
}

/// The request a client is being served.
#[derive(Debug)]
pub struct Request {
    pub flow: Flow,
    pub wait: Wait,
    pub host: String,
    /// The head to send upstream.
    pub forward: Chunk,
    /// Where in it the request's name is.
    pub id: Range<usize>,
    pub body: Body,
    pub version: Version,
    pub is_head: bool,
    pub repeatable: bool,
    pub keep_alive: bool,
    pub upgrade: bool,
    /// A reused connection failed it once: only a new one will do.
    pub fresh_only: bool,
    /// The client waits for a word before it sends the body.
    pub expects: bool,
    /// It is for an ACME challenge, whose file is being read.
    pub awaits_challenge: bool,
    /// What its route answers once the body is dropped.
    pub reply: Option<Rc<Reply>>,
}

/// A connection to an upstream.
#[derive(Debug)]
pub struct UpstreamConn {
    pub upstream: UpstreamKey,
    pub phase: UpPhase,
    /// It has carried a request before.
    pub reused: bool,
}

#[derive(Debug)]
pub enum UpPhase {
    Connecting { since: Millis, timeout_ms: Millis },
    Idle { since: Millis },
    Exchange(Box<Exchange>),
}

/// A request given to an upstream, and its response as far as it has come.
#[derive(Debug, Default)]
pub struct Exchange {
    /// An unfinished response head.
    pub head: Vec<u8>,
    pub scanned: usize,
    /// Something of the response has come.
    pub answered: bool,
    pub stage: Stage,
}

#[derive(Debug, Default)]
pub enum Stage {
    #[default]
    Head,
    Body {
        body: Body,
        unchunk: bool,
        upstream_keep_alive: bool,
        client_keep_alive: bool,
    },
}

impl Sock {
    pub fn new(role: Role, peer: Option<SockId>, now: Millis) -> Self {
        Self {
            role,
            peer,
            listener: None,
            source: None,
            on_route: None,
            on_route_as: None,
            out: Outbox::default(),
            out_dead: false,
            kept: None,
            recv: Recv::Off,
            bounded: false,
            cautious: false,
            taken_bytes: 0,
            read_closed: false,
            finish: Finish::No,
            fin_sent: false,
            tls: Tls::Off,
            listen: None,
            made_at: now,
            moved_at: now,
            timer_at: None,
            touched: false,
            lending: false,
        }
    }

    /// Queues bytes to be sent.
    pub fn push(&mut self, now: Millis, chunk: Chunk) {
        if self.out_dead || self.fin_sent {
            return;
        }
        if self.out.is_empty() {
            self.moved_at = now;
        }
        self.out.push(chunk);
    }

    /// Bytes of our own in which what was received waits to be used, or to be repeated or logged.
    pub fn keeps_bytes(&self) -> usize {
        match &self.role {
            Role::Preface(preface) => preface.inbuf.capacity(),
            Role::Http(http) => {
                let forward = http.request.as_ref().map_or(0, |request| request.forward.len());
                http.inbuf.capacity() + forward
            }
            Role::Tcp(tcp) => tcp.inbuf.capacity(),
            Role::Upstream(UpstreamConn { phase: UpPhase::Exchange(exchange), .. }) => {
                exchange.head.capacity()
            }
            Role::Tunnel { flow: Some(flow), .. } => flow.line.as_ref().map_or(0, |line| line.text_bytes()),
            Role::Upstream(_) | Role::Tunnel { flow: None, .. } | Role::Check(_) => 0,
        }
    }

    /// Counts what it keeps, and returns that.
    pub fn count_kept(&mut self, budget: &Rc<Budget>) -> usize {
        match (self.keeps_bytes(), &mut self.kept) {
            (0, kept) => {
                *kept = None;
                0
            }
            (bytes, kept) => {
                kept.get_or_insert_with(|| Kept::new(budget)).set(bytes);
                bytes
            }
        }
    }

    /// The exchange of an upstream connection that has one.
    pub fn exchange(&mut self) -> Option<&mut Exchange> {
        match &mut self.role {
            Role::Upstream(UpstreamConn { phase: UpPhase::Exchange(exchange), .. }) => Some(exchange),
            _ => None,
        }
    }

    pub fn http(&mut self) -> Option<&mut HttpClient> {
        match &mut self.role {
            Role::Http(client) => Some(client),
            _ => None,
        }
    }

    pub fn preface(&mut self) -> Option<&mut Preface> {
        match &mut self.role {
            Role::Preface(preface) => Some(preface),
            _ => None,
        }
    }

    /// Whether it came in rather than being connected by us.
    pub fn is_client(&self) -> bool {
        !matches!(self.role, Role::Upstream(_) | Role::Check(_) | Role::Tunnel { upstream: Some(_), .. })
    }

    /// The wait of a client that has one.
    pub fn wait(&mut self) -> Option<&mut Wait> {
        match &mut self.role {
            Role::Http(client) => client.request.as_mut().map(|request| &mut request.wait),
            Role::Tcp(tcp) => Some(&mut tcp.wait),
            _ => None,
        }
    }
}

impl HttpClient {
    pub fn new(origin: Origin, now: Millis) -> Self {
        Self {
            address: origin.source,
            listen: origin.listen,
            secured: None,
            phase: Phase::Head,
            inbuf: Vec::new(),
            scanned: 0,
            head_since: None,
            idle_since: now,
            requests: 0,
            request: None,
        }
    }

    /// Whether all of the current request's body has been taken from the client.
    pub fn body_done(&self) -> bool {
        self.request.as_ref().is_none_or(|request| request.body.is_done())
    }
}
