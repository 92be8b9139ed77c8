//! What one round sees: the store's rows, held against the runner's world, as a view that can be planned on.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use epagent_core::app::{Candidate, Crash, Generation, Instance, InstanceState, View};
use epagent_core::exit::Exit;
use epagent_core::health::Health;
use epagent_core::name::{JailId, ProcessName};
use epagent_core::phase::Phase;
use epagent_core::spec::{APP_PORT, AppSpec, Listen, RouteMatch};
use epagent_store::{App, Deploy, Instance as Row, Wanted};
use epagent_wire::runner::{Jail, JailState, SOCKET_NAME, World};
use epagent_wire::table::SOCKET_PREFIX;

use super::{AppLoop, QUICK_MS_MAX, RoundError};
use crate::clock;
use crate::health::Subject;

/// The states an instance's row goes through. `healthy` is `running` after it has proven itself, so that a
/// restarted agent need not prove it again.
pub mod state {
    pub const STARTING: &str = "starting";
    pub const RUNNING: &str = "running";
    pub const HEALTHY: &str = "healthy";
    pub const DRAINING: &str = "draining";
    pub const STOPPING: &str = "stopping";
    pub const EXITED: &str = "exited";
}

pub struct Seen {
    pub view: View,
    pub rows: HashMap<JailId, Row>,
    /// Where each takes requests, as the balancer's table says it.
    pub addresses: HashMap<JailId, String>,
    /// The deploy under way, in whatever phase.
    pub deploy: Option<Deploy>,
    /// Rows that are recorded as starting and that the runner does not know: their start was cut.
    pub unstarted: Vec<JailId>,
}

impl AppLoop {
    pub(super) async fn look(&mut self, app: &App, world: &World) -> Result<Seen, RoundError> {
        let store = &self.parts.store;
        let deploy = store.deploy_under_way(&self.app).await?;
        let served = store.deploy_serving(&self.app).await?;
        let candidate = match &deploy {
            Some(deploy) if has_instances(deploy.phase) && app.wanted != Wanted::Removed => {
                let generation = self.generation(deploy).await?;
                generation.map(|generation| Candidate { generation, phase: deploy.phase })
            }
            _ => None,
        };
        let serving = match (&candidate, &served) {
            (Some(candidate), _) if candidate.phase.has_switched() => Some(candidate.generation.clone()),
            (_, Some(served)) => self.generation(served).await?,
            _ => None,
        };
        let mut seen = Seen {
            view: View {
                wanted: app.wanted == Wanted::Running,
                serving,
                candidate,
                scale: self.parts.store.scale(&self.app).await?,
                instances: Vec::new(),
                crashes: self.crashes.clone(),
                table_current: false,
                asleep: store.asleep(&self.app).await?.into_keys().collect(),
                idle_ms: BTreeMap::new(),
                awaited: self.parts.waking.awaited(&self.app),
            },
            rows: HashMap::new(),
            addresses: HashMap::new(),
            deploy,
            unstarted: Vec::new(),
        };
        for row in self.parts.store.instances_live(Some(&self.app)).await? {
            self.see_instance(row, world, &mut seen).await?;
        }
        seen.view.crashes.clone_from(&self.crashes);
        for process in seen.view.answering() {
            self.parts.waking.answered(&self.app, &process);
            seen.view.awaited.remove(&process);
        }
        if seen.may_sleep(clock::steady_ms()) {
            seen.view.idle_ms = self.parts.waking.idle_ms(&self.app).await;
        }
        self.ages.keep(|id| seen.rows.contains_key(id));
        self.stops_sent.retain(|id| seen.rows.contains_key(id));
        Ok(seen)
    }

    async fn generation(&self, deploy: &Deploy) -> Result<Option<Generation>, RoundError> {
        let release = self.parts.store.release(&self.app, deploy.release).await?;
        Ok(release.map(|release| {
            let spec = Arc::new(release.spec);
            Generation { deploy: deploy.id, release: deploy.release, spec }
        }))
    }

