//! Finding and removing what an interrupted start or a dead monitor left behind.
//!
//! Everything an instance is made of hangs on its processes and its cgroups: mounts and the inner network die with
//! the namespaces, the namespaces with the processes. So killing and removing cgroups, and links of the node whose
//! slot is not in use, leaves nothing.

use std::thread;
use std::time::{Duration, Instant};

use crate::cgroup::{CgroupRoot, EMPTY_TIMEOUT};
use crate::error::Error;
use crate::id::JailId;
use crate::net::rtnl::Rtnl;

/// How often a killed instance is looked at.
const POLL: Duration = Duration::from_millis(2);

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
pub fn survey(root: &CgroupRoot) -> Result<Vec<Found>, Error> {
    let found = |id: JailId| Found {
        monitor_alive: root.monitor_populated(&id),
        app_alive: root.app_populated(&id),
        id,
    };
    Ok(root.ids()?.into_iter().map(found).collect())
}

/// Kills what is left of `id`, monitor included, waits for it (up to [`EMPTY_TIMEOUT`]) and removes its cgroups.
/// Idempotent. Blocks for as long as the kernel takes to tear the instance down: some milliseconds as a rule.
pub fn remove(root: &CgroupRoot, id: &JailId) -> Result<(), Error> {
    let deadline = Instant::now() + EMPTY_TIMEOUT;
    loop {
        // Again in every turn: a launch cut short may be between its clone and its exec.
        root.kill_all(id)?;
        if !root.app_populated(id) && !root.monitor_populated(id) {
            return root.remove_instance(id);
        }
        if Instant::now() >= deadline {
            let reason = format!("processes of {id} do not die; are they waiting for a disk?");
            return Err(Error::Refused { operation: "remove instance", reason });
        }
        thread::sleep(POLL);
    }
}

/// Deletes the node's veths whose slot is not in `keep`; gives the names of those deleted.
pub fn remove_links(node: u16, keep: &[u32]) -> Result<Vec<String>, Error> {
    let mut rtnl = Rtnl::open().map_err(Error::call("open rtnetlink"))?;
    let links = rtnl.links().map_err(Error::call("list links"))?;
    let prefix = format!("ep{node}-");
    let stale = links.into_iter().filter_map(|link| {
        let slot: u32 = link.name.strip_prefix(&prefix)?.parse().ok()?;
        (!keep.contains(&slot)).then_some(link.name)
    });
    stale
        .map(|name| rtnl.delete_link(&name).map(|()| name.clone()).map_err(Error::path("delete link", name)))
        .collect()
}
