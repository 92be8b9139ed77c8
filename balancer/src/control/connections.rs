//! Looking at client connections one by one, a page at a time.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// Most rows of one answer.
pub const ROWS_MAX: usize = 1_000;

/// Which connections are wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConnectionsQuery {
    /// Most rows, up to [`ROWS_MAX`]; 0 stands for that many.
    #[serde(default)]
    pub limit: usize,
    /// The `next` of the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<u64>,
    /// Only those being served by one of these routes; none stands for all connections.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub routes: BTreeSet<String>,
}

/// One page of open client connections. They come and go between two pages, but none that stays is left out
/// or shown twice.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connections {
    pub rows: Vec<Connection>,
    /// Where the next page begins; absent on the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u64>,
}

/// An open client connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// Address and port, as the client's socket or its PROXY header says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<String>,
    /// `http`, `https`, `sni`, `tcp-PORT`, with its suffixes.
    #[serde(default)]
    pub listener: String,
    #[serde(default)]
    pub state: ConnectionState,
    /// Absent between two requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    /// The upstream that has it now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upstream: Option<String>,
    /// Since it was accepted.
    #[serde(default)]
    pub age_ms: u64,
    /// Since bytes last moved, either way.
    #[serde(default)]
    pub idle_ms: u64,
    /// Requests begun on it; 0 of plain connections.
    #[serde(default)]
    pub requests: u64,
    /// Of the request or tunnel it is being served now, from the client...
    #[serde(default)]
    pub bytes_in: u64,
    /// ...and to it.
    #[serde(default)]
    pub bytes_out: u64,
}

/// What a client connection is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConnectionState {
    /// It has to say what comes first: a PROXY header, a ClientHello.
    Preface,
    /// A TLS handshake is under way.
    Handshake,
    /// Between two requests, or before the first.
    #[default]
    Idle,
    /// A request's head is coming in.
    Head,
    /// In a hold queue.
    Held,
    /// A connect to its upstream is under way.
    Connecting,
    /// An upstream has its request.
    Exchange,
    /// Its route answers by itself, once the request's body is in.
    Dropping,
    /// Bytes pass both ways.
    Tunnel,
    /// The last answer is on its way.
    Closing,
}
