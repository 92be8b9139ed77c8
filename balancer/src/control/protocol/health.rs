//! What status says of upstreams' health, and of a route's upstreams all together.

use serde::{Deserialize, Serialize};

/// What an upstream's active checks have come to, on the thread that thinks worst of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthStatus {
    pub state: ShownHealth,
    /// How the last check ended, in words: `passed`, or why it failed.
    pub last: String,
    pub passed_total: u64,
    pub failed_total: u64,
}

/// Whether an upstream gets traffic, as far as its active checks go. The worse, the greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShownHealth {
    /// It does.
    Passing,
    /// It is new, and has not passed as often as it must.
    Unproven,
    /// It does not.
    Failing,
}

impl HealthStatus {
    /// Adds another thread's view of the same upstream.
    pub fn add(&mut self, other: &HealthStatus) {
        if other.state > self.state {
            (self.state, self.last) = (other.state, other.last.clone());
        }
        self.passed_total += other.passed_total;
        self.failed_total += other.failed_total;
    }
}

/// The upstreams of one route, all together.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FleetStatus {
    /// How many the route names.
    pub named: u64,
    /// How many of these the table says are up.
    pub up: u64,
    /// How many of these may be given traffic and, as far as is known, can be: reached, proven, not ejected.
    /// Of several threads, the fewest.
    pub usable: u64,
    /// Those that get none for a while because their traffic failed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ejected: Vec<Ejected>,
}

/// An upstream that a route does not use for a while.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ejected {
    pub upstream: String,
    /// How long it will still be, in milliseconds.
    pub left_ms: u64,
}

impl FleetStatus {
    /// Adds another thread's view of the same upstreams.
    pub fn add(&mut self, other: &FleetStatus) {
        self.named = self.named.max(other.named);
        self.up = self.up.max(other.up);
        self.usable = self.usable.min(other.usable);
        for ejected in &other.ejected {
            match self.ejected.iter_mut().find(|known| known.upstream == ejected.upstream) {
                Some(known) => known.left_ms = known.left_ms.max(ejected.left_ms),
                None => self.ejected.push(ejected.clone()),
            }
        }
    }
}
