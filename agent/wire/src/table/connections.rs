//! Open client connections, as the balancer shows them a page at a time.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// Which connections are wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionsQuery {
    /// Most rows; the balancer has a bound of its own.
    pub limit: usize,
    /// The `next` of the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<u64>,
    /// Only those being served by one of these routes; none stands for all connections.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub routes: BTreeSet<String>,
}

/// One page. Connections come and go between two, but none that stays is left out or shown twice.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connections {
    pub rows: Vec<Connection>,
    /// Where the next page begins; absent on the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u64>,
}

/// An open client connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Connection {
    /// Address and port; none of a client on a unix socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client: Option<String>,
    /// `http`, `https`, `sni`, `tcp-PORT`, with their suffixes.
    pub listener: String,
    /// `preface`, `handshake`, `idle`, `head`, `held`, `connecting`, `exchange`, `dropping`, `tunnel`, `closing`.
    pub state: String,
    /// The id of the route that serves it; none between two requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    /// The upstream that has it now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upstream: Option<String>,
    pub age_ms: u64,
    /// Since bytes last moved, either way.
    pub idle_ms: u64,
    /// Requests begun on it; 0 of plain connections.
    pub requests: u64,
    /// Of the request or tunnel that it is served now, from the client...
    pub bytes_in: u64,
    /// ...and to it.
    pub bytes_out: u64,
}
