//! The most memory that connections and tables may take in a core, by the sizes of its own types.
//!
//! What grows is counted at twice its length, which is how a vector grows. A connection has the largest role it
//! may have, and an upstream connection that serves it. What of it waits to be sent is not counted here: that
//! has a budget of its own ([`super::memory`]), as has what connections keep beyond their fair share.

use super::choose::maglev_size_for;
use super::config::Config;
use super::flow::Flow;
use super::histogram::BUCKETS;
use super::io::{Millis, SockId};
use super::limits::Sources;
use super::memory::{KEPT_FAIR_BYTES, Limits};
use super::outbox::Outbox;
use super::preface::Preface;
use super::routes::{Route, hashes};
use super::session::{Exchange, HttpClient, Sock, TcpClient};
use super::slab::Slab;
use super::upstreams::Upstream;
use crate::table::{ID_BYTES_MAX, Table};

/// What malloc adds to each piece: a header, and rounding up.
const PIECE_BYTES: usize = 24;
/// Pieces of a connection, a route or an upstream at its busiest: roles, queues, strings.
const PIECES: usize = 16;
/// Lists of the core that a socket may be on: to settle, lenders, thirsty, runnable, held.
const LISTS: usize = 5;
/// How often a route or an upstream is found by a name: by its id, and by what it matches.
const NAMES: usize = 4;

/// The largest records of a client connection and of the upstream connection that serves it.
pub fn records_bytes() -> usize {
    let timers = 2 * 2 * size_of::<(Millis, SockId)>();
    let lists = 2 * LISTS * size_of::<(SockId, Millis)>();
    let sock = 2 * Slab::<SockId, Sock>::SLOT_BYTES + timers + lists + Outbox::BUSY_BYTES;
    let roles = [size_of::<HttpClient>(), size_of::<TcpClient>(), size_of::<Preface>(), size_of::<Flow>()];
    let role = roles.into_iter().max().unwrap_or_default();
    2 * sock + role + size_of::<Exchange>() + PIECES * PIECE_BYTES
}

/// What such pairs may keep of what they have received: everybody's fair share, then the budget of all, and what
/// one batch brings before that is looked at.
pub fn kept_bytes(config: &Config, pairs: usize) -> usize {
    let Limits { buffers, buffer_bytes, kept_bytes_max, .. } = config.memory;
    2 * pairs * KEPT_FAIR_BYTES + kept_bytes_max + 2 * buffers * buffer_bytes as usize
}

/// What limits by source may take.
pub fn sources_bytes() -> usize {
    Sources::bytes_max()
}

/// What the routes of a table may take, their upstreams, and what those of them look up that hash.
pub fn table_bytes(table: &Table) -> usize {
    let histogram = BUCKETS * size_of::<u64>();
    let common = NAMES * (2 * ID_BYTES_MAX + PIECE_BYTES) + PIECES * PIECE_BYTES;
    let route = 2 * size_of::<Route>() + 3 * histogram + common;
    let idle = Config::IDLE_PER_UPSTREAM * size_of::<SockId>();
    let upstream = 2 * size_of::<Upstream>() + histogram + idle + common;
    let upstreams: usize = table.routes.iter().map(|route| route.upstreams().len()).sum();
    let hashing = table.routes.iter().filter(|route| hashes(route)).count();
    let lookup = hashing * maglev_size_for(hashing) as usize * size_of::<u16>();
    table.routes.len() * route + upstreams * upstream + lookup
}
