//! What is said on the control socket: one JSON object per line each way.
//!
//! ```text
//! → {"set_table": {"version": 7, "routes": [...]}}
//! ← {"ack": {"version": 7, "problems": []}}
//! → {"status": {}}
//! ← {"status": {"table_version": 7, "upstreams": [...], ...}}
//! → {"connections": {"limit": 100}}
//! ← {"connections": {"rows": [{"client": "192.0.2.1:4711", "state": "exchange", ...}], "next": 17}}
//! → {"audit": {}}
//! ← {"audit": {"entries": [{"by": {"peer": {"uid": 0, "pid": 71}}, "request": "set_table", ...}]}}
//! → {"wait": {"since": 0, "timeout_ms": 30000}}
//! ← {"waited": {"sequence": 1, "routes": ["shop-web"]}}
//! → {"set_tabel": {}}
//! ← {"error": {"code": "bad_request", "message": "unknown variant ..."}}
//! ```

pub mod health;

use serde::{Deserialize, Serialize};

pub use self::health::{Ejected, FleetStatus, HealthStatus, ShownHealth};
use super::audit::{Audit, AuditQuery};
use super::certificates::{Certificates, ReloadCertificatesQuery};
use super::connections::{Connections, ConnectionsQuery};
pub use super::counters::Counters;
pub use super::memory::MemoryStatus;
use super::said::{Said, SaidQuery};
use super::traffic::{Ends, Latency, Responses, add_some};
use crate::core::histogram::Histogram;
use crate::doors::Io;
use crate::table::{Address, Table, UpstreamState};
use crate::unix::TenantSockets;

/// Longest line either side accepts, in bytes, newline included.
pub const LINE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Longest line with metrics, in bytes: as many routes and upstreams as are shown, with ids of full length.
pub const METRICS_LINE_BYTES_MAX: usize = 32 * 1024 * 1024;

/// Longest a [`WaitQuery`] is left unanswered, in milliseconds.
pub const WAIT_MS_MAX: u64 = 60_000;

/// What may be asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Replace the routing table. Answered once every thread routes by it and it is saved.
    SetTable(Table),
    /// Report counters, upstreams, hold queues and listeners.
    Status(StatusQuery),
    /// Say what status says in Prometheus' text format.
    Metrics(MetricsQuery),
    /// Show open client connections, a page at a time.
    Connections(ConnectionsQuery),
    /// Show the last changes, and who made them.
    Audit(AuditQuery),
    /// Show what was logged last, numbered.
    Said(SaidQuery),
    /// Answer when a route that has no upstream begins to hold something, or when the time is up.
    Wait(WaitQuery),
    /// Hand over to a new process of the program on disk. Answered when that one is in charge, or when it never
    /// will be.
    Reload(ReloadQuery),
    /// Read the folder of certificates again. Answered when what it has is in force.
    ReloadCertificates(ReloadCertificatesQuery),
}

/// `reload` takes no arguments.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReloadQuery {}

/// `metrics` takes no arguments.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricsQuery {}

/// Metrics in Prometheus' text format 0.0.4. The only answer that may be longer than [`LINE_BYTES_MAX`], up to
/// [`METRICS_LINE_BYTES_MAX`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics {
    pub text: String,
}

/// What of the status is wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StatusQuery {
    /// Also the histograms of routes and upstreams, which are many numbers.
    #[serde(default, skip_serializing_if = "is_false")]
    pub latency: bool,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// Waits for a route that holds something and has no upstream that is up: an app that is stopped while
/// nobody uses it is wanted again.
///
/// Each such beginning has the next number. Ask with the number of the last answer, and with 0 at first: when
/// the numbers differ (something began meanwhile, or the balancer was restarted) the answer comes at once. So
/// nothing that begins between two questions is missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WaitQuery {
    pub since: u64,
    /// Longest wait, in milliseconds; at most [`WAIT_MS_MAX`] of it are waited.
    pub timeout_ms: u64,
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// The table is in force.
    Ack(Ack),
    /// The state of things.
    Status(Box<Status>),
    Metrics(Metrics),
    Connections(Connections),
    Audit(Audit),
    Said(Said),
    /// The wait is over.
    Waited(Waited),
    /// A new process is in charge; the old one finishes what it carries.
    Reloaded(Reloaded),
    /// Certificates were read again.
    Certificates(Certificates),
    /// Nothing was changed, and why.
    Error(ControlError),
}

