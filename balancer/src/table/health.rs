//! How the balancer finds out by itself whether an upstream should be given traffic.
//!
//! For balancers that nobody tells: whoever checks the apps and pushes their states leaves all of this out.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::{Action, Address, Route, TableError};

/// Bounds of `interval_ms`.
pub const INTERVAL_MS: (u64, u64) = (50, 3_600_000);
/// Bounds of `timeout_ms`.
pub const TIMEOUT_MS: (u64, u64) = (10, 60_000);
/// Most of `rise`, `fall` and `failures`.
pub const IN_A_ROW_MAX: u16 = 1_000;
/// Bounds of `ejection_ms`.
pub const EJECTION_MS: (u64, u64) = (50, 3_600_000);
/// Longest path, host or body text, in bytes.
pub const TEXT_BYTES_MAX: usize = 1_024;

/// What is done to find out. Nothing, if nothing is said.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Health {
    /// Ask upstreams how they are. An upstream that is new, or up again, gets traffic once it has passed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active: Option<Active>,
    /// Look at what becomes of the traffic they get.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passive: Option<Passive>,
}

/// Checks of upstreams that are up, each on a connection of its own. Every thread checks, and judges, for
/// itself. Routes that name the same upstream must agree on its checks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Active {
    pub check: Check,
    /// From the end of one check to the next, more or less a tenth, so that checks do not fall into step.
    #[serde(default = "defaults::interval_ms")]
    pub interval_ms: u64,
    /// Longest a check may take, its connect included; then it has failed.
    #[serde(default = "defaults::timeout_ms")]
    pub timeout_ms: u64,
    /// So many in a row passed, and it gets traffic.
    #[serde(default = "defaults::rise")]
    pub rise: u16,
    /// So many in a row failed, and it gets none.
    #[serde(default = "defaults::fall")]
    pub fall: u16,
}

/// What a check is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// A connection can be made.
    Tcp,
    /// A GET is answered as it should be.
    Http(HttpCheck),
}

/// A GET, and the answer it should have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpCheck {
    #[serde(default = "defaults::path")]
    pub path: String,
    /// What it says as Host.
    #[serde(default = "defaults::host")]
    pub host: String,
    /// The first and the last status that is good.
    #[serde(default = "defaults::status")]
    pub status: (u16, u16),
    /// Text that must be in the first 64 KiB of the body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
}

/// When traffic that fails keeps an upstream from getting more for a while: it is ejected from the route, by
/// the thread that saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Passive {
    /// So many in a row: connects that failed, responses that broke off, came too late or were no HTTP, and
    /// statuses from 500 on.
    #[serde(default = "defaults::failures")]
    pub failures: u16,
    /// How long it gets nothing. Twice as long each time it is ejected again soon after, up to
    /// [`crate::core::config::Config::EJECTION_TIMES_MAX`] times as long.
    #[serde(default = "defaults::ejection_ms")]
    pub ejection_ms: u64,
    /// Most of the route's upstreams that may be ejected at a time. One always stays, whatever this says.
    #[serde(default = "defaults::ejected_max_percent")]
    pub ejected_max_percent: u8,
}

impl Default for Passive {
    fn default() -> Self {
        Self {
            failures: defaults::failures(),
            ejection_ms: defaults::ejection_ms(),
            ejected_max_percent: defaults::ejected_max_percent(),
        }
    }
}

mod defaults {
    pub fn interval_ms() -> u64 {
        2_000
    }
    pub fn timeout_ms() -> u64 {
        1_000
    }
    pub fn rise() -> u16 {
        2
    }
    pub fn fall() -> u16 {
        3
    }
    pub fn path() -> String {
        "/".to_owned()
    }
    pub fn host() -> String {
        "localhost".to_owned()
    }
    pub fn status() -> (u16, u16) {
        (200, 399)
    }
    pub fn failures() -> u16 {
        5
    }
    pub fn ejection_ms() -> u64 {
        10_000
    }
    pub fn ejected_max_percent() -> u8 {
        50
    }
}

/// Checks bounds, and that what is sent makes a request.
pub(super) fn check_health(route: &str, health: &Health) -> Result<(), TableError> {
    let fault = |what: &'static str| TableError::BadHealth { route: route.to_owned(), what };
    let within = |value: u64, (least, most): (u64, u64)| (least..=most).contains(&value);
    let in_a_row = |count: u16| within(u64::from(count), (1, u64::from(IN_A_ROW_MAX)));
    if let Some(active) = &health.active {
        if !within(active.interval_ms, INTERVAL_MS) {
            return Err(fault("interval_ms is 50 to 3,600,000"));
        }
        if !within(active.timeout_ms, TIMEOUT_MS) {
            return Err(fault("timeout_ms is 10 to 60,000"));
        }
        if !in_a_row(active.rise) || !in_a_row(active.fall) {
            return Err(fault("rise and fall are 1 to 1,000"));
        }
        if let Check::Http(http) = &active.check {
            check_http(http).map_err(fault)?;
        }
    }
    if let Some(passive) = &health.passive {
        if !in_a_row(passive.failures) {
            return Err(fault("failures is 1 to 1,000"));
        }
        if !within(passive.ejection_ms, EJECTION_MS) {
            return Err(fault("ejection_ms is 50 to 3,600,000"));
        }
        if passive.ejected_max_percent > 100 {
            return Err(fault("ejected_max_percent is 0 to 100"));
        }
    }
    Ok(())
}

fn check_http(http: &HttpCheck) -> Result<(), &'static str> {
    let is_text = |text: &str| text.len() <= TEXT_BYTES_MAX && text.bytes().all(|b| b.is_ascii_graphic());
    if !http.path.starts_with('/') || !is_text(&http.path) {
        return Err("path begins with / and has no blanks");
    }
    if http.host.is_empty() || !is_text(&http.host) {
        return Err("host is a host's name, without blanks");
    }
    let (first, last) = http.status;
    if !(200..=599).contains(&first) || last > 599 || first > last {
        return Err("status is the first and the last good one, 200 to 599");
    }
    if http.body.as_ref().is_some_and(|body| body.is_empty() || body.len() > TEXT_BYTES_MAX) {
        return Err("body is 1 to 1,024 bytes of text");
    }
    Ok(())
}

/// Checks that no two routes want the same upstream checked in different ways.
pub(super) fn check_agreement(routes: &[Route]) -> Result<(), TableError> {
    let mut known: HashMap<(&str, &Address), Option<&Active>> = HashMap::new();
    for route in routes {
        let Action::Proxy(proxy) = &route.action else { continue };
        let active = proxy.health.active.as_ref();
        for upstream in &proxy.upstreams {
            let earlier = known.insert((upstream.id.as_str(), &upstream.address), active);
            if earlier.is_some_and(|earlier| earlier != active) {
                return Err(TableError::TwoChecks { route: route.id.clone(), id: upstream.id.clone() });
            }
        }
    }
    Ok(())
}
