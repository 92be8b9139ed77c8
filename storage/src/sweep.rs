//! The sweep: ends what was cut short, and removes what nobody claims.
//!
//! Made for running beside everything else. Three things keep it from taking what is alive: a running operation holds
//! the lock of its record; the caller's [`LiveSet`] names the staging areas and instances it knows; and whatever is
//! younger than that set is left for the next sweep, since its caller may just not have heard of it yet.
//!
//! Volumes, releases, images and log folders are never swept: their owner removes them by name.

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use crate::error::{Error, Result};
use crate::name::InstanceId;
use crate::place::{Place, STAGING, Slot};
use crate::plan::{Intent, Verdict};
use crate::types::{LiveSet, QuotaHealth, SweepReport};
use crate::{Pool, dirs};

impl Pool {
    /// An empty live set as of now. Take it *before* looking at what runs, fill it, then [`Pool::sweep`].
    pub fn live_set(&self) -> Result<LiveSet> {
        self.engine.backend.commit()?;
        let as_of = self.engine.backend.generation()?;
        Ok(LiveSet { staging: BTreeSet::new(), instances: BTreeSet::new(), as_of })
    }

    /// Finishes or takes back what was cut short; removes staging areas and instance roots nobody claims.
    pub fn sweep(&self, live: &LiveSet) -> Result<SweepReport> {
        let mut report = SweepReport::default();
        let mut slots: BTreeSet<String> = self.engine.records.slots()?.iter().map(Slot::file).collect();
        let staging = dirs::require(self.engine.root(), STAGING)?;
        slots.extend(dirs::names(&staging)?);
        for file in slots {
            match Slot::parse(&file) {
                Some(slot) => self.sweep_slot(&slot, live, &mut report),
                None => report.failed.push(format!("{STAGING}/{file} is nothing of ours")),
            }
        }
        for instance in self.listed::<InstanceId>("instances")? {
            self.sweep_instance(instance, live, &mut report);
        }
        if self.engine.backend.quota_health()? != QuotaHealth::Off {
            self.engine.backend.commit()?;
            report.groups_removed = self.engine.backend.collect_fences()?;
            self.engine.backend.refresh_reserve()?;
        }
        Ok(report)
    }

    fn sweep_slot(&self, slot: &Slot, live: &LiveSet, report: &mut SweepReport) {
        match self.try_sweep_slot(slot, live) {
            Ok(Swept::Spared) | Err(Error::Busy { .. }) => report.spared.push(slot.to_string()),
            Ok(Swept::Ended(Verdict::Finish)) => report.finished.push(slot.to_string()),
            Ok(Swept::Ended(Verdict::Undo)) => report.undone.push(slot.to_string()),
            Ok(Swept::Orphan) => report.orphans.push(slot.to_string()),
            Ok(Swept::Nothing) => {}
            Err(error) => report.failed.push(describe(slot, &error)),
        }
    }

    fn try_sweep_slot(&self, slot: &Slot, live: &LiveSet) -> Result<Swept> {
        if let Slot::Stage(id) = slot
            && (live.staging.contains(id) || self.is_younger(&slot.path(), live)?)
        {
            return Ok(Swept::Spared);
        }
        let mut held = self.engine.records.lock_idle(slot)?;
        if held.intent.is_some() {
            return Ok(self.engine.recover(&mut held)?.map_or(Swept::Nothing, Swept::Ended));
        }
        // No record of it: deleted as if its creation had been cut short.
        let is_there = self.engine.exists(&slot.path())?;
        held.intent = is_there.then_some(Intent::Create);
        self.engine.recover(&mut held)?;
        Ok(if is_there { Swept::Orphan } else { Swept::Nothing })
    }

    fn sweep_instance(&self, instance: InstanceId, live: &LiveSet, report: &mut SweepReport) {
        if live.instances.contains(&instance) {
            return;
        }
        let place = Place::Instance(instance);
        let swept = self.is_younger(&place.path(), live).and_then(|younger| match younger {
            true => Ok(false),
            false => self.remove(&place).map(|()| true),
        });
        match swept {
            Ok(true) => report.orphans.push(place.to_string()),
            Ok(false) | Err(Error::Busy { .. }) => report.spared.push(place.to_string()),
            Err(error) => report.failed.push(describe(&place, &error)),
        }
    }

    fn is_younger(&self, path: &str, live: &LiveSet) -> Result<bool> {
        match dirs::open(self.engine.root(), path)? {
            Some(tree) => Ok(self.engine.backend.created_generation(tree.as_fd())? > live.as_of),
            None => Ok(false),
        }
    }
}

enum Swept {
    Spared,
    Ended(Verdict),
    Orphan,
    Nothing,
}

fn describe(what: &dyn std::fmt::Display, error: &Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{what}: {error}: {source}"),
        None => format!("{what}: {error}"),
    }
}
