//! The work that may take long, as a closed list: what a forked child does with the disk.
//!
//! A [`Work`] is plain data made by the pure check; [`perform`] carries it out, with no choice left. Each begins by
//! making its intent durable (a record) and is idempotent, so that one that was killed half way is done again
//! or undone by [`crate::recover`].

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::path::Path;

use epagent_isolation::cgroup::CgroupRoot;
use epagent_isolation::sweep;
use epagent_storage::{self as storage, Base, ImageId, Pool, Quota, StagingId};
use epagent_wire::name::{AppName, ImageName, JailId, ReleaseNumber, VolumeName};
use epagent_wire::runner::{Refusal, RefusalCode};
use nix::errno::Errno;
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, fchown};
use serde::{Deserialize, Serialize};

use crate::app_sockets;
use crate::config::Config;
use crate::disk::{Disk, DiskError};
use crate::recover::keep_network;
use crate::tables::{AppRecord, JailRecord, ReleaseRecord};

/// The two log files of a jail and its exit record fit in.
const LOG_QUOTA: Quota = Quota::mib(32);
/// What a job may write however full the pool is; the pool's own limit still holds.
const JOB_BYTES_MIN: u64 = 64 << 20;

/// What one child does.
#[derive(Debug, Clone)]
pub enum Work {
    AppEnsure(AppRecord),
    AppRemove(AppRemoval),
    ImageStage {
        job: JailRecord,
        image: ImageName,
        quota: Quota,
    },
    /// Publishes (or, after a failure, drops) the tree of an ended job and writes its end to its record.
    ImageConclude {
        job: JailRecord,
        image: ImageName,
        publish: bool,
        in_use: BTreeSet<ImageId>,
    },
    ImageRemove {
        image: ImageName,
        in_use: BTreeSet<ImageId>,
    },
    ReleaseStage {
        job: JailRecord,
        release: ReleaseRecord,
        quota: Quota,
    },
    /// A job in a tree that exists.
    JobPrepare {
        job: JailRecord,
        release: ReleaseRecord,
    },
    ReleaseSeal(ReleaseRecord),
    ReleaseAbort(ReleaseRecord),
    ReleaseRemove {
        app: AppName,
        release: ReleaseNumber,
    },
    VolumeEnsure {
        app: AppName,
        volume: VolumeName,
        quota: Quota,
    },
    VolumeRemove {
        app: AppName,
        volume: VolumeName,
    },
    InstancePrepare {
        jail: JailRecord,
        app: AppName,
        release: ReleaseNumber,
        quota: Quota,
    },
    Discard(Discard),
    /// Kills what is left of a jail whose monitor is gone; its record stays and tells how it ended.
    Reap(JailRecord),
    LogRemove {
        jail: JailId,
    },
    Survey,
    /// Looks after what the host's network has to be for the instances.
    KeepNetwork(Box<Config>),
}

impl Work {
    /// What it is, for messages: `make app shop`.
    pub fn name(&self) -> String {
        match self {
            Work::AppEnsure(record) => format!("make app {}", record.app),
            Work::AppRemove(removal) => format!("remove app {}", removal.app),
            Work::ImageStage { image, .. } => format!("make a tree for image {image}"),
            Work::ImageConclude { image, .. } => format!("publish image {image}"),
            Work::ImageRemove { image, .. } => format!("remove image {image}"),
            Work::ReleaseStage { release, .. } => {
                format!("make the tree of release {} of {}", release.release, release.app)
            }
            Work::JobPrepare { job, .. } => format!("prepare job {}", job.jail),
            Work::ReleaseSeal(record) => format!("seal release {} of {}", record.release, record.app),
            Work::ReleaseAbort(record) => {
                format!("drop the tree of release {} of {}", record.release, record.app)
            }
            Work::ReleaseRemove { app, release } => format!("remove release {release} of {app}"),
            Work::VolumeEnsure { app, volume, .. } => format!("make volume {volume} of {app}"),
            Work::VolumeRemove { app, volume } => format!("remove volume {volume} of {app}"),
            Work::InstancePrepare { jail, .. } => format!("prepare jail {}", jail.jail),
            Work::Discard(what) => format!("remove jail {}", what.jail),
            Work::Reap(record) => format!("kill what is left of jail {}", record.jail),
            Work::LogRemove { jail } => format!("remove the log of jail {jail}"),
            Work::Survey => "look at the pool".to_owned(),
            Work::KeepNetwork(_) => "look after the network".to_owned(),
        }
    }
}