/// The table with this version is in force on every thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    pub version: u64,
    /// What of the table could not be put into effect. The rest is in force all the same.
    pub problems: Vec<Problem>,
}

/// One part of a table that could not be put into effect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The route it is about; absent when it is about the whole table (it could not be saved).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    pub message: String,
}

/// What a wait came to. Also sent when the peer asks something else meanwhile, before the answer to that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waited {
    /// The `since` of the next question.
    pub sequence: u64,
    /// The ids of the routes that hold something and have no upstream that is up, now. Empty when the time
    /// was up, or when whoever was held has left again.
    pub routes: Vec<String>,
}

/// What a reload came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// The process that is in charge now.
    pub pid: u32,
}

/// Why a request changed nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlError {
    pub code: ErrorCode,
    pub message: String,
}

/// The closed list of refusals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The line is not JSON, or not a request; or it is longer than [`LINE_BYTES_MAX`].
    BadRequest,
    /// The table is not valid as a whole.
    BadTable,
    /// The running table has a higher version, or the same version with other contents.
    StaleVersion,
    /// The peer's uid may not use this socket.
    Forbidden,
    /// A thread did not take the table or answer in time.
    Busy,
    /// The new process did not come up; the old one goes on.
    HandoverFailed,
}

/// The state of the whole balancer, summed over its threads.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Of this program.
    #[serde(default)]
    pub version: String,
    /// The process that answers.
    #[serde(default)]
    pub pid: u32,
    /// Since this process started.
    #[serde(default)]
    pub uptime_ms: u64,
    pub table_version: u64,
    pub threads: u32,
    /// What the data path uses.
    #[serde(default)]
    pub io: Io,
    /// Whether unix sockets of tenants may be upstreams.
    #[serde(default)]
    pub tenant_sockets: TenantSockets,
    pub listeners: Vec<ListenerStatus>,
    pub routes: Vec<RouteStatus>,
    /// Also upstreams that have left the table but still have something to finish (`state: removed`).
    pub upstreams: Vec<UpstreamStatus>,
    pub counters: Counters,
    /// Of this process alone.
    #[serde(default)]
    pub memory: MemoryStatus,
    /// Processes that have handed over to this one and finish what they carry, the oldest first. What they
    /// have and count is part of everything above.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub draining: Vec<DrainingStatus>,
    /// What TLS listeners show their clients.
    #[serde(default, skip_serializing_if = "Certificates::is_empty")]
    pub certificates: Certificates,
}

/// A process that drains.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainingStatus {
    pub pid: u32,
    pub drains_for_ms: u64,
    /// Client connections it still has, when it said so last.
    pub connections: u64,
}

/// One listening socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerStatus {
    /// `http`, or `tcp-PORT`.
    pub name: String,
    pub address: String,
    /// Whether the socket was handed to the balancer rather than bound by it.
    pub inherited: bool,
}

/// One route of the table.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteStatus {
    pub id: String,
    /// Requests and connections it has now, held ones and those being answered among them.
    #[serde(default)]
    pub active: u64,
    /// How long it has had none: since the last one ended, or since the route was made; 0 while it has some.
    #[serde(default)]
    pub idle_ms: u64,
    /// Requests (HTTP) or connections (TCP) that matched, in total.
    pub requests_total: u64,
    /// Held now.
    pub held: u64,
    /// Age of the oldest one held now, in milliseconds.
    pub oldest_held_ms: u64,
    /// Ever held.
    pub held_total: u64,
    /// Answered 503 because the hold queue was full and this was the oldest.
    pub hold_shed_total: u64,
    /// Answered 503 because they were held for `max_age_ms`.
    pub hold_expired_total: u64,
    /// How they ended. An alias's are those of the route it leads to.
    #[serde(default)]
    pub ends: Ends,
    /// What clients were answered.
    #[serde(default)]
    pub responses: Responses,
    /// From clients, head and framing included, also of what has not ended.
    #[serde(default)]
    pub bytes_in_total: u64,
    /// To clients, also of what has not ended.
    #[serde(default)]
    pub bytes_out_total: u64,
    /// Only when asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency: Option<Latency>,
    /// Its upstreams.
    #[serde(default)]
    pub fleet: FleetStatus,
}

