//! The routes: finding the one a host, server name or port belongs to, and the queue of what each one holds.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use super::actions::Reply;
use super::choose::{Candidate, Chooser, Wanted, maglev_size_for};
use super::flow::Carried;
use super::io::{Millis, SockId};
use super::limits::RouteLimits;
use super::slab::{RouteKey, Slab};
use super::upstreams::Upstreams;
use crate::control::protocol::RouteStatus;
use crate::table::actions::ALIAS_DEPTH_MAX;
use crate::table::{
    self, Action, Algorithm, HoldLimits, Match, Proxy, Table, UpstreamState, normal_host, normal_pattern,
    normal_sni,
};

/// One route as the core runs it.
#[derive(Debug)]
pub struct Route {
    pub id: String,
    /// Among whom it chooses, and how; nobody when the route holds.
    pub chooser: Chooser,
    /// What it answers by itself, without any upstream.
    pub reply: Option<Rc<Reply>>,
    /// It is another route's name. Whoever waits at it has to look for a route again.
    pub is_alias: bool,
    /// This thread's share of the route's hold.
    pub limits: HoldLimits,
    /// What it takes.
    pub limited: RouteLimits,
    /// Clients that wait, the oldest first, with when they began to.
    pub held: VecDeque<(SockId, Millis)>,
    /// Requests and connections it has now, held ones among them.
    pub active: u64,
    /// When the last one ended, or when the route was made.
    pub left_at: Millis,
    /// What has ended.
    pub carried: Carried,
    pub requests_total: u64,
    pub held_total: u64,
    pub shed_total: u64,
    pub expired_total: u64,
}

impl Route {
    /// Takes the oldest client that waits for a route which now answers by itself.
    pub fn pop_answered(&mut self) -> Option<(SockId, Rc<Reply>)> {
        let reply = self.reply.clone()?;
        self.held.pop_front().map(|(client, _)| (client, reply))
    }

    pub fn status(&self, now: Millis, upstreams: &Upstreams, latency: bool) -> RouteStatus {
        RouteStatus {
            id: self.id.clone(),
            active: self.active,
            idle_ms: if self.active > 0 { 0 } else { now.saturating_sub(self.left_at) },
            requests_total: self.requests_total,
            held: self.held.len() as u64,
            oldest_held_ms: self.held.front().map_or(0, |(_, since)| now.saturating_sub(*since)),
            held_total: self.held_total,
            hold_shed_total: self.shed_total,
            hold_expired_total: self.expired_total,
            ends: self.carried.ends,
            responses: self.carried.responses,
            bytes_in_total: self.carried.bytes_in,
            bytes_out_total: self.carried.bytes_out,
            latency: latency.then(|| self.carried.latency.clone()),
            fleet: self.chooser.status(now, upstreams),
        }
    }

    fn choose_among(&mut self, proxy: &Proxy, upstreams: &Upstreams, hashing_routes: usize) {
        let candidate = |wanted: &table::Upstream| {
            let key = upstreams.key(&wanted.id, &wanted.address)?;
            Some(Candidate::new(key, wanted.weight, wanted.state == UpstreamState::Up))
        };
        let stays = proxy.upstreams.iter().filter(|upstream| upstream.state != UpstreamState::Draining);
        let candidates: Vec<Candidate> = stays.filter_map(candidate).collect();
        self.chooser.apply(Wanted {
            algorithm: &proxy.algorithm,
            all_down: proxy.all_down,
            candidates,
            named: proxy.upstreams.len(),
            passive: proxy.health.passive,
            maglev_size: maglev_size_for(hashing_routes),
        });
    }

    pub fn oldest_held(&self) -> Option<SockId> {
        self.held.front().map(|(client, _)| *client)
    }

    /// Whether it holds something and has nobody to give it to.
    pub fn is_starving(&self) -> bool {
        self.chooser.up_count() == 0 && self.reply.is_none() && !self.held.is_empty()
    }
}

pub(super) fn hashes(route: &table::Route) -> bool {
    matches!(&route.action, Action::Proxy(Proxy { algorithm: Algorithm::Hash(_), .. }))
}

/// What taking over a table led to.
pub struct Applied {
    /// The clients that were held for routes that are gone.
    pub orphans: Vec<SockId>,
    /// A route that holds something has lost its last upstream.
    pub starved: bool,
}

/// Routes by name: the exact one, else the longest parent's, else the catch-all.
#[derive(Debug, Default)]
struct Names {
    exact: HashMap<String, RouteKey>,
    /// By what follows `*.`.
    parents: HashMap<String, RouteKey>,
    any: Option<RouteKey>,
}

impl Names {
    fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.parents.is_empty() && self.any.is_none()
    }

    fn find(&self, name: &str) -> Option<RouteKey> {
        if let Some(key) = self.exact.get(name) {
            return Some(*key);
        }
        let mut rest = name;
        while let Some((_, parent)) = rest.split_once('.') {
            if let Some(key) = self.parents.get(parent) {
                return Some(*key);
            }
            rest = parent;
        }
        self.any
    }

    fn add(&mut self, pattern: Option<String>, key: RouteKey) {
        let Some(pattern) = pattern else { return };
        match pattern.strip_prefix("*.") {
            _ if pattern == "*" => self.any = Some(key),
            Some(parent) => {
                self.parents.insert(parent.to_owned(), key);
            }
            None => {
                self.exact.insert(pattern, key);
            }
        }
    }
}

/// All routes, and the ways to find one.
#[derive(Debug, Default)]
pub struct Routes {
    slab: Slab<RouteKey, Route>,
    by_id: HashMap<String, RouteKey>,
    hosts: Names,
    server_names: Names,
    ports: HashMap<u16, RouteKey>,
}