/// An app with everything that is known to be its own.
#[derive(Debug, Clone)]
pub struct AppRemoval {
    pub app: AppName,
    pub jails: Vec<JailId>,
    pub releases: Vec<ReleaseRecord>,
    pub volumes: Vec<VolumeName>,
    pub logs: Vec<JailId>,
}

/// Removes what is left of a jail, whatever state it is in: processes, cgroups, socket, root, record.
#[derive(Debug, Clone)]
pub struct Discard {
    pub jail: JailId,
    /// The tree of a job on an image.
    pub image_staging: Option<StagingId>,
    /// The release for which the jail was made and which has to go with it, when its making failed.
    pub release: Option<ReleaseRecord>,
}

impl Discard {
    pub fn of(record: &JailRecord) -> Discard {
        let image_staging = record.makes_image().map(|_| record.image_staging());
        Discard { jail: record.jail.clone(), image_staging, release: None }
    }
}

/// What the child tells the loop.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Outcome {
    Done,
    Image(ImageId),
    /// Whether the tree has a file of certificate authorities that another can be mounted over.
    Tree {
        has_ca_bundle: bool,
    },
    Survey(Box<Survey>),
    Network(Mended),
}

/// What was put right of the host's network.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Mended {
    /// The packet filter was gone.
    pub filter: bool,
    /// Names below /proc/sys/net.
    pub settings: Vec<String>,
}

/// Figures of what is on the pool; which objects exist is in the tables.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Survey {
    pub images: Vec<(ImageId, u64, u64)>,
    pub releases: Vec<(String, String, u64)>,
    pub volumes: Vec<(String, String, u64)>,
    pub pool_total_bytes: u64,
    pub pool_used_bytes: u64,
    pub pool_reserve_bytes: u64,
}

/// Where the work is done: what the loop has open and the child inherits.
#[derive(Debug, Clone, Copy)]
pub struct Site<'a> {
    pub pool: &'a Pool,
    pub disk: &'a Disk,
    pub cgroups: &'a CgroupRoot,
    /// The folder of the monitors' control sockets.
    pub sockets: &'a Path,
    /// The folder of the folders in which apps listen.
    pub app_sockets: &'a Path,
    /// The agent's group, which may read logs.
    pub reader_gid: u32,
}

/// Why a piece of work failed.
#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    #[error(transparent)]
    Storage(#[from] storage::Error),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Isolation(#[from] epagent_isolation::Error),
    #[error(
        "{} is gone, and with it the pool of the releases on record: is its disk mounted? Without it, remove the records \
         in the state folder's `releases` to begin anew",
        path.display()
    )]
    NoPool { path: std::path::PathBuf },
    #[error(
        "{} is another pool ({found}) than the one of the {releases} releases on record ({known}): is its disk \
         mounted? Without that one, remove the records in the state folder's `releases` to begin anew",
        path.display()
    )]
    OtherPool { path: std::path::PathBuf, found: u16, known: u16, releases: usize },
    #[error("{operation}")]
    Call {
        operation: &'static str,
        #[source]
        source: std::io::Error,
    },
}

impl WorkError {
    pub fn refusal(&self) -> Refusal {
        use storage::Error as E;
        let code = match self {
            WorkError::Storage(E::PoolFull { .. } | E::QuotaFull { .. }) => RefusalCode::NoSpace,
            WorkError::Storage(E::NotFound { .. }) => RefusalCode::NotFound,
            WorkError::Storage(E::Conflict { .. } | E::Busy { .. } | E::ImageInUse { .. }) => {
                RefusalCode::Conflict
            }
            _ => RefusalCode::System,
        };
        Refusal { code, message: chain(self) }
    }
}

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// A job may fill at most half of what tenants have left, so that its neighbours go on writing meanwhile.
fn capped(pool: &Pool, quota: Quota) -> Result<Quota, WorkError> {
    let usage = pool.usage()?;
    let left_bytes = usage.tenant_limit_bytes.saturating_sub(usage.tenant_used_bytes);
    Ok(Quota::bytes(quota.limit_bytes.min((left_bytes / 2).max(JOB_BYTES_MIN))))
}

