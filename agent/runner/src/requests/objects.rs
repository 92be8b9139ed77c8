//! Apps, images, releases and volumes: what may be made of them, changed, and removed. Pure.
//!
//! Removing is refused while something uses the object, and says what.

use std::collections::BTreeMap;

use epagent_storage::Quota;
use epagent_wire::name::{AppName, ImageName, ReleaseNumber, VolumeName};
use epagent_wire::runner::{Purpose, RefusalCode};

use super::fields::{self, refuse};
use super::view::{View, is_over};
use super::{Checked, Plan};
use crate::jobs::{self, HOST_IMAGE};
use crate::order::Order;
use crate::tables::{
    AppRecord, IMAGES_MAX, JailRecord, RELEASES_MAX, ReleaseRecord, VOLUMES_MAX, image_job_id, is_jail_of,
};
use crate::work::{AppRemoval, Work};

/// How much of a build command a jail's record repeats.
const COMMAND_SHOWN_CHARS: usize = 256;

impl View<'_> {
    pub(super) fn app_ensure(&self, app: &AppName) -> Checked {
        if self.tables.apps.contains_key(app) {
            return Ok(Plan::Nothing);
        }
        match self.tables.free_range(self.config.ranges()) {
            Some(range) => Ok(Plan::Work(Work::AppEnsure(AppRecord { app: app.clone(), range }))),
            None => refuse(
                RefusalCode::Exhausted,
                format!("all {} id ranges of this node are taken", self.config.ranges() - 1),
            ),
        }
    }

    pub(super) fn app_remove(&self, app: &AppName) -> Checked {
        if !self.tables.apps.contains_key(app) {
            return Ok(Plan::Nothing);
        }
        if let Some(jail) = self.tables.jails_of(app).find(|jail| !is_over(jail)) {
            let message =
                format!("app {app} can't be removed: jail {} still runs; stop it first", jail.record.jail);
            return refuse(RefusalCode::Conflict, message);
        }
        let tables = self.tables;
        Ok(Plan::Work(Work::AppRemove(AppRemoval {
            app: app.clone(),
            jails: tables.jails_of(app).map(|jail| jail.record.jail.clone()).collect(),
            releases: tables.releases.values().filter(|record| record.app == *app).cloned().collect(),
            volumes: tables
                .volumes
                .keys()
                .filter(|(owner, _)| owner == app)
                .map(|(_, volume)| volume.clone())
                .collect(),
            logs: tables.logs.iter().filter(|jail| is_jail_of(jail, app)).cloned().collect(),
        })))
    }

    /// The record of a job on an image.
    pub(super) fn image_job(
        &self,
        image: &ImageName,
        purpose: Purpose,
        slot: Option<u32>,
    ) -> Checked<JailRecord> {
        if image.as_str() == HOST_IMAGE {
            return refuse(
                RefusalCode::Conflict,
                "the image host is the host's own /usr; choose another name",
            );
        }
        if !self.tables.images.contains_key(image) && self.tables.images.len() >= IMAGES_MAX {
            return refuse(RefusalCode::Exhausted, format!("there are {IMAGES_MAX} images; remove some"));
        }
        let mut jails = self.tables.jails.values();
        if let Some(job) = jails.find(|jail| jail.record.makes_image() == Some(image) && !is_over(jail)) {
            let message =
                format!("image {image} is being made by job {}; wait for it or stop it", job.record.jail);
            return refuse(RefusalCode::Conflict, message);
        }
        self.room_for_jail(true)?;
        Ok(self.record(self.new_id(image_job_id)?, None, purpose, slot))
    }

    pub(super) fn stage_image(&self, image: &ImageName, order: Order) -> Plan {
        let quota = Quota::bytes(self.config.build.disk.0);
        let work = Work::ImageStage { job: order.jail.clone(), image: image.clone(), quota };
        Plan::Launch { work, order: Box::new(order) }
    }

    pub(super) fn image_remove(&self, image: &ImageName) -> Checked {
        if image.as_str() == HOST_IMAGE {
            return refuse(RefusalCode::Conflict, "the image host belongs to the runner");
        }
        let tables = self.tables;
        if let Some(release) =
            tables.releases.values().find(|release| release.image.name.as_str() == image.as_str())
        {
            let message = format!("image {image} is used by release {} of {}", release.release, release.app);
            return refuse(RefusalCode::Conflict, message);
        }
        if let Some(job) =
            tables.jails.values().find(|jail| jail.record.makes_image() == Some(image) && !is_over(jail))
        {
            return refuse(
                RefusalCode::Conflict,
                format!("image {image} is being made by job {}", job.record.jail),
            );
        }
        match tables.images.contains_key(image) {
            true => {
                Ok(Plan::Work(Work::ImageRemove { image: image.clone(), in_use: tables.images_in_use() }))
            }
            false => Ok(Plan::Nothing),
        }
    }

    /// The record of a release whose tree is to be made, from the current version of the image.
    pub(super) fn new_release(
        &self,
        app: &AppName,
        release: ReleaseNumber,
        image: &ImageName,
    ) -> Checked<ReleaseRecord> {
        self.app(app)?;
        let key = (app.clone(), release);
        match self.tables.releases.get(&key) {
            Some(record) if record.sealed => {
                return refuse(
                    RefusalCode::Conflict,
                    format!("release {release} of {app} is sealed and can't be built again"),
                );
            }
            Some(_) => self.no_job_in(app, release)?,
            None if self.tables.releases.len() >= RELEASES_MAX => {
                return refuse(
                    RefusalCode::Exhausted,
                    format!("there are {RELEASES_MAX} releases; remove old ones"),
                );
            }
            None => {}
        }
        let image = self.image(image)?;
        Ok(ReleaseRecord { app: app.clone(), release, image, sealed: false })
    }

    pub(super) fn build_run(
        &self,
        app: &AppName,
        release: ReleaseNumber,
        command: &str,
        env: &BTreeMap<String, String>,
    ) -> Checked {
        fields::shell(command)?;
        fields::env(env)?;
        let record = self.unsealed(app, release)?;
        let purpose = Purpose::BuildRun { command: command.chars().take(COMMAND_SHOWN_CHARS).collect() };
        let mut jobs = self.tables.jails_of_release(app, release);
        if let Some(job) = jobs.find(|job| job.is_active() && job.record.purpose == purpose) {
            return Ok(Plan::AlreadyStarted(job.record.jail.clone()));
        }
        self.no_job_in(app, release)?;
        let job = self.job(app, release, purpose, Some(self.slot()?))?;
        let order = jobs::run(job.clone(), record, command, env, self.id_base(app)?, self.config);
        Ok(Plan::Launch { work: Work::JobPrepare { job, release: record.clone() }, order: Box::new(order) })
    }

    pub(super) fn build_seal(&self, app: &AppName, release: ReleaseNumber) -> Checked {
        if self.release(app, release)?.sealed {
            return Ok(Plan::Nothing);
        }
        self.no_job_in(app, release)?;
        let record = ReleaseRecord { sealed: true, ..self.unsealed(app, release)?.clone() };
        Ok(Plan::Work(Work::ReleaseSeal(record)))
    }

    pub(super) fn build_abort(&self, app: &AppName, release: ReleaseNumber) -> Checked {
        self.app(app)?;
        match self.tables.releases.get(&(app.clone(), release)) {
            None => Ok(Plan::Nothing),
            Some(record) if record.sealed => refuse(
                RefusalCode::Conflict,
                format!("release {release} of {app} is sealed; it is removed, not aborted"),
            ),
            Some(record) => {
                self.no_job_in(app, release)?;
                Ok(Plan::Work(Work::ReleaseAbort(record.clone())))
            }
        }
    }

    pub(super) fn release_remove(&self, app: &AppName, release: ReleaseNumber) -> Checked {
        self.app(app)?;
        let Some(record) = self.tables.releases.get(&(app.clone(), release)) else {
            return Ok(Plan::Nothing);
        };
        if !record.sealed {
            return refuse(
                RefusalCode::Conflict,
                format!("release {release} of {app} is being built; abort it instead"),
            );
        }
        if let Some(jail) = self.tables.jails_of_release(app, release).find(|jail| !jail.record.is_job()) {
            let message = format!("release {release} of {app} is used by jail {}", jail.record.jail);
            return refuse(RefusalCode::Conflict, message);
        }
        Ok(Plan::Work(Work::ReleaseRemove { app: app.clone(), release }))
    }

    pub(super) fn volume_ensure(&self, app: &AppName, volume: &VolumeName, quota_bytes: u64) -> Checked {
        self.app(app)?;
        let quota_bytes = quota_bytes.clamp(1 << 20, self.config.limits.volume.0.max(1 << 20));
        match self.tables.volumes.get(&(app.clone(), volume.clone())) {
            Some(present) if *present == quota_bytes => Ok(Plan::Nothing),
            None if self.tables.volumes.len() >= VOLUMES_MAX => {
                refuse(RefusalCode::Exhausted, format!("there are {VOLUMES_MAX} volumes on this node"))
            }
            _ => {
                let quota = Quota::bytes(quota_bytes);
                Ok(Plan::Work(Work::VolumeEnsure { app: app.clone(), volume: volume.clone(), quota }))
            }
        }
    }

    pub(super) fn volume_remove(&self, app: &AppName, volume: &VolumeName) -> Checked {
        self.app(app)?;
        if !self.tables.volumes.contains_key(&(app.clone(), volume.clone())) {
            return Ok(Plan::Nothing);
        }
        let mut jails = self.tables.jails_of(app);
        if let Some(jail) = jails.find(|jail| jail.record.volumes.contains(volume) && !is_over(jail)) {
            let message = format!("volume {volume} of {app} is mounted in jail {}", jail.record.jail);
            return refuse(RefusalCode::Conflict, message);
        }
        Ok(Plan::Work(Work::VolumeRemove { app: app.clone(), volume: volume.clone() }))
    }
}
