//! Quota groups: made before the subvolume they hold, read from the quota tree, collected when empty.
//!
//! Group ids are `level << 48 | number`. Ours are `2/P` and `1/(P << 24 | n)`, P being the pool's number, so several
//! pools (and an operator's own groups) can share a file system.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FlockOperation, Mode, OFlags};

use super::Btrfs;
use crate::backend::Fence;
use crate::error::{Error, Result};
use crate::sys::{
    self, Counted, Item, KEY_QGROUP_INFO, KEY_QGROUP_LIMIT, KEY_QGROUP_RELATION, KEY_QGROUP_STATUS,
    KEY_ROOT_ITEM, KeyRange, QuotaCommand, TREE_QUOTA, TREE_ROOT,
};
use crate::types::{Quota, QuotaMode, Usage};

const LEVEL_SHIFT: u32 = 48;
/// Ids of subvolumes are those of groups of level 0.
const SUBVOLUMES_MAX: u64 = (1 << LEVEL_SHIFT) - 1;
const NUMBER_SHIFT: u32 = 24;
const NUMBER_MASK: u64 = (1 << NUMBER_SHIFT) - 1;
/// How many groups may be taken from under us while we make one.
const ATTEMPTS_MAX: u32 = 64;

const STATUS_RESCAN: u64 = 1 << 1;
const STATUS_INCONSISTENT: u64 = 1 << 2;
const STATUS_SIMPLE: u64 = 1 << 3;
const LIMIT_MAX_RFER: u64 = 1 << 0;
const LIMIT_MAX_EXCL: u64 = 1 << 1;

/// What the file system says about its quotas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum QuotaState {
    Off,
    On { mode: QuotaMode, consistent: bool },
}

fn search(fs: impl AsFd, objectid: (u64, u64), kind: u32, offset: (u64, u64)) -> Result<Vec<Item>> {
    sys::tree_search(fs, KeyRange { tree: TREE_QUOTA, objectid, kind, offset })
        .map_err(|e| Error::io("read the quota tree of", super::POOL, e))
}

pub(crate) fn state(fs: impl AsFd) -> Result<QuotaState> {
    let status = search(fs, (0, 0), KEY_QGROUP_STATUS, (0, 0))?;
    let Some(flags) = status.first().map(|item| item.word(2)) else { return Ok(QuotaState::Off) };
    let mode = if flags & STATUS_SIMPLE != 0 { QuotaMode::Simple } else { QuotaMode::Ordinary };
    Ok(QuotaState::On { mode, consistent: flags & (STATUS_RESCAN | STATUS_INCONSISTENT) == 0 })
}

/// Switches quotas on: the wanted mode, or the best the kernel has.
pub(crate) fn enable(fs: impl AsFd, wanted: Option<QuotaMode>) -> Result<QuotaMode> {
    let failed = |e| Error::io("switch on quotas for", super::POOL, e);
    if wanted != Some(QuotaMode::Ordinary) {
        match sys::quota_control(&fs, QuotaCommand::EnableSimple) {
            Ok(()) => return Ok(QuotaMode::Simple),
            Err(e) if wanted.is_none() && e.raw_os_error() == Some(libc::EINVAL) => {}
            Err(e) => return Err(failed(e)),
        }
    }
    sys::quota_control(&fs, QuotaCommand::EnableOrdinary).map_err(failed)?;
    sys::quota_rescan_wait(&fs).map_err(failed)?;
    Ok(QuotaMode::Ordinary)
}

/// Whether no group of a pool with this number exists yet.
pub(crate) fn pool_number_is_free(fs: impl AsFd, number: u16) -> Result<bool> {
    let id = tenants_id(number);
    Ok(search(&fs, (0, 0), KEY_QGROUP_INFO, (id, id))?.is_empty() && groups(&fs, number)?.is_empty())
}

fn tenants_id(number: u16) -> u64 {
    2 << LEVEL_SHIFT | u64::from(number)
}

fn group_range(number: u16) -> (u64, u64) {
    let first = 1 << LEVEL_SHIFT | u64::from(number) << NUMBER_SHIFT;
    (first, first | NUMBER_MASK)
}

fn groups(fs: impl AsFd, number: u16) -> Result<Vec<u64>> {
    let items = search(fs, (0, 0), KEY_QGROUP_INFO, group_range(number))?;
    Ok(items.iter().map(|item| item.offset).collect())
}

fn level_of(group: u64) -> u64 {
    group >> LEVEL_SHIFT
}

impl Btrfs {
    /// Makes the group of all tenants, if it is missing, and sets what they together may use.
    pub(super) fn limit_tenants(&self) -> Result<()> {
        if self.mode != QuotaMode::Simple {
            return Ok(());
        }
        let failed = |e| Error::io("limit all tenants of", super::POOL, e);
        let group = tenants_id(self.number);
        match sys::qgroup_create(&self.root, group) {
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {}
            other => other.map_err(failed)?,
        }
        sys::qgroup_limit(&self.root, group, Counted::Referenced, self.tenant_limit_bytes()?).map_err(failed)
    }

