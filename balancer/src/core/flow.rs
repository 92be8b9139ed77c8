//! One request or plain connection, from its beginning to its end.
//!
//! ```text
//! begins ──▶ (held) ──▶ given to an upstream ──first byte──▶ … ──▶ ends: counted, and told to the log
//!               └──────────── answered by the balancer, or gone ─────▲
//! ```
//!
//! Whoever ends one says so through [`Core::end_flow`], once; counters, histograms and the access log are
//! all fed there, from the same values, so they reconcile by construction. What is still open shows in
//! status only by its bytes.

use std::net::SocketAddr;

use super::access::Access;
use super::engine::Core;
use super::histogram::{Histogram, Micros};
use super::http::answer::Answer;
use super::session::{Request, Role, Sock};
use super::slab::{RouteKey, UpstreamKey};
use crate::control::traffic::{Ends, Latency, Responses};

/// What is remembered of a request or connection while it lasts.
#[derive(Debug, Clone)]
pub struct Flow {
    pub address: Option<SocketAddr>,
    /// The route it is counted on; [`RouteKey::NONE`] when none takes it.
    pub route: RouteKey,
    /// The upstream that had it last.
    pub upstream: Option<UpstreamKey>,
    pub began_us: Micros,
    pub held_since_us: Option<Micros>,
    /// How long it was held in all, if it was.
    pub held_us: Option<Micros>,
    pub given_us: Option<Micros>,
    /// From being given to an upstream to the first byte of that one.
    pub first_byte_us: Option<Micros>,
    /// Of the final response.
    pub status: Option<u16>,
    /// Why it was turned away before anything was understood.
    pub fault: Option<&'static str>,
    /// From the client, head and framing included.
    pub bytes_in: u64,
    /// To the client.
    pub bytes_out: u64,
    /// The exchange that led to this tunnel has been counted already...
    pub upgraded: bool,
    /// ...and what the log will say of its request, if there is one.
    pub line: Option<Box<Access>>,
    /// The name a connection was routed by.
    pub host: Option<Box<str>>,
}

/// How one ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The app's response was passed on in full.
    Answered,
    /// After a switch of protocols both sides ended.
    Upgraded,
    /// Both sides of a plain connection ended.
    Closed,
    /// The app went away in the middle.
    Cut,
    /// The client did.
    Aborted,
    /// Nothing moved in it for too long.
    Idle,
    /// The route answered by itself, in this way.
    Page(&'static str),
    /// The balancer answered, or ended it, in its own name.
    Own(Answer),
    /// It was turned away before anything was understood, for this reason.
    Refused(&'static str),
}

impl Outcome {
    /// What the log calls it.
    pub fn code(self) -> &'static str {
        match self {
            Outcome::Answered => "answered",
            Outcome::Upgraded => "upgraded",
            Outcome::Closed => "closed",
            Outcome::Cut => "cut",
            Outcome::Aborted => "aborted",
            Outcome::Idle => "idle",
            Outcome::Page(code) | Outcome::Refused(code) => code,
            Outcome::Own(answer) => answer.code(),
        }
    }

    /// Nothing about it is worth an operator's look.
    pub fn went_well(self) -> bool {
        matches!(self, Outcome::Answered | Outcome::Upgraded | Outcome::Closed | Outcome::Page(_))
    }

    fn counter(self, ends: &mut Ends) -> &mut u64 {
        match self {
            Outcome::Answered | Outcome::Upgraded | Outcome::Closed => &mut ends.passed,
            Outcome::Cut => &mut ends.cut,
            Outcome::Aborted => &mut ends.aborted,
            Outcome::Page(_) => &mut ends.page,
            Outcome::Idle | Outcome::Own(_) | Outcome::Refused(_) => &mut ends.refused,
        }
    }
}

/// What a route has carried, apart from what is under way.
#[derive(Debug, Default)]
pub struct Carried {
    pub ends: Ends,
    pub responses: Responses,
    pub latency: Latency,
    pub bytes_in: u64,
    pub bytes_out: u64,
}

/// What an upstream has answered.
#[derive(Debug, Default)]
pub struct Answered {
    pub responses: Responses,
    pub first_byte: Histogram,
}

impl Flow {
    pub fn new(address: Option<SocketAddr>, now_us: Micros) -> Self {
        Self {
            address,
            route: RouteKey::NONE,
            upstream: None,
            began_us: now_us,
            held_since_us: None,
            held_us: None,
            given_us: None,
            first_byte_us: None,
            status: None,
            fault: None,
            bytes_in: 0,
            bytes_out: 0,
            upgraded: false,
            line: None,
            host: None,
        }
    }

    /// It has to wait for an upstream.
    pub fn held(&mut self, now_us: Micros) {
        self.held_since_us.get_or_insert(now_us);
    }

