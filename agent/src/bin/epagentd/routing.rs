//! The table the balancer should have, and the loop that sees to it that it has it.
//!
//! Each app's loop hands in the routes of its app, operators say words over them, and the table is what [`merge`] makes
//! of both. After a start of the agent nothing is sent before every app has handed in its own once: until then the
//! balancer serves from the table it has, which knows more than we do.
//!
//! One app must not hold back the others. For an app that can't be looked at, the routes the balancer took of it last
//! stand in; and a table that is refused is taken apart:
//!
//! ```text
//!   wanted ── sent ──▶ taken                          all of it is in force
//!                 └──▶ refused ──▶ what differs from the last one taken, one source at a time
//!                                   ├─ taken: it was not this one
//!                                   └─ refused: its old part stays, an error is recorded, and it is left
//!                                      out until it changes
//! ```

pub mod merge;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use epagent_core::name::{AppName, JailId};
use epagent_store::{Store, StoreError};
use epagent_wire::table::{Problem, Route, Table};
use tokio::sync::{MutexGuard, Notify, watch};

use crate::balancer::{Balancer, BalancerError};
use crate::clock;
use crate::supervise::chain;
use merge::{Inputs, Source};

/// The name of the counter in the store.
const VERSION: &str = "table_version";
/// How often the balancer is looked at although nothing changed: it may have lost its disk.
const INTERVAL: Duration = Duration::from_secs(5);
const RETRY_AFTER: Duration = Duration::from_millis(200);
/// How long after the start an app that can't be looked at, and of which nothing was recorded, is waited for.
const MISSING_MAX: Duration = Duration::from_secs(10);
/// How long an operator waits for the balancer to take a word.
const SETTLED_MAX: Duration = Duration::from_secs(5);
/// The balancer's code for a table it does not take as a whole.
const BAD_TABLE: &str = "bad_table";

#[derive(Clone)]
pub struct Routing(Arc<Shared>);

struct Shared {
    balancer: Balancer,
    state: Mutex<State>,
    /// Something was handed in or said.
    changed: Notify,
    /// The count of changes that the balancer has been told of.
    told: watch::Sender<u64>,
    /// Held while a word is written and read again, so that an older picture never follows a newer one.
    turn: tokio::sync::Mutex<()>,
    started: Instant,
}

#[derive(Default)]
struct State {
    wanted: Inputs,
    /// As the balancer took it last.
    taken: Inputs,
    /// What the balancer does not take, as it was when it was refused, and why.
    refused: Inputs,
    why_refused: BTreeMap<Source, String>,
    /// Apps that have not handed in their routes since the start.
    missing: BTreeSet<AppName>,
    /// Counts changes; `current` is the count that the balancer was told of.
    changes: u64,
    current: u64,
    /// The count at which each app's routes last changed.
    changed_at: BTreeMap<AppName, u64>,
    version: u64,
    problems: Vec<Problem>,
}

/// What there is to be said about all routes at one moment.
pub struct Picture {
    pub wanted: Inputs,
    pub why_refused: BTreeMap<Source, String>,
    pub problems: Vec<Problem>,
}

/// What became of a word that was said.
pub enum Settled {
    InForce,
    /// The balancer refuses it: its own words.
    Refused(String),
    /// The balancer has not answered yet.
    NotYet,
}

