//! The monitor's share of making an instance: init in its namespaces, ids, link, mounts.
//!
//! All of it happens while init waits for `Begin`. If the monitor dies in between, init reads the end of its channel
//! and ends, and the kernel removes namespaces, link and mounts with it: no step needs an undo of its own.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags};
use rustix::mount::OpenTreeFlags;

use super::channel::{self, ToInit};
use super::init::{self, InitSide};
use crate::cgroup::CgroupRoot;
use crate::error::Error;
use crate::net::link;
use crate::seccomp::Filters;
use crate::spec::{JailSpec, MountSource, RootSpec};
use crate::sys;
use crate::sys::process::{self, Fork, SingleThreaded};

/// Under memory pressure of the whole host, instances go before the host's own services (0) and their monitors.
const INSTANCE_OOM_SCORE_ADJ: &str = "300";

/// The step in which a failure means that init has ended by itself.
pub(super) const BEGIN: &str = "begin";

/// Descriptors for init, from the handover.
#[derive(Debug)]
pub(super) struct Sources {
    pub root: Option<OwnedFd>,
    pub mounts: Vec<OwnedFd>,
    pub program: Option<OwnedFd>,
    pub secrets: Option<OwnedFd>,
    pub stdin: OwnedFd,
}

/// A living init and what the monitor holds of it.
#[derive(Debug)]
pub(super) struct Born {
    pub pid: i32,
    pub pidfd: OwnedFd,
    pub channel: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

/// A failure and the step it happened in.
#[derive(Debug)]
pub(super) struct BirthError {
    pub step: &'static str,
    pub error: String,
    /// Init, if it was there already.
    pub born: Option<Born>,
}

/// Makes the instance up to the point where init goes on by itself. `forget` drops, in init, what of the monitor's
/// descriptors init must not keep.
pub(super) fn give_birth(
    token: SingleThreaded,
    spec: &JailSpec,
    cgroups: &CgroupRoot,
    sources: Sources,
    forget: impl FnOnce(),
) -> Result<Born, BirthError> {
    let (born, mounts) = match clone_init(token, spec, cgroups, sources, forget) {
        Ok(all) => all,
        Err(error) => return Err(BirthError { step: "clone init", error: error.chain(), born: None }),
    };
    match equip(spec, &born, mounts) {
        Ok(()) => Ok(born),
        Err((step, error)) => Err(BirthError { step, error: error.chain(), born: Some(born) }),
    }
}

/// Sources of mounts, which stay with the monitor until they are idmapped.
type MountSources = (Option<OwnedFd>, Vec<OwnedFd>);

fn clone_init(
    token: SingleThreaded,
    spec: &JailSpec,
    cgroups: &CgroupRoot,
    sources: Sources,
    forget: impl FnOnce(),
) -> Result<(Born, MountSources), Error> {
    let filters = Filters::compile(spec.profile).map_err(Error::call("compile seccomp filters"))?;
    let (channel, init_channel) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|e| Error::call("make channel")(io::Error::from(e)))?;
    let pipe = || {
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|e| Error::call("pipe")(io::Error::from(e)))
    };
    let (stdout, stdout_in) = pipe()?;
    let (stderr, stderr_in) = pipe()?;
    for end in [&stdout_in, &stderr_in] {
        give_to_app(end.as_fd(), spec).map_err(Error::call("give output pipe to the app"))?;
    }
    let app_dir = cgroups.app_dir(&spec.id);
    let app_dir_fd =
        rustix::fs::open(&app_dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| Error::path("open cgroup", &app_dir)(io::Error::from(e)))?;
    let entrances = cgroups.entrances(&spec.id)?;
    let namespaces = process::NEW_USER
        | process::NEW_MOUNT
        | process::NEW_PID
        | process::NEW_IPC
        | process::NEW_UTS
        | process::NEW_NET;
    // CLONE_NEWCGROUP would make the monitor's cgroup the root of the view; init unshares once it is in its own.
    match process::fork(&token, namespaces, Some(app_dir_fd.as_fd())).map_err(Error::call("clone3"))? {
        Fork::Child => {
            drop((channel, stdout, stderr, app_dir_fd, sources.root, sources.mounts));
            forget();
            let side = InitSide {
                channel: init_channel,
                entrances,
                spec: spec.clone(),
                filters,
                stdin: sources.stdin,
                stdout: stdout_in,
                stderr: stderr_in,
                program: sources.program,
                secrets: sources.secrets,
            };
            init::run(token, side)
        }
        Fork::Parent { pid, pidfd } => {
            let born = Born { pid, pidfd, channel, stdout, stderr };
            Ok((born, (sources.root, sources.mounts)))
        }
    }
}

/// So that the app can open /dev/stdout, which is what logs of many servers are set to.
fn give_to_app(pipe: BorrowedFd<'_>, spec: &JailSpec) -> io::Result<()> {
    let (uid, gid) = (spec.ids.first() + spec.user.uid, spec.ids.first() + spec.user.gid);
    Ok(rustix::fs::fchown(pipe, Some(rustix::fs::Uid::from_raw(uid)), Some(rustix::fs::Gid::from_raw(gid)))?)
}

