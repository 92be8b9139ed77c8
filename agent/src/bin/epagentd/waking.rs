//! Who is waited for: processes that sleep, or are down, while the balancer holds requests for them.
//!
//! One question stands at the balancer at any time, on a connection of its own, and is answered in the moment a route
//! with nobody to answer begins to hold a request. Nothing is polled, so that what a sleeping app costs its first
//! visitor is the app's own start.
//!
//! ```text
//!   balancer: a request is held ──▶ the wait is answered ──▶ Awaited ──▶ the app's loop is woken ──▶ Wake, Start
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use epagent_core::name::{AppName, ProcessName};
use epagent_wire::table::{RouteStatus, Status};

use crate::apps::Apps;
use crate::balancer::Balancer;
use crate::supervise::chain;

/// How long one question stands; then it is asked again, and says what waits now.
const WAIT: Duration = Duration::from_secs(20);
const RETRY_AFTER: Duration = Duration::from_millis(200);
/// How old an answer about who is idle may be.
const ACTIVITY_AGE_MAX: Duration = Duration::from_secs(1);

/// What the balancer said last about who waits, and about who is idle. Cheap to clone.
#[derive(Clone)]
pub struct Waking {
    balancer: Balancer,
    awaited: Arc<Mutex<BTreeMap<AppName, BTreeSet<ProcessName>>>>,
    /// One question answers all apps that ask in the same second.
    activity: Arc<tokio::sync::Mutex<Option<Activity>>>,
}

/// What the balancer said of its routes, and when.
struct Activity {
    at: Instant,
    status: Arc<Status>,
}

impl Waking {
    pub fn new(balancer: Balancer) -> Self {
        Self { balancer, awaited: Arc::default(), activity: Arc::default() }
    }

    /// Processes of the app that somebody waits for, as far as is known.
    pub fn awaited(&self, app: &AppName) -> BTreeSet<ProcessName> {
        self.lock().get(app).cloned().unwrap_or_default()
    }

    /// How long nobody has asked for each of the app's routed processes; those that somebody is asking for now are
    /// left out, and all while the balancer can't be asked.
    pub async fn idle_ms(&self, app: &AppName) -> BTreeMap<ProcessName, u64> {
        let mut activity = self.activity.lock().await;
        let status = match &*activity {
            Some(Activity { at, status }) if at.elapsed() < ACTIVITY_AGE_MAX => status.clone(),
            _ => match self.balancer.status().await {
                Ok(status) => {
                    let status = Arc::new(status);
                    *activity = Some(Activity { at: Instant::now(), status: status.clone() });
                    status
                }
                Err(_) => return BTreeMap::new(),
            },
        };
        idle(app, &status.routes)
    }

    /// Somebody is there to answer for the process now.
    pub fn answered(&self, app: &AppName, process: &ProcessName) {
        if let Some(processes) = self.lock().get_mut(app) {
            processes.remove(process);
        }
    }

    /// Asks for ever. A balancer that is being restarted is asked again, and says at once what waits.
    pub async fn keep_asking(&self, apps: Apps) -> Result<(), Infallible> {
        let mut since = 0;
        loop {
            let waited = match self.balancer.wait(since, WAIT).await {
                Ok(waited) => waited,
                Err(error) => {
                    tracing::debug!(error = chain(&error), "the balancer can't be asked who waits");
                    tokio::time::sleep(RETRY_AFTER).await;
                    continue;
                }
            };
            since = waited.sequence;
            let mut awaited: BTreeMap<AppName, BTreeSet<ProcessName>> = BTreeMap::new();
            for (app, process) in waited.routes.iter().filter_map(|route| place(route)) {
                awaited.entry(app).or_default().insert(process);
            }
            let names: Vec<AppName> = awaited.keys().cloned().collect();
            *self.lock() = awaited;
            names.iter().for_each(|app| apps.wake(app));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<AppName, BTreeSet<ProcessName>>> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A process is as idle as the one of its routes that was asked for last.
fn idle(app: &AppName, routes: &[RouteStatus]) -> BTreeMap<ProcessName, u64> {
    let mut idle: BTreeMap<ProcessName, u64> = BTreeMap::new();
    let mut busy = BTreeSet::new();
    for route in routes {
        let Some((_, process)) = place(&route.id).filter(|(of, _)| of == app) else { continue };
        if route.active > 0 {
            busy.insert(process.clone());
        }
        let least = idle.entry(process).or_insert(route.idle_ms);
        *least = route.idle_ms.min(*least);
    }
    idle.retain(|process, _| !busy.contains(process));
    idle
}

/// The app and process of a route's id: `APP/PROCESS/NUMBER`.
fn place(route: &str) -> Option<(AppName, ProcessName)> {
    let mut parts = route.split('/');
    let place = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    parts.next().map(|_| place)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(id: &str, active: u64, idle_ms: u64) -> RouteStatus {
        RouteStatus { id: id.to_owned(), active, idle_ms, ..RouteStatus::default() }
    }

    #[test]
    fn a_process_is_as_idle_as_its_busiest_route() {
        let routes = [
            route("shop/web/0", 0, 9_000),
            route("shop/web/1", 0, 4_000),
            route("shop/api/2", 1, 0),
            route("shop/api/3", 0, 8_000),
            route("other/web/0", 0, 7_000),
            route("operator/1", 0, 1),
        ];
        let idle = idle(&"shop".parse().unwrap(), &routes);
        assert_eq!(idle, BTreeMap::from([("web".parse().unwrap(), 4_000)]));
    }
}