    fn released(&mut self, now_us: Micros) {
        if let Some(since_us) = self.held_since_us.take() {
            *self.held_us.get_or_insert(0) += now_us.saturating_sub(since_us);
        }
    }

    /// An upstream has it from now on.
    pub fn given(&mut self, now_us: Micros, upstream: UpstreamKey) {
        self.released(now_us);
        (self.upstream, self.given_us, self.first_byte_us) = (Some(upstream), Some(now_us), None);
    }

    /// Its upstream said something to the client.
    pub fn passed_on(&mut self, now_us: Micros, bytes: usize) {
        self.bytes_out += bytes as u64;
        if let (None, Some(given_us)) = (self.first_byte_us, self.given_us) {
            self.first_byte_us = Some(now_us.saturating_sub(given_us));
        }
    }
}

impl Sock {
    /// What a client is being served.
    pub fn flow(&self) -> Option<&Flow> {
        match &self.role {
            Role::Http(http) => http.request.as_ref().map(|request| &request.flow),
            Role::Tcp(tcp) => Some(&tcp.flow),
            Role::Tunnel { flow, .. } => flow.as_deref(),
            Role::Preface(_) | Role::Upstream(_) | Role::Check(_) => None,
        }
    }

    pub fn flow_mut(&mut self) -> Option<&mut Flow> {
        match &mut self.role {
            Role::Http(http) => http.request.as_mut().map(|request| &mut request.flow),
            Role::Tcp(tcp) => Some(&mut tcp.flow),
            Role::Tunnel { flow, .. } => flow.as_deref_mut(),
            Role::Preface(_) | Role::Upstream(_) | Role::Check(_) => None,
        }
    }
}

impl Core {
    /// Sets the finer clock that spans are measured by, once per batch and before its completions. Without
    /// it they are good to a millisecond.
    pub fn tick(&mut self, now_us: Micros) {
        self.now_us = self.now_us.max(now_us);
    }

    /// The finer clock, which is never behind the other.
    pub(super) fn now_us(&self) -> Micros {
        self.now_us.max(self.now * 1_000)
    }

    /// A request or connection is over: the one place where that is counted and logged.
    pub(super) fn end_flow(&mut self, mut flow: Flow, request: Option<&Request>, outcome: Outcome) {
        let now_us = self.now_us();
        let outcome = flow.fault.map_or(outcome, Outcome::Refused);
        flow.released(now_us);
        let duration_us = now_us.saturating_sub(flow.began_us);
        if let Some(route) = self.routes.get_mut(flow.route) {
            let carried = &mut route.carried;
            *outcome.counter(&mut carried.ends) += 1;
            carried.responses.count(flow.status);
            carried.bytes_in += flow.bytes_in;
            carried.bytes_out += flow.bytes_out;
            if !flow.upgraded {
                carried.count_times(&flow, duration_us);
            }
        }
        if let Some(upstream) = flow.upstream.and_then(|key| self.upstreams.get_mut(key)) {
            upstream.answered.responses.count(flow.status);
            if let Some(first_byte_us) = flow.first_byte_us.filter(|_| !flow.upgraded) {
                upstream.answered.first_byte.record(first_byte_us);
            }
        }
        if self.config.access_log {
            self.log_flow(&mut flow, request, outcome, duration_us);
        }
    }

    /// A client is turned away before anything of it was understood.
    pub(super) fn turn_away(&mut self, address: Option<SocketAddr>, code: &'static str) {
        self.end_flow(Flow::new(address, self.now_us()), None, Outcome::Refused(code));
    }

    /// The exchange of a request that becomes a tunnel is over, and counts as long as it took; the rest is
    /// counted when the tunnel ends.
    pub(super) fn upgrade_flow(&mut self, flow: &mut Flow, request: &Request) {
        flow.status = Some(101);
        flow.upgraded = true;
        if self.config.access_log {
            flow.line = Some(Box::new(self.describe(flow, Some(request))));
        }
        let duration_us = self.now_us().saturating_sub(flow.began_us);
        if let Some(route) = self.routes.get_mut(flow.route) {
            route.carried.count_times(flow, duration_us);
        }
        if let (Some(key), Some(first_byte_us)) = (flow.upstream, flow.first_byte_us)
            && let Some(upstream) = self.upstreams.get_mut(key)
        {
            upstream.answered.first_byte.record(first_byte_us);
        }
    }
}

impl Carried {
    fn count_times(&mut self, flow: &Flow, duration_us: Micros) {
        self.latency.duration.record(duration_us);
        if let Some(first_byte_us) = flow.first_byte_us {
            self.latency.first_byte.record(first_byte_us);
        }
        if let Some(held_us) = flow.held_us {
            self.latency.held.record(held_us);
        }
    }
}
