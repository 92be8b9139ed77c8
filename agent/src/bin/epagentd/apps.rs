//! The loop of each app: look, decide, act, again.
//!
//! ```text
//!          store (what is wanted) ─┐
//!          world (what there is) ──┼─▶ View ─▶ epagent_core::app::plan ─▶ actions ─▶ runner, store
//!   checks, balancer (how it is) ──┘     └───▶ routes ─▶ the balancer's table
//! ```
//!
//! A loop keeps nothing that matters between two rounds, so it may be killed anywhere; each round begins with a
//! look at the world that was begun after the last action. It is woken by requests, by the runner's events, by
//! health changes, and by the clock.

mod act;
mod build;
mod look;
mod start;
mod tidy;

pub use build::Progress;
pub use look::state;
pub use start::{Job, environment, missing_secrets, start as start_jail};

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use epagent_core::app::ages::Ages;
use epagent_core::app::{Crash, plan};
use epagent_core::name::{AppName, DeployId, JailId, ProcessName};
use epagent_core::verdict::Cause;
use epagent_store::{Store, StoreError, Wanted};
use tokio::sync::Notify;

use crate::clock;
use crate::config::Config;
use crate::health::Checks;
use crate::routing::Routing;
use crate::runner::{CallError, Runner};
use crate::supervise::{Board, chain, last_panic};
use crate::table;
use crate::waking::Waking;
use crate::world::Worlds;

/// The pace of an app that is as it should be.
const PACE_CALM: Duration = Duration::from_secs(1);
/// The pace while a jail is being made, which takes less than 10 ms, and for how long it is kept.
const PACE_QUICK: Duration = Duration::from_millis(4);
const QUICK_MS_MAX: u64 = 500;
/// The pace while something is on its way.
const PACE_BUSY: Duration = Duration::from_millis(50);
/// The pace while the runner is away or a round fails.
const PACE_TROUBLE: Duration = Duration::from_millis(250);
/// How often old logs, trees and releases are looked for; after a deploy it is done at once.
const TIDY_INTERVAL: Duration = Duration::from_secs(60);

/// What every loop and every request works with. Cheap to clone.
#[derive(Clone)]
pub struct Parts {
    pub config: Arc<Config>,
    pub store: Store,
    pub runner: Runner,
    pub worlds: Worlds,
    pub checks: Checks,
    pub routing: Routing,
    pub waking: Waking,
    pub board: Board,
    /// Jails that a request of a user holds: `epagent run`.
    pub held: Held,
    /// Held while a deploy is begun.
    pub begins: Arc<tokio::sync::Mutex<()>>,
}

/// Jails that no instance row speaks of and that are not to be swept.
#[derive(Clone, Default)]
pub struct Held(Arc<Mutex<HashSet<JailId>>>);

impl Held {
    /// Holds the jail until the guard is dropped.
    pub fn hold(&self, id: JailId) -> HeldGuard {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone());
        HeldGuard { held: self.clone(), id }
    }

    pub fn contains(&self, id: &JailId) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(id)
    }
}

pub struct HeldGuard {
    held: Held,
    id: JailId,
}

