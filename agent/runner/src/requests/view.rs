//! What the check looks at, and the questions it asks again and again: does it exist, is it free, is there room? Pure.

use epagent_storage::ImageId;
use epagent_wire::name::{AppName, ImageName, JailId, ReleaseNumber};
use epagent_wire::runner::{Purpose, RefusalCode};

use super::Checked;
use super::fields::refuse;
use crate::config::Config;
use crate::jobs::HOST_IMAGE;
use crate::tables::{
    AppRecord, JAILS_MAX, JOBS_MAX, Jail, JailRecord, LOGS_MAX, Phase, ReleaseRecord, Tables,
};

/// What the check looks at beside the request.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    pub tables: &'a Tables,
    pub config: &'a Config,
    pub now_ms: u64,
    /// The kernel's boot id.
    pub boot: &'a str,
    /// Drawn at random, for the name of a new job.
    pub salt: u64,
}

impl View<'_> {
    pub(super) fn app(&self, app: &AppName) -> Checked<&AppRecord> {
        let known = self.tables.apps.get(app);
        known.map_or_else(|| refuse(RefusalCode::NotFound, format!("there is no app {app}")), Ok)
    }

    pub(super) fn id_base(&self, app: &AppName) -> Checked<u32> {
        Ok(self.config.range_base(self.app(app)?.range))
    }

    pub(super) fn release(&self, app: &AppName, release: ReleaseNumber) -> Checked<&ReleaseRecord> {
        self.app(app)?;
        let known = self.tables.releases.get(&(app.clone(), release));
        known.map_or_else(|| refuse(RefusalCode::NotFound, format!("app {app} has no release {release}")), Ok)
    }

    pub(super) fn unsealed(&self, app: &AppName, release: ReleaseNumber) -> Checked<&ReleaseRecord> {
        let record = self.release(app, release)?;
        match record.sealed {
            true => refuse(RefusalCode::Conflict, format!("release {release} of {app} is sealed")),
            false => Ok(record),
        }
    }

    pub(super) fn image(&self, image: &ImageName) -> Checked<ImageId> {
        let hidden = image.as_str() == HOST_IMAGE && !self.config.host_image;
        match self.tables.images.get(image) {
            Some(id) if !hidden => Ok(id.clone()),
            _ => refuse(RefusalCode::NotFound, format!("there is no image {image}")),
        }
    }

    /// The runner's own image with the folders of a root and nothing in them.
    pub(super) fn skeleton(&self) -> Checked<ImageId> {
        let mut images = self.tables.images.values();
        let known = images.find(|id| id.name.as_str() == HOST_IMAGE).cloned();
        known.map_or_else(|| refuse(RefusalCode::NotFound, "the runner's own skeleton image is missing"), Ok)
    }

    pub(super) fn jail(&self, jail: &JailId) -> Checked<&Jail> {
        let known = self.tables.jails.get(jail);
        known.map_or_else(|| refuse(RefusalCode::NotFound, format!("there is no jail {jail}")), Ok)
    }

    pub(super) fn running(&self, jail: &JailId) -> Checked<i32> {
        match self.jail(jail)?.phase {
            Phase::Running { pid, .. } => Ok(pid),
            _ => refuse(RefusalCode::Conflict, format!("jail {jail} does not run")),
        }
    }

    pub(super) fn exec(&self, jail: &JailId, exec: u32) -> Checked<()> {
        match self.jail(jail)?.execs.contains(&exec) {
            true => Ok(()),
            false => refuse(RefusalCode::NotFound, format!("jail {jail} runs no command {exec}")),
        }
    }

    pub(super) fn no_job_in(&self, app: &AppName, release: ReleaseNumber) -> Checked<()> {
        match self.tables.jails_of_release(app, release).find(|jail| jail.record.is_job() && !is_over(jail)) {
            Some(job) => {
                let message = format!(
                    "job {} works in release {release} of {app}; wait for it or stop it",
                    job.record.jail
                );
                refuse(RefusalCode::Conflict, message)
            }
            None => Ok(()),
        }
    }

    pub(super) fn room_for_jail(&self, is_job: bool) -> Checked<()> {
        let tables = self.tables;
        if tables.jails.len() >= JAILS_MAX {
            return refuse(
                RefusalCode::Exhausted,
                format!("there are {JAILS_MAX} jails; forget those that ended"),
            );
        }
        if tables.logs.len() >= LOGS_MAX {
            return refuse(RefusalCode::Exhausted, format!("{LOGS_MAX} logs are kept; remove some"));
        }
        if is_job && tables.jobs_running() >= JOBS_MAX {
            return refuse(
                RefusalCode::Exhausted,
                format!("{JOBS_MAX} jobs run at once; try again when one has ended"),
            );
        }
        Ok(())
    }

    pub(super) fn slot(&self) -> Checked<u32> {
        match self.tables.free_slot(self.config.slots()) {
            Some(slot) => Ok(slot),
            None => refuse(RefusalCode::Exhausted, "all addresses of this node's block are taken"),
        }
    }

    pub(super) fn job(
        &self,
        app: &AppName,
        release: ReleaseNumber,
        purpose: Purpose,
        slot: Option<u32>,
    ) -> Checked<JailRecord> {
        self.room_for_jail(true)?;
        let id = self.new_id(|salt| JailId::new(app, salt))?;
        Ok(self.record(id, Some((app, release)), purpose, slot))
    }

    /// An id that nothing has, not even a log.
    pub(super) fn new_id(&self, make: impl Fn(u64) -> JailId) -> Checked<JailId> {
        let id = make(self.salt);
        match self.tables.jails.contains_key(&id) || self.tables.logs.contains(&id) {
            true => refuse(RefusalCode::Conflict, "the drawn name is taken; try again"),
            false => Ok(id),
        }
    }

    pub(super) fn record(
        &self,
        jail: JailId,
        release: Option<(&AppName, ReleaseNumber)>,
        purpose: Purpose,
        slot: Option<u32>,
    ) -> JailRecord {
        JailRecord {
            jail,
            app: release.map(|(app, _)| app.clone()),
            release: release.map(|(_, release)| release),
            purpose,
            slot,
            volumes: Default::default(),
            created_at_ms: self.now_ms,
            boot: self.boot.to_owned(),
            concluded: None,
        }
    }
}

/// Ended for good, so that nothing of it runs or is about to.
pub fn is_over(jail: &Jail) -> bool {
    matches!(jail.phase, Phase::Exited { .. })
}
