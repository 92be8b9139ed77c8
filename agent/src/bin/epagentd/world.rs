//! The newest picture of what the runner has.
//!
//! One loop asks the runner, on every event of it, on request, and once a second; everybody else reads the answer.
//! Who has just changed something asks for a picture that was *begun* after that ([`Worlds::fresh`]), so that no
//! decision is taken on what was true before the last action.

use std::sync::Arc;
use std::time::Duration;

use epagent_wire::runner::World;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use crate::runner::{CallError, Runner};

/// The pace when nothing happens.
const INTERVAL: Duration = Duration::from_secs(1);
/// Requests for a fresh picture that may wait; all that wait are answered by one.
const REQUESTS_MAX: usize = 256;

type Wanted = oneshot::Sender<Arc<World>>;

#[derive(Clone)]
pub struct Worlds {
    wanted: mpsc::Sender<Wanted>,
    latest: watch::Receiver<Option<Arc<World>>>,
}

/// The half that [`Watcher::run`] drives.
pub struct Watcher {
    runner: Runner,
    wanted: mpsc::Receiver<Wanted>,
    latest: watch::Sender<Option<Arc<World>>>,
}

pub fn watcher(runner: Runner) -> (Worlds, Watcher) {
    let (wanted_sender, wanted) = mpsc::channel(REQUESTS_MAX);
    let (latest_sender, latest) = watch::channel(None);
    (Worlds { wanted: wanted_sender, latest }, Watcher { runner, wanted, latest: latest_sender })
}

impl Worlds {
    /// A picture that was begun after this call; None while the runner can't be reached.
    pub async fn fresh(&self) -> Option<Arc<World>> {
        let (sender, answer) = oneshot::channel();
        self.wanted.send(sender).await.ok()?;
        answer.await.ok()
    }

    /// The newest picture, if there ever was one.
    pub fn latest(&self) -> Option<Arc<World>> {
        self.latest.borrow().clone()
    }
}

impl Watcher {
    pub async fn run(&mut self) -> Result<(), CallError> {
        let mut events = self.runner.events();
        let mut waiting: Vec<Wanted> = Vec::new();
        loop {
            tokio::select! {
                Some(wanted) = self.wanted.recv() => waiting.push(wanted),
                event = events.recv() => if let Err(broadcast::error::RecvError::Closed) = event {
                    return Err(CallError::Away);
                },
                () = tokio::time::sleep(INTERVAL) => {}
            }
            while let Ok(wanted) = self.wanted.try_recv() {
                waiting.push(wanted);
            }
            match self.runner.observe().await {
                Ok(world) => {
                    let world = Arc::new(world);
                    for wanted in waiting.drain(..) {
                        let _ = wanted.send(world.clone());
                    }
                    self.latest.send_replace(Some(world));
                }
                // The link restarts by itself; who waits is told that there is no picture.
                Err(error) => {
                    tracing::debug!(%error, "no picture of the runner's world");
                    waiting.clear();
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }
}
