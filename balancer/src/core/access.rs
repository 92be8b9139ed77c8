//! What the access log is told of each request and plain connection, when there is a log.
//!
//! Each is told exactly once, when it ends, from the values that are counted; so the log reconciles with the
//! counters. What never became a request (a refused head) is told too.

use std::net::IpAddr;

use serde::Serialize;

use super::engine::Core;
use super::flow::{Flow, Outcome};
use super::histogram::Micros;
use super::session::Request;

/// One request or connection and what became of it.
#[derive(Debug, Clone, Serialize)]
pub struct Access {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client: Option<IpAddr>,
    /// What the request is called, to the app and in an answer of ours.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub request_id: String,
    /// Absent of plain connections and of refused heads.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub method: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub target: String,
    /// Of a plain connection, the server name it was routed by.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub host: String,
    /// Absent when no route takes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    /// The instance that had it last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upstream: Option<String>,
    /// Absent when the client was sent none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// `answered`, `upgraded`, `closed` (a plain connection, by both sides), `cut` (the app died in the
    /// middle), `aborted` (the client did), `idle`, what the route did itself (`static`, `redirect`, `empty`),
    /// the code of the balancer's own answer, or why it was turned away before anything was understood
    /// (`unrouted`, `tls_not_tls`, `hello_refused` and the like).
    pub outcome: &'static str,
    /// From the client, head and framing included.
    pub bytes_in: u64,
    /// To the client.
    pub bytes_out: u64,
    /// From the head being complete (a connection: from accepting) to the end.
    pub duration_us: Micros,
    /// From being given to the upstream to its first byte.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttfb_us: Option<Micros>,
    /// In the hold queue, if it was held.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_us: Option<Micros>,
}

impl Core {
    pub(super) fn log_flow(
        &mut self,
        flow: &mut Flow,
        request: Option<&Request>,
        outcome: Outcome,
        duration_us: Micros,
    ) {
        let line = match flow.line.take() {
            Some(line) => *line,
            None => self.describe(flow, request),
        };
        self.access.push(Access {
            status: flow.status,
            outcome: outcome.code(),
            bytes_in: flow.bytes_in,
            bytes_out: flow.bytes_out,
            duration_us,
            ttfb_us: flow.first_byte_us,
            held_us: flow.held_us,
            ..line
        });
    }

    /// What is known of one before it has ended.
    pub(super) fn describe(&self, flow: &Flow, request: Option<&Request>) -> Access {
        let shown = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Access {
            client: flow.address.map(|address| address.ip().to_canonical()),
            request_id: request.map(|request| shown(request.id())).unwrap_or_default(),
            method: request.map(|request| shown(request.method())).unwrap_or_default(),
            target: request.map(|request| shown(request.target())).unwrap_or_default(),
            host: match request {
                Some(request) => request.host.clone(),
                None => flow.host.as_deref().unwrap_or_default().to_owned(),
            },
            route: self.routes.get(flow.route).map(|route| route.id.clone()),
            upstream: flow
                .upstream
                .and_then(|key| self.upstreams.get(key))
                .map(|upstream| upstream.id.clone()),
            status: None,
            outcome: "",
            bytes_in: 0,
            bytes_out: 0,
            duration_us: 0,
            ttfb_us: None,
            held_us: None,
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
    /// What it is called.
    pub fn id(&self) -> &[u8] {
        self.forward.get(self.id.clone()).unwrap_or_default()
    }

    pub fn method(&self) -> &[u8] {
        self.forward.split(|b| *b == b' ').next().unwrap_or_default()
    }

    /// Path and query, as they are sent upstream.
    pub fn target(&self) -> &[u8] {
        self.forward.split(|b| *b == b' ').nth(1).unwrap_or_default()
    }
}