    async fn see_instance(&mut self, row: Row, world: &World, seen: &mut Seen) -> Result<(), RoundError> {
        let jail = world.jails.iter().find(|jail| jail.id == row.jail);
        let finding = self.parts.checks.finding(&row.jail);
        let proven = row.state == state::HEALTHY;
        let health = match &finding {
            Some(finding) => finding.health,
            None if proven => Health::Healthy,
            None => Health::Unproven,
        };
        let now = clock::moment();
        if row.restarts > 0 {
            let place = (row.process.clone(), row.index);
            let at_ms = now.when(row.created_at_ms);
            self.crashes.entry(place).or_insert(Crash { restarts: row.restarts, at_ms });
        }
        let state = match jail.map(|jail| &jail.state) {
            Some(JailState::Exited(exit)) => InstanceState::Exited(exit.clone()),
            None if row.state == state::STARTING => {
                seen.unstarted.push(row.jail.clone());
                InstanceState::Starting
            }
            None => InstanceState::Exited(Exit { at_ms: now.wall_ms, ..Exit::default() }),
            Some(JailState::Starting | JailState::Running) => match row.state.as_str() {
                state::DRAINING => {
                    let since_ms = self.ages.draining_since(&row.jail).unwrap_or(now.steady_ms);
                    InstanceState::Draining { since_ms, in_flight: None }
                }
                state::STOPPING => InstanceState::Stopping { sent: self.stops_sent.contains(&row.jail) },
                // A runner that has just found its jails again may call one starting that we know to run.
                state::STARTING if matches!(jail, Some(Jail { state: JailState::Starting, .. })) => {
                    InstanceState::Starting
                }
                _ => InstanceState::Running,
            },
        };
        if let Some(jail) = jail {
            let socket = socket_of(&row, &seen.view);
            self.record_progress(&row, jail, socket.as_deref(), &state, health).await?;
            let tcp = jail.address.as_ref().map(|address| format!("{address}:{APP_PORT}"));
            if let Some(address) = socket.or(tcp) {
                seen.addresses.insert(row.jail.clone(), address);
            }
        }
        let is_started = state != InstanceState::Starting;
        let started_at_ms = self.ages.see(&row.jail, row.created_at_ms, is_started, now);
        let is_unhealthy = health == Health::Unhealthy;
        let unhealthy_since_ms = self.ages.unhealthy_since(&row.jail, is_unhealthy, now);
        seen.view.instances.push(Instance {
            id: row.jail.clone(),
            deploy: row.deploy,
            process: row.process.clone(),
            index: row.index,
            state,
            health,
            started_at_ms,
            unhealthy_since_ms,
            last_error: finding.and_then(|finding| finding.last_error),
        });
        seen.rows.insert(row.jail.clone(), row);
        Ok(())
    }

