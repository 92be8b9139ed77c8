//! The seam between what storage means and what holds it.
//!
//! Everything above this trait speaks of trees (a directory with a fence around it), not of subvolumes and qgroups.
//! btrfs implements all of it. A backend that cannot clone cheaply would serve volumes alone: `create`, `set_quota`,
//! `usage`, `destroy`, `flush`.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};

use crate::error::Result;
use crate::types::{PoolUsage, Quota, QuotaHealth, Usage};

/// A limit made ready for a tree that does not exist yet.
#[derive(Debug)]
pub(crate) struct Fence {
    pub(crate) quota: Quota,
    /// The backend's name for it, if it has one before the tree exists.
    pub(crate) group: Option<u64>,
    /// Held until the tree is inside, so that nobody tidies the still empty group away.
    pub(crate) _guard: OwnedFd,
}

pub(crate) trait Backend: fmt::Debug {
    fn quota_health(&self) -> Result<QuotaHealth>;

    fn fence(&self, quota: Quota) -> Result<Fence>;
    /// An empty tree `name` in `dir`, inside `fence` from its first byte.
    fn create(&self, dir: BorrowedFd<'_>, name: &str, fence: &Fence) -> Result<()>;
    /// A writable copy of `source` that costs only what is written to it later.
    fn clone_tree(
        &self,
        source: BorrowedFd<'_>,
        dir: BorrowedFd<'_>,
        name: &str,
        fence: &Fence,
    ) -> Result<()>;
    /// Deletes a tree with everything nested inside it, whatever it is called.
    fn destroy(&self, tree: OwnedFd, what: &str) -> Result<()>;

    fn is_sealed(&self, tree: BorrowedFd<'_>) -> Result<bool>;
    fn set_sealed(&self, tree: BorrowedFd<'_>, sealed: bool) -> Result<()>;
    fn set_quota(&self, tree: BorrowedFd<'_>, quota: Quota) -> Result<()>;
    fn usage(&self, tree: BorrowedFd<'_>) -> Result<Usage>;
    fn pool_usage(&self) -> Result<PoolUsage>;

    /// A number that grows with each commit, and the one at which a tree was made.
    fn generation(&self) -> Result<u64>;
    fn created_generation(&self, tree: BorrowedFd<'_>) -> Result<u64>;

    /// Writes out all data, and makes all names durable.
    fn flush(&self) -> Result<()>;
    /// Makes all names durable.
    fn commit(&self) -> Result<()>;

    /// Recomputes what tenants together may use, as the file system's own bookkeeping grows.
    fn refresh_reserve(&self) -> Result<()>;
    /// Removes fences nothing is inside of any more; returns how many.
    fn collect_fences(&self) -> Result<u32>;
}
