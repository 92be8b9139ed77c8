//! Who is turned away because there would be too many: at a listener, at a route, of one source.
//!
//! ```text
//!  accepted ── pool or listener full ──▶ reset   (shed_connections)
//!     │ its source is known (a PROXY header may have to come first)
//!     ├─────── source has its share ───▶ reset   (shed_sources)
//!     ▼
//!  request ─── source too fast ────────▶ 429     (rate_limited)     plain TCP: reset, in the same counters
//!          ├── source has its share ───▶ 429     (source_full)
//!          ├── route full ─────────────▶ 503     (route_full)
//!          └── route too fast ─────────▶ 429     (rate_limited)
//! ```
//!
//! The source comes before the route: what one source is refused must not use up what others may have. New
//! connections are shed before anything that is being served: they have cost the least, and their clients can go
//! elsewhere.

mod bucket;
mod sources;

use std::net::{IpAddr, SocketAddr};

pub use self::bucket::{Bucket, Rate};
pub use self::sources::{Scope, Sources};
use super::engine::Core;
use super::flow::Outcome;
use super::http::answer::Answer;
use super::io::{ListenerId, Millis, SockId};
use super::session::{Role, Sock};
use super::slab::SourceKey;
use crate::table::limits::{Limits, ListenerLimits, SourceLimits};

/// A route's limits, as one thread applies them.
#[derive(Debug, Default)]
pub struct RouteLimits {
    connections_max: Option<u64>,
    rate: Option<Rate>,
    bucket: Bucket,
    per_source: Limited,
}

/// A listener's limits, as one thread applies them.
#[derive(Debug, Default)]
pub struct Door {
    connections_max: Option<u64>,
    per_source: Limited,
}

/// What a source may have.
#[derive(Debug, Clone, Copy, Default)]
struct Limited {
    connections_max: Option<u32>,
    rate: Option<Rate>,
}

impl Limited {
    fn new(limits: Option<SourceLimits>) -> Self {
        let limits = limits.unwrap_or_default();
        Self {
            connections_max: limits.connections_max,
            rate: limits.requests_per_second.map(|rate| Rate::new(rate, limits.burst, 1)),
        }
    }

    fn is_unlimited(&self) -> bool {
        self.connections_max.is_none() && self.rate.is_none()
    }
}

impl RouteLimits {
    /// Takes over what a table says; what was used up stays used up.
    pub fn apply(&mut self, limits: Option<Limits>, threads: u32) {
        let limits = limits.unwrap_or_default();
        self.connections_max = limits.connections_max.map(|most| u64::from(most.div_ceil(threads)));
        self.rate = limits.requests_per_second.map(|rate| Rate::new(rate, limits.burst, threads));
        self.per_source = Limited::new(limits.per_source);
    }
}

impl Door {
    pub fn new(limits: ListenerLimits, threads: u32) -> Self {
        Self {
            connections_max: limits.connections_max.map(|most| u64::from(most.div_ceil(threads))),
            per_source: Limited::new(limits.per_source),
        }
    }

    /// Whether it takes one more when it has so many.
    pub fn has_room(&self, open: u64) -> bool {
        self.connections_max.is_none_or(|most| open < most)
    }
}

/// Why a source gets no more.
enum Refusal {
    Full,
    TooFast { wait_ms: Millis },
}

impl Core {
    /// Whether a connection's source may have one more; it is known from now on. Asked once for each.
    pub(super) fn admit_source(&mut self, id: SockId) -> bool {
        let Some(sock) = self.socks.get(id).filter(|sock| sock.source.is_none()) else { return true };
        let Some((listener, address)) = sock.listener.zip(sock.client_address()) else { return true };
        let Some(limited) = self.listener_limits(listener).filter(|limited| !limited.is_unlimited()) else {
            return true;
        };
        match self.take_of(limited, Scope::Listener(listener), address) {
            Ok(key) => {
                if let Some(sock) = self.socks.get_mut(id) {
                    sock.source = Some(key);
                }
                true
            }
            Err(_) => {
                self.counters.shed_sources += 1;
                false
            }
        }
    }

    /// Ends a connection that its source may not have.
    pub(super) fn shed_source(&mut self, id: SockId) {
        let Some(sock) = self.socks.get(id) else { return };
        if sock.flow().is_none() {
            self.turn_away(sock.client_socket_address(), "shed_sources");
        }
        self.end_client(id, true, Outcome::Refused("shed_sources"));
    }

    /// Whether a client's request or connection is too much for its route, and what it is answered then.
    pub(super) fn over_limits(&mut self, id: SockId) -> Option<Answer> {
        let now = self.now;
        let sock = self.socks.get(id)?;
        let (key, address) = (sock.on_route?, sock.client_address());
        let limited = self.routes.get(key)?.limited.per_source;
        if let Some(address) = address.filter(|_| !limited.is_unlimited()) {
            match self.take_of(limited, Scope::Route(key), address) {
                Ok(source) => self.socks.get_mut(id)?.on_route_as = Some(source),
                Err(Refusal::Full) => return Some(Answer::SourceFull),
                Err(Refusal::TooFast { wait_ms }) => return Some(Answer::rate_limited(wait_ms)),
            }
        }
        let route = self.routes.get_mut(key)?;
        // It is counted already.
        if route.limited.connections_max.is_some_and(|most| route.active > most) {
            return Some(Answer::RouteFull);
        }
        let rate = route.limited.rate?;
        route.limited.bucket.take(&rate, now).err().map(Answer::rate_limited)
    }

    /// A source has one less.
    pub(super) fn give_back(&mut self, source: Option<SourceKey>) {
        if let Some(source) = source.and_then(|source| self.sources.get_mut(source)) {
            source.open -= 1;
        }
    }

    /// Sources known, and how much of theirs is open; for tests that look for leaks.
    pub fn source_counts(&self) -> (usize, u64) {
        (self.sources.len(), self.sources.open())
    }

    fn take_of(&mut self, limited: Limited, scope: Scope, address: IpAddr) -> Result<SourceKey, Refusal> {
        let now = self.now;
        let key = self.sources.find(scope, address);
        let Some(source) = self.sources.get_mut(key) else { return Ok(key) };
        if limited.connections_max.is_some_and(|most| source.open >= most) {
            return Err(Refusal::Full);
        }
        if let Some(rate) = &limited.rate {
            source.bucket.take(rate, now).map_err(|wait_ms| Refusal::TooFast { wait_ms })?;
        }
        source.open += 1;
        Ok(key)
    }

    fn listener_limits(&self, listener: ListenerId) -> Option<Limited> {
        self.listeners.get(&listener).map(|listener| listener.door.per_source)
    }
}

impl Sock {
    fn client_address(&self) -> Option<IpAddr> {
        self.client_socket_address().map(|address| address.ip())
    }

    fn client_socket_address(&self) -> Option<SocketAddr> {
        match &self.role {
            Role::Http(http) => http.address,
            Role::Tcp(tcp) => tcp.origin.source,
            Role::Preface(preface) => preface.origin.source,
            Role::Upstream(_) | Role::Check(_) | Role::Tunnel { .. } => None,
        }
    }
}
