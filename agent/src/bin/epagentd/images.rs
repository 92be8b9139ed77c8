//! Jobs on images: imports and bootstraps. They belong to no app, and nothing of them outlives the request that
//! asked for them but the image itself, which the runner publishes when the job ends well.

use std::time::Duration;

use epagent_core::exit::Exit;
use epagent_core::name::JailId;
use epagent_wire::runner::{JailState, Request, World};

use crate::apps::Parts;
use crate::runner::CallError;

const INTERVAL: Duration = Duration::from_secs(10);

/// Removes jobs that ended and that no request waits for any more, as after a restart of the agent.
pub async fn keep_clean(parts: Parts) -> Result<(), CallError> {
    loop {
        tokio::time::sleep(INTERVAL).await;
        let Some(world) = parts.worlds.latest() else { continue };
        for jail in world.jails.iter().filter(|jail| jail.app.is_none() && !parts.held.contains(&jail.id)) {
            if let JailState::Exited(_) = jail.state {
                remove(&parts, &jail.id).await;
            }
        }
    }
}

/// Removes what is left of a job, its log included.
pub async fn remove(parts: &Parts, jail: &JailId) {
    for request in [Request::Forget { jail: jail.clone() }, Request::LogRemove { jail: jail.clone() }] {
        if let Err(error) = parts.runner.call(request).await {
            tracing::debug!(%error, %jail, "what is left of a job on an image was not removed");
        }
    }
}

/// How the job ended, if it has; an error when the runner does not know it.
pub fn ended(world: &World, id: &JailId) -> Option<Exit> {
    let lost = || Exit { monitor_lost: true, ..Exit::default() };
    let Some(jail) = world.jails.iter().find(|jail| jail.id == *id) else { return Some(lost()) };
    match &jail.state {
        JailState::Exited(exit) => Some(exit.clone()),
        _ => None,
    }
}
