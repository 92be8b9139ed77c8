//! The operations on a [`Pool`], by kind of object; the four verbs they are made of stand here.
//!
//! Each verb first ends what an earlier operation on the same object left behind, so that repeating a call after a
//! crash simply works, and each is safe to call from several processes at once ([`Error::Busy`] for the second).

mod image;
mod instance;
mod release;
mod volume;

use std::os::fd::{AsFd, OwnedFd};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::engine::read_mark;
use crate::error::{Error, Result};
use crate::place::{Place, Slot, Target};
use crate::plan::{self, Intent, Mark};
use crate::record::Held;
use crate::types::{Quota, QuotaHealth, Usage};
use crate::{Pool, StagingId, dirs};

/// How often a record may change hands while we wait for a fresh one.
const ATTEMPTS_MAX: u32 = 4;

pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// An object found in a listing.
pub(crate) struct Found {
    pub(crate) mark: Mark,
    pub(crate) usage: Usage,
}

impl Pool {
    /// A fresh record for `slot`, after ending whatever the last one was about.
    fn begin(&self, slot: &Slot) -> Result<Held> {
        for _ in 0..ATTEMPTS_MAX {
            let mut held = self.engine.records.lock(slot)?;
            if held.intent.is_none() && !self.engine.exists(&slot.path())? {
                return Ok(held);
            }
            held.intent.get_or_insert(Intent::Create);
            self.engine.recover(&mut held)?;
        }
        Err(Error::Busy { what: slot.to_string() })
    }

    /// Ends what an operation on `slot` left behind, if anything.
    fn finish(&self, slot: &Slot) -> Result<()> {
        if let Some(mut held) = self.engine.records.lock_existing(slot)? {
            self.engine.recover(&mut held)?;
        }
        Ok(())
    }

    /// Makes or finds a caller's staging area.
    fn stage(
        &self,
        id: &StagingId,
        target: Target,
        from: Option<&Place>,
        quota: Quota,
        mark: Mark,
    ) -> Result<OwnedFd> {
        self.require_quota()?;
        let slot = Slot::Stage(id.clone());
        if let Some(held) = self.engine.records.lock_existing(&slot)? {
            match &held.intent {
                Some(Intent::Stage { target: other }) if *other != target => {
                    return Err(Error::Conflict {
                        what: slot.to_string(),
                        detail: format!("it is for {other}"),
                    });
                }
                _ => {}
            }
            if let Some(tree) = self.staged(&slot)? {
                self.adjust_quota(&tree, quota)?;
                return Ok(tree);
            }
        }
        let mut held = self.begin(&slot)?;
        let mark = Mark { staging: Some(id.clone()), created_ms: now_ms(), ..mark };
        self.engine.run(&mut held, &plan::stage(&slot, from, target, quota, mark))?;
        dirs::require(self.engine.root(), &slot.path())
    }

    /// The staging area, if it is there and was completed.
    fn staged(&self, slot: &Slot) -> Result<Option<OwnedFd>> {
        let Slot::Stage(id) = slot else { return Ok(None) };
        let Some(tree) = dirs::open(self.engine.root(), &slot.path())? else { return Ok(None) };
        let mark = read_mark(&tree, slot)?;
        Ok((mark.staging.as_ref() == Some(id)).then_some(tree))
    }

    /// Moves a staging area to the place `choose` names, or finds where it went. A failure leaves the area as it was.
    fn publish(
        &self,
        id: &StagingId,
        target: Target,
        choose: impl FnOnce() -> Result<Place>,
    ) -> Result<Place> {
        let slot = Slot::Stage(id.clone());
        if let Some(mut held) = self.engine.records.lock_existing(&slot)? {
            match &held.intent {
                Some(Intent::Stage { target: other }) if *other != target => {
                    return Err(Error::Conflict {
                        what: slot.to_string(),
                        detail: format!("it is for {other}"),
                    });
                }
                _ => {}
            }
            if self.staged(&slot)?.is_some() {
                let place = choose()?;
                self.engine.perform(&mut held, &plan::publish(&slot, &place))?;
                return Ok(place);
            }
            self.engine.recover(&mut held)?;
        }
        match self.engine.find_published(&target, id)? {
            Some((place, true)) => Ok(place),
            _ => Err(Error::NotFound { what: slot.to_string() }),
        }
    }

