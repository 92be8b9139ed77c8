//! The routing table: what the control socket receives, what is kept on disk, what the core routes by.
//!
//! A table is whole and immutable. A change is a new table with a higher `version`; there is no partial
//! update, so what runs, what is saved and what the sender believes can only differ by a version number.
//!
//! ```json
//! { "version": 7,
//!   "defaults": { "hold": { "max_requests": 1000, "max_age_ms": 30000 } },
//!   "routes": [
//!     { "id": "shop-web", "match": { "host": "shop.example" },
//!       "action": { "proxy": { "upstreams": [
//!         { "id": "shop.web.0.r12", "address": "10.90.0.2:8080", "state": "up" },
//!         { "id": "shop.web.0.r11", "address": "10.90.0.6:8080", "state": "draining" } ] } } },
//!     { "id": "db", "match": { "port": 5432 }, "action": { "hold": {} },
//!       "hold": { "max_requests": 50, "max_age_ms": 10000 } } ] }
//! ```
//!
//! Parsing is strict (an unknown key is an error), and [`Table::validate`] refuses what has no single
//! meaning, such as two routes with one match.

pub mod actions;
pub mod address;
pub mod choosing;
pub mod health;
pub mod limits;
pub mod names;

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};

use self::actions::{ActionFault, Alias, Empty, NoSettings, Pages, Redirect, StaticPage};
pub use self::address::{Address, AddressError, UnixPath};
pub use self::choosing::{Algorithm, AllDown, Hash, HashBy, WEIGHT_MAX};
use self::choosing::{check_algorithm, default_weight, is_default, is_default_weight};
use self::health::check_health;
pub use self::health::{Active, Check, Health, HttpCheck, Passive};
pub use self::limits::{Limits, ListenerLimits, SourceLimits};
pub use self::names::{normal_host, normal_pattern, normal_sni};
use crate::core::http::answer::Answer;

/// Most routes one table may hold.
pub const ROUTES_MAX: usize = 20_000;
/// Most upstreams one route may hold.
pub const UPSTREAMS_PER_ROUTE_MAX: usize = 1_000;
/// Longest route or upstream id, in bytes.
pub const ID_BYTES_MAX: usize = 200;

/// Everything the balancer routes by. See the module header for an example.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// Orders tables: one with a lower version than the running one is refused.
    pub version: u64,
    /// The routes, in no particular order: an exact host always wins over a wildcard.
    #[serde(default)]
    pub routes: Vec<Route>,
    /// What routes use that do not say otherwise.
    #[serde(default)]
    pub defaults: Defaults,
    /// What is said in place of the balancer's own answers, by their codes: `{"unknown_host": {"body": ...}}`.
    #[serde(default, skip_serializing_if = "Pages::is_empty")]
    pub pages: Pages,
}

/// Values for routes that leave them out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Defaults {
    /// Bounds of the hold queue.
    #[serde(default)]
    pub hold: HoldLimits,
}

/// One route: which traffic, and what happens to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// Names the route in status, problems and logs; unique in the table. A route that keeps its id keeps
    /// its counters and its held requests when the table changes.
    pub id: String,
    /// Which traffic it takes; unique in the table.
    #[serde(rename = "match")]
    pub matches: Match,
    /// What is done with that traffic.
    pub action: Action,
    /// Bounds of this route's hold queue; absent means the table's defaults.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<HoldLimits>,
    /// How much it takes; absent means whatever comes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
}

/// Which traffic a route takes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Match {
    /// HTTP requests for this host, on every HTTP listener. `shop.example` matches exactly; `*.shop.example`
    /// matches every name below it, the longest such parent winning; `*` matches any host that nothing else
    /// does. Letter case, a port and a trailing dot in the request's Host do not matter.
    Host(String),
    /// Plain TCP connections to this port.
    Port(u16),
    /// TLS connections whose client asks for this server name, on every listener of the mode `sni`; they are
    /// passed through unopened. Forms as for `host`; only `*` also takes clients that name none.
    Sni(String),
}

