//! What `epagentd` tells `epagent-balancer`, as the balancer's control socket takes it: one JSON value per line.
//!
//! The balancer imports no crate of ours and documents the same shapes on its side, with all its counters; here
//! is what the agent sends and reads. A test in `tests/` holds the two against each other.

mod connections;
mod status;

pub use connections::*;
pub use status::*;

use serde::{Deserialize, Serialize};

use crate::said::Said;

/// Begins the address of an upstream that listens on a unix socket; what follows is its path below the folder that the
/// balancer was given for tenants.
pub const SOCKET_PREFIX: &str = "unix:";
/// The longest line either side sends.
pub const LINE_BYTES_MAX: usize = 4 << 20;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    SetTable(Table),
    Status {
        /// Also how long everything took.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        latency: bool,
    },
    /// Show open client connections, a page at a time.
    Connections(ConnectionsQuery),
    /// What it logged after line `after` of its run `run`.
    Said {
        run: u64,
        after: u64,
    },
    /// Hand over to a new process of the program on disk.
    Reload {},
    /// Answered when a route with nobody to answer begins to hold something, or when the time is up.
    Wait {
        /// The `sequence` of the last answer; 0 at first.
        since: u64,
        timeout_ms: u64,
    },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    Ack(Ack),
    Status(Box<Status>),
    Connections(Connections),
    Said(Said),
    Waited(Waited),
    Reloaded(Reloaded),
    Error(Refused),
}

/// The whole table. It replaces the one before, between two requests, if its version is higher.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    pub version: u64,
    pub routes: Vec<Route>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// `APP/PROCESS/NUMBER`, for counters and logs.
    pub id: String,
    #[serde(rename = "match")]
    pub matches: Match,
    pub action: Action,
    pub hold: Hold,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Match {
    Host(String),
    Port(u16),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// To one of these that is up; while none is, requests are held.
    Proxy { upstreams: Vec<Upstream> },
    /// Requests wait until a later table says otherwise.
    Hold {},
    /// Every request gets this page.
    Static { status: u16, content_type: String, body: String },
    /// Every request is sent elsewhere.
    Redirect { to: String, status: u16, keep_path: bool },
}

impl Route {
    /// The upstreams of a proxy route; none of another.
    pub fn upstreams(&self) -> &[Upstream] {
        match &self.action {
            Action::Proxy { upstreams } => upstreams,
            _ => &[],
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upstream {
    /// The jail's id.
    pub id: String,
    pub address: String,
    pub state: UpstreamState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UpstreamState {
    Up,
    /// Finishes what it has and gets nothing new.
    Draining,
    Down,
}

/// The bounds of a hold; past them the oldest request is answered 503.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    pub max_requests: u32,
    pub max_age_ms: u64,
}

/// The table of this version is in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    pub version: u64,
    /// What of it could not be put into effect; the rest is in force all the same.
    pub problems: Vec<Problem>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The route it is about; none when it is about the whole table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    pub message: String,
}

/// Nothing was changed, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    pub code: String,
    pub message: String,
}