impl Routing {
    /// Begins with what the store has: words, and the routes that were last taken of `apps`, all of which are to hand
    /// in their own before the first table is sent.
    pub async fn new(balancer: Balancer, apps: BTreeSet<AppName>, store: &Store) -> Result<Self, StoreError> {
        let mut inputs = said(store).await?;
        for (app, routes) in store.routes_taken().await? {
            // One that this version can't read stands in for nothing.
            if let (true, Ok(routes)) = (apps.contains(&app), serde_json::from_str(&routes)) {
                inputs.apps.insert(app, routes);
            }
        }
        let changed_at = inputs.apps.keys().map(|app| (app.clone(), 1)).collect();
        let state = State {
            taken: inputs.clone(),
            wanted: inputs,
            missing: apps,
            changes: 1,
            changed_at,
            ..State::default()
        };
        let shared = Shared {
            balancer,
            state: Mutex::new(state),
            changed: Notify::new(),
            told: watch::Sender::new(0),
            turn: tokio::sync::Mutex::default(),
            started: Instant::now(),
        };
        Ok(Self(Arc::new(shared)))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn balancer(&self) -> &Balancer {
        &self.0.balancer
    }

    /// Hands in the routes of an app, and says whether the balancer's table has them.
    pub fn hand_in(&self, app: &AppName, routes: Vec<Route>) -> bool {
        let mut state = self.state();
        let was_missing = state.missing.remove(app);
        if was_missing || state.wanted.apps.get(app) != Some(&routes) {
            state.changes += 1;
            let at = state.changes;
            state.changed_at.insert(app.clone(), at);
            state.wanted.apps.insert(app.clone(), routes);
            self.0.changed.notify_one();
        }
        let is_told = state.changed_at.get(app).is_some_and(|&at| at <= state.current);
        is_told && !state.is_refused(&Source::App(app.clone()))
    }

    /// The app can't be looked at just now: what the balancer took of it last stands in, so that the others need not
    /// wait for it.
    pub fn stand_in(&self, app: &AppName) {
        let mut state = self.state();
        if state.wanted.apps.contains_key(app) || self.0.started.elapsed() > MISSING_MAX {
            let was_missing = state.missing.remove(app);
            if was_missing {
                self.0.changed.notify_one();
            }
        }
    }

    /// The app is gone.
    pub fn remove(&self, app: &AppName) {
        let mut state = self.state();
        state.missing.remove(app);
        state.changed_at.remove(app);
        if state.wanted.apps.remove(app).is_some() {
            state.changes += 1;
        }
        self.0.changed.notify_one();
    }

    /// Whoever changes what is said in the store has the turn from before that until [`Routing::reload`] returned.
    pub async fn turn(&self) -> MutexGuard<'_, ()> {
        self.0.turn.lock().await
    }

    /// Takes what is said from the store; returns the count to wait for by [`Routing::settled`].
    pub async fn reload(&self, store: &Store) -> Result<u64, StoreError> {
        let new = said(store).await?;
        let mut state = self.state();
        state.changes += 1;
        state.wanted.words = new.words;
        state.wanted.drains = new.drains;
        self.0.changed.notify_one();
        Ok(state.changes)
    }

    /// Waits until the balancer was told of this change, and says what became of `source` in it.
    pub async fn settled(&self, change: u64, source: &Source) -> Settled {
        let mut told = self.0.told.subscribe();
        let is_told = tokio::time::timeout(SETTLED_MAX, told.wait_for(|told| *told >= change)).await;
        let state = self.state();
        match (is_told, state.why_refused.get(source)) {
            (Ok(_), Some(why)) if state.is_refused(source) => Settled::Refused(why.clone()),
            (Ok(_), _) => Settled::InForce,
            (Err(_), _) => Settled::NotYet,
        }
    }

    pub fn picture(&self) -> Picture {
        let state = self.state();
        let refused = state.why_refused.iter().filter(|(source, _)| state.is_refused(source));
        Picture {
            wanted: state.wanted.clone(),
            why_refused: refused.map(|(source, why)| (source.clone(), why.clone())).collect(),
            problems: state.problems.clone(),
        }
    }

    pub fn version(&self) -> u64 {
        self.state().version
    }

    /// What is wanted and not in force, for people.
    pub fn problems(&self) -> Vec<String> {
        let Picture { why_refused, problems, .. } = self.picture();
        let refused = why_refused.iter().map(|(source, why)| format!("{source}: refused: {why}"));
        let failed = problems.into_iter().map(|problem| match problem.route {
            Some(route) => format!("{route}: {}", problem.message),
            None => problem.message,
        });
        refused.chain(failed).collect()
    }

    /// Requests and connections in flight at each upstream, as of the present table; None when the balancer has
    /// another one or can't be asked.
    pub async fn in_flight(&self) -> Option<HashMap<JailId, u32>> {
        let version = self.state().version;
        let status = self.0.balancer.status().await.ok()?;
        if status.table_version != version {
            return None;
        }
        let count = |active: u64| u32::try_from(active).unwrap_or(u32::MAX);
        let upstreams = status.upstreams.iter();
        Some(
            upstreams
                .filter_map(|up| {
                    Some((up.id.parse().ok()?, count(up.active_requests + up.active_connections)))
                })
                .collect(),
        )
    }

