//! Opening a pool: find or make the file system, lock it, settle its quotas, lay out its folders.
//!
//! ```text
//!  lock ──▶ up (loop file) or check (existing path) ──▶ identity ──▶ quotas ──▶ folders ──▶ open
//! ```
//!
//! Each arrow is idempotent, so a pool whose opening was cut short is opened by opening it again. The pool's identity
//! (its number, which keeps its quota groups apart from others', and the quota mode it was made with) is an attribute
//! of its root directory.

mod disks;
mod loopfile;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FlockOperation, Mode, StatxAttributes, StatxFlags, XattrFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::btrfs::{self, Btrfs, QuotaState};
use crate::engine::{Engine, StepObserver, open_root};
use crate::error::{Error, Result};
use crate::place::{FOLDERS, RECORDS, STAGING};
use crate::record::Records;
use crate::types::*;
use crate::{dirs, sys};

const BTRFS_MAGIC: u64 = 0x9123_683e;
/// Format of the pool as a whole; a newer one is refused.
const FORMAT: u32 = 1;
const IDENTITY: &str = "trusted.epagent.pool";
const LOCK_POLL: Duration = Duration::from_millis(20);
/// Between the reserve and the pool's end there is at least this much, for tenants and btrfs's own bookkeeping.
const TENANT_BYTES_MIN: u64 = 128 << 20;

/// An open, locked pool. Dropping it lets go of the lock and keeps everything mounted; [`Pool::close`] takes it down.
#[derive(Debug)]
pub struct Pool {
    pub(crate) engine: Engine,
    location: Location,
    facts: PoolFacts,
    fsid: [u8; 16],
    /// Shared by forked children, so a successor waits for the last of them.
    _locks: Vec<OwnedFd>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Identity {
    format: u32,
    number: u16,
    quota_mode: QuotaMode,
}

impl Pool {
    /// Opens the pool, making and mounting it first where needed, and locks it for this process and its children.
    pub fn open_or_create(config: &PoolConfig) -> Result<Pool> {
        let deadline = Instant::now() + Duration::from_millis(config.lock_wait_ms);
        let mut locks = Vec::new();
        let (root, path, created) = match &config.location {
            Location::Existing { path } => (open_root(path)?, path.clone(), false),
            Location::LoopFile { file, mount_point, size_bytes, allocation } => {
                locks.push(lock(loopfile::open_lock(file)?, file, deadline)?);
                let up = loopfile::up(file, mount_point, || {
                    checked_reserve(*size_bytes, config.reserve_bytes)?;
                    Ok((*size_bytes, *allocation))
                })?;
                (up.root, mount_point.clone(), up.created)
            }
        };
        check_btrfs(&root, &path)?;
        locks.push(lock(duplicate(&root, &path)?, &path, deadline)?);
        let is_ours = matches!(config.location, Location::LoopFile { .. });
        let identity = identify(&root, &path, config.quota, is_ours)?;
        for folder in FOLDERS {
            let folder = dirs::ensure(&root, folder)?;
            rustix::fs::fchmod(&folder, Mode::RWXU)
                .map_err(|e| Error::io("close to others", path_text(&path), e))?;
        }
        let reserve_bytes = reserve(&root, &path, config.reserve_bytes)?;
        let backend = Btrfs {
            group_lock: dirs::require(&root, STAGING)?,
            root: duplicate(&root, &path)?,
            mode: identity.quota_mode,
            number: identity.number,
            reserve_bytes,
        };
        let records = Records::new(dirs::require(&root, RECORDS)?);
        let engine = Engine::new(root, records, Box::new(backend));
        let quota_health = engine.backend.quota_health()?;
        if quota_health != QuotaHealth::Off {
            engine.backend.refresh_reserve()?;
        }
        engine.backend.commit()?;
        let fsid = sys::fs_id(engine.root()).map_err(|e| Error::io("read the id of", path_text(&path), e))?;
        let facts = PoolFacts {
            remarks: remarks(&engine, quota_health, identity.quota_mode)?,
            root: path,
            number: identity.number,
            created,
            quota_mode: identity.quota_mode,
            quota_health,
            reserve_bytes,
        };
        Ok(Pool { engine, location: config.location.clone(), facts, fsid, _locks: locks })
    }