impl Drop for HeldGuard {
    fn drop(&mut self) {
        self.held.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

/// All apps' loops.
#[derive(Clone)]
pub struct Apps {
    parts: Parts,
    loops: Arc<Mutex<HashMap<AppName, Arc<Notify>>>>,
}

/// Why a round was not finished. The next one begins anew.
#[derive(Debug, thiserror::Error)]
pub enum RoundError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{attempted}")]
    Runner {
        attempted: String,
        #[source]
        source: CallError,
    },
    #[error("{attempted}")]
    Io {
        attempted: String,
        #[source]
        source: std::io::Error,
    },
    #[error("the record of how far {0} is can't be read")]
    Progress(epagent_core::name::DeployId, #[source] serde_json::Error),
}

impl Apps {
    pub fn new(parts: Parts) -> Self {
        Self { parts, loops: Arc::default() }
    }

    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// Has the app looked at now; starts its loop if it has none.
    pub fn wake(&self, app: &AppName) {
        let mut loops = self.loops.lock().unwrap_or_else(PoisonError::into_inner);
        let wake = loops.entry(app.clone()).or_insert_with(|| {
            let wake = Arc::new(Notify::new());
            tokio::spawn(self.clone().keep_app(app.clone(), wake.clone()));
            wake
        });
        wake.notify_one();
    }

    /// Runs the app's loop until the app is gone; a panic in it is recorded and it starts anew.
    async fn keep_app(self, app: AppName, wake: Arc<Notify>) {
        loop {
            let running = AppLoop::new(app.clone(), self.parts.clone(), wake.clone()).run();
            match tokio::spawn(running).await {
                Ok(()) => break,
                Err(_) => {
                    let subject = format!("app {app}");
                    let store = &self.parts.store;
                    let now_ms = clock::now_ms();
                    let panic = last_panic();
                    let _ = store
                        .error_record("loop_failed", &subject, "panicked", panic.as_deref(), now_ms)
                        .await;
                    tokio::time::sleep(PACE_CALM).await;
                }
            }
        }
        self.loops.lock().unwrap_or_else(PoisonError::into_inner).remove(&app);
        // Somebody may have made the app again in between, and woken the loop that was about to end.
        if matches!(self.parts.store.app(&app).await, Ok(Some(_))) {
            self.wake(&app);
        }
    }
}

struct AppLoop {
    app: AppName,
    parts: Parts,
    wake: Arc<Notify>,
    crashes: BTreeMap<(ProcessName, u32), Crash>,
    /// Since when instances are as they are.
    ages: Ages,
    /// Instances the runner was told to stop, by this process: another one tells it again.
    stops_sent: HashSet<JailId>,
    /// The deploy whose archive is waited for, and since when.
    awaited_upload: Option<(DeployId, u64)>,
    tidied_at: Option<Instant>,
    /// The trouble that was last recorded, so that it is told once and not every round.
    trouble: Option<String>,
}

/// Whether the rest of what was planned may still be done.
#[derive(PartialEq, Eq)]
enum Next {
    GoOn,
    /// What was planned on is no longer so.
    LookAgain,
}

enum Pace {
    Again,
    /// Something starts, which takes milliseconds.
    Quick,
    Busy,
    Calm,
    Away,
    Gone,
}

impl AppLoop {
    fn new(app: AppName, parts: Parts, wake: Arc<Notify>) -> Self {
        Self {
            app,
            parts,
            wake,
            crashes: BTreeMap::new(),
            ages: Ages::default(),
            stops_sent: HashSet::new(),
            awaited_upload: None,
            tidied_at: None,
            trouble: None,
        }
    }

    async fn run(mut self) {
        // A calm app that only the clock woke may be judged by the last picture of the world: nothing of it has been
        // changed since. Otherwise the picture must be newer than what was done or told.
        let mut fresh = true;
        loop {
            let outcome = self.round(fresh).await;
            let calm = matches!(outcome, Ok(Pace::Calm));
            if matches!(outcome, Ok(Pace::Away) | Err(_)) {
                self.parts.routing.stand_in(&self.app);
            }
            let pause = match outcome {
                Ok(Pace::Gone) => return,
                Ok(Pace::Again) => {
                    fresh = true;
                    continue;
                }
                Ok(Pace::Quick) => PACE_QUICK,
                Ok(Pace::Busy) => PACE_BUSY,
                Ok(Pace::Calm) => {
                    self.trouble = None;
                    PACE_CALM
                }
                Ok(Pace::Away) => PACE_TROUBLE,
                Err(error) => {
                    self.tell_trouble(chain(&error)).await;
                    PACE_TROUBLE
                }
            };
            fresh = tokio::select! {
                () = self.wake.notified() => true,
                () = tokio::time::sleep(pause) => !calm,
            };
        }
    }

    /// Records trouble, unless it is the same as before.
    async fn tell_trouble(&mut self, message: String) {
        if self.trouble.as_ref() == Some(&message) {
            return;
        }
        tracing::warn!(app = %self.app, reason = message, "an app could not be made what it should be");
        let subject = format!("app {}", self.app);
        let recorded =
            self.parts.store.error_record("app_trouble", &subject, &message, None, clock::now_ms()).await;
        if recorded.is_ok() {
            self.trouble = Some(message);
        }
    }

    async fn round(&mut self, fresh: bool) -> Result<Pace, RoundError> {
        let Some(app) = self.parts.store.app(&self.app).await? else {
            self.parts.routing.remove(&self.app);
            self.parts.checks.keep(&self.app, Vec::new());
            return Ok(Pace::Gone);
        };
        let latest = if fresh { None } else { self.parts.worlds.latest() };
        let world = match latest {
            Some(world) => Some(world),
            None => self.parts.worlds.fresh().await,
        };
        let Some(world) = world else { return Ok(Pace::Away) };
        let mut seen = self.look(&app, &world).await?;
        self.parts.checks.keep(&self.app, seen.subjects());
        let routes = table::routes(&self.app, &seen.view, &seen.addresses);
        seen.view.table_current = self.parts.routing.hand_in(&self.app, routes);
        if seen.view.table_current {
            self.see_in_flight(&mut seen).await;
        }

        if app.wanted == Wanted::Removed
            && let Some(deploy) = seen.deploy.as_ref().filter(|deploy| !deploy.phase.has_switched())
        {
            let why = "the app is being removed".to_owned();
            self.give_up(deploy, Cause::Canceled { why }, None).await?;
            return Ok(Pace::Again);
        }
        if self.start_again(&seen).await? || self.build(&mut seen, &world).await? {
            return Ok(Pace::Again);
        }
        let swept = self.sweep(&seen, &world, app.wanted).await?;
        let actions = plan(&seen.view, clock::steady_ms());
        let acted = !actions.is_empty();
        for action in actions {
            if self.act(action, &seen).await? == Next::LookAgain {
                return Ok(Pace::Again);
            }
        }
        if self.tidied_at.is_none_or(|at| at.elapsed() >= TIDY_INTERVAL) && app.wanted != Wanted::Removed {
            self.tidy(&world).await?;
            self.tidied_at = Some(Instant::now());
        }
        if app.wanted == Wanted::Removed && seen.is_empty() && !acted && !swept {
            self.remove(&world).await?;
            return Ok(Pace::Again);
        }
        Ok(match (acted || swept, seen.is_settled()) {
            (true, _) => Pace::Again,
            (false, false) if self.is_starting(&seen) => Pace::Quick,
            (false, false) => Pace::Busy,
            (false, true) => Pace::Calm,
        })
    }
}
