//! The btrfs backend: a tree is a subvolume, a fence is a quota group.
//!
//! With simple quotas (Linux 6.7) each object has a level-1 group of its own below one level-2 group for all tenants:
//!
//! ```text
//!  2/P  all tenants: pool − bookkeeping − reserve
//!   ├─ 1/n  volume shop/data: its quota
//!   │   └─ 0/301  the subvolume;  0/317, 0/318 …  whatever the tenant nests inside it joins the same group
//!   └─ 1/m  instance root web-1: its quota
//!       └─ 0/302
//! ```
//!
//! The group exists, with its limit, before the subvolume is born into it, so there is no moment without a limit. A
//! clone is charged only what is written to it. What a deleted base still shares with clones stays charged to the
//! base's group until the last clone is gone; a group with nothing inside is collected later.
//!
//! The fallback below 6.7 is ordinary qgroups. There a clone cannot join a group without a recount, so limits sit on
//! the subvolumes themselves (exclusive bytes for clones) and there is no group for all tenants: nothing new is made once
//! only the reserve is left, but what there is can write into it. Nested subvolumes and reflinks escape the limits, so whoever runs tenants on such a kernel must refuse them the ioctls 0x9401, 0x940e, 0x9417
//! and 0x9418 (snapshot and subvolume creation). Its counts can become inconsistent, which [`Backend::quota_health`]
//! reports.

mod quota;
mod trees;

use std::os::fd::{BorrowedFd, OwnedFd};

pub(crate) use quota::{QuotaState, enable, pool_number_is_free, state};

use crate::backend::{Backend, Fence};
use crate::error::{Error, Result};
use crate::sys;
use crate::types::{PoolUsage, Quota, QuotaHealth, QuotaMode, Usage};

/// What was settled when the pool was opened.
#[derive(Debug)]
pub(crate) struct Btrfs {
    /// The pool's root directory.
    pub(crate) root: OwnedFd,
    /// A folder whose flock orders making groups (shared) against collecting them (exclusive).
    pub(crate) group_lock: OwnedFd,
    pub(crate) mode: QuotaMode,
    /// Sets this pool's groups apart from others on the same file system; 1 to 65535.
    pub(crate) number: u16,
    pub(crate) reserve_bytes: u64,
}

const POOL: &str = "the pool";

impl Backend for Btrfs {
    fn quota_health(&self) -> Result<QuotaHealth> {
        Ok(match state(&self.root)? {
            QuotaState::Off => QuotaHealth::Off,
            QuotaState::On { mode, .. } if mode != self.mode => QuotaHealth::Off,
            QuotaState::On { consistent: false, .. } => QuotaHealth::Inconsistent,
            QuotaState::On { .. } => QuotaHealth::Good,
        })
    }

    fn fence(&self, quota: Quota) -> Result<Fence> {
        self.new_group(quota)
    }

    fn create(&self, dir: BorrowedFd<'_>, name: &str, fence: &Fence) -> Result<()> {
        sys::subvol_create(dir, name, fence.group)
            .map_err(|e| Error::io("create a subvolume for", name, e))?;
        self.limit_new_tree(dir, name, fence, sys::Counted::Referenced)
    }

    fn clone_tree(
        &self,
        source: BorrowedFd<'_>,
        dir: BorrowedFd<'_>,
        name: &str,
        fence: &Fence,
    ) -> Result<()> {
        sys::subvol_snapshot(source, dir, name, fence.group)
            .map_err(|e| Error::io("create a snapshot for", name, e))?;
        self.limit_new_tree(dir, name, fence, sys::Counted::Exclusive)
    }

    fn destroy(&self, tree: OwnedFd, what: &str) -> Result<()> {
        trees::destroy(&self.root, tree, what)
    }

    fn is_sealed(&self, tree: BorrowedFd<'_>) -> Result<bool> {
        sys::subvol_is_read_only(tree).map_err(|e| Error::io("read the flags of", "a subvolume", e))
    }

    fn set_sealed(&self, tree: BorrowedFd<'_>, sealed: bool) -> Result<()> {
        sys::subvol_set_read_only(tree, sealed).map_err(|e| Error::io("set the flags of", "a subvolume", e))
    }

    fn set_quota(&self, tree: BorrowedFd<'_>, quota: Quota) -> Result<()> {
        self.change_limit(tree, quota)
    }

    fn usage(&self, tree: BorrowedFd<'_>) -> Result<Usage> {
        self.tree_usage(tree)
    }

    fn pool_usage(&self) -> Result<PoolUsage> {
        let space = rustix::fs::fstatvfs(&self.root).map_err(|e| Error::io("read the size of", POOL, e))?;
        let tenants = self.tenants_usage()?;
        Ok(PoolUsage {
            size_bytes: space.f_blocks * space.f_frsize,
            free_bytes: space.f_bavail * space.f_frsize,
            tenant_used_bytes: tenants.used_bytes,
            tenant_limit_bytes: tenants.limit_bytes,
            reserve_bytes: self.reserve_bytes,
        })
    }

    fn generation(&self) -> Result<u64> {
        sys::fs_generation(&self.root).map_err(|e| Error::io("read the generation of", POOL, e))
    }

    fn created_generation(&self, tree: BorrowedFd<'_>) -> Result<u64> {
        let identity = sys::subvol_identity(tree).map_err(|e| Error::io("identify", "a subvolume", e))?;
        Ok(identity.created_generation)
    }

    fn flush(&self) -> Result<()> {
        rustix::fs::syncfs(&self.root).map_err(|e| Error::io("flush", POOL, e))
    }

    fn commit(&self) -> Result<()> {
        sys::commit(&self.root).map_err(|e| Error::io("commit", POOL, e))
    }

    fn refresh_reserve(&self) -> Result<()> {
        self.limit_tenants()
    }

    fn collect_fences(&self) -> Result<u32> {
        self.collect_groups()
    }
}