    /// Makes or finds an object that is put in place at once.
    fn create(&self, place: &Place, from: Option<&Place>, quota: Quota, mark: Mark) -> Result<OwnedFd> {
        self.finish(&Slot::Old(place.clone()))?;
        if let Some(tree) = dirs::open(self.engine.root(), &place.path())? {
            self.adjust_quota(&tree, quota)?;
            return Ok(tree);
        }
        self.require_quota()?;
        let mut held = self.begin(&Slot::New(place.clone()))?;
        if self.engine.exists(&place.path())? {
            self.engine.records.close(&held)?;
        } else {
            let mark = Mark { created_ms: now_ms(), ..mark };
            self.engine.run(&mut held, &plan::create(place, from, quota, mark))?;
        }
        self.engine.open_place(place)
    }

    /// Removes an object with all that is nested inside; absent is fine. Its quota group goes with a later sweep, when
    /// the kernel has freed what was deleted.
    pub(crate) fn remove(&self, place: &Place) -> Result<()> {
        self.finish(&Slot::New(place.clone()))?;
        self.finish(&Slot::Old(place.clone()))?;
        if self.engine.exists(&place.path())? {
            match self.remove_recorded(place) {
                Err(Error::PoolFull { .. }) => self.remove_at_once(place)?,
                other => other?,
            }
            self.engine.tidy_folder(place)?;
        }
        Ok(())
    }

    fn remove_recorded(&self, place: &Place) -> Result<()> {
        let mut held = self.begin(&Slot::Old(place.clone()))?;
        self.engine.run(&mut held, &plan::remove(place))
    }

    /// When not even a record has room, deleting is the one thing that still works (btrfs keeps a reserve for it) and
    /// the one that helps. Cut short, it may leave the object without what was nested in it; asking again removes it.
    fn remove_at_once(&self, place: &Place) -> Result<()> {
        match self.engine.open_place(place) {
            Ok(tree) => self.engine.backend.destroy(tree, &place.to_string())?,
            Err(Error::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
        self.engine.backend.commit()
    }

    /// A changed quota takes effect at once. With quotas off what exists is used as it is.
    fn adjust_quota(&self, tree: &OwnedFd, quota: Quota) -> Result<()> {
        if self.engine.backend.quota_health()? == QuotaHealth::Off
            || self.engine.backend.usage(tree.as_fd())?.limit_bytes == quota.limit_bytes
        {
            return Ok(());
        }
        self.engine.backend.set_quota(tree.as_fd(), quota)
    }

    /// Opens an object that is completely in place.
    fn open_ready(&self, place: &Place) -> Result<OwnedFd> {
        let tree = self.engine.open_place(place)?;
        match place.is_sealed() && !self.engine.backend.is_sealed(tree.as_fd())? {
            true => Err(Error::NotFound { what: place.to_string() }),
            false => Ok(tree),
        }
    }

    /// What is known of an object; `None` when it vanished since it was listed or is not completely in place.
    fn find(&self, place: &Place) -> Result<Option<Found>> {
        let tree = match self.open_ready(place) {
            Err(Error::NotFound { .. }) => return Ok(None),
            other => other?,
        };
        Ok(Some(Found { mark: read_mark(&tree, place)?, usage: self.engine.backend.usage(tree.as_fd())? }))
    }

    /// The names in a folder that parse as `T`.
    pub(crate) fn listed<T: std::str::FromStr>(&self, folder: &str) -> Result<Vec<T>> {
        let Some(folder) = dirs::open(self.engine.root(), folder)? else { return Ok(Vec::new()) };
        Ok(dirs::names(&folder)?.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Opens a staging area of either kind.
    pub fn staging_open(&self, staging: &StagingId) -> Result<OwnedFd> {
        let slot = Slot::Stage(staging.clone());
        self.staged(&slot)?.ok_or_else(|| Error::NotFound { what: slot.to_string() })
    }

    /// Throws a staging area of either kind away. Absent is fine; one whose publication had begun is published.
    pub fn staging_abort(&self, staging: &StagingId) -> Result<()> {
        self.finish(&Slot::Stage(staging.clone()))
    }

    /// What a staging area uses.
    pub fn staging_usage(&self, staging: &StagingId) -> Result<Usage> {
        let tree = self.staging_open(staging)?;
        self.engine.backend.usage(tree.as_fd())
    }
}
