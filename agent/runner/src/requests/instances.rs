//! Instances: what may be started and forgotten. Pure.

use epagent_storage::Quota;
use epagent_wire::name::JailId;
use epagent_wire::runner::{Purpose, RefusalCode, Start};

use super::fields::{self, refuse};
use super::view::{View, is_over};
use super::{Checked, Plan};
use crate::start;
use crate::tables::{Jail, is_jail_of};
use crate::work::{Discard, Work};

impl View<'_> {
    pub(super) fn start(&self, jail: &JailId, start: &Start) -> Checked {
        self.app(&start.app)?;
        if !is_jail_of(jail, &start.app) {
            let message = format!(
                "jail {jail} is not one of app {}: its jails are named {}-XXXXXXXX",
                start.app, start.app
            );
            return refuse(RefusalCode::NotYours, message);
        }
        fields::command(&start.command)?;
        fields::env(&start.env)?;
        fields::mount_paths(&start.volumes)?;
        if let Some(present) = self.tables.jails.get(jail) {
            return self.started_before(present, start);
        }
        let release = self.release(&start.app, start.release)?;
        if !release.sealed {
            return refuse(
                RefusalCode::Conflict,
                format!("release {} of {} is still being built", start.release, start.app),
            );
        }
        if let Some(volume) = start
            .volumes
            .keys()
            .find(|volume| !self.tables.volumes.contains_key(&(start.app.clone(), (*volume).clone())))
        {
            return refuse(RefusalCode::NotFound, format!("app {} has no volume {volume}", start.app));
        }
        self.room_for_jail(false)?;
        let limits = fields::clamp(&start.limits, &self.config.limits);
        let mut record =
            self.record(jail.clone(), Some((&start.app, start.release)), Purpose::Start, Some(self.slot()?));
        record.volumes = start.volumes.keys().cloned().collect();
        let order = start::order(start, &limits, record.clone(), release, self.id_base(&start.app)?);
        let quota = Quota::bytes(limits.disk_bytes);
        let work =
            Work::InstancePrepare { jail: record, app: start.app.clone(), release: start.release, quota };
        Ok(Plan::Launch { work, order: Box::new(order) })
    }

    pub(super) fn started_before(&self, present: &Jail, start: &Start) -> Checked {
        let record = &present.record;
        let same = record.app.as_ref() == Some(&start.app)
            && record.release == Some(start.release)
            && record.purpose == Purpose::Start
            && record.volumes.iter().eq(start.volumes.keys());
        match same {
            true => Ok(Plan::AlreadyStarted(record.jail.clone())),
            false => refuse(RefusalCode::Conflict, format!("jail {} exists and is another one", record.jail)),
        }
    }

    pub(super) fn forget(&self, jail: &JailId) -> Checked {
        let Some(present) = self.tables.jails.get(jail) else { return Ok(Plan::Nothing) };
        if !is_over(present) {
            return refuse(RefusalCode::Conflict, format!("jail {jail} has not ended; stop it first"));
        }
        Ok(Plan::Work(Work::Discard(Discard::of(&present.record))))
    }
}
