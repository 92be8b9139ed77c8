//! The table the balancer should have, and the loop that sees to it that it has it.
//!
//! Each app's loop hands in the routes of its app; the table is all of them. After a start of the agent nothing is
//! sent before every app has handed in its own once: until then the balancer serves from the table it has, which
//! knows more than we do.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use epagent_core::name::{AppName, JailId};
use epagent_store::{Store, StoreError};
use epagent_wire::table::{Route, Table};
use tokio::sync::Notify;

use crate::balancer::Balancer;
use crate::clock;
use crate::supervise::chain;

/// The name of the counter in the store.
const VERSION: &str = "table_version";
/// How often the balancer is looked at although nothing changed: it may have lost its disk.
const INTERVAL: Duration = Duration::from_secs(5);
const RETRY_AFTER: Duration = Duration::from_millis(200);

#[derive(Clone)]
pub struct Routing(Arc<Shared>);

struct Shared {
    balancer: Balancer,
    state: Mutex<State>,
    /// Something was handed in.
    changed: Notify,
}

#[derive(Default)]
struct State {
    routes: BTreeMap<AppName, Vec<Route>>,
    /// Apps that have not handed in their routes since the start.
    missing: BTreeSet<AppName>,
    /// Counts changes; `current` is the count that the balancer's table has.
    changes: u64,
    current: u64,
    /// The count at which each app's routes last changed.
    changed_at: BTreeMap<AppName, u64>,
    version: u64,
    problems: Vec<String>,
}

impl Routing {
    /// `apps`: all that must hand in their routes before the first table is sent.
    pub fn new(balancer: Balancer, apps: BTreeSet<AppName>) -> Self {
        let state = State { missing: apps, changes: 1, ..State::default() };
        Self(Arc::new(Shared { balancer, state: Mutex::new(state), changed: Notify::new() }))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands in the routes of an app, and says whether the balancer's table has them.
    pub fn hand_in(&self, app: &AppName, routes: Vec<Route>) -> bool {
        let mut state = self.state();
        let was_missing = state.missing.remove(app);
        if was_missing || state.routes.get(app) != Some(&routes) {
            state.changes += 1;
            let at = state.changes;
            state.changed_at.insert(app.clone(), at);
            state.routes.insert(app.clone(), routes);
            self.0.changed.notify_one();
        }
        state.changed_at.get(app).is_some_and(|&at| at <= state.current)
    }

    /// The app is gone.
    pub fn remove(&self, app: &AppName) {
        let mut state = self.state();
        state.missing.remove(app);
        state.changed_at.remove(app);
        if state.routes.remove(app).is_some() {
            state.changes += 1;
        }
        self.0.changed.notify_one();
    }

    pub fn version(&self) -> u64 {
        self.state().version
    }

    /// What of the last table could not be put into effect.
    pub fn problems(&self) -> Vec<String> {
        self.state().problems.clone()
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
                store
                    .error_record("table_not_taken", "balancer", &chain(&error), None, clock::now_ms())
                    .await?;
                tokio::time::sleep(RETRY_AFTER).await;
            }
        }
    }

    async fn send(&self, store: &Store) -> Result<Result<(), crate::balancer::BalancerError>, StoreError> {
        let status = match self.0.balancer.status().await {
            Ok(status) => status,
            Err(error) => return Ok(Err(error)),
        };
        let (routes, changes) = {
            let state = self.state();
            let same = state.changes == state.current && state.version == status.table_version;
            if !state.missing.is_empty() || same {
                return Ok(Ok(()));
            }
            (merged(&state.routes), state.changes)
        };
        let version = store.counter_next(VERSION, status.table_version + 1).await?;
        let ack = match self.0.balancer.set_table(Table { version, routes }).await {
            Ok(ack) => ack,
            Err(error) => return Ok(Err(error)),
        };
        let mut state = self.state();
        state.version = ack.version;
        state.current = changes;
        state.problems = ack
            .problems
            .into_iter()
            .map(|problem| match problem.route {
                Some(route) => format!("{route}: {}", problem.message),
                None => problem.message,
            })
            .collect();
        Ok(Ok(()))
    }
}

/// One table of all routes. A deploy that asks for a match that another app has is refused before it begins, so
/// two routes with one match mean that this check was passed by; the app that comes first by name keeps it.
fn merged(routes: &BTreeMap<AppName, Vec<Route>>) -> Vec<Route> {
    let mut seen = BTreeSet::new();
    routes.values().flatten().filter(|route| seen.insert(route.matches.clone())).cloned().collect()
}
