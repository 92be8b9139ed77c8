//! Before the loop: opening everything, and finding the world as a killed runner left it.
//!
//! ```text
//!  records + pool + cgroups
//!     │  intents without an object ........ undone
//!     │  objects without a record ......... removed (roots, staging areas, cgroups, veths)
//!     │  both, and the monitor lives ...... connected to again
//!     └  both, and the monitor is gone .... killed what is left, told as lost
//! ```
//!
//! This is the one time at which the runner waits for disks: nobody is being served yet, and what runs, runs.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;

use epagent_isolation::cgroup::CgroupRoot;
use epagent_isolation::net::{self, FirewallConfig};
use epagent_isolation::sweep::{self, Found};
use epagent_storage::{Allocation, LiveSet, Location, Pool, PoolConfig};
use epagent_wire::name::{AppName, JailId, ReleaseNumber};
use epagent_wire::runner::Exit;

use crate::app_sockets::AppSockets;
use crate::config::{self, Config};
use crate::disk::{Disk, Records};
use crate::launch::{Binaries, Sockets};
use crate::requests::keys::{Hold, Key};
use crate::server::{Parts, Server, Task};
use crate::skeleton;
use crate::tables::{Jail, JailRecord, Phase, ReleaseRecord, Tables};
use crate::work::{Discard, Mended, Site, Work, WorkError, instance_id, perform};

/// How long a predecessor's last child may hold the pool.
const LOCK_WAIT_MS: u64 = 10_000;

pub fn pool_config(config: &Config) -> PoolConfig {
    let pool = match &config.pool {
        config::Pool::Loop { mount, file, size } => PoolConfig::loop_file(file, mount, size.0),
        config::Pool::Path { path } => PoolConfig::existing(path),
    };
    debug_assert!(!matches!(&pool.location, Location::LoopFile { allocation: Allocation::Sparse, .. }));
    PoolConfig { lock_wait_ms: LOCK_WAIT_MS, ..pool }
}

/// With releases on record there is a pool, and what is not it is left as it is: see [`check_pool`].
fn pool_to_open(config: &Config, disk: &Disk) -> Result<PoolConfig, WorkError> {
    let mut wanted = pool_config(config);
    if disk.pool_number()?.is_none() || !disk.has_releases()? {
        return Ok(wanted);
    }
    wanted.quota.enable_on_existing = false;
    match &wanted.location {
        Location::LoopFile { file, .. } if !file.exists() => Err(WorkError::NoPool { path: file.clone() }),
        _ => Ok(wanted),
    }
}

/// A pool that is not the one of the records is a disk that is not mounted, or another's: everything on record would
/// be forgotten as gone.
fn check_pool(pool: &Pool, disk: &Disk, records: &Records) -> Result<(), WorkError> {
    let (found, known) = (pool.facts().number, disk.pool_number()?);
    match known {
        Some(known) if known != found && !records.releases.is_empty() => Err(WorkError::OtherPool {
            path: pool.facts().root.clone(),
            found,
            known,
            releases: records.releases.len(),
        }),
        Some(known) if known == found => Ok(()),
        _ => Ok(disk.put_pool_number(found)?),
    }
}

fn firewall_config(config: &Config) -> FirewallConfig {
    FirewallConfig {
        node: config.node,
        resolvers: config.network.resolvers.clone(),
        allowed: config.network.allow.clone(),
    }
}

fn guard_blocks(config: &Config) -> Result<(), epagent_isolation::Error> {
    config.network.blocks().try_for_each(|(base, prefix)| net::guard_block(base, prefix))
}

/// Puts right what others have changed of the host's network since the node began, and what has come up late.
pub fn keep_network(config: &Config) -> Result<Mended, WorkError> {
    let filter = net::keep_firewall(&firewall_config(config))?;
    let settings = net::enable_forwarding(config.node)?;
    guard_blocks(config)?;
    Ok(Mended { filter, settings })
}