    /// What is left for tenants: all bytes, less the chunks that are metadata's alone (with their copies), less the
    /// reserve. Exact where data and metadata share chunks, as in every loop file; elsewhere as of now.
    pub(crate) fn tenant_limit_bytes(&self) -> Result<u64> {
        let space =
            rustix::fs::fstatvfs(&self.root).map_err(|e| Error::io("read the size of", super::POOL, e))?;
        let chunks = sys::space(&self.root).map_err(|e| Error::io("read the space of", super::POOL, e))?;
        let taken_bytes = chunks.metadata_raw_bytes.saturating_add(self.reserve_bytes);
        Ok((space.f_blocks * space.f_frsize).saturating_sub(taken_bytes))
    }

    pub(super) fn new_group(&self, quota: Quota) -> Result<Fence> {
        let guard = self.lock_groups(FlockOperation::LockShared)?;
        if self.mode != QuotaMode::Simple {
            self.refuse_the_reserve()?;
            return Ok(Fence { quota, group: None, _guard: guard });
        }
        let failed = |e| Error::io("make a quota group in", super::POOL, e);
        let (first, last) = group_range(self.number);
        let taken = groups(&self.root, self.number)?;
        let mut id = match taken.last() {
            None => first,
            Some(&highest) if highest < last => highest + 1,
            // All numbers were used once: the first gap.
            Some(_) => (first..=last).zip(&taken).find(|(id, taken)| id != *taken).map_or(last, |(id, _)| id),
        };
        for _ in 0..ATTEMPTS_MAX {
            match sys::qgroup_create(&self.root, id) {
                Ok(()) => break,
                Err(e) if e.raw_os_error() == Some(libc::EEXIST) && id < last => id += 1,
                Err(e) => return Err(failed(e)),
            }
        }
        sys::qgroup_limit(&self.root, id, Counted::Referenced, quota.limit_bytes).map_err(failed)?;
        sys::qgroup_assign(&self.root, id, tenants_id(self.number)).map_err(failed)?;
        Ok(Fence { quota, group: Some(id), _guard: guard })
    }

    /// A descriptor of its own for each lock, since a flock belongs to the open file.
    fn lock_groups(&self, how: FlockOperation) -> Result<OwnedFd> {
        let failed = |e: rustix::io::Errno| Error::io("lock the quota groups of", super::POOL, e);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let lock = rustix::fs::openat(&self.group_lock, ".", flags, Mode::empty()).map_err(failed)?;
        rustix::fs::flock(&lock, how).map_err(failed)?;
        Ok(lock)
    }

    /// Ordinary qgroups: the limit goes on the subvolume, before anybody but us can reach it.
    pub(super) fn limit_new_tree(
        &self,
        dir: BorrowedFd<'_>,
        name: &str,
        fence: &Fence,
        counted: Counted,
    ) -> Result<()> {
        if self.mode == QuotaMode::Simple {
            return Ok(());
        }
        let tree = crate::dirs::require(dir, name)?;
        let id = self.id_of(tree.as_fd())?;
        sys::qgroup_limit(&self.root, id, counted, fence.quota.limit_bytes)
            .map_err(|e| Error::io("limit", name, e))
    }

    fn id_of(&self, tree: BorrowedFd<'_>) -> Result<u64> {
        Ok(sys::subvol_identity(tree).map_err(|e| Error::io("identify", "a subvolume", e))?.id)
    }

    /// The group that holds a tree's limit: its level-1 group, or its own.
    fn limiting_group(&self, tree: BorrowedFd<'_>) -> Result<u64> {
        let id = self.id_of(tree)?;
        let parents = search(&self.root, (id, id), KEY_QGROUP_RELATION, group_range(self.number))?;
        Ok(parents.first().map_or(id, |item| item.offset))
    }

    pub(super) fn change_limit(&self, tree: BorrowedFd<'_>, quota: Quota) -> Result<()> {
        let group = self.limiting_group(tree)?;
        let counted = match self.limit_flags(group)? & LIMIT_MAX_EXCL {
            0 => Counted::Referenced,
            _ => Counted::Exclusive,
        };
        sys::qgroup_limit(&self.root, group, counted, quota.limit_bytes)
            .map_err(|e| Error::io("change the limit of", "a subvolume", e))
    }

    fn limit_flags(&self, group: u64) -> Result<u64> {
        let limit = search(&self.root, (0, 0), KEY_QGROUP_LIMIT, (group, group))?;
        Ok(limit.first().map_or(0, |item| item.word(0)))
    }

    pub(super) fn tree_usage(&self, tree: BorrowedFd<'_>) -> Result<Usage> {
        self.group_usage(self.limiting_group(tree)?)
    }