    /// starting → running → healthy, in the store.
    async fn record_progress(
        &self,
        row: &Row,
        jail: &Jail,
        socket: Option<&str>,
        state: &InstanceState,
        health: Health,
    ) -> Result<(), RoundError> {
        if *state != InstanceState::Running {
            return Ok(());
        }
        let store = &self.parts.store;
        match (row.state.as_str(), health) {
            (state::STARTING, _) => {
                let at_ms = jail.started_at_ms.unwrap_or_else(clock::now_ms);
                let address = socket.or(jail.address.as_deref());
                store.instance_started(&row.jail, state::RUNNING, address, at_ms).await?;
            }
            (state::RUNNING, Health::Healthy) => {
                store.instance_state(&row.jail, state::HEALTHY).await?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Asks the balancer what draining instances still have. To be called when the balancer is known to have the
    /// table that drains them: what an older table says may still grow.
    pub(super) async fn see_in_flight(&mut self, seen: &mut Seen) {
        let drains = |instance: &Instance| matches!(instance.state, InstanceState::Draining { .. });
        if !seen.view.instances.iter().any(drains) {
            return;
        }
        // From here on the balancer is known to send nothing new: the time a drain may take begins.
        let now = clock::moment();
        for instance in seen.view.instances.iter().filter(|instance| drains(instance)) {
            self.ages.drains(&instance.id, now);
        }
        let Some(counts) = self.parts.routing.in_flight().await else { return };
        for instance in &mut seen.view.instances {
            if let InstanceState::Draining { in_flight, .. } = &mut instance.state {
                *in_flight = Some(counts.get(&instance.id).copied().unwrap_or(0));
            }
        }
    }

    /// Something is being made, and was begun a moment ago.
    pub(super) fn is_starting(&self, seen: &Seen) -> bool {
        let now = clock::moment();
        let starts = |instance: &&Instance| instance.state == InstanceState::Starting;
        let mut starting = seen.view.instances.iter().filter(starts);
        starting.any(|instance| self.ages.lived_ms(&instance.id, now) < QUICK_MS_MAX)
    }
}

impl Seen {
    /// What is to be checked: everything that runs and may serve.
    pub fn subjects(&self) -> Vec<Subject> {
        let generations: Vec<&Generation> =
            [self.view.serving.as_ref(), self.view.candidate.as_ref().map(|candidate| &candidate.generation)]
                .into_iter()
                .flatten()
                .collect();
        let running = self.view.instances.iter().filter(|instance| instance.state == InstanceState::Running);
        running
            .filter_map(|instance| {
                let generation =
                    generations.iter().find(|generation| generation.deploy == instance.deploy)?;
                let spec = generation.spec.processes.get(&instance.process)?.health.clone();
                let address = self.addresses.get(&instance.id)?.clone();
                let proven = self.rows.get(&instance.id)?.state == state::HEALTHY;
                let host = host_of(&generation.spec, &instance.process);
                Some(Subject { id: instance.id.clone(), address, host, spec, proven })
            })
            .collect()
    }

    /// Nothing of the app runs or is being made.
    pub fn is_empty(&self) -> bool {
        self.view.instances.is_empty()
    }

    /// Whether it is worth asking how idle the app is: something of it may sleep, and is old enough to.
    fn may_sleep(&self, now_ms: u64) -> bool {
        let Some(serving) = self.view.serving.as_ref().filter(|_| self.view.candidate.is_none()) else {
            return false;
        };
        serving.spec.processes.iter().any(|(process, spec)| {
            let of_process = |instance: &&Instance| instance.process == *process;
            spec.sleep.as_ref().is_some_and(|sleep| {
                let is_old = |instance: &Instance| {
                    now_ms.saturating_sub(instance.started_at_ms) >= sleep.idle_after_ms
                };
                !self.view.asleep.contains(process)
                    && self.view.instances.iter().filter(of_process).all(is_old)
            })
        })
    }

    /// Nothing is on its way.
    pub fn is_settled(&self) -> bool {
        let settled = |instance: &Instance| {
            instance.state == InstanceState::Running && instance.health != Health::Unproven
        };
        let waits_for_upload = |deploy: &Deploy| deploy.phase == Phase::Received;
        self.deploy.as_ref().is_none_or(waits_for_upload)
            && self.view.instances.iter().all(settled)
            && self.view.table_current
    }
}

/// The socket of an instance that listens on one. What is recorded goes before what its release says: that one may be
/// gone while the instance still finishes what it has.
fn socket_of(row: &Row, view: &View) -> Option<String> {
    if let Some(recorded) = &row.address {
        return recorded.starts_with(SOCKET_PREFIX).then(|| recorded.clone());
    }
    let candidate = view.candidate.as_ref().map(|candidate| &candidate.generation);
    let mut generations = view.serving.iter().chain(candidate);
    let own = generations.find(|generation| generation.deploy == row.deploy)?;
    let listen = own.spec.processes.get(&row.process)?.listen;
    (listen == Listen::Unix).then(|| format!("{SOCKET_PREFIX}{}/{SOCKET_NAME}", row.jail))
}

/// The first host name that leads to the process; for a wildcard, a name below it.
fn host_of(spec: &AppSpec, process: &ProcessName) -> String {
    let hosts = spec.routes.iter().filter(|route| route.process == *process);
    let first = hosts.into_iter().find_map(|route| match &route.matches {
        RouteMatch::Host(host) => Some(host.replace('*', "health")),
        RouteMatch::Port(_) => None,
    });
    first.unwrap_or_else(|| "localhost".to_owned())
}

fn has_instances(phase: Phase) -> bool {
    matches!(phase, Phase::Starting | Phase::Checking | Phase::Switching | Phase::Draining)
}
