//! What the balancer says of itself: what the agent and its operators read of it.
//!
//! Every field may be missing: a balancer of another version says more or less. Counters are a map, since this side adds
//! nothing to what their names say.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The state of the whole balancer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    pub version: String,
    pub pid: u32,
    pub uptime_ms: u64,
    pub table_version: u64,
    pub threads: u32,
    /// What the data path uses: `uring` or `epoll`.
    pub io: String,
    /// Whether unix sockets of tenants may be upstreams: `open`, or why not.
    pub tenant_sockets: String,
    pub listeners: Vec<ListenerStatus>,
    pub routes: Vec<RouteStatus>,
    /// Also upstreams that have left the table and still have something to finish.
    pub upstreams: Vec<UpstreamStatus>,
    pub counters: BTreeMap<String, u64>,
    /// Processes that have handed over to this one and finish what they carry.
    pub draining: Vec<DrainingStatus>,
    /// What TLS listeners show their clients.
    pub certificates: Certificates,
    pub memory: MemoryStatus,
}

/// What waits in memory, and how much the process may come to use at all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryStatus {
    /// Bytes that wait for peers that do not keep up, and most that may.
    pub waiting_bytes: u64,
    pub waiting_bytes_max: u64,
    pub bound: MemoryBound,
}

/// The most memory that the balancer may come to use, in bytes, by what for: each part at its worst, all at a time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryBound {
    /// The sum of all parts but the kernel's; 0 when the balancer does not say.
    pub total_bytes: u64,
    pub receive_buffers_bytes: u64,
    /// What waits for peers that do not keep up.
    pub waiting_bytes: u64,
    /// Records of connections.
    pub connections_bytes: u64,
    /// Unfinished heads, and bodies that have nowhere to go yet.
    pub kept_bytes: u64,
    pub tls_bytes: u64,
    /// Who has how much of each limit.
    pub sources_bytes: u64,
    pub table_bytes: u64,
    pub control_bytes: u64,
    pub process_bytes: u64,
    /// The kernel's, for the sockets' own buffers; not part of the total.
    pub kernel_sockets_bytes: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Certificates {
    pub in_force: Vec<CertificateStatus>,
    pub refused: Vec<RefusedCertificate>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CertificateStatus {
    /// What its files are called.
    pub id: String,
    /// The host names it is for.
    pub names: Vec<String>,
    /// RFC 3339, in UTC.
    pub not_before: String,
    pub not_after: String,
    pub not_after_unix_s: i64,
    /// `valid`, `expires_soon`, `expired`, `not_yet_valid`; it is shown to clients in any case.
    pub state: String,
    /// Shown to clients that name no host, or one that no certificate is for.
    pub is_default: bool,
}

/// A pair of files that is not used.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RefusedCertificate {
    /// Empty when it is about the whole folder.
    pub id: String,
    pub reason: String,
    /// What was in force before stays in force.
    pub kept: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ListenerStatus {
    pub name: String,
    pub address: String,
    /// It was handed to the balancer rather than bound by it.
    pub inherited: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DrainingStatus {
    pub pid: u32,
    pub drains_for_ms: u64,
    pub connections: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RouteStatus {
    pub id: String,
    /// Requests and connections now, held ones included.
    pub active: u64,
    /// How long there have been none.
    pub idle_ms: u64,
    pub requests_total: u64,
    /// Held now.
    pub held: u64,
    pub held_total: u64,
    pub hold_shed_total: u64,
    pub hold_expired_total: u64,
    /// How they ended: `passed`, `aborted`, `cut`, …
    pub ends: BTreeMap<String, u64>,
    /// What clients were answered: `2xx`, `5xx`, …
    pub responses: BTreeMap<String, u64>,
    pub bytes_in_total: u64,
    pub bytes_out_total: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency: Option<Latency>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UpstreamStatus {
    pub id: String,
    pub address: String,
    /// `up`, `draining`, `down`, `removed`.
    pub state: String,
    pub active_requests: u64,
    pub active_connections: u64,
    pub requests_total: u64,
    pub connect_errors_total: u64,
    /// Why the last connect failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connect_error: Option<String>,
    pub request_errors_total: u64,
    pub unreachable: bool,
}

/// How long the requests and connections of a route took.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Latency {
    pub duration: Histogram,
    pub first_byte: Histogram,
    pub held: Histogram,
}

/// Counts of values by size, in buckets that cut each doubling into four; `[[bucket, count], …]`, empty ones left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Histogram {
    pub sum_us: u64,
    pub max_us: u64,
    pub buckets: Vec<(u32, u64)>,
}

impl Histogram {
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|(_, count)| count).sum()
    }

    /// A value that this share of all (0 to 1) does not exceed, to an eighth; none when there is no value.
    pub fn quantile_us(&self, share: f64) -> Option<u64> {
        let rank = (self.count() as f64 * share.clamp(0.0, 1.0)).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (bucket, count) in &self.buckets {
            seen += count;
            if seen >= rank {
                let start = bucket.checked_sub(1).map_or(0, end_of);
                let middle = start + (end_of(*bucket) - 1).saturating_sub(start) / 2;
                return Some(middle.min(self.max_us));
            }
        }
        None
    }

    /// What has come since `before`, an earlier state of the same one.
    pub fn since(&self, before: &Histogram) -> Histogram {
        let old: BTreeMap<u32, u64> = before.buckets.iter().copied().collect();
        let left = |(bucket, count): &(u32, u64)| {
            (*bucket, count.saturating_sub(old.get(bucket).copied().unwrap_or(0)))
        };
        Histogram {
            sum_us: self.sum_us.saturating_sub(before.sum_us),
            // The largest of all is an upper bound of the largest since.
            max_us: self.max_us,
            buckets: self.buckets.iter().map(left).filter(|(_, count)| *count > 0).collect(),
        }
    }
}

/// The smallest value in microseconds that is too large for a bucket; the last one has no end.
fn end_of(bucket: u32) -> u64 {
    const LAST: u32 = 140;
    match bucket {
        0..4 => u64::from(bucket) + 1,
        4..LAST => u64::from(4 + bucket % 4 + 1) << (bucket / 4 - 1),
        _ => u64::MAX,
    }
}

/// A new process is in charge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    pub pid: u32,
}

/// The wait is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waited {
    pub sequence: u64,
    /// Ids of the routes that hold something and have no upstream that is up, now.
    pub routes: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_since_is_told_apart() {
        let before = Histogram { sum_us: 10, max_us: 9, buckets: vec![(3, 1), (9, 2)] };
        let after = Histogram { sum_us: 5_010, max_us: 2_400, buckets: vec![(3, 1), (9, 3), (40, 2)] };
        let since = after.since(&before);
        assert_eq!(since.buckets, [(9, 1), (40, 2)]);
        assert_eq!((since.count(), since.quantile_us(0.01)), (3, Some(10)));
        assert_eq!(since.quantile_us(0.99), Some(2_303));
        assert_eq!(Histogram::default().quantile_us(0.5), None);
    }
}
