//! Routes as operators see and change them.

use epagent_core::route::Word;
use serde::{Deserialize, Serialize};

/// What traffic to one host or port gets: a row of `epagent route ls`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Route {
    /// `shop.example`, `*.example`, `*`, or a port's number.
    pub target: String,
    /// `proxy`, `hold`, `static`, `redirect`: what is in force.
    pub action: String,
    /// Its id in the balancer's table, counters and logs.
    pub route: String,
    /// The app whose manifest has it; also while an operator's word goes before it.
    pub app: Option<String>,
    /// The operator's word, where there is one.
    pub word: Option<SaidWord>,
    /// Since when what is in force is so.
    pub since: Option<String>,
    pub upstreams: Vec<RouteUpstream>,
    /// Why it is not, or not wholly, in force.
    pub trouble: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RouteUpstream {
    /// An instance's id, or a backend's address.
    pub id: String,
    pub address: String,
    /// `up`, `draining`, `down`.
    pub state: String,
    /// Requests and connections it still has; none while the balancer can't be asked.
    pub in_flight: Option<u64>,
    /// Who took it out of the balancer, if an operator did.
    pub drained: Option<Said>,
}

/// A word an operator said.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SaidWord {
    pub word: Word,
    #[serde(flatten)]
    pub said: Said,
}

/// Who said something, why, and when.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Said {
    pub who: String,
    /// Empty when no reason was given.
    pub why: String,
    pub at: String,
}

/// To say a word about a target, in place of the one before.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteSay {
    pub word: Word,
    #[serde(default)]
    pub reason: String,
}

/// To end a hold.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteRelease {
    #[serde(default)]
    pub reason: String,
}

/// To take one upstream out of the balancer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteDrain {
    /// An instance's id, its place as in `web.0`, or a backend's address.
    pub upstream: String,
    #[serde(default)]
    pub reason: String,
}

/// To take back what was said of a target: everything, or that one upstream of it is drained.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteClear {
    #[serde(default)]
    pub upstream: Option<String>,
    #[serde(default)]
    pub reason: String,
}