/// What a route does with its traffic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Pass it to one of the upstreams; hold it while none of them can take it.
    Proxy(Proxy),
    /// Hold everything new until a later table says otherwise.
    Hold(Hold),
    /// Answer with a page. This and all that follow are for HTTP routes only.
    Static(StaticPage),
    /// Send the client elsewhere.
    Redirect(Redirect),
    /// Answer with a status and nothing else.
    Empty(Empty),
    /// Do what the route of another host does.
    Alias(Alias),
    /// Answer as if no route took the host.
    UnknownHost(NoSettings),
    /// Answer as if there were no route at all.
    NoHosts(NoSettings),
}

/// The upstreams of a route.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Proxy {
    /// Where traffic may go. May be empty: unless `all_down` says otherwise everything is held, as with
    /// [`Action::Hold`].
    #[serde(default)]
    pub upstreams: Vec<Upstream>,
    /// Which of them is next.
    #[serde(default, skip_serializing_if = "is_default")]
    pub algorithm: Algorithm,
    /// How it is found out whether they should be given any.
    #[serde(default, skip_serializing_if = "is_default")]
    pub health: Health,
    /// What happens when none of them can be given anything.
    #[serde(default, skip_serializing_if = "is_default")]
    pub all_down: AllDown,
}

/// The hold action has no settings of its own; its bounds are the route's `hold`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hold {}

/// One place traffic may go to: an instance of an app.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Upstream {
    /// The instance's id. The same id and address in several routes are one upstream, counted together.
    pub id: String,
    /// Where it listens: `ip:port`, or `unix:PATH`.
    pub address: Address,
    /// Whether it may be given traffic; it may, where nobody says otherwise.
    #[serde(default)]
    pub state: UpstreamState,
    /// Tell it of each client with a PROXY protocol header (version 2) before the client's own bytes. For
    /// routes by port and by server name: HTTP connections carry requests of many clients.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub proxy_protocol: bool,
    /// Its share of the route's traffic, relative to the others': 1 to [`WEIGHT_MAX`].
    #[serde(default = "default_weight", skip_serializing_if = "is_default_weight")]
    pub weight: u16,
}

/// Whether an upstream may be given traffic, as the sender of the table judges it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UpstreamState {
    /// Healthy: takes new requests and connections.
    #[default]
    Up,
    /// Gets nothing new; what it is doing, it finishes. Idle connections to it are closed at once.
    Draining,
    /// Unhealthy: gets nothing new, and idle connections to it are closed.
    Down,
}

/// Bounds of a hold queue. Each thread of the balancer gets an equal share of `max_requests`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HoldLimits {
    /// Most requests and connections held at a time; one more sheds the oldest with 503.
    pub max_requests: u32,
    /// Longest time one of them is held, in milliseconds; then it gets 503.
    pub max_age_ms: u64,
}

impl Default for HoldLimits {
    fn default() -> Self {
        Self { max_requests: 1_000, max_age_ms: 30_000 }
    }
}