/// Does it. Called in a child; the loop never calls it except before it serves.
pub fn perform(work: &Work, site: &Site<'_>) -> Result<Outcome, WorkError> {
    let Site { pool, disk, .. } = *site;
    match work {
        Work::AppEnsure(record) => disk.put_app(record)?,
        Work::AppRemove(removal) => remove_app(removal, site)?,
        Work::ImageStage { job, image, quota } => {
            disk.put_jail(job)?;
            log_folder(&job.jail, site)?;
            pool.image_stage(&job.image_staging(), &image_name(image)?, capped(pool, *quota)?)?;
        }
        Work::ImageConclude { job, image, publish, in_use } => {
            return conclude_image(job, image, *publish, in_use, site);
        }
        Work::ImageRemove { image, in_use } => match pool.image_remove(&image_name(image)?, in_use) {
            Ok(()) | Err(storage::Error::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        },
        Work::ReleaseStage { job, release, quota } => {
            disk.put_release(release)?;
            disk.put_jail(job)?;
            log_folder(&job.jail, site)?;
            pool.staging_abort(&release.staging())?;
            let (app, number) = (app_name(&release.app)?, release_id(release.release)?);
            let base = Base::Image(release.image.clone());
            let quota = capped(pool, *quota)?;
            let tree = pool.release_stage(&release.staging(), &app, &number, &base, quota)?;
            make_app_folder(&tree)?;
            return Ok(Outcome::Tree { has_ca_bundle: has_ca_bundle(&tree) });
        }
        Work::JobPrepare { job, release } => {
            disk.put_jail(job)?;
            log_folder(&job.jail, site)?;
            let tree = pool.staging_open(&release.staging())?;
            return Ok(Outcome::Tree { has_ca_bundle: has_ca_bundle(&tree) });
        }
        Work::ReleaseSeal(record) => {
            let (app, number) = (app_name(&record.app)?, release_id(record.release)?);
            pool.release_publish(&record.staging(), &app, &number)?;
            disk.put_release(record)?;
        }
        Work::ReleaseAbort(record) => {
            pool.staging_abort(&record.staging())?;
            disk.remove_release(&record.app, record.release)?;
        }
        Work::ReleaseRemove { app, release } => {
            gone(pool.release_remove(&app_name(app)?, &release_id(*release)?))?;
            disk.remove_release(app, *release)?;
        }
        Work::VolumeEnsure { app, volume, quota } => {
            pool.volume_ensure(&app_name(app)?, &volume_name(volume)?, *quota)?;
        }
        Work::VolumeRemove { app, volume } => {
            gone(pool.volume_remove(&app_name(app)?, &volume_name(volume)?))?
        }
        Work::InstancePrepare { jail, app, release, quota } => {
            disk.put_jail(jail)?;
            log_folder(&jail.jail, site)?;
            let root = pool.instance_root_create(
                &instance_id(&jail.jail)?,
                &app_name(app)?,
                &release_id(*release)?,
                *quota,
            )?;
            return Ok(Outcome::Tree { has_ca_bundle: has_ca_bundle(&root) });
        }
        Work::Discard(what) => discard(what, site)?,
        Work::Reap(record) => {
            disk.put_jail(record)?;
            sweep::remove(site.cgroups, &isolation_id(&record.jail)?)?;
        }
        Work::LogRemove { jail } => gone(pool.log_dir_remove(&instance_id(jail)?))?,
        Work::Survey => return survey(pool).map(|survey| Outcome::Survey(Box::new(survey))),
        Work::KeepNetwork(config) => return keep_network(config).map(Outcome::Network),
    }
    Ok(Outcome::Done)
}

fn remove_app(removal: &AppRemoval, site: &Site<'_>) -> Result<(), WorkError> {
    let app = app_name(&removal.app)?;
    for jail in &removal.jails {
        discard(&Discard { jail: jail.clone(), image_staging: None, release: None }, site)?;
    }
    for record in &removal.releases {
        site.pool.staging_abort(&record.staging())?;
        gone(site.pool.release_remove(&app, &release_id(record.release)?))?;
        site.disk.remove_release(&record.app, record.release)?;
    }
    for volume in &removal.volumes {
        gone(site.pool.volume_remove(&app, &volume_name(volume)?))?;
    }
    for jail in &removal.logs {
        gone(site.pool.log_dir_remove(&instance_id(jail)?))?;
    }
    // Last, so that a removal that was cut short is asked for again.
    Ok(site.disk.remove_app(&removal.app)?)
}

fn conclude_image(
    job: &JailRecord,
    image: &ImageName,
    publish: bool,
    in_use: &BTreeSet<ImageId>,
    site: &Site<'_>,
) -> Result<Outcome, WorkError> {
    let outcome = if publish {
        let id = site.pool.image_publish(&job.image_staging(), &image_name(image)?)?;
        site.pool.image_gc(in_use)?;
        Outcome::Image(id)
    } else {
        site.pool.staging_abort(&job.image_staging())?;
        Outcome::Done
    };
    site.disk.put_jail(job)?;
    Ok(outcome)
}

fn discard(what: &Discard, site: &Site<'_>) -> Result<(), WorkError> {
    sweep::remove(site.cgroups, &isolation_id(&what.jail)?)?;
    match std::fs::remove_file(crate::launch::control_socket(site.sockets, &what.jail)) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            return Err(WorkError::Call { operation: "remove the monitor's socket", source });
        }
        _ => {}
    }
    app_sockets::remove(site.app_sockets, &what.jail)?;
    if let Some(staging) = &what.image_staging {
        site.pool.staging_abort(staging)?;
    }
    if let Some(release) = &what.release {
        site.pool.staging_abort(&release.staging())?;
        site.disk.remove_release(&release.app, release.release)?;
    }
    gone(site.pool.instance_root_remove(&instance_id(&what.jail)?))?;
    Ok(site.disk.remove_jail(&what.jail)?)
}

