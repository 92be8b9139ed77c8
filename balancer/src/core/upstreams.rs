//! The upstreams: what each is doing, and whether it can be reached.
//!
//! ```text
//!            a connect fails                 its turn has come
//!   Good ─────────────────────▶ Lost ───────────────────────────▶ Lost, probing
//!    ▲                           ▲   wait doubles, 50 ms to 5 s        │
//!    │                           └──────── it fails too ───────────────┤
//!    └──────────────────────────────────── it connects ────────────────┘
//! ```
//!
//! A lost upstream is given one request at a time, so that a restarting app is found again within 50 ms
//! without every held request knocking at its door.

use std::collections::HashMap;

use super::checks::Checked;
use super::config::Config;
use super::flow::Answered;
use super::io::{Errno, Millis, SockId};
use super::random;
use super::slab::{Slab, UpstreamKey};
use crate::control::protocol::{ShownState, UpstreamStatus};
use crate::table::{Address, Table, UpstreamState};

/// One upstream.
#[derive(Debug)]
pub struct Upstream {
    pub id: String,
    pub address: Address,
    pub state: ShownState,
    /// What it was by the table before.
    pub was: ShownState,
    /// Its health checks, if it has any.
    pub check: Option<Checked>,
    /// It is told of each client with a PROXY header.
    pub proxy_protocol: bool,
    /// Kept-alive connections, the most recently used last.
    pub idle: Vec<SockId>,
    pub active_requests: u64,
    pub active_connections: u64,
    pub connecting: u32,
    reach: Reach,
    pub answered: Answered,
    /// Until then it is not asked again: the queue of its unix socket was full.
    full_until: Millis,
    /// Why the last connect failed.
    failed: Option<Errno>,
    pub requests_total: u64,
    pub connections_total: u64,
    pub connect_errors_total: u64,
    pub request_errors_total: u64,
}

/// What may be asked of an upstream now, as far as facts go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It takes requests.
    Ready,
    /// It could not be reached, and it is time to try again.
    Due,
    /// It could not be reached; it is tried before its time only when there is nobody else.
    LastResort,
    /// As many connects to it are under way as may be, or its queue is full.
    Busy,
    /// It could not be reached a moment ago, or somebody is trying right now.
    Away,
}

/// Whether its last connect worked.
#[derive(Debug, Clone, Copy)]
enum Reach {
    Good,
    Lost { tried_at: Millis, backoff_ms: Millis, probing: bool },
}

impl Upstream {
    fn new(id: &str, address: Address) -> Self {
        Self {
            id: id.to_owned(),
            address,
            state: ShownState::Removed,
            was: ShownState::Removed,
            check: None,
            proxy_protocol: false,
            idle: Vec::new(),
            active_requests: 0,
            active_connections: 0,
            connecting: 0,
            reach: Reach::Good,
            answered: Answered::default(),
            full_until: 0,
            failed: None,
            requests_total: 0,
            connections_total: 0,
            connect_errors_total: 0,
            request_errors_total: 0,
        }
    }

    /// A connect to it begins.
    pub fn connect_begins(&mut self) {
        self.connecting += 1;
        if let Reach::Lost { probing, .. } = &mut self.reach {
            *probing = true;
        }
    }

    /// A connect ended without saying anything about the upstream.
    pub fn connect_abandoned(&mut self) {
        self.connecting -= 1;
        if let Reach::Lost { probing, .. } = &mut self.reach {
            *probing = false;
        }
    }

    pub fn connect_worked(&mut self) {
        self.connecting -= 1;
        self.failed = None;
        self.connections_total += 1;
        self.reach = Reach::Good;
    }

    /// It is there, but takes no more for the moment.
    pub fn connect_put_off(&mut self, now: Millis) {
        self.connecting -= 1;
        self.reach = Reach::Good;
        self.full_until = now + Config::HOLD_TICK_MS;
    }

    pub fn connect_failed(&mut self, now: Millis, error: Errno) {
        self.connecting -= 1;
        self.failed = Some(error);
        self.connect_errors_total += 1;
        let backoff_ms = match self.reach {
            Reach::Good => Config::HOLD_TICK_MS,
            Reach::Lost { backoff_ms, .. } => (2 * backoff_ms).min(Config::BACKOFF_MAX_MS),
        };
        self.reach = Reach::Lost { tried_at: now, backoff_ms, probing: false };
    }

    /// Somebody else has just connected to it.
    pub fn reached(&mut self) {
        self.reach = Reach::Good;
    }

    /// Whether its checks, if it has any, say that it may be given traffic.
    pub fn is_proven(&self) -> bool {
        self.check.as_ref().is_none_or(|check| check.verdict.is_passing())
    }

    /// Whether its checks have yet to say anything of it.
    pub fn is_unjudged(&self) -> bool {
        self.check.as_ref().is_some_and(|check| check.verdict.is_unproven())
    }

    pub fn is_lost(&self) -> bool {
        matches!(self.reach, Reach::Lost { .. })
    }

