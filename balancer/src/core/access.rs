//! What the access log is told of each request and plain connection, when there is a log.
//!
//! Each is told exactly once, when it ends, from the values that are counted; so the log reconciles with the
//! counters. What never became a request (a refused head) is told too.

use std::net::IpAddr;

use serde::Serialize;

use super::dispatch::field;
use super::engine::Core;
use super::flow::{Flow, Outcome};
use super::histogram::Micros;
use super::http::head::Version;
use super::session::Request;
use super::slab::RouteKey;

/// One request or connection and what became of it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Access {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client: Option<IpAddr>,
    /// What the request is called, to the app and in an answer of ours.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub request_id: String,
    /// `HTTP/1.1`, `HTTP/1.0` or `tcp`; absent when it was turned away before anything was understood.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub protocol: &'static str,
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
    /// Only when the log's format has them.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub referer: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub user_agent: String,
    /// This line stands for so many, when what went well is sampled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample: Option<u32>,
}

impl Access {
    /// What its texts take that a client chooses.
    pub(super) fn text_bytes(&self) -> usize {
        self.target.len() + self.host.len() + self.method.len()
    }
}

impl Core {
    pub(super) fn log_flow(
        &mut self,
        flow: &mut Flow,
        request: Option<&Request>,
        outcome: Outcome,
        duration_us: Micros,
    ) {
        let well = outcome.went_well() && flow.status.is_none_or(|status| status < 400);
        let sample = (well && self.config.access_log_sample > 1).then_some(self.config.access_log_sample);
        if let Some(sample) = sample {
            self.access_turn = (self.access_turn + 1) % sample;
            if self.access_turn != 0 {
                self.counters.access_log_sampled_out += 1;
                return;
            }
        }
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
            sample,
            ..line
        });
    }

    /// What is known of one before it has ended.
    pub(super) fn describe(&self, flow: &Flow, request: Option<&Request>) -> Access {
        let shown = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let wanted = |name| match request.filter(|_| self.config.access_log_agent) {
            Some(request) => shown(field(&request.forward, name).unwrap_or_default()),
            None => String::new(),
        };
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
            protocol: match request.map(|request| request.version) {
                Some(Version::Http11) => "HTTP/1.1",
                Some(Version::Http10) => "HTTP/1.0",
                None if flow.route != RouteKey::NONE => "tcp",
                None => "",
            },
            referer: wanted("referer"),
            user_agent: wanted("user-agent"),
            ..Access::default()
        }
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
