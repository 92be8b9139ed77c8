//! The balancer's routes of one app, derived from what the app looks like. Pure.
//!
//! Only instances of the generation that serves are up, and only while healthy. Draining ones are listed so that
//! the balancer lets them finish and counts what they have. A candidate's instances are not in the table before
//! their deploy switches. When none is up, the balancer holds requests.

use std::collections::HashMap;

use epagent_core::app::{Instance, InstanceState, View};
use epagent_core::health::Health;
use epagent_core::name::{AppName, JailId, ProcessName};
use epagent_core::spec::{ProcessSpec, RouteMatch};
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
    for (number, route) in serving.spec.routes.iter().enumerate() {
        let Some(spec) = serving.spec.processes.get(&route.process) else { continue };
        let matches = match &route.matches {
            RouteMatch::Host(host) => Match::Host(host.clone()),
            RouteMatch::Port(port) => Match::Port(*port),
        };
        let hold = match (view.wanted, replaced.contains(&route.process)) {
            (false, _) => Hold { max_requests: 0, max_age_ms: 0 },
            (true, false) if spec.sleep.is_some() => {
                Hold { max_requests: HELD_MAX, max_age_ms: wake_ms(spec) }
            }
            (true, false) => Hold { max_requests: HELD_MAX, max_age_ms: HELD_MS_MAX },
            (true, true) => Hold { max_requests: HELD_MAX, max_age_ms: replace_ms(spec) },
        };
        routes.push(Route {
            // Not what it matches: a host name alone may be longer than the balancer lets an id be.
            id: format!("{app}/{}/{number}", route.process),
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

/// Who wakes a process waits for its start.
fn wake_ms(spec: &ProcessSpec) -> u64 {
    spec.health.deadline_ms.saturating_add(REPLACE_SLACK_MS).clamp(HELD_MS_MAX, REPLACE_MS_MAX)
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
            let address = addresses.get(&instance.id)?.clone();
            Some(Upstream { id: instance.id.to_string(), address, state })
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use epagent_core::app::{Candidate, Generation};
    use epagent_core::name::{DeployId, ReleaseNumber};
    use epagent_core::phase::Phase;
    use epagent_core::spec::AppSpec;

    use super::*;

    const MANIFEST: &str = r#"
        app = "shop"
        image = "host"
        [process.web]
        command = "serve"
        deploy = "STRATEGY"
        [[route]]
        host = "shop.example"
        process = "web"
    "#;

    fn generation(deploy: i64, strategy: &str) -> Generation {
        let text = MANIFEST.replace("STRATEGY", strategy);
        let spec: AppSpec =
            epagent::manifest::parse_toml("epagent.toml", &text, &Default::default()).unwrap();
        Generation { deploy: DeployId(deploy), release: ReleaseNumber(1), spec: Arc::new(spec) }
    }

    fn instance(number: u64, deploy: i64, state: InstanceState, health: Health) -> Instance {
        Instance {
            id: JailId::new(&"shop".parse().unwrap(), number),
            deploy: DeployId(deploy),
            process: "web".parse().unwrap(),
            index: 0,
            state,
            health,
            started_at_ms: 0,
            unhealthy_since_ms: None,
            last_error: None,
        }
    }

    fn view(instances: Vec<Instance>) -> View {
        View {
            wanted: true,
            serving: Some(generation(1, "overlap")),
            candidate: None,
            scale: BTreeMap::new(),
            instances,
            crashes: BTreeMap::new(),
            table_current: false,
            asleep: Default::default(),
            idle_ms: Default::default(),
            awaited: Default::default(),
        }
    }

    fn states(view: &View) -> Vec<UpstreamState> {
        let addresses = view
            .instances
            .iter()
            .map(|instance| (instance.id.clone(), "100.96.0.1:8000".to_owned()))
            .collect();
        let routes = routes(&"shop".parse().unwrap(), view, &addresses);
        routes[0].upstreams().iter().map(|upstream| upstream.state).collect()
    }

    #[test]
    fn a_candidate_gets_no_requests_before_its_deploy_switches() {
        let both = vec![
            instance(1, 1, InstanceState::Running, Health::Healthy),
            instance(2, 2, InstanceState::Running, Health::Healthy),
        ];
        let mut view = view(both);
        view.candidate = Some(Candidate { generation: generation(2, "overlap"), phase: Phase::Checking });
        assert_eq!(states(&view), [UpstreamState::Up]);

        view.serving = Some(generation(2, "overlap"));
        view.candidate = Some(Candidate { generation: generation(2, "overlap"), phase: Phase::Switching });
        view.instances[0].state = InstanceState::Draining { since_ms: 0, in_flight: None };
        assert_eq!(states(&view), [UpstreamState::Draining, UpstreamState::Up]);
    }

    #[test]
    fn when_every_instance_fails_its_checks_they_get_requests_all_the_same() {
        let unhealthy = |number| instance(number, 1, InstanceState::Running, Health::Unhealthy);
        assert_eq!(states(&view(vec![unhealthy(1), unhealthy(2)])), [UpstreamState::Up, UpstreamState::Up]);
        let one_well = view(vec![unhealthy(1), instance(2, 1, InstanceState::Running, Health::Healthy)]);
        assert_eq!(states(&one_well), [UpstreamState::Down, UpstreamState::Up]);
    }

    #[test]
    fn a_stopped_app_holds_nobody_and_a_replaced_one_holds_longer() {
        let hold = |view: &View| routes(&"shop".parse().unwrap(), view, &HashMap::new())[0].hold;
        let mut view = view(Vec::new());
        let usual = hold(&view);
        view.candidate = Some(Candidate { generation: generation(2, "replace"), phase: Phase::Starting });
        assert!(hold(&view).max_age_ms > usual.max_age_ms);
        view.wanted = false;
        assert_eq!(hold(&view).max_requests, 0);
    }
}