/// The state of an upstream as status shows it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShownState {
    Up,
    Draining,
    Down,
    /// No longer in the table; it has something to finish.
    #[default]
    Removed,
}

impl ShownState {
    /// As it is written in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Draining => "draining",
            Self::Down => "down",
            Self::Removed => "removed",
        }
    }
}

impl From<UpstreamState> for ShownState {
    fn from(state: UpstreamState) -> Self {
        match state {
            UpstreamState::Up => Self::Up,
            UpstreamState::Draining => Self::Draining,
            UpstreamState::Down => Self::Down,
        }
    }
}

/// One upstream. An upstream that drains is empty when `active_requests` and `active_connections` are 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpstreamStatus {
    pub id: String,
    pub address: Address,
    pub state: ShownState,
    /// HTTP requests given to it and not yet answered in full.
    pub active_requests: u64,
    /// Plain TCP and upgraded connections it is carrying.
    pub active_connections: u64,
    /// Kept-alive connections that wait for a next request.
    pub idle_connections: u64,
    pub requests_total: u64,
    pub connections_total: u64,
    /// Connects that failed or timed out.
    pub connect_errors_total: u64,
    /// Why the last connect failed; absent when it worked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connect_error: Option<String>,
    /// Requests lost because it closed, reset, stalled or broke the protocol after it was given them.
    pub request_errors_total: u64,
    /// The last connect failed; it is tried again every 50 ms, by one request at a time.
    pub unreachable: bool,
    /// What clients were answered that were last given to it.
    #[serde(default)]
    pub responses: Responses,
    /// From being given a request or connection to the first byte. Only when asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_byte: Option<Histogram>,
    /// What its active checks say; absent when it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthStatus>,
}

impl RouteStatus {
    /// Adds another thread's counts of the same route.
    pub fn add(&mut self, other: &RouteStatus) {
        self.active += other.active;
        // It idles only where every thread's does.
        self.idle_ms = self.idle_ms.min(other.idle_ms);
        self.requests_total += other.requests_total;
        self.held += other.held;
        self.oldest_held_ms = self.oldest_held_ms.max(other.oldest_held_ms);
        self.held_total += other.held_total;
        self.hold_shed_total += other.hold_shed_total;
        self.hold_expired_total += other.hold_expired_total;
        self.ends.add(&other.ends);
        self.responses.add(&other.responses);
        self.bytes_in_total += other.bytes_in_total;
        self.bytes_out_total += other.bytes_out_total;
        add_some(&mut self.latency, &other.latency, Latency::add);
        self.fleet.add(&other.fleet);
    }
}

impl UpstreamStatus {
    /// Adds another thread's counts of the same upstream.
    pub fn add(&mut self, other: &UpstreamStatus) {
        self.active_requests += other.active_requests;
        self.active_connections += other.active_connections;
        self.idle_connections += other.idle_connections;
        self.requests_total += other.requests_total;
        self.connections_total += other.connections_total;
        self.connect_errors_total += other.connect_errors_total;
        self.connect_error = self.connect_error.take().or_else(|| other.connect_error.clone());
        self.request_errors_total += other.request_errors_total;
        self.unreachable |= other.unreachable;
        self.responses.add(&other.responses);
        add_some(&mut self.first_byte, &other.first_byte, Histogram::add);
        if let (Some(health), Some(other)) = (&mut self.health, &other.health) {
            health.add(other);
        }
    }
}