fn survey(pool: &Pool) -> Result<Survey, WorkError> {
    let usage = pool.usage()?;
    Ok(Survey {
        images: (pool.image_list()?.into_iter())
            .map(|image| (image.id, image.usage.used_bytes, image.created_ms))
            .collect(),
        releases: (pool.release_list()?.into_iter())
            .map(|release| (release.app.into(), release.release.into(), release.usage.used_bytes))
            .collect(),
        volumes: (pool.volume_list()?.into_iter())
            .map(|volume| (volume.app.into(), volume.name.into(), volume.usage.used_bytes))
            .collect(),
        pool_total_bytes: usage.size_bytes,
        pool_used_bytes: usage.size_bytes.saturating_sub(usage.free_bytes),
        pool_reserve_bytes: usage.reserve_bytes,
    })
}

/// Its parents are root's alone; the agent, given the folder's descriptor, may read in it: what is made in it gets the
/// agent's group from the folder.
fn log_folder(jail: &JailId, site: &Site<'_>) -> Result<(), WorkError> {
    let fault = |error: Errno| WorkError::Call {
        operation: "open the log folder to the agent",
        source: error.into(),
    };
    let folder = site.pool.log_dir_ensure(&instance_id(jail)?, LOG_QUOTA)?;
    fchown(&folder, None, Some(Gid::from_raw(site.reader_gid))).map_err(fault)?;
    // After the change of the group, which clears the set-group-id bit.
    fchmod(&folder, Mode::from_bits_truncate(0o2750)).map_err(fault)
}

/// `/app` of a new tree. What an image may have there instead is left alone; it is the unpacker, inside, who
/// then says what is wrong with it.
fn make_app_folder(tree: &impl AsFd) -> Result<(), WorkError> {
    match nix::sys::stat::mkdirat(tree.as_fd(), "app", Mode::from_bits_truncate(0o755)) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(WorkError::Call { operation: "make /app in the new tree", source: error.into() }),
    }
}

/// Looked up below the tree without following a single link, whoever made it.
fn has_ca_bundle(tree: &impl AsFd) -> bool {
    use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
    let path = crate::order::CA_BUNDLE.trim_start_matches('/');
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    openat2(tree.as_fd(), path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
        .and_then(|file| rustix::fs::fstat(&file))
        .is_ok_and(|facts| rustix::fs::FileType::from_raw_mode(facts.st_mode).is_file())
}

/// Removing what is gone already is no failure.
fn gone(result: storage::Result<()>) -> Result<(), WorkError> {
    match result {
        Ok(()) | Err(storage::Error::NotFound { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

// Names of ours as the two crates below know them. Their alphabets contain ours.

pub fn app_name(app: &AppName) -> storage::Result<storage::AppName> {
    Ok(storage::AppName::new(app.as_str())?)
}

pub fn image_name(image: &ImageName) -> storage::Result<storage::ImageName> {
    Ok(storage::ImageName::new(image.as_str())?)
}

pub fn release_id(release: ReleaseNumber) -> storage::Result<storage::ReleaseId> {
    Ok(storage::ReleaseId::new(release.to_string())?)
}

pub fn volume_name(volume: &VolumeName) -> storage::Result<storage::VolumeName> {
    Ok(storage::VolumeName::new(volume.as_str())?)
}

pub fn instance_id(jail: &JailId) -> storage::Result<storage::InstanceId> {
    Ok(storage::InstanceId::new(jail.as_str())?)
}

pub fn isolation_id(jail: &JailId) -> Result<epagent_isolation::id::JailId, WorkError> {
    epagent_isolation::id::JailId::new(jail.as_str()).map_err(|error| WorkError::Call {
        operation: "name the jail",
        source: std::io::Error::new(std::io::ErrorKind::InvalidInput, error.to_string()),
    })
}
