//! The balancer's routes of one app, derived from what the app looks like. Pure.
//!
//! Only instances of the generation that serves are up, and only while healthy. Draining ones are listed so that
//! the balancer lets them finish and counts what they have. A candidate's instances are not in the table before
//! their deploy switches. When none is up, the balancer holds requests.

use std::collections::HashMap;

use epagent_core::app::{Instance, InstanceState, View};
use epagent_core::health::Health;
use epagent_core::name::{AppName, JailId, ProcessName};
use epagent_core::spec::{APP_PORT, ProcessSpec, RouteMatch};
use epagent_wire::table::{Action, Hold, Match, Route, Upstream, UpstreamState};

/// Requests of one route that may wait.
const HELD_MAX: u32 = 1_000;
/// How long they may wait for an instance that is being replaced after a crash.
const HELD_MS_MAX: u64 = 30_000;
/// What a `replace` may take beyond the app's own times to stop and to become healthy.
const REPLACE_SLACK_MS: u64 = 10_000;
/// The longest hold, whatever the manifest says.
const REPLACE_MS_MAX: u64 = 300_000;

pub fn routes(app: &AppName, view: &View, addresses: &HashMap<JailId, String>) -> Vec<Route> {
    let Some(serving) = &view.serving else { return Vec::new() };
    let replaced = view.replaced();
    let mut routes = Vec::new();
    for route in &serving.spec.routes {
        let Some(spec) = serving.spec.processes.get(&route.process) else { continue };
        let (text, matches) = match &route.matches {
            RouteMatch::Host(host) => (host.clone(), Match::Host(host.clone())),
            RouteMatch::Port(port) => (port.to_string(), Match::Port(*port)),
        };
        let hold = match (view.wanted, replaced.contains(&route.process)) {
            (false, _) => Hold { max_requests: 0, max_age_ms: 0 },
            (true, false) => Hold { max_requests: HELD_MAX, max_age_ms: HELD_MS_MAX },
            (true, true) => Hold { max_requests: HELD_MAX, max_age_ms: replace_ms(spec) },
        };
        routes.push(Route {
            id: format!("{app}/{}/{text}", route.process),
            matches,
            action: Action::Proxy { upstreams: upstreams(view, &route.process, addresses) },
            hold,
        });
    }
    routes
}

/// A replace may take the old instance's end, the new one's start, and, when that fails, the old one's return.
fn replace_ms(spec: &ProcessSpec) -> u64 {
    let deadline_ms = spec.health.deadline_ms.saturating_mul(2);
    (spec.stop.grace_ms + deadline_ms + REPLACE_SLACK_MS).min(REPLACE_MS_MAX)
}

fn upstreams(view: &View, process: &ProcessName, addresses: &HashMap<JailId, String>) -> Vec<Upstream> {
    let serving = view.serving.as_ref().map(|generation| generation.deploy);
    let candidate = view.candidate.as_ref().map(|candidate| candidate.generation.deploy);
    let unserved = |instance: &Instance| Some(instance.deploy) == candidate && candidate != serving;
    let mut upstreams: Vec<Upstream> = view
        .instances
        .iter()
        .filter(|instance| instance.process == *process && !unserved(instance))
        .filter_map(|instance| {
            let state = match instance.state {
                InstanceState::Draining { .. } => UpstreamState::Draining,
                InstanceState::Running if Some(instance.deploy) == serving => match instance.health {
                    Health::Healthy => UpstreamState::Up,
                    Health::Unhealthy => UpstreamState::Down,
                    Health::Unproven => return None,
                },
                _ => return None,
            };
            let address = addresses.get(&instance.id)?;
            Some(Upstream { id: instance.id.to_string(), address: format!("{address}:{APP_PORT}"), state })
        })
        .collect();
    // All unhealthy: a failing check is then more likely wrong than every instance is, so they get requests again.
    if !upstreams.iter().any(|upstream| upstream.state == UpstreamState::Up) {
        for upstream in upstreams.iter_mut().filter(|upstream| upstream.state == UpstreamState::Down) {
            upstream.state = UpstreamState::Up;
        }
    }
    upstreams
}
