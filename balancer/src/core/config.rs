//! The bounds the core works within. Each is a default that the command line may change.

use super::io::Millis;
use super::memory::Limits;
use crate::table::limits::ListenerLimits;

/// Bounds and waits of one thread's core.
#[derive(Debug, Clone)]
pub struct Config {
    /// Client connections; accepting pauses there, and clients that come are shed if it stays so. One accept burst may exceed it by [`Config::SLACK`].
    pub connections_max: u64,
    /// How many threads share the table's hold limits.
    pub threads: u32,
    /// What the choices that look random start from: the same seed, the same choices.
    pub seed: u64,
    /// What the names of requests start from; no two threads of any balancers have the same.
    pub request_id_seed: [u64; 2],
    /// How long clients wait in the kernel's queue for room among the connections; then they are reset.
    pub overload_grace_ms: Millis,
    /// What each listener takes that was given no limits of its own.
    pub listener_limits: ListenerLimits,
    /// Look for the files of ACME challenges before their routes.
    pub acme: bool,
    /// Note every request's end for the access log.
    pub access_log: bool,
    /// Of what went well, note one in so many.
    pub access_log_sample: u32,
    /// Note Referer and User-Agent too.
    pub access_log_agent: bool,
    /// A request head larger than this gets 431.
    pub head_bytes_max: usize,
    /// From a request's first byte (or from accepting) to the end of its head; then 408.
    pub head_timeout_ms: Millis,
    /// Between two requests of a client.
    pub client_idle_timeout_ms: Millis,
    /// A client or upstream that takes or sends nothing of a body it owes us.
    pub body_timeout_ms: Millis,
    /// An upstream that sends nothing while it owes a response; then 504.
    pub response_timeout_ms: Millis,
    /// A connect to an upstream.
    pub connect_timeout_ms: Millis,
    /// A tunnel in which nothing moves.
    pub tunnel_idle_timeout_ms: Millis,
    /// What may wait in memory.
    pub memory: Limits,
}

impl Config {
    /// How far one accept burst may go beyond `connections_max`.
    pub const SLACK: u64 = 1024;
    /// A source is stopped when this much waits to be sent to its other side...
    pub const BACKLOG_HIGH_BYTES: usize = 256 * 1024;
    /// ...and goes on when less than this is left: in bulk, the next bytes are received while the last ones
    /// are being sent.
    pub const BACKLOG_LOW_BYTES: usize = 256 * 1024;
    /// The same marks for what waits in memory of our own.
    pub const SPILL_HIGH_BYTES: usize = 128 * 1024;
    pub const SPILL_LOW_BYTES: usize = 32 * 1024;
    /// What a bulk flow receives at a time: the more of them there are, the less.
    pub const BULK_BYTES_MIN: u32 = 256 * 1024;
    pub const BULK_BYTES_MAX: u32 = 1024 * 1024;
    /// A flow of which this much waits or comes at a time is a bulk flow; with less it is one of small
    /// messages again.
    pub const QUIET_BYTES: usize = 16 * 1024;
    /// What is received at a time for a peer that does not keep up, once it has taken what it had...
    pub const SLOW_BYTES: u32 = 64 * 1024;
    /// ...and when half of the memory for such peers is in use.
    pub const PRESSED_BYTES: u32 = 4 * 1024;
    /// For so long after a receive found no buffer, flows take one buffer at a time.
    pub const THIRST_MS: Millis = 10;
    /// Entries of timers that nobody waits for are dropped when there are so many beside two for each socket.
    pub const TIMERS_SLACK: usize = 64;
    /// How often it is looked, while few buffers are left to lend, which have been lent for too long...
    pub const LENT_TICK_MS: Millis = 10;
    /// ...and otherwise, which are lent at all.
    pub const LENT_SWEEP_MS: Millis = 1_000;
    /// Request bytes kept of a client that has to wait: body while it is held, pipelined requests.
    pub const AHEAD_BYTES: usize = 64 * 1024;
    /// Of the body of a request that a route answers by itself, this much is read so that the connection
    /// can go on; a larger one ends it.
    pub const DROPPED_BYTES_MAX: u64 = 64 * 1024;
    /// A response head larger than this is refused.
    pub const RESPONSE_HEAD_BYTES_MAX: usize = 64 * 1024;
    /// Kept-alive connections per upstream and thread.
    pub const IDLE_PER_UPSTREAM: usize = 1024;
    /// How long a kept-alive connection may wait for its next request. Shorter than what app servers use
    /// (gunicorn 2 s, Node 5 s), so that it is the balancer who closes first.
    pub const UPSTREAM_IDLE_MS: Millis = 1_500;
    /// A request that must not be repeated is given only to a connection that idled less than this.
    pub const UPSTREAM_IDLE_UNREPEATABLE_MS: Millis = 250;
    /// Connects under way per upstream and thread; more requests are held until one completes.
    pub const CONNECTING_MAX: u32 = 512;
    /// Connects tried for one request without a pause. What follows then is the route's policy for traffic
    /// that nobody can take; a held request goes on trying, every [`Config::HOLD_TICK_MS`] at most, as long
    /// as it is held.
    pub const CONNECT_TRIES_MAX: u8 = 10;
    /// Health checks at work at a time, per thread; the others wait their turn.
    pub const CHECKS_MAX: usize = 32;
    /// Longest pause between two checks of an upstream that gets no traffic and whose last check passed.
    pub const RISING_CHECK_MS: Millis = 250;
    /// How many times `ejection_ms` the longest ejection lasts.
    pub const EJECTION_TIMES_MAX: Millis = 10;
    /// How often held requests look again, and how soon an unreachable upstream is tried again when no
    /// other is left.
    pub const HOLD_TICK_MS: Millis = 50;
    /// Longest wait before an unreachable upstream is tried again while others serve.
    pub const BACKOFF_MAX_MS: Millis = 5_000;
    /// Connect timeout of such a try.
    pub const PROBE_TIMEOUT_MS: Millis = 1_000;
    /// How long the rest of an unwanted request is read and dropped, so that the client sees our answer
    /// rather than a reset.
    pub const LINGER_MS: Millis = 1_000;
    /// Pause after accepting failed for lack of descriptors or memory.
    pub const ACCEPT_BACKOFF_MS: Millis = 100;
    /// While stopping in a hurry: an idle client is closed after this.
    pub const STOPPING_IDLE_MS: Millis = 1_000;
}

impl Default for Config {
    fn default() -> Self {
        Self {
            connections_max: 50_000,
            threads: 1,
            seed: 0,
            overload_grace_ms: 1_000,
            listener_limits: ListenerLimits::default(),
            request_id_seed: [0; 2],
            acme: false,
            access_log: false,
            access_log_sample: 1,
            access_log_agent: false,
            head_bytes_max: 32 * 1024,
            head_timeout_ms: 10_000,
            client_idle_timeout_ms: 60_000,
            body_timeout_ms: 60_000,
            response_timeout_ms: 300_000,
            connect_timeout_ms: 3_000,
            tunnel_idle_timeout_ms: 3_600_000,
            memory: Limits::default(),
        }
    }
}
