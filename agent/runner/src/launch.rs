//! From an [`Order`] to a running monitor: opens what the order names and hands it to the isolation crate.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use epagent_isolation::cgroup::{CgroupRoot, Disk};
use epagent_isolation::launch::{JailExecutable, LaunchConfig, LaunchFds, Launched, launch};
use epagent_storage::Pool;
use epagent_wire::name::JailId;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use crate::app_sockets::AppSockets;
use crate::config::Config;
use crate::order::{Order, Program, Root, Source};
use crate::work::{WorkError, app_name, chain, instance_id, volume_name};

/// The folder of the monitors' sockets, by descriptor: a socket's address has 107 bytes, a state folder may have more.
#[derive(Debug)]
pub struct Sockets {
    _folder: OwnedFd,
    path: PathBuf,
}

impl Sockets {
    pub fn open(folder: &Path) -> Result<Sockets, WorkError> {
        let fault =
            |source| WorkError::Call { operation: "open the folder of the monitors' sockets", source };
        let mut builder = std::fs::DirBuilder::new();
        std::os::unix::fs::DirBuilderExt::mode(builder.recursive(true), 0o700);
        builder.create(folder).map_err(fault)?;
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let folder = open(folder, flags, Mode::empty()).map_err(|error| fault(error.into()))?;
        let path = format!("/proc/self/fd/{}", folder.as_raw_fd()).into();
        Ok(Sockets { _folder: folder, path })
    }

    /// Valid in this process and in what it forks.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

pub fn control_socket(sockets: &Path, jail: &JailId) -> PathBuf {
    sockets.join(jail.as_str())
}

/// The two programs that are ours inside of jails, opened once.
#[derive(Debug)]
pub struct Binaries {
    jail: JailExecutable,
    unpack: OwnedFd,
}

impl Binaries {
    pub fn open(config: &Config) -> Result<Binaries, WorkError> {
        let fault =
            |error: nix::Error| WorkError::Call { operation: "open unpack_binary", source: error.into() };
        let unpack =
            open(&config.unpack_binary, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).map_err(fault)?;
        Ok(Binaries { jail: JailExecutable::load(&config.jail_binary)?, unpack })
    }
}

/// Where a jail is launched: all that is the same for every one of them.
#[derive(Debug, Clone, Copy)]
pub struct Ground<'a> {
    pub config: &'a Config,
    pub binaries: &'a Binaries,
    pub cgroups: &'a CgroupRoot,
    pub pool: &'a Pool,
    pub sockets: &'a Path,
    pub app_sockets: &'a AppSockets,
}

/// Those under the pool, on which the traffic of instances is limited.
pub fn disks(pool: &Pool) -> Result<Vec<Disk>, WorkError> {
    let disks = pool.disks()?.into_iter();
    Ok(disks.map(|disk| Disk { major: disk.major, minor: disk.minor }).collect())
}

/// Starts the monitor. `descriptors` are those that came with the request: the stream of an unpack job, or the secrets of
/// an instance.
pub fn launch_order(
    order: &Order,
    descriptors: &[OwnedFd],
    ground: &Ground<'_>,
) -> Result<Launched, WorkError> {
    let mut order = order.clone();
    order.mounts.retain(|mount| exists(&mount.source));
    let spec = order.spec(ground.config)?;
    let root = open_root(&order, ground.pool)?;
    let mounts = order.mounts.iter().map(|mount| open_source(&mount.source, &order, ground));
    let mounts = mounts.collect::<Result<Vec<OwnedFd>, WorkError>>()?;
    let logs = ground.pool.log_dir_open(&instance_id(&order.jail.jail)?)?;
    let given = descriptors.first().map(|descriptor| descriptor.as_fd());
    let unpacks = matches!(order.program, Program::Unpack(_));
    let fds = LaunchFds {
        root: Some(root.as_fd()),
        mounts: mounts.iter().map(|mount| mount.as_fd()).collect::<Vec<BorrowedFd<'_>>>(),
        program: unpacks.then(|| ground.binaries.unpack.as_fd()),
        secrets: given.filter(|_| !unpacks),
        logs: Some(logs.as_fd()),
        stdin: given.filter(|_| unpacks),
        lease: None,
    };
    // An app without its limit is better than none, and `doctor` tells of a node on which there are no limits.
    let disks = disks(ground.pool).unwrap_or_else(|error| {
        tracing::warn!(jail = %order.jail.jail, "its disk traffic is not limited: {}", chain(&error));
        Vec::new()
    });
    let config = LaunchConfig {
        executable: &ground.binaries.jail,
        cgroups: ground.cgroups,
        disks: &disks,
        control_socket: control_socket(ground.sockets, &order.jail.jail),
    };
    Ok(launch(&config, &spec, &fds)?)
}

/// A host need not have each folder that Debian has.
fn exists(source: &Source) -> bool {
    match source {
        Source::Host(folder) => Path::new(folder.path()).is_dir(),
        Source::Volume(..) | Source::Staging(_) | Source::CaBundle | Source::AppSocket => true,
    }
}

fn open_root(order: &Order, pool: &Pool) -> Result<OwnedFd, WorkError> {
    Ok(match &order.root {
        Root::Instance => pool.instance_root_open(&instance_id(&order.jail.jail)?)?,
        Root::Staging(staging) => pool.staging_open(staging)?,
        Root::Image(image) => pool.image_open(image)?,
    })
}

fn open_source(source: &Source, order: &Order, ground: &Ground<'_>) -> Result<OwnedFd, WorkError> {
    let open_path = |path: &Path, flags| {
        open(path, OFlag::O_PATH | OFlag::O_CLOEXEC | flags, Mode::empty()).map_err(|error| WorkError::Call {
            operation: "open what is mounted from the host",
            source: error.into(),
        })
    };
    match source {
        Source::Volume(app, volume) => Ok(ground.pool.volume_open(&app_name(app)?, &volume_name(volume)?)?),
        Source::Staging(staging) => Ok(ground.pool.staging_open(staging)?),
        Source::Host(folder) => open_path(Path::new(folder.path()), OFlag::O_DIRECTORY),
        Source::AppSocket => ground.app_sockets.make(&order.jail.jail, order.id_base),
        Source::CaBundle => {
            let bundle = ground.config.build.ca_bundle.as_deref().unwrap_or(Path::new("/dev/null"));
            open_path(bundle, OFlag::empty())
        }
    }
}
