//! What one instance has on disk: its throw-away root and its log folder.

use std::os::fd::OwnedFd;

use crate::Pool;
use crate::engine::read_mark;
use crate::error::{Error, Result};
use crate::name::{AppName, InstanceId, ReleaseId};
use crate::place::Place;
use crate::plan::Mark;
use crate::types::{InstanceInfo, LogDirInfo, Quota};

impl Pool {
    /// Makes (or finds) the throw-away writable root of `instance`, a clone of the release. The quota counts what is
    /// written on top of it.
    pub fn instance_root_create(
        &self,
        instance: &InstanceId,
        app: &AppName,
        release: &ReleaseId,
        quota: Quota,
    ) -> Result<OwnedFd> {
        let from = Place::Release(app.clone(), release.clone());
        self.open_ready(&from)?;
        let place = Place::Instance(instance.clone());
        let mark = Mark { app: Some(app.clone()), release: Some(release.clone()), ..Mark::default() };
        let tree = self.create(&place, Some(&from), quota, mark)?;
        let found = read_mark(&tree, &place)?;
        match found.app.as_ref() == Some(app) && found.release.as_ref() == Some(release) {
            true => Ok(tree),
            false => {
                Err(Error::Conflict { what: place.to_string(), detail: "it is of another release".into() })
            }
        }
    }

    pub fn instance_root_open(&self, instance: &InstanceId) -> Result<OwnedFd> {
        self.open_ready(&Place::Instance(instance.clone()))
    }

    pub fn instance_root_remove(&self, instance: &InstanceId) -> Result<()> {
        self.remove(&Place::Instance(instance.clone()))
    }

    pub fn instance_root_list(&self) -> Result<Vec<InstanceInfo>> {
        let mut roots = Vec::new();
        for instance in self.listed::<InstanceId>("instances")? {
            let Some(found) = self.find(&Place::Instance(instance.clone()))? else { continue };
            // Without both it is not one of ours; a sweep removes it.
            if let (Some(app), Some(release)) = (found.mark.app, found.mark.release) {
                let created_ms = found.mark.created_ms;
                roots.push(InstanceInfo { instance, app, release, created_ms, usage: found.usage });
            }
        }
        Ok(roots)
    }

    /// Makes (or finds) the log folder of `instance` and sets its quota.
    pub fn log_dir_ensure(&self, instance: &InstanceId, quota: Quota) -> Result<OwnedFd> {
        self.create(&Place::Log(instance.clone()), None, quota, Mark::default())
    }

    pub fn log_dir_open(&self, instance: &InstanceId) -> Result<OwnedFd> {
        self.open_ready(&Place::Log(instance.clone()))
    }

    pub fn log_dir_remove(&self, instance: &InstanceId) -> Result<()> {
        self.remove(&Place::Log(instance.clone()))
    }

    pub fn log_dir_list(&self) -> Result<Vec<LogDirInfo>> {
        let mut folders = Vec::new();
        for instance in self.listed::<InstanceId>("logs")? {
            if let Some(found) = self.find(&Place::Log(instance.clone()))? {
                folders.push(LogDirInfo { instance, created_ms: found.mark.created_ms, usage: found.usage });
            }
        }
        Ok(folders)
    }
}