/// Why a table was refused as a whole.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    #[error("the table has {count} routes, more than the limit of {ROUTES_MAX}")]
    TooManyRoutes { count: usize },
    #[error("route {route:?} has {count} upstreams, more than the limit of {UPSTREAMS_PER_ROUTE_MAX}")]
    TooManyUpstreams { route: String, count: usize },
    #[error("the id {id:?} is empty, longer than {ID_BYTES_MAX} bytes, or has characters that do not print")]
    BadId { id: String },
    #[error("two routes have the id {id:?}")]
    SameId { id: String },
    #[error("route {route:?} matches {what}, which an earlier route matches too")]
    SameMatch { route: String, what: String },
    #[error("route {route:?} has the host {host:?}, which is not a host name or a wildcard like *.example")]
    BadHost { route: String, host: String },
    #[error(
        "route {route:?} has the server name {name:?}, which is not a host name (no port, no address, no \
         trailing dot) or a wildcard like *.example"
    )]
    BadSni { route: String, name: String },
    #[error("route {route:?} has the port 0")]
    PortZero { route: String },
    #[error(
        "route {route:?} wants PROXY headers for the upstream {id:?}, which only routes by port and by server \
         name can have: an HTTP connection to an upstream carries the requests of many clients, which learn of \
         them from X-Forwarded-For"
    )]
    HttpProxyProtocol { route: String, id: String },
    #[error("route {route:?} and an earlier one differ in whether the upstream {id:?} gets PROXY headers")]
    UnlikeUpstream { route: String, id: String },
    #[error("route {route:?} names the upstream {id:?} twice")]
    SameUpstream { route: String, id: String },
    #[error("route {route:?} gives the upstream {id:?} the weight {weight}: it is 1 to {WEIGHT_MAX}")]
    BadWeight { route: String, id: String, weight: u16 },
    #[error("route {route:?} hashes the header {name:?}, which is no header's name")]
    BadHeaderName { route: String, name: String },
    #[error("route {route:?} has a health check that cannot be: {what}")]
    BadHealth { route: String, what: &'static str },
    #[error("route {route:?} checks the upstream {id:?} in another way than an earlier route does")]
    TwoChecks { route: String, id: String },
    #[error("route {route:?} has a limit that cannot be: {what}")]
    BadLimit { route: String, what: &'static str },
    #[error("route {route:?}: {fault}")]
    Action { route: String, fault: ActionFault },
    #[error("the page for {code:?}: {fault}")]
    Page { code: String, fault: ActionFault },
    #[error("there is a page for {code:?}, which is no answer of the balancer's; it has {}", Answer::CODES.join(", "))]
    UnknownPage { code: String },
}

impl Table {
    /// A table that routes nothing: what runs before the first one arrives.
    pub fn empty() -> Self {
        Self { version: 0, routes: Vec::new(), defaults: Defaults::default(), pages: Pages::new() }
    }

    /// Checks what serde cannot: bounds, names, and that no two routes claim the same traffic.
    pub fn validate(&self) -> Result<(), TableError> {
        if self.routes.len() > ROUTES_MAX {
            return Err(TableError::TooManyRoutes { count: self.routes.len() });
        }
        let mut ids = HashSet::new();
        let mut matches = HashSet::new();
        let mut introduced = HashMap::new();
        for route in &self.routes {
            check_id(&route.id)?;
            if !ids.insert(route.id.as_str()) {
                return Err(TableError::SameId { id: route.id.clone() });
            }
            let claimed = match &route.matches {
                Match::Host(host) => match normal_pattern(host) {
                    Some(normal) => Match::Host(normal),
                    None => return Err(TableError::BadHost { route: route.id.clone(), host: host.clone() }),
                },
                Match::Sni(name) => match normal_sni(name) {
                    Some(normal) => Match::Sni(normal),
                    None => return Err(TableError::BadSni { route: route.id.clone(), name: name.clone() }),
                },
                Match::Port(0) => return Err(TableError::PortZero { route: route.id.clone() }),
                Match::Port(port) => Match::Port(*port),
            };
            let what = claimed.to_string();
            if !matches.insert(claimed) {
                return Err(TableError::SameMatch { route: route.id.clone(), what });
            }
            route.check_upstreams()?;
            route.limits.map_or(Ok(()), |limits| limits.check(&route.id))?;
            route.check_proxy_protocol(&mut introduced)?;
            let failed = |fault| TableError::Action { route: route.id.clone(), fault };
            route.action.check(&route.matches).map_err(failed)?;
        }
        health::check_agreement(&self.routes)?;
        actions::check_aliases(&self.routes).map_err(|(route, fault)| TableError::Action { route, fault })?;
        for (code, page) in &self.pages {
            if !Answer::CODES.contains(&code.as_str()) {
                return Err(TableError::UnknownPage { code: code.clone() });
            }
            page.check().map_err(|fault| TableError::Page { code: code.clone(), fault })?;
        }
        Ok(())
    }
}

impl Route {
    /// The upstreams of a proxy route; none for other actions.
    pub fn upstreams(&self) -> &[Upstream] {
        match &self.action {
            Action::Proxy(proxy) => &proxy.upstreams,
            _ => &[],
        }
    }

    fn check_upstreams(&self) -> Result<(), TableError> {
        let upstreams = self.upstreams();
        if upstreams.len() > UPSTREAMS_PER_ROUTE_MAX {
            return Err(TableError::TooManyUpstreams { route: self.id.clone(), count: upstreams.len() });
        }
        let mut seen = HashSet::new();
        for upstream in upstreams {
            check_id(&upstream.id)?;
            if !seen.insert(upstream.id.as_str()) {
                return Err(TableError::SameUpstream { route: self.id.clone(), id: upstream.id.clone() });
            }
            if !(1..=WEIGHT_MAX).contains(&upstream.weight) {
                let (route, id) = (self.id.clone(), upstream.id.clone());
                return Err(TableError::BadWeight { route, id, weight: upstream.weight });
            }
        }
        match &self.action {
            Action::Proxy(proxy) => {
                check_algorithm(&self.id, &proxy.algorithm)?;
                check_health(&self.id, &proxy.health)
            }
            _ => Ok(()),
        }
    }

    /// `known` has what earlier routes say of the same upstreams.
    fn check_proxy_protocol<'a>(
        &'a self,
        known: &mut HashMap<(&'a str, &'a Address), bool>,
    ) -> Result<(), TableError> {
        for upstream in self.upstreams() {
            let (route, id) = (self.id.clone(), upstream.id.clone());
            if upstream.proxy_protocol && matches!(self.matches, Match::Host(_)) {
                return Err(TableError::HttpProxyProtocol { route, id });
            }
            let earlier = known.insert((&upstream.id, &upstream.address), upstream.proxy_protocol);
            if earlier.is_some_and(|earlier| earlier != upstream.proxy_protocol) {
                return Err(TableError::UnlikeUpstream { route, id });
            }
        }
        Ok(())
    }
}

