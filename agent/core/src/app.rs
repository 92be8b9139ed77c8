//! One app's next actions.
//!
//! [`plan`] looks at an app as it is (what serves, what is being deployed, which instances exist and how they are)
//! and returns the actions that bring it closer to what is wanted. It keeps nothing between calls and its actions
//! may be carried out twice, so the caller can be killed anywhere, look again, and go on.
//!
//! A *generation* is the set of instances that one deploy started. At most one serves, and at most one more, the
//! *candidate*, is on its way:
//!
//! ```text
//!               overlap                                        replace
//!  starting     candidate's instances start beside             requests held; the old drain and stop;
//!               the serving ones                               then the candidate's start
//!  checking     all of them healthy?   no: failed, the candidate is drained and stopped, and what serves is
//!               yes                    brought back to its full number (a hold ends as soon as it is healthy)
//!  switching    the candidate becomes the serving generation; the balancer has taken the table
//!  draining     instances of every other generation drain, stop and are forgotten; then: done
//! ```
//!
//! An instance moves one way only:
//!
//! ```text
//!  starting ─▶ running ─▶ draining ─▶ stopping ─▶ exited ─▶ (forgotten)
//!      └──────────┴──────────────────────────────────▲
//! ```
//!
//! `restart`, `rollback` and a change of configuration are deploys, so that there is one way to replace what runs.

pub mod ages;
mod candidate;
#[cfg(test)]
mod simulation;
mod sleep;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::backoff;
use crate::exit::Exit;
use crate::health::Health;
use crate::name::{DeployId, JailId, ProcessName, ReleaseNumber};
use crate::phase::Phase;
use crate::spec::{AppSpec, ProcessSpec, Strategy};
use crate::verdict::Cause;

/// How long a draining instance may keep requests before it is stopped all the same. Upgraded connections may
/// never end by themselves.
pub const DRAIN_MS_MAX: u64 = 30_000;

/// An app as it is wanted and as it is seen, at one moment.
#[derive(Debug, Clone)]
pub struct View {
    /// False: the operator stopped it.
    pub wanted: bool,
    pub serving: Option<Generation>,
    pub candidate: Option<Candidate>,
    /// What `epagent scale` said, over what the manifest says.
    pub scale: BTreeMap<ProcessName, u32>,
    pub instances: Vec<Instance>,
    /// For the instances of the serving generation that ended by themselves.
    pub crashes: BTreeMap<(ProcessName, u32), Crash>,
    /// Whether the balancer has taken the table that the present phases ask for.
    pub table_current: bool,
    /// Processes that were stopped because nobody asked for them.
    pub asleep: BTreeSet<ProcessName>,
    /// How long nobody has asked for a process. Absent: somebody does, or it is not known.
    pub idle_ms: BTreeMap<ProcessName, u64>,
    /// Processes somebody waits for, with no instance to answer.
    pub awaited: BTreeSet<ProcessName>,
}

/// What one deploy runs.
#[derive(Debug, Clone)]
pub struct Generation {
    pub deploy: DeployId,
    pub release: ReleaseNumber,
    pub spec: Arc<AppSpec>,
}

/// A deploy in `starting` or later; what comes before has no instances and is not planned here.
#[derive(Debug, Clone)]
pub struct Candidate {
    pub generation: Generation,
    pub phase: Phase,
}