    /// What all tenants use of what they may. Ordinary quota groups have none for all of them: then it is whatever
    /// the file system holds.
    pub(super) fn tenants_usage(&self) -> Result<Usage> {
        if self.mode == QuotaMode::Simple {
            return self.group_usage(tenants_id(self.number));
        }
        let space =
            rustix::fs::fstatvfs(&self.root).map_err(|e| Error::io("read the size of", super::POOL, e))?;
        let used_bytes = space.f_blocks.saturating_sub(space.f_bfree) * space.f_frsize;
        Ok(Usage { used_bytes, limit_bytes: self.tenant_limit_bytes()? })
    }

    /// Without a group that holds what runs to the reserve, it is at least kept from what is new.
    fn refuse_the_reserve(&self) -> Result<()> {
        let usage = self.tenants_usage()?;
        match usage.used_bytes < usage.limit_bytes {
            true => Ok(()),
            false => {
                Err(Error::io("use the reserve of", super::POOL, io::Error::from_raw_os_error(libc::ENOSPC)))
            }
        }
    }

    fn group_usage(&self, group: u64) -> Result<Usage> {
        let info = search(&self.root, (0, 0), KEY_QGROUP_INFO, (group, group))?;
        let limit = search(&self.root, (0, 0), KEY_QGROUP_LIMIT, (group, group))?;
        let counts = |word| info.first().map_or(0, |item| item.word(word));
        let limits = |word| limit.first().map_or(0, |item| item.word(word));
        let (referenced, exclusive) = (counts(1), counts(3));
        Ok(match limits(0) {
            flags if flags & LIMIT_MAX_EXCL != 0 => Usage { used_bytes: exclusive, limit_bytes: limits(2) },
            flags if flags & LIMIT_MAX_RFER != 0 => Usage { used_bytes: referenced, limit_bytes: limits(1) },
            _ => Usage { used_bytes: referenced, limit_bytes: 0 },
        })
    }

    /// Removes groups of this pool that hold no subvolume and no bytes any more. Skipped while somebody makes one.
    pub(super) fn collect_groups(&self) -> Result<u32> {
        let Ok(_guard) = self.lock_groups(FlockOperation::NonBlockingLockExclusive) else { return Ok(0) };
        let mut removed = 0;
        if self.mode != QuotaMode::Simple {
            for group in self.stale_groups()? {
                removed += u32::from(gone(sys::qgroup_remove(&self.root, group))?);
            }
            return Ok(removed);
        }
        let living = self.living_subvolumes()?;
        for group in groups(&self.root, self.number)? {
            if self.collect_group(group, &living)? {
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// Groups of subvolumes that are gone, which older kernels leave behind. A subvolume has its group a moment before
    /// it is found, in one transaction: what is not found after that has been committed is gone.
    fn stale_groups(&self) -> Result<Vec<u64>> {
        let groups = search(&self.root, (0, 0), KEY_QGROUP_INFO, (sys::FIRST_FREE_OBJECTID, SUBVOLUMES_MAX))?;
        let mut stale: Vec<u64> = groups.iter().map(|item| item.offset).collect();
        let is_gone = |living: HashSet<u64>| move |id: &u64| !living.contains(id);
        stale.retain(is_gone(self.living_subvolumes()?));
        if !stale.is_empty() {
            sys::commit(&self.root).map_err(|e| Error::io("commit", super::POOL, e))?;
            stale.retain(is_gone(self.living_subvolumes()?));
        }
        Ok(stale)
    }

    fn living_subvolumes(&self) -> Result<HashSet<u64>> {
        let range = KeyRange {
            tree: TREE_ROOT,
            objectid: (sys::FIRST_FREE_OBJECTID, SUBVOLUMES_MAX),
            kind: KEY_ROOT_ITEM,
            offset: (0, u64::MAX),
        };
        let roots = sys::tree_search(&self.root, range)
            .map_err(|e| Error::io("list the subvolumes of", super::POOL, e))?;
        Ok(roots.iter().map(|item| item.objectid).collect())
    }

    fn collect_group(&self, group: u64, living: &HashSet<u64>) -> Result<bool> {
        let relations = search(&self.root, (group, group), KEY_QGROUP_RELATION, (0, u64::MAX))?;
        for member in relations.iter().map(|item| item.offset).filter(|&id| level_of(id) == 0) {
            // Still there, or gone but with bytes that a clone shares: the kernel refuses, the next sweep tries again.
            if living.contains(&member) || !gone(sys::qgroup_remove(&self.root, member))? {
                return Ok(false);
            }
        }
        gone(sys::qgroup_remove(&self.root, group))
    }
}

/// Whether a group has been removed; `Ok(false)` when the kernel still needs it.
fn gone(result: io::Result<()>) -> Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Ok(false),
        Err(e) => Err(Error::io("remove a quota group of", super::POOL, e)),
    }
}