    /// Sends the table whenever it has changed or the balancer has another.
    pub async fn run(&self, store: Store) -> Result<(), StoreError> {
        loop {
            tokio::select! {
                () = self.0.changed.notified() => {}
                () = tokio::time::sleep(INTERVAL) => {}
            }
            while let Err(error) = self.send(&store).await? {
                let message = chain(&error);
                store.error_record("table_not_taken", "balancer", &message, None, clock::now_ms()).await?;
                tokio::time::sleep(RETRY_AFTER).await;
            }
        }
    }

    async fn send(&self, store: &Store) -> Result<Result<(), BalancerError>, StoreError> {
        let status = match self.0.balancer.status().await {
            Ok(status) => status,
            Err(error) => return Ok(Err(error)),
        };
        let (next, changes) = {
            let state = self.state();
            let same = state.changes == state.current && state.version == status.table_version;
            if !state.missing.is_empty() || same {
                return Ok(Ok(()));
            }
            (state.acceptable(), state.changes)
        };
        let sent = match self.set(store, &next, status.table_version + 1).await? {
            Err(BalancerError::Refused { code, .. }) if code == BAD_TABLE => {
                self.take_apart(store, &next).await?
            }
            sent => sent,
        };
        if sent.is_ok() {
            self.state().current = changes;
            self.0.told.send_replace(changes);
        }
        Ok(sent)
    }

    /// Sends the table of these inputs; what the balancer took is recorded.
    async fn set(
        &self,
        store: &Store,
        inputs: &Inputs,
        version_min: u64,
    ) -> Result<Result<(), BalancerError>, StoreError> {
        let version = store.counter_next(VERSION, version_min).await?;
        let ack = match self.0.balancer.set_table(Table { version, routes: inputs.routes() }).await {
            Ok(ack) => ack,
            Err(error) => return Ok(Err(error)),
        };
        let changed: BTreeMap<AppName, String> = {
            let mut state = self.state();
            state.version = ack.version;
            state.problems = ack.problems;
            let old = std::mem::replace(&mut state.taken, inputs.clone());
            let changed = inputs.apps.iter().filter(|(app, routes)| old.apps.get(*app) != Some(*routes));
            changed
                .filter_map(|(app, routes)| Some((app.clone(), serde_json::to_string(routes).ok()?)))
                .collect()
        };
        // Only once it is taken: what was refused must not stand in for anything.
        if !changed.is_empty() {
            store.routes_taken_set(&changed).await?;
        }
        Ok(Ok(()))
    }

    /// The balancer refused a table as a whole: finds out what of it, and brings the rest into force.
    async fn take_apart(
        &self,
        store: &Store,
        next: &Inputs,
    ) -> Result<Result<(), BalancerError>, StoreError> {
        let mut good = Inputs { drains: next.drains.clone(), ..self.state().taken.clone() };
        for source in next.differing(&good) {
            let mut trial = good.clone();
            trial.adopt(&source, next);
            match self.set(store, &trial, 0).await? {
                Ok(()) => good = trial,
                Err(BalancerError::Refused { code, message }) if code == BAD_TABLE => {
                    tracing::warn!(%source, reason = message, "the balancer does not take this; its old part stays");
                    store
                        .error_record("route_refused", &source.to_string(), &message, None, clock::now_ms())
                        .await?;
                    let mut state = self.state();
                    state.refused.adopt(&source, next);
                    state.why_refused.insert(source, message);
                }
                Err(error) => return Ok(Err(error)),
            }
        }
        Ok(Ok(()))
    }
}

impl State {
    /// Whether the balancer refused what is wanted of this source now.
    fn is_refused(&self, source: &Source) -> bool {
        self.why_refused.contains_key(source) && self.wanted.agrees(source, &self.refused)
    }

    /// What is wanted, with the old parts of what is known to be refused.
    fn acceptable(&self) -> Inputs {
        let mut inputs = self.wanted.clone();
        for source in self.why_refused.keys().filter(|source| self.is_refused(source)) {
            inputs.adopt(source, &self.taken);
        }
        inputs
    }
}

/// What operators said, as inputs without apps.
async fn said(store: &Store) -> Result<Inputs, StoreError> {
    let words = store.route_words().await?.into_iter().map(|word| (word.target.clone(), word));
    let drains = store.route_drains().await?.into_iter().map(|drain| (drain.upstream.clone(), drain));
    Ok(Inputs { apps: BTreeMap::new(), words: words.collect(), drains: drains.collect() })
}