impl std::fmt::Display for Match {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Match::Host(host) => write!(f, "host {host}"),
            Match::Port(port) => write!(f, "port {port}"),
            Match::Sni(name) => write!(f, "server name {name}"),
        }
    }
}

fn check_id(id: &str) -> Result<(), TableError> {
    let fits = !id.is_empty() && id.len() <= ID_BYTES_MAX && id.bytes().all(|b| b.is_ascii_graphic());
    if fits { Ok(()) } else { Err(TableError::BadId { id: id.to_owned() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = r#"{ "version": 7,
      "defaults": { "hold": { "max_requests": 1000, "max_age_ms": 30000 } },
      "routes": [
        { "id": "shop-web", "match": { "host": "shop.example" },
          "action": { "proxy": { "upstreams": [
            { "id": "a", "address": "10.90.0.2:8080", "state": "up" },
            { "id": "b", "address": "[fd00::2]:8080", "state": "draining" } ] } } },
        { "id": "db", "match": { "port": 5432 }, "action": { "hold": {} },
          "hold": { "max_requests": 50, "max_age_ms": 10000 } } ] }"#;

    fn example() -> Table {
        serde_json::from_str(EXAMPLE).unwrap()
    }

    #[test]
    fn the_documented_example_parses_and_round_trips() {
        let table = example();
        assert_eq!(table.validate(), Ok(()));
        assert_eq!(table.routes[0].upstreams()[1].state, UpstreamState::Draining);
        let again: Table = serde_json::from_str(&serde_json::to_string(&table).unwrap()).unwrap();
        assert_eq!(again, table);
    }

    #[test]
    fn an_unknown_key_is_an_error() {
        let text = EXAMPLE.replace("\"version\"", "\"versoin\": 1, \"version\"");
        assert!(serde_json::from_str::<Table>(&text).unwrap_err().to_string().contains("versoin"));
    }

    #[test]
    fn two_routes_cannot_claim_the_same_traffic() {
        let mut table = example();
        let mut twin = table.routes[0].clone();
        twin.id = "twin".into();
        twin.matches = Match::Host("SHOP.example.".into());
        table.routes.push(twin);
        assert!(matches!(table.validate(), Err(TableError::SameMatch { .. })));
    }

    #[test]
    fn names_without_one_meaning_are_refused() {
        for host in ["", "a b", "*", "x.*.y", "a..b", "*a.b", "u@h", ".a", "a:b", "[::1", "a\nb"] {
            let mut table = example();
            table.routes[0].matches = Match::Host(host.into());
            assert_eq!(table.validate().is_ok(), host == "*", "{host:?}");
        }
        for id in ["", "a b", "a\nb", &"x".repeat(201)] {
            let mut table = example();
            table.routes[0].id = id.into();
            assert!(matches!(table.validate(), Err(TableError::BadId { .. })), "{id:?}");
        }
    }
}