    /// Unmounts a loop-file pool and frees its loop device, waiting at most 2 s for the last user; an existing path is
    /// only let go.
    pub fn close(self) -> Result<()> {
        let Pool { engine, location, _locks, .. } = self;
        engine.backend.flush()?;
        drop(engine);
        // The lock on the root directory would keep the mount busy; the one on the lock file is held to the end.
        let keep: Vec<OwnedFd> = match &location {
            Location::LoopFile { .. } => _locks.into_iter().take(1).collect(),
            Location::Existing { .. } => Vec::new(),
        };
        let result = match &location {
            Location::LoopFile { file, mount_point, .. } => loopfile::down(file, mount_point),
            Location::Existing { .. } => Ok(()),
        };
        drop(keep);
        result
    }

    pub fn facts(&self) -> &PoolFacts {
        &self.facts
    }

    /// The disks it lies on, now: an operator may add and replace devices of a mounted btrfs. Does not wait for them.
    pub fn disks(&self) -> Result<Vec<DiskNumber>> {
        disks::below(Path::new(disks::SYSFS), &self.fsid)
            .map_err(|e| Error::io("look for the disks of", path_text(&self.facts.root), e))
    }

    /// The state of the quotas now, which an operator (or an inconsistency) may have changed since opening.
    pub fn quota_health(&self) -> Result<QuotaHealth> {
        self.engine.backend.quota_health()
    }

    /// Switches quotas on again after somebody switched them off; only on the operator's word, since what was written
    /// meanwhile is not counted. Reopen the pool afterwards; limits come back as objects are ensured again.
    pub fn quota_restore(&mut self) -> Result<()> {
        if self.engine.backend.quota_health()? == QuotaHealth::Off {
            btrfs::enable(self.engine.root(), Some(self.facts.quota_mode))?;
        }
        self.engine.backend.refresh_reserve()?;
        self.engine.backend.commit()?;
        self.facts.quota_health = self.engine.backend.quota_health()?;
        Ok(())
    }

    pub fn usage(&self) -> Result<PoolUsage> {
        self.engine.backend.pool_usage()
    }

    /// Writes out and commits everything so far.
    pub fn sync(&self) -> Result<()> {
        self.engine.backend.flush()
    }

    /// Has `observer` called with a description of each step before it is performed: for traces, and for tests that
    /// cut an operation short.
    pub fn observe_steps(&mut self, observer: StepObserver) {
        self.engine.observer = Some(observer);
    }

    /// Nothing a tenant can write to is made without a limit.
    pub(crate) fn require_quota(&self) -> Result<()> {
        match self.engine.backend.quota_health()? {
            QuotaHealth::Off => Err(Error::QuotaOff {
                path: self.facts.root.clone(),
                advice: "they were on when the pool was made; restore them before anything new is created",
            }),
            QuotaHealth::Good | QuotaHealth::Inconsistent => Ok(()),
        }
    }
}

fn path_text(path: &Path) -> String {
    path.display().to_string()
}

fn duplicate(root: &OwnedFd, path: &Path) -> Result<OwnedFd> {
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    // Opened anew rather than dup'ed, so that a flock on it is its own.
    rustix::fs::openat(root, ".", flags, Mode::empty()).map_err(|e| Error::io("open", path_text(path), e))
}

fn lock(file: OwnedFd, path: &Path, deadline: Instant) -> Result<OwnedFd> {
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => sleep(LOCK_POLL),
            Err(Errno::WOULDBLOCK) => return Err(Error::PoolLocked { path: path.to_owned() }),
            Err(e) => return Err(Error::io("lock", path_text(path), e)),
        }
    }
}

fn check_btrfs(root: &OwnedFd, path: &Path) -> Result<()> {
    let stat =
        rustix::fs::fstatfs(root).map_err(|e| Error::io("ask for the file system of", path_text(path), e))?;
    match stat.f_type as u64 {
        BTRFS_MAGIC => Ok(()),
        magic => Err(Error::NotBtrfs { path: path.to_owned(), magic }),
    }
}

