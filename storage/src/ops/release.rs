//! Releases: an image's clone with the built app in it, sealed, immutable, never replaced.

use std::os::fd::OwnedFd;

use crate::Pool;
use crate::error::{Error, Result};
use crate::name::{AppName, ReleaseId, StagingId};
use crate::place::{Place, Target};
use crate::plan::Mark;
use crate::types::{Base, Quota, ReleaseInfo};

fn place(app: &AppName, release: &ReleaseId) -> Place {
    Place::Release(app.clone(), release.clone())
}

fn target(app: &AppName, release: &ReleaseId) -> Target {
    Target::Release { app: app.clone(), release: release.clone() }
}

impl Pool {
    /// Makes (or finds) a writable clone of `base` to build `release` of `app` in. The quota counts what is written on
    /// top of the base.
    pub fn release_stage(
        &self,
        staging: &StagingId,
        app: &AppName,
        release: &ReleaseId,
        base: &Base,
        quota: Quota,
    ) -> Result<OwnedFd> {
        let place = place(app, release);
        if self.engine.exists(&place.path())? {
            return Err(Error::Conflict { what: place.to_string(), detail: "releases are immutable".into() });
        }
        let image = match base {
            Base::Image(id) => Some(id.clone()),
            Base::Empty => None,
        };
        let from = image.clone().map(Place::Image);
        if let Some(from) = &from {
            self.open_ready(from)?;
        }
        let mark = Mark { image, app: Some(app.clone()), release: Some(release.clone()), ..Mark::default() };
        self.stage(staging, target(app, release), from.as_ref(), quota, mark)
    }

    /// Seals the staging area as the release. Repeated: fine.
    pub fn release_publish(&self, staging: &StagingId, app: &AppName, release: &ReleaseId) -> Result<()> {
        self.publish(staging, target(app, release), || Ok(place(app, release))).map(drop)
    }

    pub fn release_open(&self, app: &AppName, release: &ReleaseId) -> Result<OwnedFd> {
        self.open_ready(&place(app, release))
    }

    /// Removes a release. Instance roots cloned from it live on.
    pub fn release_remove(&self, app: &AppName, release: &ReleaseId) -> Result<()> {
        self.remove(&place(app, release))
    }

    pub fn release_list(&self) -> Result<Vec<ReleaseInfo>> {
        let mut releases = Vec::new();
        for app in self.listed::<AppName>("releases")? {
            for release in self.listed::<ReleaseId>(&format!("releases/{app}"))? {
                if let Some(found) = self.find(&place(&app, &release))? {
                    releases.push(ReleaseInfo {
                        app: app.clone(),
                        release,
                        image: found.mark.image,
                        created_ms: found.mark.created_ms,
                        usage: found.usage,
                    });
                }
            }
        }
        Ok(releases)
    }
}