    /// Whether it can take a request.
    pub fn standing(&self, now: Millis) -> Standing {
        match self.reach {
            Reach::Good if self.connecting >= Config::CONNECTING_MAX => Standing::Busy,
            Reach::Good if now < self.full_until => Standing::Busy,
            Reach::Good => Standing::Ready,
            Reach::Lost { probing: true, .. } => Standing::Away,
            Reach::Lost { tried_at, backoff_ms, .. } if now >= tried_at + backoff_ms => Standing::Due,
            Reach::Lost { tried_at, .. } if now >= tried_at + Config::HOLD_TICK_MS => Standing::LastResort,
            Reach::Lost { .. } => Standing::Away,
        }
    }

    /// What it has under way.
    pub fn load(&self) -> u64 {
        self.active_requests + self.active_connections + u64::from(self.connecting)
    }

    /// Connections to it, with or without something under way.
    pub fn connections(&self) -> u64 {
        self.load() + self.idle.len() as u64
    }

    /// A number made from its id alone, by which it keeps its place wherever and whenever it is known.
    pub fn name_hash(&self) -> u64 {
        random::hash(self.id.as_bytes())
    }

    fn is_busy(&self) -> bool {
        self.load() > 0 || !self.idle.is_empty()
    }

    pub fn status(&self, latency: bool) -> UpstreamStatus {
        UpstreamStatus {
            id: self.id.clone(),
            address: self.address.clone(),
            state: self.state,
            active_requests: self.active_requests,
            active_connections: self.active_connections,
            idle_connections: self.idle.len() as u64,
            requests_total: self.requests_total,
            connections_total: self.connections_total,
            connect_errors_total: self.connect_errors_total,
            connect_error: self.failed.map(|error| error.to_string()),
            request_errors_total: self.request_errors_total,
            unreachable: self.is_lost(),
            responses: self.answered.responses,
            first_byte: latency.then(|| self.answered.first_byte.clone()),
            health: self.check.as_ref().map(Checked::status),
        }
    }
}

/// All upstreams of the table, and those that left it with something to finish.
#[derive(Debug, Default)]
pub struct Upstreams {
    slab: Slab<UpstreamKey, Upstream>,
    by_name: HashMap<(String, Address), UpstreamKey>,
}

impl Upstreams {
    pub fn get(&self, key: UpstreamKey) -> Option<&Upstream> {
        self.slab.get(key)
    }

    pub fn get_mut(&mut self, key: UpstreamKey) -> Option<&mut Upstream> {
        self.slab.get_mut(key)
    }

    pub fn iter(&self) -> impl Iterator<Item = (UpstreamKey, &Upstream)> {
        self.slab.iter()
    }

    pub fn keys(&self) -> Vec<UpstreamKey> {
        self.slab.iter().map(|(key, _)| key).collect()
    }

    pub fn len(&self) -> usize {
        self.slab.len()
    }

    pub fn key(&self, id: &str, address: &Address) -> Option<UpstreamKey> {
        self.by_name.get(&(id.to_owned(), address.clone())).copied()
    }

    /// Takes over a table's upstreams, and returns the idle connections of those that are not up.
    pub fn apply(&mut self, table: &Table) -> Vec<SockId> {
        let keys: Vec<UpstreamKey> = self.by_name.values().copied().collect();
        for key in keys {
            if let Some(upstream) = self.slab.get_mut(key) {
                upstream.was = std::mem::replace(&mut upstream.state, ShownState::Removed);
            }
        }
        for wanted in table.routes.iter().flat_map(|route| route.upstreams()) {
            let name = (wanted.id.clone(), wanted.address.clone());
            let slab = &mut self.slab;
            let key = *self
                .by_name
                .entry(name)
                .or_insert_with(|| slab.insert(Upstream::new(&wanted.id, wanted.address.clone())));
            if let Some(upstream) = slab.get_mut(key) {
                upstream.state = stricter(upstream.state, wanted.state);
                upstream.proxy_protocol = wanted.proxy_protocol;
            }
        }
        let mut unwanted = Vec::new();
        for key in self.by_name.values() {
            if let Some(upstream) =
                self.slab.get_mut(*key).filter(|upstream| upstream.state != ShownState::Up)
            {
                unwanted.append(&mut upstream.idle);
            }
        }
        unwanted
    }

    /// Forgets what has left the table and has nothing more to finish.
    pub fn sweep(&mut self) {
        let slab = &mut self.slab;
        self.by_name.retain(|_, key| {
            let gone = slab.get(*key).is_none_or(|up| up.state == ShownState::Removed && !up.is_busy());
            if gone {
                slab.remove(*key);
            }
            !gone
        });
    }
}

/// An upstream named by several routes is shown, and kept, in its most restricted state.
fn stricter(known: ShownState, wanted: UpstreamState) -> ShownState {
    match (known, ShownState::from(wanted)) {
        (ShownState::Removed, wanted) => wanted,
        (ShownState::Down, _) | (_, ShownState::Down) => ShownState::Down,
        (ShownState::Draining, _) | (_, ShownState::Draining) => ShownState::Draining,
        _ => ShownState::Up,
    }
}