#[derive(Debug, Clone)]
pub struct Instance {
    pub id: JailId,
    pub deploy: DeployId,
    pub process: ProcessName,
    pub index: u32,
    pub state: InstanceState,
    pub health: Health,
    /// Since when it has been being made, or running, by the steady clock, as the other times here.
    pub started_at_ms: u64,
    /// Since when it has not been healthy, if it was before.
    pub unhealthy_since_ms: Option<u64>,
    /// Why its last check failed.
    pub last_error: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InstanceState {
    /// Recorded; its jail is being made.
    Starting,
    Running,
    /// Gets nothing new. Since when the balancer knows that, and what it says the instance still has; None: unknown.
    Draining {
        since_ms: u64,
        in_flight: Option<u32>,
    },
    /// Is to end. `sent`: the runner has been told, as far as this agent knows.
    Stopping {
        sent: bool,
    },
    Exited(Exit),
}

/// How often in a row an instance crashed, and when last, by the steady clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Crash {
    pub restarts: u32,
    pub at_ms: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    Start {
        deploy: DeployId,
        process: ProcessName,
        index: u32,
    },
    Drain {
        id: JailId,
    },
    Stop {
        id: JailId,
    },
    /// It does not become healthy: count that as a crash and put another in its place.
    Recycle {
        id: JailId,
    },
    /// Nobody asks for the process: it is to have no instances until somebody does.
    Sleep {
        process: ProcessName,
    },
    /// Somebody asks for the process.
    Wake {
        process: ProcessName,
    },
    /// Record how it ended and remove what is left of it.
    Forget {
        id: JailId,
    },
    Advance {
        deploy: DeployId,
        from: Phase,
        to: Phase,
    },
    Fail {
        deploy: DeployId,
        phase: Phase,
        cause: Cause,
        instance: Option<JailId>,
    },
}

impl View {
    /// How many instances of `process` are wanted of this generation. A candidate's are wanted also while the app is
    /// stopped or asleep: what it brings up is what starts the app again.
    pub fn count(&self, generation: &Generation, process: &ProcessName) -> u32 {
        let is_candidate =
            self.candidate.as_ref().is_some_and(|candidate| candidate.generation.deploy == generation.deploy);
        if !is_candidate && (!self.wanted || self.asleep.contains(process)) {
            return 0;
        }
        let asked = self.scale.get(process).copied();
        generation.spec.processes.get(process).map_or(0, |found| asked.unwrap_or(found.instances))
    }

    /// Processes of which an instance can answer.
    pub fn answering(&self) -> BTreeSet<ProcessName> {
        let answers = |instance: &&Instance| {
            instance.state == InstanceState::Running
                && instance.health == Health::Healthy
                && self.is_serving(instance)
        };
        self.instances.iter().filter(answers).map(|instance| instance.process.clone()).collect()
    }

    /// Processes whose requests are held and whose old instances make room, because a candidate replaces them.
    pub fn replaced(&self) -> BTreeSet<ProcessName> {
        let Some(candidate) = &self.candidate else { return BTreeSet::new() };
        if !matches!(candidate.phase, Phase::Starting | Phase::Checking) {
            return BTreeSet::new();
        }
        let new = candidate.generation.spec.processes.iter();
        new.filter(|(_, spec)| spec.deploy == Strategy::Replace).map(|(name, _)| name.clone()).collect()
    }

    fn of(&self, deploy: DeployId) -> impl Iterator<Item = &Instance> {
        self.instances.iter().filter(move |instance| instance.deploy == deploy)
    }

    fn is_serving(&self, instance: &Instance) -> bool {
        self.serving.as_ref().is_some_and(|serving| serving.deploy == instance.deploy)
    }

    fn is_candidate(&self, instance: &Instance) -> bool {
        self.candidate.as_ref().is_some_and(|candidate| candidate.generation.deploy == instance.deploy)
    }

    /// Of a candidate that does not serve yet.
    fn is_on_trial(&self, instance: &Instance) -> bool {
        self.is_candidate(instance) && !self.is_serving(instance)
    }
}

impl Instance {
    /// Whether it is on its way up or up.
    pub fn is_live(&self) -> bool {
        matches!(self.state, InstanceState::Starting | InstanceState::Running)
    }

    /// Whether it may still write to a volume.
    fn has_ended(&self) -> bool {
        matches!(self.state, InstanceState::Exited(_))
    }
}

/// The next actions for one app. Calling it again after they were carried out, and whenever something changed,
/// brings the app to what is wanted. `now_ms` is of the steady clock ([`crate::clock`]), as every time in the view.
pub fn plan(view: &View, now_ms: u64) -> Vec<Action> {
    let mut actions = Vec::new();
    end_instances(view, now_ms, &mut actions);
    if let Some(serving) = &view.serving {
        sleep::plan(view, serving, now_ms, &mut actions);
        keep_serving(view, serving, now_ms, &mut actions);
    }
    if let Some(candidate) = &view.candidate {
        candidate::advance(view, candidate, now_ms, &mut actions);
    }
    actions
}

