//! The words of the public interface: how a pool is configured, what it reports, what an object costs.
//!
//! Plain data, no behaviour beyond defaults; everything that acts is on [`crate::Pool`].

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::name::{AppName, ImageId, InstanceId, ReleaseId, StagingId, VolumeName};

/// The smallest reserve kept for the agent unless configured otherwise.
pub const RESERVE_BYTES_MIN: u64 = 256 << 20;
/// The default reserve, as a share of the pool.
pub const RESERVE_PERCENT: u64 = 5;
/// The smallest loop file: below it btrfs has no room for its own bookkeeping.
pub const POOL_BYTES_MIN: u64 = 256 << 20;

/// Where the pool is, and what it keeps back.
#[derive(Debug, Clone)]
pub struct PoolConfig {
    pub location: Location,
    /// Part of the pool that tenants together can never fill. `None`: max(5 %, 256 MiB).
    pub reserve_bytes: Option<u64>,
    pub quota: QuotaPolicy,
    /// How long to wait for another agent (or a predecessor's last child) to let go of the pool.
    pub lock_wait_ms: u64,
}

impl PoolConfig {
    /// The embedded default: a fully allocated loop file, mounted at `mount_point`.
    pub fn loop_file(file: impl Into<PathBuf>, mount_point: impl Into<PathBuf>, size_bytes: u64) -> Self {
        Self {
            location: Location::LoopFile {
                file: file.into(),
                mount_point: mount_point.into(),
                size_bytes,
                allocation: Allocation::Full,
            },
            reserve_bytes: None,
            quota: QuotaPolicy::default(),
            lock_wait_ms: 2_000,
        }
    }

    /// A directory on a btrfs that somebody else made and mounted.
    pub fn existing(path: impl Into<PathBuf>) -> Self {
        Self {
            location: Location::Existing { path: path.into() },
            reserve_bytes: None,
            quota: QuotaPolicy::default(),
            lock_wait_ms: 2_000,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    Existing { path: PathBuf },
    LoopFile { file: PathBuf, mount_point: PathBuf, size_bytes: u64, allocation: Allocation },
}

/// Whether the loop file owns all its blocks from the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Allocation {
    /// Every block is reserved at creation and discards are off, so the host's disk cannot fill up under the pool.
    #[default]
    Full,
    /// Blocks are taken as they are written. For tests and throw-away pools only: when the host's disk is full, btrfs
    /// sees write errors and goes read-only.
    Sparse,
}

/// Which quota mechanism to use, and whether it may be switched on for a file system that is not only ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuotaPolicy {
    /// `None`: simple quotas where the kernel has them (6.7), else ordinary qgroups.
    pub mode: Option<QuotaMode>,
    /// For [`Location::Existing`] with quotas off: switch them on (true), or refuse to open (false).
    /// A loop file made by this crate always gets quotas.
    pub enable_on_existing: bool,
}

impl Default for QuotaPolicy {
    fn default() -> Self {
        Self { mode: None, enable_on_existing: true }
    }
}

/// The mechanism that holds the limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum QuotaMode {
    /// Simple quotas: every extent belongs to the subvolume that wrote it; nested subvolumes inherit the fence.
    Simple,
    /// Ordinary qgroups, the fallback below 6.7. Limits hold per subvolume, the reserve is kept from new objects only,
    /// and a tenant who could create nested subvolumes would escape: the jail must refuse him the btrfs ioctls 1, 14,
    /// 23 and 24.
    Ordinary,
}

/// Whether limits are being kept right now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum QuotaHealth {
    Good,
    /// btrfs says its counts are inconsistent or being recounted; limits may be wrong until a rescan.
    Inconsistent,
    /// The pool had quotas and somebody switched them off. Nothing tenant-writable is created until
    /// [`crate::Pool::quota_restore`]; what runs goes on.
    Off,
}

/// What `doctor` shows of a pool.
#[derive(Debug, Clone, Serialize)]
pub struct PoolFacts {
    pub root: PathBuf,
    /// Drawn when the pool was made, to tell it from others.
    pub number: u16,
    /// True when this call made the file system.
    pub created: bool,
    pub quota_mode: QuotaMode,
    pub quota_health: QuotaHealth,
    pub reserve_bytes: u64,
    /// Things an operator should know, e.g. mount flags missing on an existing path.
    pub remarks: Vec<String>,
}

/// A whole disk (no partition), as the kernel numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DiskNumber {
    pub major: u32,
    pub minor: u32,
}

/// The limit of one object, in bytes of its own new data and metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Quota {
    pub limit_bytes: u64,
}

impl Quota {
    pub const fn bytes(limit_bytes: u64) -> Self {
        Self { limit_bytes }
    }
    pub const fn mib(mib: u64) -> Self {
        Self { limit_bytes: mib << 20 }
    }
}

/// Figures of the whole pool. Quota figures are those of the last commit (at most 30 s old; exact after
/// [`crate::Pool::sync`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PoolUsage {
    pub size_bytes: u64,
    pub free_bytes: u64,
    /// What tenants' objects use together, and may.
    pub tenant_used_bytes: u64,
    pub tenant_limit_bytes: u64,
    pub reserve_bytes: u64,
}

/// Figures of one object, as fresh as [`PoolUsage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Usage {
    pub used_bytes: u64,
    /// 0 when the object has no limit (quotas were off when it was made).
    pub limit_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ImageInfo {
    pub id: ImageId,
    pub current: bool,
    pub created_ms: u64,
    pub usage: Usage,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReleaseInfo {
    pub app: AppName,
    pub release: ReleaseId,
    /// The image it was cloned from, `None` for an empty base.
    pub image: Option<ImageId>,
    pub created_ms: u64,
    pub usage: Usage,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct InstanceInfo {
    pub instance: InstanceId,
    pub app: AppName,
    pub release: ReleaseId,
    pub created_ms: u64,
    pub usage: Usage,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VolumeInfo {
    pub app: AppName,
    pub name: VolumeName,
    /// Set when the volume was made and never again: the same name with another id is another volume.
    pub volume_id: String,
    pub created_ms: u64,
    pub usage: Usage,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LogDirInfo {
    pub instance: InstanceId,
    pub created_ms: u64,
    pub usage: Usage,
}

/// What a release is built on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Base {
    Image(ImageId),
    /// Nothing: the jail binds its system files from elsewhere.
    Empty,
}

/// What a sweep must leave alone, and as of when. Made by [`crate::Pool::live_set`] *before* the caller looks at what it
/// runs, so that whatever is created meanwhile is newer than the set and spared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveSet {
    pub staging: BTreeSet<StagingId>,
    pub instances: BTreeSet<InstanceId>,
    pub(crate) as_of: u64,
}

/// What a sweep did.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct SweepReport {
    /// Operations cut short that were completed.
    pub finished: Vec<String>,
    /// Operations cut short that were taken back.
    pub undone: Vec<String>,
    /// Objects nobody claims, removed.
    pub orphans: Vec<String>,
    /// Left alone: live, or in the hands of a running operation.
    pub spared: Vec<String>,
    /// Empty quota groups removed.
    pub groups_removed: u32,
    /// What could not be cleaned; the next sweep tries again.
    pub failed: Vec<String>,
}