/// Opens all there is and sorts out what was left half done.
pub fn recover(config: Config, listener: OwnedFd) -> Result<Parts, WorkError> {
    let binaries = Binaries::open(&config)?;
    let sockets = Sockets::open(&config.jail_sockets())?;
    let app_sockets = AppSockets::open(&config)?;
    let disk = Disk::open(&config.state_dir)?;
    let wanted = pool_to_open(&config, &disk)?;
    // Waits for a predecessor's last child, which may be writing records still.
    let pool = Pool::open_or_create(&wanted)?;
    let records = disk.read()?;
    check_pool(&pool, &disk, &records)?;
    let cgroups = CgroupRoot::open(&config.cgroup.root)?;
    net::install_firewall(&firewall_config(&config))?;
    net::enable_forwarding(config.node)?;
    guard_blocks(&config)?;
    skeleton::ensure(&pool)?;

    let boot = boot_id()?;
    // First the pool finishes or takes back what it was in the middle of; only then is it asked what it has.
    let mut live = pool.live_set()?;
    claim(&records, &mut live);
    let swept = pool.sweep(&live)?;
    for line in swept.finished.iter().chain(&swept.undone).chain(&swept.orphans).chain(&swept.failed) {
        tracing::info!("pool: {line}");
    }
    let found = sweep::survey(&cgroups)?;
    let reader_gid = config.brain_uid;
    let site = Site {
        pool: &pool,
        disk: &disk,
        cgroups: &cgroups,
        sockets: sockets.path(),
        app_sockets: app_sockets.path(),
        reader_gid,
    };
    let tables = tables(records, &found, &boot, &site)?;
    for found in found.iter().filter(|found| !is_claimed(&tables, found)) {
        sweep::remove(&cgroups, &found.id)?;
    }
    let is_known = |name: &str| tables.jails.keys().any(|jail| jail.as_str() == name);
    app_sockets.sweep(is_known)?;
    let slots: Vec<u32> = tables.jails.values().filter_map(|jail| jail.record.slot).collect();
    net_links(config.node, &slots)?;
    Ok(Parts { config, tables, disk, pool, cgroups, binaries, sockets, app_sockets, boot, listener })
}

fn net_links(node: u16, keep: &[u32]) -> Result<(), WorkError> {
    for link in sweep::remove_links(node, keep)? {
        tracing::info!(%link, "removed an interface that no jail has");
    }
    Ok(())
}

fn boot_id() -> Result<String, WorkError> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|text| text.trim().to_owned())
        .map_err(|source| WorkError::Call { operation: "read the kernel's boot id", source })
}

/// A jail of ours; one that was lost only for as long as its monitor lives after all.
fn is_claimed(tables: &Tables, found: &Found) -> bool {
    let jail = found.id.as_str().parse::<JailId>().ok().and_then(|jail| tables.jails.get(&jail));
    jail.is_some_and(|jail| jail.record.concluded.is_none() || found.monitor_alive)
}

/// The tables as records and pool have them together; records of what never came to be are removed.
fn tables(records: Records, found: &[Found], boot: &str, site: &Site<'_>) -> Result<Tables, WorkError> {
    let mut tables = Tables::default();
    records.apps.into_iter().for_each(|record| tables.insert_app(record));
    for image in site.pool.image_list()?.into_iter().filter(|image| image.current) {
        if let Ok(name) = image.id.name.as_str().parse() {
            tables.images.insert(name, image.id);
        }
    }
    for volume in site.pool.volume_list()? {
        if let (Ok(app), Ok(name)) = (volume.app.as_str().parse(), volume.name.as_str().parse()) {
            tables.volumes.insert((app, name), volume.usage.limit_bytes);
        }
    }
    for log in site.pool.log_dir_list()? {
        tables.logs.extend(log.instance.as_str().parse::<JailId>());
    }
    releases(records.releases, &mut tables, site)?;
    let launched: BTreeSet<&str> = found.iter().map(|found| found.id.as_str()).collect();
    for record in records.jails {
        if record.boot == boot && !launched.contains(record.jail.as_str()) && record.concluded.is_none() {
            // The runner was killed before it launched it; nobody was told of it. Whoever asked asks again.
            perform(&Work::Discard(Discard::of(&record)), site)?;
        } else {
            tables.insert_jail(Jail::new(record.clone(), phase(&record, boot)));
        }
    }
    tables.give_slots_from(records.first_slot);
    Ok(tables)
}

