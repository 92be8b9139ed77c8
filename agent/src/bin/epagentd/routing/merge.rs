//! One table of what the apps ask for and what the operator says. Pure.
//!
//! ```text
//!   routes of each app ──▶ by what they match ──▶ the operator's words over them ──▶ drains ──▶ the table
//! ```
//!
//! A word about an app's route keeps that route's id, so that its counters go on and what it holds is released by the
//! same route that held it.

use std::collections::{BTreeMap, BTreeSet};

use epagent_core::name::AppName;
use epagent_core::route::{HOLD_MS_DEFAULT, Word};
use epagent_core::spec::RouteMatch;
use epagent_store::{RouteDrain, RouteWord};
use epagent_wire::table::{Action, Hold, Match, Route, Upstream, UpstreamState};

/// Requests that a route without an app may hold.
const HELD_MAX: u32 = 1_000;

/// Everything a table is made of.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Inputs {
    pub apps: BTreeMap<AppName, Vec<Route>>,
    pub words: BTreeMap<RouteMatch, RouteWord>,
    /// By upstream.
    pub drains: BTreeMap<String, RouteDrain>,
}

/// A part of the inputs that the balancer can take or refuse by itself.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    App(AppName),
    Word(RouteMatch),
}

/// What traffic of one kind gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InForce<'a> {
    pub route: Route,
    /// The app whose route this is, or would be but for the word.
    pub app: Option<&'a AppName>,
    pub word: Option<&'a RouteWord>,
}

impl Inputs {
    /// The routes of the table, in the order of what they match.
    pub fn routes(&self) -> Vec<Route> {
        self.in_force().into_values().map(|found| found.route).collect()
    }

    /// What is in force, by what it is about. A deploy that asks for a match that another app has is refused before
    /// it begins, so two apps with one match mean that this check was passed by: the first by name keeps it.
    pub fn in_force(&self) -> BTreeMap<RouteMatch, InForce<'_>> {
        let mut all: BTreeMap<RouteMatch, InForce<'_>> = BTreeMap::new();
        for (app, routes) in &self.apps {
            for route in routes {
                let found = InForce { route: route.clone(), app: Some(app), word: None };
                all.entry(target_of(&route.matches)).or_insert(found);
            }
        }
        for (target, word) in &self.words {
            let found = all.entry(target.clone()).or_insert_with(|| InForce {
                route: bare(target, word.number),
                app: None,
                word: None,
            });
            found.word = Some(word);
            put_over(&mut found.route, &word.word);
        }
        for found in all.values_mut() {
            if let Action::Proxy { upstreams } = &mut found.route.action {
                let drained = upstreams.iter_mut().filter(|upstream| self.drains.contains_key(&upstream.id));
                drained.for_each(|upstream| upstream.state = UpstreamState::Draining);
            }
        }
        all
    }

    /// Where these differ from `other`.
    pub fn differing(&self, other: &Inputs) -> BTreeSet<Source> {
        let apps = self.apps.keys().chain(other.apps.keys());
        let apps = apps.filter(|app| self.apps.get(app) != other.apps.get(app));
        let words = self.words.keys().chain(other.words.keys());
        let words = words.filter(|target| self.words.get(target) != other.words.get(target));
        apps.cloned().map(Source::App).chain(words.cloned().map(Source::Word)).collect()
    }

    /// Takes over one source as `other` has it.
    pub fn adopt(&mut self, source: &Source, other: &Inputs) {
        match source {
            Source::App(app) => match other.apps.get(app) {
                Some(routes) => drop(self.apps.insert(app.clone(), routes.clone())),
                None => drop(self.apps.remove(app)),
            },
            Source::Word(target) => match other.words.get(target) {
                Some(word) => drop(self.words.insert(target.clone(), word.clone())),
                None => drop(self.words.remove(target)),
            },
        }
    }

    /// Whether one source is alike in both.
    pub fn agrees(&self, source: &Source, other: &Inputs) -> bool {
        match source {
            Source::App(app) => self.apps.get(app) == other.apps.get(app),
            Source::Word(target) => self.words.get(target) == other.words.get(target),
        }
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::App(app) => write!(f, "app {app}"),
            Source::Word(target) => write!(f, "route {target}"),
        }
    }
}

/// A route of no app's.
fn bare(target: &RouteMatch, number: i64) -> Route {
    Route {
        id: format!("operator/{number}"),
        matches: match target {
            RouteMatch::Host(host) => Match::Host(host.clone()),
            RouteMatch::Port(port) => Match::Port(*port),
        },
        action: Action::Hold {},
        hold: Hold { max_requests: HELD_MAX, max_age_ms: HOLD_MS_DEFAULT },
    }
}

fn put_over(route: &mut Route, word: &Word) {
    route.action = match word.clone() {
        Word::Hold { max_age_ms } => {
            // A stopped app's route holds nobody; the operator who says hold means it.
            route.hold = Hold { max_requests: route.hold.max_requests.max(HELD_MAX), max_age_ms };
            Action::Hold {}
        }
        Word::Static { status, content_type, body } => Action::Static { status, content_type, body },
        Word::Redirect { to, status, keep_path } => Action::Redirect { to, status, keep_path },
        Word::Proxy { backends } => {
            let backends = backends.into_iter().map(|address| address.to_string());
            let upstream =
                |address: String| Upstream { id: address.clone(), address, state: UpstreamState::Up };
            Action::Proxy { upstreams: backends.map(upstream).collect() }
        }
    };
}

