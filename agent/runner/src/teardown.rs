//! The orderly end of a node: everything that runs is stopped, everything that was made in the kernel is removed.
//!
//! Trees, volumes and logs stay on the pool; instance roots go. It needs no runner and no tables, only what is found,
//! and works the same after one that was killed. Each step is tried whatever became of the one before.

use std::path::Path;
use std::time::{Duration, Instant};

use epagent_isolation::cgroup::CgroupRoot;
use epagent_isolation::monitor::Client;
use epagent_isolation::monitor::protocol::State;
use epagent_isolation::{net, sweep};
use epagent_storage::Pool;
use nix::libc::SIGTERM;

use crate::app_sockets::AppSockets;
use crate::config::{self, Config};
use crate::disk::Disk;
use crate::launch::Sockets;
use crate::recover::pool_config;
use crate::work::chain;

/// How long instances have to end by themselves.
pub const GRACE_MS: u64 = 10_000;
/// How long a monitor has to do what it was told, past the grace.
const SLACK: Duration = Duration::from_secs(2);
/// Between two looks at monitors that are stopping.
const LOOK: Duration = Duration::from_millis(20);

pub fn teardown(config: &Config, grace_ms: u64) -> Result<(), String> {
    let mut faults = Vec::new();
    let mut step = |what: &str, result: Result<(), String>| {
        if let Err(why) = result {
            tracing::error!(step = what, "teardown: {why}");
            faults.push(what.to_owned());
        }
    };
    step("stop jails", stop_jails(config, grace_ms));
    step("remove interfaces", sweep::remove_links(config.node, &[]).map(drop).map_err(|error| error.chain()));
    step("remove the packet filter", net::remove_firewall(config.node).map_err(|error| error.chain()));
    step("remove the route of the block", unguard(config));
    step("put forwarding back", net::disable_forwarding(config.node).map_err(|error| error.chain()));
    step("close the pool", close_pool(config));
    step("remove the folders of the apps' sockets", remove_app_sockets(config));
    step("forget jails", forget_jails(config));
    if faults.is_empty() {
        Ok(())
    } else {
        Err(format!("not everything could be removed: {}", faults.join(", ")))
    }
}

fn stop_jails(config: &Config, grace_ms: u64) -> Result<(), String> {
    let cgroups = CgroupRoot::open(&config.cgroup.root).map_err(|error| error.chain())?;
    let sockets = Sockets::open(&config.jail_sockets()).map_err(|error| chain(&error))?;
    let found = sweep::survey(&cgroups).map_err(|error| error.chain())?;
    let mut stopping: Vec<Client> = (found.iter().filter(|found| found.monitor_alive))
        .filter_map(|found| Client::connect(&sockets.path().join(found.id.as_str())).ok())
        .filter_map(|mut client| client.stop(SIGTERM, grace_ms).ok().map(|()| client))
        .collect();
    let deadline = Instant::now() + Duration::from_millis(grace_ms) + SLACK;
    while !stopping.is_empty() && Instant::now() < deadline {
        std::thread::sleep(LOOK);
        stopping.retain_mut(|client| client.status().is_ok_and(|status| status.state != State::Exited));
    }
    drop(stopping);
    let mut faults = Vec::new();
    for found in &found {
        // Kills what is left, the monitor included.
        if let Err(error) = sweep::remove(&cgroups, &found.id) {
            faults.push(error.chain());
        }
    }
    cgroups.remove().unwrap_or_else(|error| faults.push(error.chain()));
    if faults.is_empty() { Ok(()) } else { Err(faults.join("; ")) }
}

fn unguard(config: &Config) -> Result<(), String> {
    let undone = config.network.blocks().map(|(base, prefix)| net::unguard_block(base, prefix));
    undone.collect::<Result<(), _>>().map_err(|error| error.chain())
}

/// Not one that is not there: opening it would make it.
fn close_pool(config: &Config) -> Result<(), String> {
    let exists = match &config.pool {
        config::Pool::Loop { file, .. } => file.exists(),
        config::Pool::Path { path } => path.exists(),
    };
    if !exists {
        return Ok(());
    }
    let mut wanted = pool_config(config);
    // A disk that is not mounted leaves a folder of somebody else's: no place to make a pool of.
    wanted.quota.enable_on_existing = false;
    let pool = match Pool::open_or_create(&wanted) {
        Err(epagent_storage::Error::QuotaOff { .. }) => return Ok(()),
        opened => opened.map_err(|error| chain(&error))?,
    };
    let removed = pool
        .instance_root_list()
        .and_then(|roots| roots.into_iter().try_for_each(|root| pool.instance_root_remove(&root.instance)));
    let closed = pool.close();
    removed.and(closed).map_err(|error| chain(&error))
}

fn remove_app_sockets(config: &Config) -> Result<(), String> {
    let sockets = AppSockets::open(config).map_err(|error| chain(&error))?;
    sockets.sweep(|_| false).map_err(|error| chain(&error))
}

/// The records of jails and the sockets of their monitors.
fn forget_jails(config: &Config) -> Result<(), String> {
    let disk = Disk::open(&config.state_dir).map_err(|error| chain(&error))?;
    for record in disk.read().map_err(|error| chain(&error))?.jails {
        disk.remove_jail(&record.jail).map_err(|error| chain(&error))?;
    }
    remove_files(&config.jail_sockets()).map_err(|error| format!("remove the monitors' sockets: {error}"))
}

fn remove_files(folder: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        std::fs::remove_file(entry?.path())?;
    }
    Ok(())
}
