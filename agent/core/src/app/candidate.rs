//! A deploy from `starting` to `done`: which actions each phase takes and what lets it end.

use super::{Action, Candidate, Generation, Instance, InstanceState, View};
use crate::health::Health;
use crate::name::ProcessName;
use crate::phase::Phase;
use crate::spec::Strategy;
use crate::verdict::Cause;

pub(super) fn advance(view: &View, candidate: &Candidate, now_ms: u64, actions: &mut Vec<Action>) {
    let generation = &candidate.generation;
    let deploy = generation.deploy;
    let to = |to| Action::Advance { deploy, from: candidate.phase, to };
    match candidate.phase {
        Phase::Starting => {
            if let Some(failed) = failure(view, candidate, now_ms) {
                actions.push(failed);
            } else if start_missing(view, generation, actions) {
                actions.push(to(Phase::Checking));
            }
        }
        Phase::Checking => {
            if let Some(failed) = failure(view, candidate, now_ms) {
                actions.push(failed);
            } else if start_missing(view, generation, actions) && all_healthy(view, generation) {
                actions.push(to(Phase::Switching));
            }
        }
        // The caller has made this generation the serving one; the table that says so must have been taken.
        Phase::Switching if view.table_current => actions.push(to(Phase::Draining)),
        Phase::Draining if view.instances.iter().all(|instance| instance.deploy == deploy) => {
            actions.push(to(Phase::Done));
        }
        _ => {}
    }
}

/// Starts what the generation lacks; true when it lacks nothing.
fn start_missing(view: &View, generation: &Generation, actions: &mut Vec<Action>) -> bool {
    let mut complete = true;
    for (process, spec) in &generation.spec.processes {
        let room = spec.deploy == Strategy::Overlap || old_ones_ended(view, generation, process);
        for index in 0..view.count(generation, process) {
            let exists = view.of(generation.deploy).any(|instance| {
                instance.process == *process && instance.index == index && instance.is_live()
            });
            if exists {
                continue;
            }
            complete = false;
            if room {
                actions.push(Action::Start { deploy: generation.deploy, process: process.clone(), index });
            }
        }
    }
    complete
}

fn old_ones_ended(view: &View, generation: &Generation, process: &ProcessName) -> bool {
    let old = |instance: &&Instance| instance.deploy != generation.deploy && instance.process == *process;
    view.instances.iter().filter(old).all(Instance::has_ended)
}

fn all_healthy(view: &View, generation: &Generation) -> bool {
    view.of(generation.deploy)
        .filter(|instance| instance.is_live())
        .all(|instance| instance.state == InstanceState::Running && instance.health == Health::Healthy)
}

/// The first instance that ended, or did not become healthy in its time.
fn failure(view: &View, candidate: &Candidate, now_ms: u64) -> Option<Action> {
    let generation = &candidate.generation;
    let fail = |instance: &Instance, cause| Action::Fail {
        deploy: generation.deploy,
        phase: candidate.phase,
        cause,
        instance: Some(instance.id.clone()),
    };
    view.of(generation.deploy).find_map(|instance| {
        let process = || instance.process.clone();
        let spec = &generation.spec.processes.get(&instance.process)?.health;
        let age_ms = now_ms.saturating_sub(instance.started_at_ms);
        match &instance.state {
            InstanceState::Exited(exit) => {
                let cause =
                    Cause::InstanceExited { process: process(), index: instance.index, exit: exit.clone() };
                Some(fail(instance, cause))
            }
            InstanceState::Starting if age_ms > spec.deadline_ms => {
                let cause = Cause::NotStarted { process: process(), index: instance.index, after_ms: age_ms };
                Some(fail(instance, cause))
            }
            InstanceState::Running if instance.health != Health::Healthy && age_ms > spec.deadline_ms => {
                let cause = Cause::Unhealthy {
                    process: process(),
                    index: instance.index,
                    check: spec.check.clone(),
                    after_ms: age_ms,
                    last_error: instance.last_error.clone(),
                };
                Some(fail(instance, cause))
            }
            _ => None,
        }
    })
}
