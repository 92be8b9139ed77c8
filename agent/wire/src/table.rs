//! What `epagentd` tells `epagent-balancer`, as the balancer's control socket takes it: one JSON value per line.
//!
//! The balancer imports no crate of ours and documents the same shapes on its side; a test in `tests/` holds the
//! two against each other.

use serde::{Deserialize, Serialize};

/// The whole table. It replaces the one before, between two requests, if its version is higher.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    pub version: u64,
    pub routes: Vec<Route>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// `APP/PROCESS/MATCH`, for counters and logs.
    pub id: String,
    #[serde(rename = "match")]
    pub matches: Match,
    pub action: Action,
    pub hold: Hold,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Every new request waits for a later table. Those in flight end where they are.
    Hold { upstreams: Vec<Upstream> },
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
