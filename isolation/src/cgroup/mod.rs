//! cgroups: identity, limits, killing, counting.

use std::collections::BTreeSet;

use crate::error::Error;
use crate::id::JailId;

/// The subtree in which all instances of one node live.
///
/// Pure v2: `/sys/fs/cgroup/<name>/ID/{monitor,app}`. Hybrid: the same below the v2 mount without controllers, and
/// `<controller mount>/<name>/ID` in each v1 hierarchy.
#[derive(Debug)]
pub struct CgroupRoot {}

impl CgroupRoot {
    /// Looks at what is mounted and makes the subtree `name` (slashes allowed: a delegated path).
    pub fn open(_name: &str) -> Result<CgroupRoot, Error> {
        unimplemented!()
    }
    /// `v2` or `hybrid`, for `doctor`.
    pub fn layout(&self) -> &'static str {
        unimplemented!()
    }
    /// Ids that have a cgroup in any hierarchy.
    pub fn ids(&self) -> Result<BTreeSet<JailId>, Error> {
        unimplemented!()
    }
    /// What the instance uses now.
    pub fn usage(&self, _id: &JailId) -> Result<Usage, Error> {
        unimplemented!()
    }
    /// Removes the node's own (empty) subtree: the end of a node.
    pub fn remove(self) -> Result<(), Error> {
        unimplemented!()
    }
}

/// Use of one instance; `None` where the kernel or the layout does not count it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub memory_bytes: Option<u64>,
    pub memory_peak_bytes: Option<u64>,
    pub cpu_us: Option<u64>,
    pub pids: Option<u64>,
    pub oom_kills: Option<u64>,
}
