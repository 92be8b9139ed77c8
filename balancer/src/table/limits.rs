//! How much traffic a route or a listener takes, all together and from one source.
//!
//! A source is an IPv4 address, or the /64 that an IPv6 address is in: whoever has one address of it has all.
//! What is not said is not limited.
//!
//! Each thread counts for itself. A route's and a listener's own limits are shared out, each thread having an
//! equal part (rounded up), as with hold queues. A source's limits hold in full on each thread: its few
//! connections may all be on one, and a part of a limit would be less than was promised. So a source may come to
//! `threads` times its limits at most.

use serde::{Deserialize, Serialize};

use super::TableError;

/// Most of any number of connections.
pub const CONNECTIONS_MAX: u32 = 1_000_000;
/// Most of any number of requests per second, and of any burst.
pub const RATE_MAX: u32 = 1_000_000;

/// What a route takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Requests and connections at a time, held ones included. One more is answered 503 `route_full`; plain TCP
    /// is reset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections_max: Option<u32>,
    /// Requests (or plain TCP connections) per second in the long run. One more is answered 429 `rate_limited`,
    /// with the time to wait; plain TCP is reset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_second: Option<u32>,
    /// How many may come at once after a quiet time; absent means as many as in a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst: Option<u32>,
    /// What each source may have of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_source: Option<SourceLimits>,
}

/// What one source may have of a route or a listener.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceLimits {
    /// Of a route: requests and connections at a time, more are answered 429 `source_full`. Of a listener:
    /// connections, more are reset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections_max: Option<u32>,
    /// Of a route: as for the route. Of a listener: connections per second, more are reset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_second: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst: Option<u32>,
}

/// What a listener takes. Beyond it connections are reset as soon as they are accepted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenerLimits {
    /// Connections at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections_max: Option<u32>,
    /// What each source may have of it. Behind a PROXY header, that is whom the header names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_source: Option<SourceLimits>,
}

impl Limits {
    pub(super) fn check(&self, route: &str) -> Result<(), TableError> {
        let source = self.per_source.unwrap_or_default();
        let fault = check_count(self.connections_max, CONNECTIONS_MAX)
            .or_else(|| check_rate(self.requests_per_second, self.burst))
            .or_else(|| source.fault());
        match fault {
            None => Ok(()),
            Some(what) => Err(TableError::BadLimit { route: route.to_owned(), what }),
        }
    }
}

impl ListenerLimits {
    /// What is wrong with it, if anything.
    pub fn fault(&self) -> Option<&'static str> {
        let source = self.per_source.unwrap_or_default();
        check_count(self.connections_max, CONNECTIONS_MAX).or_else(|| source.fault())
    }
}

impl SourceLimits {
    fn fault(&self) -> Option<&'static str> {
        check_count(self.connections_max, CONNECTIONS_MAX)
            .or_else(|| check_rate(self.requests_per_second, self.burst))
    }
}

fn check_rate(rate: Option<u32>, burst: Option<u32>) -> Option<&'static str> {
    match (rate, burst) {
        (None, Some(_)) => Some("a burst belongs to requests_per_second"),
        _ => check_count(rate, RATE_MAX).or_else(|| check_count(burst, RATE_MAX)),
    }
}

fn check_count(count: Option<u32>, most: u32) -> Option<&'static str> {
    let fits = count.is_none_or(|count| (1..=most).contains(&count));
    (!fits).then_some("a limit is 1 to 1,000,000")
}