fn phase(record: &JailRecord, boot: &str) -> Phase {
    match &record.concluded {
        Some(exit) => Phase::Exited { exit: exit.clone(), started_at_ms: None },
        None if record.boot == boot => Phase::Starting,
        // The machine was started anew since.
        None => Phase::Exited { exit: lost(), started_at_ms: None },
    }
}

fn lost() -> Exit {
    Exit { monitor_lost: true, at_ms: crate::now_ms(), ..Exit::default() }
}

/// A release is as its tree is: sealing and removing change the tree first and the record after.
fn releases(records: Vec<ReleaseRecord>, tables: &mut Tables, site: &Site<'_>) -> Result<(), WorkError> {
    let mut trees: BTreeMap<(AppName, ReleaseNumber), ()> = BTreeMap::new();
    for tree in site.pool.release_list()? {
        if let (Ok(app), Ok(release)) = (tree.app.as_str().parse(), tree.release.as_str().parse()) {
            trees.insert((app, release), ());
        }
    }
    for mut record in records {
        let is_sealed = trees.remove(&(record.app.clone(), record.release)).is_some();
        let is_staged = !is_sealed && site.pool.staging_open(&record.staging()).is_ok();
        if !is_sealed && !is_staged {
            // What there is of its tree was never completed.
            site.pool.staging_abort(&record.staging())?;
            site.disk.remove_release(&record.app, record.release)?;
            continue;
        }
        if is_sealed != record.sealed {
            record.sealed = is_sealed;
            site.disk.put_release(&record)?;
        }
        tables.insert_release(record);
    }
    for (app, release) in trees.keys() {
        tracing::warn!(%app, %release, "the pool has a release of which there is no record; it is left alone");
    }
    Ok(())
}

/// What records speak for: the trees that are being built and the roots of jails.
fn claim(records: &Records, live: &mut LiveSet) {
    let releases = records.releases.iter().filter(|record| !record.sealed).map(ReleaseRecord::staging);
    let jobs = records.jails.iter().filter(|job| job.makes_image().is_some() && job.concluded.is_none());
    live.staging = releases.chain(jobs.map(JailRecord::image_staging)).collect();
    live.instances = records.jails.iter().filter_map(|record| instance_id(&record.jail).ok()).collect();
}

impl Server {
    /// Connects to the monitors that live; the others are lost.
    pub fn reattach(&mut self) {
        let starting = self.tables.jails.iter().filter(|(_, jail)| jail.phase == Phase::Starting);
        for jail in starting.map(|(jail, _)| jail.clone()).collect::<Vec<_>>() {
            self.reconnect(&jail);
        }
        self.drop_trees_of_lost_jobs();
    }

    /// Trees of image jobs that ended with the machine.
    fn drop_trees_of_lost_jobs(&mut self) {
        let jails = self.tables.jails.values();
        let lost = jails
            .filter(|jail| jail.record.concluded.is_none() && matches!(jail.phase, Phase::Exited { .. }));
        let work: Vec<_> = lost
            .filter_map(|jail| {
                let image = jail.record.makes_image()?.clone();
                let job = JailRecord { concluded: Some(lost_exit(jail)), ..jail.record.clone() };
                Some((
                    Key::Image(image.clone()),
                    Work::ImageConclude { job, image, publish: false, in_use: BTreeSet::new() },
                ))
            })
            .collect();
        for (key, work) in work {
            self.admit(Task::Own { work, keys: vec![(key, Hold::Exclusive)] });
        }
    }
}

fn lost_exit(jail: &Jail) -> Exit {
    match &jail.phase {
        Phase::Exited { exit, .. } => exit.clone(),
        _ => lost(),
    }
}
