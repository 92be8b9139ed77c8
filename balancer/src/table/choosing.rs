//! How a route chooses among its upstreams, and what it does when none can be chosen.

use serde::{Deserialize, Serialize};

use super::TableError;

/// Largest weight of an upstream. 1 is the smallest: an upstream that is to get nothing is draining.
pub const WEIGHT_MAX: u16 = 256;
/// Longest name of a header that is hashed, in bytes.
pub const HEADER_NAME_BYTES_MAX: usize = 100;

/// Which of the upstreams that can take a request gets it. With all of them an upstream's share follows its
/// weight.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// The one with the least under way (requests, tunnels and connects) for its weight; among equals, in turn.
    #[default]
    LeastLoad,
    /// In turn.
    RoundRobin,
    /// The one with the fewest open connections for its weight, kept-alive idle ones included; among equals,
    /// in turn. For apps to which a connection is dear even when nothing is asked on it.
    LeastConnections,
    /// Two at random (as often as their weights say), and of those the one with the less under way. Costs the
    /// same however many upstreams there are, and several balancers do not run to the same one at once.
    TwoChoices,
    /// The same client to the same upstream, as long as it can take requests.
    Hash(Hash),
}

/// What of a request decides where it goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hash {
    pub by: HashBy,
}

/// What is hashed. A request that has none of it is given by least load.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HashBy {
    /// The client's address, without its port.
    Source,
    /// The value of this header; in its absence, and for plain TCP, the client's address.
    Header(String),
}

/// What becomes of traffic that no upstream can be given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AllDown {
    /// It is held, within the bounds of the route's hold queue.
    #[default]
    Hold,
    /// 503 at once: `all_down`, or `no_upstreams` where the route names none. Plain TCP is reset.
    Answer,
    /// It is passed on as if all were up, but for those that drain: a check may be wrong, and an error of the
    /// app's own says more than one of the balancer's. Held where the route names none.
    FailOpen,
}

pub(super) fn default_weight() -> u16 {
    1
}

pub(super) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
pub(super) fn is_default_weight(weight: &u16) -> bool {
    *weight == default_weight()
}

/// Checks the header's name: a token (RFC 9110 §5.1).
pub(super) fn check_algorithm(route: &str, algorithm: &Algorithm) -> Result<(), TableError> {
    let Algorithm::Hash(Hash { by: HashBy::Header(name) }) = algorithm else { return Ok(()) };
    let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    let fits = !name.is_empty() && name.len() <= HEADER_NAME_BYTES_MAX && name.bytes().all(is_token);
    match fits {
        true => Ok(()),
        false => Err(TableError::BadHeaderName { route: route.to_owned(), name: name.clone() }),
    }
}