/// Draining instances that are empty are stopped, ended ones forgotten, and those of no wanted generation drained.
fn end_instances(view: &View, now_ms: u64, actions: &mut Vec<Action>) {
    for instance in &view.instances {
        let id = || instance.id.clone();
        match &instance.state {
            // The exit of one on trial is first reported by its deploy's failure; then it belongs to no generation.
            InstanceState::Exited(_) if !view.is_on_trial(instance) => {
                actions.push(Action::Forget { id: id() })
            }
            InstanceState::Draining { since_ms, in_flight } => {
                // Until the balancer has taken the table, it may still be sending requests here.
                let spent = *in_flight == Some(0) || now_ms.saturating_sub(*since_ms) >= DRAIN_MS_MAX;
                if view.table_current && spent {
                    actions.push(Action::Stop { id: id() });
                }
            }
            InstanceState::Stopping { sent: false } => actions.push(Action::Stop { id: id() }),
            InstanceState::Starting | InstanceState::Running
                if !view.is_serving(instance) && !view.is_candidate(instance) =>
            {
                actions.push(Action::Drain { id: id() });
            }
            _ => {}
        }
    }
}

/// Each process of the serving generation has as many instances as it should, at the lowest indices.
fn keep_serving(view: &View, serving: &Generation, now_ms: u64, actions: &mut Vec<Action>) {
    let replaced = view.replaced();
    for instance in view.of(serving.deploy).filter(|instance| instance.is_live()) {
        let wanted = view.count(serving, &instance.process);
        if instance.index >= wanted || replaced.contains(&instance.process) {
            actions.push(Action::Drain { id: instance.id.clone() });
        }
    }
    for (process, spec) in serving.spec.processes.iter().filter(|(process, _)| !replaced.contains(process)) {
        for index in 0..view.count(serving, process) {
            let here = |instance: &Instance| instance.process == *process && instance.index == index;
            let taken = view.of(serving.deploy).any(|instance| here(instance) && instance.is_live());
            // With `replace`, none starts while one may still write: of another generation, or its own predecessor.
            let blocked = spec.deploy == Strategy::Replace
                && view.instances.iter().any(|other| {
                    let elsewhere = other.process == *process && other.deploy != serving.deploy;
                    (elsewhere || here(other)) && !other.has_ended()
                });
            let waiting = view.crashes.get(&(process.clone(), index)).is_some_and(|crash| {
                now_ms.saturating_sub(crash.at_ms) < backoff::wait_ms(crash.restarts.saturating_sub(1))
            });
            if !taken && !blocked && !waiting {
                actions.push(Action::Start { deploy: serving.deploy, process: process.clone(), index });
            }
        }
        recycle(view, serving, process, spec, now_ms, actions);
    }
}

/// Replaces an instance that runs and has not been healthy for as long as a new one may take to become it; one of a
/// process at a time, so that a check that is wrong does not take all of them away.
fn recycle(
    view: &View,
    serving: &Generation,
    process: &ProcessName,
    spec: &ProcessSpec,
    now_ms: u64,
    actions: &mut Vec<Action>,
) {
    let of_process = || view.of(serving.deploy).filter(|instance| instance.process == *process);
    let in_change = of_process().any(|instance| instance.state != InstanceState::Running);
    // A deploy judges its own instances until it has switched.
    if in_change || view.candidate.is_some() {
        return;
    }
    let ailing = of_process().find(|instance| {
        let since_ms = match instance.health {
            Health::Healthy => return false,
            Health::Unproven => instance.started_at_ms,
            Health::Unhealthy => instance.unhealthy_since_ms.unwrap_or(now_ms),
        };
        now_ms.saturating_sub(since_ms) > spec.health.deadline_ms
    });
    if let Some(instance) = ailing {
        actions.push(Action::Recycle { id: instance.id.clone() });
    }
}