/// Ids, link and mounts; then init may begin.
fn equip(spec: &JailSpec, born: &Born, (root, mounts): MountSources) -> Result<(), (&'static str, Error)> {
    let at = |step: &'static str| move |error: Error| (step, error);
    map_ids(spec, born.pid).map_err(at("map ids"))?;
    let file = proc_file(born.pid, "oom_score_adj");
    fs::write(&file, INSTANCE_OOM_SCORE_ADJ)
        .map_err(Error::path("write", file))
        .map_err(at("set oom score"))?;
    if let Some(net) = &spec.network {
        let inside = open_namespace(born.pid, "net").map_err(at("make link"))?;
        link::make_outer(net, inside.as_fd()).map_err(at("make link"))?;
    }
    let user = open_namespace(born.pid, "user").map_err(at("map mounts"))?;
    let root = prepare_root(spec, root, user.as_fd()).map_err(at("map the root directory"))?;
    let mounts = prepare_mounts(spec, &mounts, user.as_fd()).map_err(at("map mounts"))?;
    let fds: Vec<BorrowedFd<'_>> = root.iter().chain(&mounts).map(AsFd::as_fd).collect();
    channel::send(born.channel.as_fd(), &ToInit::Begin { root: root.is_some() }, &fds)
        .map_err(Error::call("send mounts to init"))
        .map_err(at(BEGIN))
}

/// Init is our unreaped child, so its pid cannot be another's.
fn proc_file(pid: i32, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{name}"))
}

fn map_ids(spec: &JailSpec, pid: i32) -> Result<(), Error> {
    let map = format!("0 {} {}\n", spec.ids.first(), crate::id::IDS_PER_RANGE);
    for name in ["uid_map", "gid_map"] {
        let file = proc_file(pid, name);
        fs::write(&file, &map).map_err(Error::path("write", file))?;
    }
    Ok(())
}

fn open_namespace(pid: i32, name: &str) -> Result<OwnedFd, Error> {
    let file = proc_file(pid, &format!("ns/{name}"));
    File::open(&file).map(Into::into).map_err(Error::path("open", file))
}

fn prepare_root(
    spec: &JailSpec,
    root: Option<OwnedFd>,
    user: BorrowedFd<'_>,
) -> Result<Option<OwnedFd>, Error> {
    let (RootSpec::Directory { read_only, idmap }, Some(root)) = (&spec.root, root) else { return Ok(None) };
    let flags = if *read_only { sys::mount::MOUNT_ATTR_RDONLY } else { 0 };
    detached(root.as_fd(), false, flags, idmap.then_some(user)).map(Some)
}

/// One detached mount per source index, in index order; a source that no mount uses is still passed, so that
/// indexes stay what they are.
fn prepare_mounts(spec: &JailSpec, sources: &[OwnedFd], user: BorrowedFd<'_>) -> Result<Vec<OwnedFd>, Error> {
    let prepare = |(number, source): (usize, &OwnedFd)| {
        let used = spec.mounts.iter().find_map(|mount| match mount.source {
            MountSource::Descriptor { index, idmap, recursive } if index == number => {
                Some((mount, idmap, recursive))
            }
            _ => None,
        });
        let Some((mount, idmap, recursive)) = used else { return detached(source.as_fd(), false, 0, None) };
        let mut flags = if mount.read_only { sys::mount::MOUNT_ATTR_RDONLY } else { 0 };
        if mount.no_exec {
            flags |= sys::mount::MOUNT_ATTR_NOEXEC;
        }
        detached(source.as_fd(), recursive, flags, idmap.then_some(user)).map_err(|error| Error::Refused {
            operation: "prepare mount",
            reason: format!("{}: {}", mount.target, error.chain()),
        })
    };
    sources.iter().enumerate().map(prepare).collect()
}

/// A copy of a mount that is attached nowhere, with flags that are never left out, and with shifted ids if wanted.
fn detached(
    source: BorrowedFd<'_>,
    recursive: bool,
    flags: u64,
    idmap: Option<BorrowedFd<'_>>,
) -> Result<OwnedFd, Error> {
    let mut clone =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        clone |= OpenTreeFlags::AT_RECURSIVE;
    }
    let mount = rustix::mount::open_tree(source, "", clone)
        .map_err(|e| Error::call("open_tree")(io::Error::from(e)))?;
    let flags = flags | sys::mount::MOUNT_ATTR_NOSUID | sys::mount::MOUNT_ATTR_NODEV;
    let operation = match idmap {
        Some(_) => "idmap (does this file system support idmapped mounts?)",
        None => "mount_setattr",
    };
    sys::mount::set_attributes(mount.as_fd(), recursive, flags, idmap).map_err(Error::call(operation))?;
    Ok(mount)
}
