//! Finding and removing what an interrupted start or a dead monitor left behind.

use crate::cgroup::CgroupRoot;
use crate::error::Error;
use crate::id::JailId;

/// What exists of one id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub id: JailId,
    /// A process is in `ID/monitor`: connect to it.
    pub monitor_alive: bool,
    /// A process is in `ID/app`.
    pub app_alive: bool,
}

/// Everything that exists below the root, to be called at the start of a runner.
pub fn survey(_root: &CgroupRoot) -> Result<Vec<Found>, Error> {
    unimplemented!()
}

/// Kills what is left of `id`, waits for it (bounded, see the constant), removes its cgroups. Idempotent.
pub fn remove(_root: &CgroupRoot, _id: &JailId) -> Result<(), Error> {
    unimplemented!()
}

/// Deletes the node's veths whose slot is not in `keep`.
pub fn remove_links(_node: u16, _keep: &[u32]) -> Result<Vec<String>, Error> {
    unimplemented!()
}
