//! Removing what nothing speaks of any more: jails, trees, old releases, old logs, and the app itself.

use std::collections::HashSet;

use epagent_core::name::JailId;
use epagent_store::{ReleaseState, Wanted};
use epagent_wire::runner::{JailState, RefusalCode, Request, World};

use super::build::Progress;
use super::look::Seen;
use super::{AppLoop, RoundError};
use crate::clock;
use crate::runner::CallError;

impl AppLoop {
    /// Ends and removes jails of the app that no row, deploy or user speaks of, and trees that are not being built
    /// any more. True when it did something.
    pub(super) async fn sweep(&self, seen: &Seen, world: &World, wanted: Wanted) -> Result<bool, RoundError> {
        let job = match &seen.deploy {
            Some(deploy) => Progress::of(deploy)?.job,
            None => None,
        };
        let mut swept = false;
        for jail in world.jails.iter().filter(|jail| jail.app.as_ref() == Some(&self.app)) {
            let known = seen.rows.contains_key(&jail.id)
                || job.as_ref() == Some(&jail.id)
                || (self.parts.held.contains(&jail.id) && wanted != Wanted::Removed);
            match &jail.state {
                _ if known => {}
                JailState::Exited(_) => {
                    self.forget_jail(&jail.id).await?;
                    swept = true;
                }
                _ => {
                    let id = jail.id.clone();
                    let request = Request::Stop { jail: id.clone(), signal: "KILL".to_owned(), grace_ms: 0 };
                    ignore_refusal(self.call(&format!("ending {id}, which nothing needs"), request).await)?;
                }
            }
        }
        for tree in world.releases.iter().filter(|tree| tree.app == self.app && !tree.sealed) {
            let building = seen.deploy.as_ref().is_some_and(|deploy| deploy.release == tree.release);
            let inhabited = world
                .jails
                .iter()
                .any(|jail| jail.app.as_ref() == Some(&self.app) && jail.release == Some(tree.release));
            if !building && !inhabited {
                let request = Request::BuildAbort { app: self.app.clone(), release: tree.release };
                ignore_refusal(self.call("dropping a tree that was not finished", request).await)?;
                swept = true;
            }
        }
        Ok(swept)
    }

    /// Removes releases past the number to be kept, trees of releases that failed, and logs of instances that are
    /// forgotten.
    pub(super) async fn tidy(&self, world: &World) -> Result<(), RoundError> {
        let store = &self.parts.store;
        let ready = store.releases(&self.app).await?;
        let ready = ready.iter().filter(|release| release.state == ReleaseState::Ready);
        for old in ready.skip(self.parts.config.limits.releases_kept) {
            store.release_remove(&self.app, old.number).await?;
        }
        let trees = store.trees_in_use(&self.app).await?;
        for tree in world.releases.iter().filter(|tree| tree.app == self.app && tree.sealed) {
            if !trees.contains(&tree.release) {
                let request = Request::ReleaseRemove { app: self.app.clone(), release: tree.release };
                ignore_refusal(self.call("removing an old release", request).await)?;
            }
        }
        self.tidy_logs(world).await
    }

    async fn tidy_logs(&self, world: &World) -> Result<(), RoundError> {
        let store = &self.parts.store;
        let mut kept: HashSet<JailId> =
            store.instances_live(Some(&self.app)).await?.into_iter().map(|row| row.jail).collect();
        let ended = store.instances_ended(Some(&self.app)).await?;
        kept.extend(ended.into_iter().take(self.parts.config.limits.logs_kept).map(|row| row.jail));
        let deploys = store.deploys(Some(&self.app), self.parts.config.limits.logs_kept as u32).await?;
        for deploy in deploys {
            kept.extend(Progress::of(&deploy)?.logs);
        }
        let ours = |id: &&JailId| id.app().as_ref() == Some(&self.app) && !self.parts.held.contains(id);
        for id in world.logs.iter().filter(ours).filter(|id| !kept.contains(id)) {
            ignore_refusal(self.call("removing an old log", Request::LogRemove { jail: id.clone() }).await)?;
        }
        Ok(())
    }

    /// The last step of the app's removal, when nothing of it runs any more.
    pub(super) async fn remove(&self, world: &World) -> Result<(), RoundError> {
        if world.apps.contains(&self.app) {
            self.call("removing the app's files", Request::AppRemove { app: self.app.clone() }).await?;
        }
        self.parts.store.app_remove(&self.app, clock::now_ms()).await?;
        Ok(())
    }
}

/// A refusal here means that it is gone already or still in use: the next round looks again.
fn ignore_refusal<T>(result: Result<T, RoundError>) -> Result<(), RoundError> {
    match result {
        Err(RoundError::Runner { source: CallError::Refused(refusal), attempted })
            if !matches!(refusal.code, RefusalCode::System) =>
        {
            tracing::debug!(attempted, refusal.message, "not done");
            Ok(())
        }
        Ok(_) => Ok(()),
        Err(error) => Err(error),
    }
}