impl Routes {
    pub fn get(&self, key: RouteKey) -> Option<&Route> {
        self.slab.get(key)
    }

    pub fn get_mut(&mut self, key: RouteKey) -> Option<&mut Route> {
        self.slab.get_mut(key)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Route> {
        self.slab.iter().map(|(_, route)| route)
    }

    pub fn entries(&self) -> impl Iterator<Item = (RouteKey, &Route)> {
        self.slab.iter()
    }

    /// The routes that hold something.
    pub fn holding(&self) -> Vec<RouteKey> {
        self.slab.iter().filter(|(_, route)| !route.held.is_empty()).map(|(key, _)| key).collect()
    }

    pub fn has_hosts(&self) -> bool {
        !self.hosts.is_empty()
    }

    /// The route of a (normal) host.
    pub fn by_host(&self, host: &str) -> Option<RouteKey> {
        self.hosts.find(host)
    }

    /// The route of a (normal) server name.
    pub fn by_server_name(&self, name: &str) -> Option<RouteKey> {
        self.server_names.find(name)
    }

    pub fn by_port(&self, port: u16) -> Option<RouteKey> {
        self.ports.get(&port).copied()
    }

    /// Takes over a table's routes.
    pub fn apply(&mut self, now: Millis, table: &Table, upstreams: &Upstreams, threads: u32) -> Applied {
        let mut starved = false;
        let mut old = std::mem::take(&mut self.by_id);
        let (mut aliases, mut orphans) = (HashMap::new(), Vec::new());
        self.hosts = Names::default();
        self.server_names = Names::default();
        self.ports.clear();
        let hashing_routes = table.routes.iter().filter(|route| hashes(route)).count();
        for wanted in &table.routes {
            let slab = &mut self.slab;
            let key = old.remove(&wanted.id).unwrap_or_else(|| slab.insert(Route::new(&wanted.id, now)));
            self.by_id.insert(wanted.id.clone(), key);
            self.enlist(&wanted.matches, key);
            let Some(route) = self.slab.get_mut(key) else { continue };
            let limits = wanted.hold.unwrap_or(table.defaults.hold);
            route.limits = HoldLimits { max_requests: limits.max_requests.div_ceil(threads), ..limits };
            route.limited.apply(wanted.limits, threads);
            let starving = route.is_starving();
            route.reply = Reply::of(&wanted.action);
            match &wanted.action {
                Action::Proxy(proxy) => route.choose_among(proxy, upstreams, hashing_routes),
                _ => route.chooser = Chooser::default(),
            }
            starved |= route.is_starving() && !starving;
            route.is_alias = false;
            if let Action::Alias(alias) = &wanted.action {
                route.is_alias = true;
                aliases.insert(key, (&wanted.matches, alias.host.as_str()));
                orphans.extend(route.held.drain(..).map(|(client, _)| client));
            }
        }
        self.link_aliases(&aliases);
        let gone = old.into_values().filter_map(|key| self.slab.remove(key));
        orphans.extend(gone.flat_map(|route| route.held).map(|(client, _)| client));
        Applied { orphans, starved }
    }

    /// Makes the hosts of aliases lead to the routes that serve them.
    fn link_aliases(&mut self, aliases: &HashMap<RouteKey, (&Match, &str)>) {
        let target = |host: &str| {
            let mut found = self.by_host(&normal_host(host.as_bytes())?)?;
            // A valid table has no longer chains; one that slipped through leads nowhere.
            for _ in 0..ALIAS_DEPTH_MAX {
                let Some((_, next)) = aliases.get(&found) else { return Some(found) };
                found = self.by_host(&normal_host(next.as_bytes())?)?;
            }
            None
        };
        let linked: Vec<(&Match, RouteKey)> =
            aliases.values().filter_map(|(matches, host)| Some((*matches, target(host)?))).collect();
        for (matches, key) in linked {
            self.enlist(matches, key);
        }
    }

    fn enlist(&mut self, matches: &Match, key: RouteKey) {
        match matches {
            Match::Port(port) => {
                self.ports.insert(*port, key);
            }
            // A valid table has no others; one that slipped through matches nothing.
            Match::Host(host) => self.hosts.add(normal_pattern(host), key),
            Match::Sni(name) => self.server_names.add(normal_sni(name), key),
        }
    }
}

impl Route {
    fn new(id: &str, now: Millis) -> Self {
        Self {
            id: id.to_owned(),
            chooser: Chooser::default(),
            reply: None,
            is_alias: false,
            limits: HoldLimits::default(),
            limited: RouteLimits::default(),
            held: VecDeque::new(),
            active: 0,
            left_at: now,
            carried: Carried::default(),
            requests_total: 0,
            held_total: 0,
            shed_total: 0,
            expired_total: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exact_host_wins_then_the_longest_parent_then_the_catch_all() {
        let routes = ["shop.example", "*.example", "*.shop.example", "*"]
            .map(|host| format!(r#"{{"id":"{host}","match":{{"host":"{host}"}},"action":{{"hold":{{}}}}}}"#));
        let table: Table =
            serde_json::from_str(&format!(r#"{{"version":1,"routes":[{}]}}"#, routes.join(","))).unwrap();
        let mut found = Routes::default();
        found.apply(1, &table, &Upstreams::default(), 1);
        for (host, route) in [
            ("shop.example", "shop.example"),
            ("a.shop.example", "*.shop.example"),
            ("a.b.shop.example", "*.shop.example"),
            ("other.example", "*.example"),
            ("example", "*"),
            ("", "*"),
        ] {
            let key = found.by_host(host).unwrap();
            assert_eq!(found.get(key).unwrap().id, route, "{host}");
        }
    }
}
