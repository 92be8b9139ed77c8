//! The pool and its operations. (Signatures first; bodies follow.)

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use crate::error::{Error, Result};
use crate::name::{AppName, ImageId, ImageName, InstanceId, ReleaseId, StagingId, VolumeName};
use crate::types::*;

/// An open, locked pool. Dropping it keeps the pool mounted; [`Pool::close`] takes it down.
#[derive(Debug)]
pub struct Pool {
    facts: PoolFacts,
}

fn pending<T>() -> Result<T> {
    Err(Error::NotFound { what: "implementation".into() })
}

#[allow(unused_variables)]
impl Pool {
    /// Opens the pool, making and mounting it first where needed. Locks it for this process and its children.
    pub fn open_or_create(config: &PoolConfig) -> Result<Pool> {
        pending()
    }
    /// Unmounts a loop-file pool and frees its loop device; an existing path is only let go.
    pub fn close(self) -> Result<()> {
        pending()
    }
    pub fn facts(&self) -> &PoolFacts {
        &self.facts
    }
    /// Re-enables quotas that somebody switched off; only on the operator's word.
    pub fn quota_restore(&mut self) -> Result<()> {
        pending()
    }
    pub fn usage(&self) -> Result<PoolUsage> {
        pending()
    }
    /// Commits everything written so far (syncfs).
    pub fn sync(&self) -> Result<()> {
        pending()
    }

    /// Makes (or finds) the empty writable staging area `staging` for a new version of `image`.
    pub fn image_stage(&self, staging: &StagingId, image: &ImageName, quota: Quota) -> Result<OwnedFd> {
        pending()
    }
    /// Seals the staging area as the new current version. Repeated: returns the version published before.
    pub fn image_publish(&self, staging: &StagingId, image: &ImageName) -> Result<ImageId> {
        pending()
    }
    pub fn image_list(&self) -> Result<Vec<ImageInfo>> {
        pending()
    }
    pub fn image_current(&self, image: &ImageName) -> Result<Option<ImageId>> {
        pending()
    }
    pub fn image_open(&self, image: &ImageId) -> Result<OwnedFd> {
        pending()
    }
    /// Removes all versions of `image`; refused with [`Error::ImageInUse`] when one of them is in `in_use`.
    pub fn image_remove(&self, image: &ImageName, in_use: &BTreeSet<ImageId>) -> Result<()> {
        pending()
    }
    /// Removes versions that are neither current nor in `in_use`; returns them.
    pub fn image_gc(&self, in_use: &BTreeSet<ImageId>) -> Result<Vec<ImageId>> {
        pending()
    }

    /// Makes (or finds) a writable clone of `base` to build `release` of `app` in.
    pub fn release_stage(
        &self,
        staging: &StagingId,
        app: &AppName,
        release: &ReleaseId,
        base: &Base,
        quota: Quota,
    ) -> Result<OwnedFd> {
        pending()
    }
    /// Seals the staging area as the release. Repeated: fine.
    pub fn release_publish(&self, staging: &StagingId, app: &AppName, release: &ReleaseId) -> Result<()> {
        pending()
    }
    pub fn release_open(&self, app: &AppName, release: &ReleaseId) -> Result<OwnedFd> {
        pending()
    }
    pub fn release_remove(&self, app: &AppName, release: &ReleaseId) -> Result<()> {
        pending()
    }
    pub fn release_list(&self) -> Result<Vec<ReleaseInfo>> {
        pending()
    }

    /// Opens a staging area of either kind.
    pub fn staging_open(&self, staging: &StagingId) -> Result<OwnedFd> {
        pending()
    }
    /// Throws a staging area away, of either kind. Not there: fine.
    pub fn staging_abort(&self, staging: &StagingId) -> Result<()> {
        pending()
    }

    /// Makes (or finds) the throw-away writable root of `instance`, a clone of the release.
    pub fn instance_root_create(
        &self,
        instance: &InstanceId,
        app: &AppName,
        release: &ReleaseId,
        quota: Quota,
    ) -> Result<OwnedFd> {
        pending()
    }
    pub fn instance_root_open(&self, instance: &InstanceId) -> Result<OwnedFd> {
        pending()
    }
    pub fn instance_root_remove(&self, instance: &InstanceId) -> Result<()> {
        pending()
    }
    pub fn instance_root_list(&self) -> Result<Vec<InstanceInfo>> {
        pending()
    }

    /// Makes (or finds) a volume and sets its quota. The root directory starts as 0:0 0755.
    pub fn volume_ensure(&self, app: &AppName, name: &VolumeName, quota: Quota) -> Result<OwnedFd> {
        pending()
    }
    pub fn volume_open(&self, app: &AppName, name: &VolumeName) -> Result<OwnedFd> {
        pending()
    }
    pub fn volume_remove(&self, app: &AppName, name: &VolumeName) -> Result<()> {
        pending()
    }
    pub fn volume_list(&self) -> Result<Vec<VolumeInfo>> {
        pending()
    }

    /// Makes (or finds) the log folder of `instance` and sets its quota.
    pub fn log_dir_ensure(&self, instance: &InstanceId, quota: Quota) -> Result<OwnedFd> {
        pending()
    }
    pub fn log_dir_open(&self, instance: &InstanceId) -> Result<OwnedFd> {
        pending()
    }
    pub fn log_dir_remove(&self, instance: &InstanceId) -> Result<()> {
        pending()
    }
    pub fn log_dir_list(&self) -> Result<Vec<LogDirInfo>> {
        pending()
    }

    /// An empty live set as of now. Take it *before* looking at what runs, fill it, then [`Pool::sweep`].
    pub fn live_set(&self) -> Result<LiveSet> {
        pending()
    }
    /// Finishes or takes back what was cut short; removes staging areas and instance roots nobody claims.
    pub fn sweep(&self, live: &LiveSet) -> Result<SweepReport> {
        pending()
    }
}