fn target_of(matches: &Match) -> RouteMatch {
    match matches {
        Match::Host(host) => RouteMatch::Host(host.clone()),
        Match::Port(port) => RouteMatch::Port(*port),
    }
}

#[cfg(test)]
mod tests {
    use epagent_store::Said;

    use super::*;

    fn said() -> Said {
        Said { who: "root".to_owned(), why: String::new(), at_ms: 1 }
    }

    fn route(id: &str, host: &str) -> Route {
        let upstream = |id: &str| Upstream {
            id: id.to_owned(),
            address: "10.0.0.1:8000".to_owned(),
            state: UpstreamState::Up,
        };
        Route {
            id: id.to_owned(),
            matches: Match::Host(host.to_owned()),
            action: Action::Proxy { upstreams: vec![upstream("shop-a"), upstream("shop-b")] },
            hold: Hold { max_requests: 0, max_age_ms: 0 },
        }
    }

    fn inputs(apps: &[(&str, Vec<Route>)]) -> Inputs {
        let apps = apps.iter().map(|(app, routes)| (app.parse().unwrap(), routes.clone()));
        Inputs { apps: apps.collect(), ..Inputs::default() }
    }

    fn say(inputs: &mut Inputs, target: &str, word: Word) {
        let target: RouteMatch = target.parse().unwrap();
        let number = inputs.words.len() as i64 + 1;
        let word = RouteWord { number, target: target.clone(), word, said: said() };
        inputs.words.insert(target, word);
    }

    #[test]
    fn a_word_goes_before_the_apps_route_and_keeps_its_id() {
        let mut inputs = inputs(&[("shop", vec![route("shop/web/0", "shop.example")])]);
        say(&mut inputs, "shop.example", Word::Hold { max_age_ms: 5_000 });
        let all = inputs.in_force();
        let found = &all[&"shop.example".parse().unwrap()];
        assert_eq!((found.route.id.as_str(), &found.route.action), ("shop/web/0", &Action::Hold {}));
        assert_eq!(found.route.hold, Hold { max_requests: HELD_MAX, max_age_ms: 5_000 });
        assert_eq!(found.app.map(AppName::as_str), Some("shop"));
        inputs.words.clear();
        assert_eq!(inputs.routes(), [route("shop/web/0", "shop.example")]);
    }

    #[test]
    fn a_word_about_what_no_app_has_is_a_route_of_its_own() {
        let mut inputs = inputs(&[("shop", vec![route("shop/web/0", "shop.example")])]);
        let backends = vec!["10.9.9.9:80".parse().unwrap(), "[fd00::9]:80".parse().unwrap()];
        say(&mut inputs, "old.example", Word::Proxy { backends });
        say(&mut inputs, "5432", Word::Hold { max_age_ms: 1 });
        let ids: Vec<String> = inputs.routes().into_iter().map(|route| route.id).collect();
        assert_eq!(ids, ["operator/1", "shop/web/0", "operator/2"]);
        let upstreams: Vec<String> =
            inputs.routes()[0].upstreams().iter().map(|upstream| upstream.address.clone()).collect();
        assert_eq!(upstreams, ["10.9.9.9:80", "[fd00::9]:80"]);
    }

    #[test]
    fn a_drained_upstream_drains_wherever_it_is_named() {
        let mut inputs =
            inputs(&[("shop", vec![route("shop/web/0", "a.example"), route("shop/web/1", "b.example")])]);
        let target: RouteMatch = "a.example".parse().unwrap();
        let drain = RouteDrain { upstream: "shop-a".to_owned(), target, said: said() };
        inputs.drains.insert(drain.upstream.clone(), drain);
        for route in inputs.routes() {
            let states: Vec<UpstreamState> =
                route.upstreams().iter().map(|upstream| upstream.state).collect();
            assert_eq!(states, [UpstreamState::Draining, UpstreamState::Up]);
        }
    }

    #[test]
    fn of_two_apps_with_one_host_the_first_keeps_it() {
        let twice =
            inputs(&[("b", vec![route("b/web/0", "x.example")]), ("a", vec![route("a/web/0", "x.example")])]);
        let ids: Vec<String> = twice.routes().into_iter().map(|route| route.id).collect();
        assert_eq!(ids, ["a/web/0"]);
    }

    #[test]
    fn what_differs_can_be_taken_over_one_by_one() {
        let old = inputs(&[("a", vec![route("a/web/0", "a.example")]), ("b", vec![])]);
        let mut new = inputs(&[("a", vec![route("a/web/0", "a2.example")]), ("c", vec![])]);
        say(&mut new, "5432", Word::Hold { max_age_ms: 1 });
        let differing = new.differing(&old);
        assert_eq!(differing.len(), 4, "{differing:?}");
        let mut step = old.clone();
        for source in &differing {
            assert!(!step.agrees(source, &new));
            step.adopt(source, &new);
            assert!(step.agrees(source, &new));
        }
        assert_eq!(step, new);
    }
}
