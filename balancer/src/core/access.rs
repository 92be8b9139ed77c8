//! What is remembered of each request for the access log, when there is one.
//!
//! Every request that is counted in `requests`, and every refusal, is noted exactly once, when it ends; so
//! the log reconciles with the counters.

use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

use super::engine::Core;
use super::io::{Millis, SockId};
use super::session::{Request, Role, Sock, Stage, UpPhase};
use super::slab::UpstreamKey;

/// One request and what became of it.
#[derive(Debug, Clone, Serialize)]
pub struct Access {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client: Option<IpAddr>,
    pub host: String,
    /// Method and target; empty when the head was refused.
    pub request: String,
    /// Absent when the client was sent none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// `answered`, `upgraded`, `cut` (the app died in the middle), `aborted` (the client did), or the code
    /// of the balancer's own answer.
    pub outcome: &'static str,
    /// The instance that had it last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upstream: Option<String>,
    /// From its head being complete to its end.
    pub duration_ms: Millis,
    /// Whether it was held on the way.
    pub held: bool,
}

impl Core {
    /// Notes a request's end.
    pub(super) fn note(
        &mut self,
        client: Option<SocketAddr>,
        request: Option<&Request>,
        outcome: &'static str,
        status: Option<u16>,
        upstream: Option<UpstreamKey>,
    ) {
        if !self.config.access_log {
            return;
        }
        let upstream = upstream.and_then(|key| self.upstreams.get(key)).map(|upstream| upstream.id.clone());
        self.access.push(Access {
            client: client.map(|client| client.ip().to_canonical()),
            host: request.map(|request| request.host.clone()).unwrap_or_default(),
            request: request.map(Request::line).unwrap_or_default(),
            status,
            outcome,
            upstream,
            duration_ms: request.map_or(0, |request| self.now.saturating_sub(request.began_at)),
            held: request.is_some_and(|request| request.wait.since.is_some()),
        });
    }

    /// Notes that a client's request ended before its answer did.
    pub(super) fn note_broken(&mut self, client: SockId, outcome: &'static str) {
        let Some(sock) = self.socks.get_mut(client).filter(|_| self.config.access_log) else { return };
        let peer = sock.peer;
        let Some((address, request)) =
            sock.http().and_then(|http| Some((http.address, http.request.take()?)))
        else {
            return;
        };
        let (status, upstream) = match peer.and_then(|peer| self.socks.get(peer)).map(|peer| &peer.role) {
            Some(Role::Upstream(conn)) => match &conn.phase {
                UpPhase::Exchange(exchange) => (exchange.status(), Some(conn.upstream)),
                _ => (None, Some(conn.upstream)),
            },
            _ => (None, None),
        };
        self.note(address, Some(&request), outcome, status, upstream);
        // Put back: what is left to do with the client may ask for it.
        if let Some(http) = self.socks.get_mut(client).and_then(Sock::http) {
            http.request = Some(request);
        }
    }

    /// Counts what the log had no room for.
    pub fn count_dropped_access(&mut self, count: u64) {
        self.counters.access_log_dropped += count;
    }

    /// What has ended since the last call.
    pub fn take_access(&mut self) -> Vec<Access> {
        std::mem::take(&mut self.access)
    }
}

impl Request {
    /// Method and target.
    fn line(&self) -> String {
        let line = self.forward.split(|b| *b == b'\r').next().unwrap_or_default();
        let line = line.strip_suffix(b" HTTP/1.1").unwrap_or(line);
        String::from_utf8_lossy(line).into_owned()
    }

    /// Path and query, as they are sent upstream.
    pub fn target(&self) -> &[u8] {
        self.forward.split(|b| *b == b' ').nth(1).unwrap_or_default()
    }
}

impl super::session::Exchange {
    fn status(&self) -> Option<u16> {
        match self.stage {
            Stage::Head => None,
            Stage::Body { status, .. } => Some(status),
        }
    }
}