fn is_mount_root(dir: &OwnedFd, path: &Path) -> Result<bool> {
    let stat = rustix::fs::statx(dir, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)
        .map_err(|e| Error::io("stat", path_text(path), e))?;
    Ok(stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// The pool's identity: read, or (with quotas switched on first) decided and written.
fn identify(root: &OwnedFd, path: &Path, policy: QuotaPolicy, is_ours: bool) -> Result<Identity> {
    if let Some(identity) = read_identity(root, path)? {
        return Ok(identity);
    }
    let quota_mode = match btrfs::state(root)? {
        QuotaState::On { mode, .. } => mode,
        QuotaState::Off if is_ours || policy.enable_on_existing => btrfs::enable(root, policy.mode)?,
        QuotaState::Off => {
            return Err(Error::QuotaOff {
                path: path.to_owned(),
                advice: "switch them on (btrfs quota enable), or allow the agent to",
            });
        }
    };
    let identity = Identity { format: FORMAT, number: free_number(root)?, quota_mode };
    let text = serde_json::to_vec(&identity).map_err(|e| Error::io("describe", path_text(path), e))?;
    rustix::fs::fsetxattr(root, IDENTITY, &text, XattrFlags::CREATE)
        .map_err(|e| Error::io("name the pool", path_text(path), e))?;
    sys::commit(root).map_err(|e| Error::io("commit", path_text(path), e))?;
    Ok(identity)
}

fn read_identity(root: &OwnedFd, path: &Path) -> Result<Option<Identity>> {
    let mut text = [0u8; 1024];
    let failed = |e: std::io::Error| Error::io("read the identity of", path_text(path), e);
    let len = match rustix::fs::fgetxattr(root, IDENTITY, &mut text[..]) {
        Err(Errno::NODATA) => return Ok(None),
        other => other.map_err(|e| failed(e.into()))?,
    };
    let identity: Identity = serde_json::from_slice(&text[..len]).map_err(|e| failed(e.into()))?;
    match identity.format <= FORMAT {
        true => Ok(Some(identity)),
        false => Err(Error::PoolFormat { found: identity.format, known: FORMAT }),
    }
}

/// How many numbers we draw before we call it hopeless; with 65,535 of them the second is hardly ever needed.
const NUMBER_DRAWS_MAX: u32 = 64;

fn free_number(root: &OwnedFd) -> Result<u16> {
    for _ in 0..NUMBER_DRAWS_MAX {
        let number = u16::from_ne_bytes(crate::random_bytes()?);
        if number != 0 && btrfs::pool_number_is_free(root, number)? {
            return Ok(number);
        }
    }
    Err(Error::io("draw a number for", "the pool", std::io::Error::from(std::io::ErrorKind::AddrInUse)))
}

fn reserve(root: &OwnedFd, path: &Path, configured: Option<u64>) -> Result<u64> {
    let space = rustix::fs::fstatvfs(root).map_err(|e| Error::io("read the size of", path_text(path), e))?;
    checked_reserve(space.f_blocks * space.f_frsize, configured)
}

fn checked_reserve(size_bytes: u64, configured: Option<u64>) -> Result<u64> {
    let reserve_bytes = configured.unwrap_or((size_bytes / 100 * RESERVE_PERCENT).max(RESERVE_BYTES_MIN));
    let least_bytes = reserve_bytes.saturating_add(TENANT_BYTES_MIN).max(POOL_BYTES_MIN);
    match size_bytes < least_bytes {
        true => Err(Error::PoolTooSmall { size_bytes, reserve_bytes, least_bytes }),
        false => Ok(reserve_bytes),
    }
}

fn remarks(engine: &Engine, health: QuotaHealth, mode: QuotaMode) -> Result<Vec<String>> {
    let flags = rustix::fs::fstatvfs(engine.root())
        .map_err(|e| Error::io("read the flags of", "the pool", e))?
        .f_flag;
    let missing =
        |flag, name: &str| (!flags.contains(flag)).then(|| format!("the pool is not mounted {name}"));
    let mut remarks: Vec<String> = [
        missing(rustix::fs::StatVfsMountFlags::NOSUID, "nosuid"),
        missing(rustix::fs::StatVfsMountFlags::NODEV, "nodev"),
    ]
    .into_iter()
    .flatten()
    .collect();
    match health {
        QuotaHealth::Good => {}
        QuotaHealth::Inconsistent => {
            remarks.push("quota counts are inconsistent; limits may not hold".into())
        }
        QuotaHealth::Off => remarks.push("quotas were switched off; no limit holds".into()),
    }
    if !sys::space(engine.root()).map_err(|e| Error::io("read the space of", "the pool", e))?.is_mixed {
        remarks
            .push("data and metadata have chunks apart: very many small files can use up the reserve".into());
    }
    if mode == QuotaMode::Ordinary {
        remarks.push(
            "ordinary qgroups: the reserve is kept from new objects only, and nested subvolumes escape limits".into(),
        );
    }
    Ok(remarks)
}

/// A pool can be shared by threads, as it is by forked processes.
const _: fn() = || {
    fn is_shared<T: Send + Sync>() {}
    is_shared::<Pool>();
};
