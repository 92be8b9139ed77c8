//! What a jail shall be, decided in full before anything of it exists.
//!
//! An [`Order`] is plain data: made by the pure check ([`crate::start`], [`crate::jobs`]), carried along while a child
//! prepares the disk, then turned into the isolation crate's `JailSpec` ([`Order::spec`]) and a list of sources to
//! open. It names objects ([`Source`]), never paths: which path belongs to an object is decided where it is opened
//! ([`crate::launch`]), from constants and the configuration.

use std::collections::BTreeMap;

use epagent_isolation::id::{IdRange, JailPath};
use epagent_isolation::spec::{
    JailSpec, Limits, MountSource, MountSpec, NetSpec, Profile, Program as JailProgram, RootSpec,
    UMASK_DEFAULT, User,
};
use epagent_storage::{ImageId, StagingId};
use epagent_wire::name::{AppName, VolumeName};

use crate::config::Config;
use crate::tables::{JailRecord, address_bases};
use crate::work::{WorkError, isolation_id};

/// Where Debian, and what is made like it, has its certificate authorities.
pub const CA_BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";
/// Where a job finds the operator's.
pub const CA_IN_JAIL: &str = "/run/epagent/ca.pem";
/// The app's files, and the working directory of all it runs.
pub const APP_DIR: &str = "/app";
/// Where a bootstrap job finds the tree it fills.
pub const TARGET_DIR: &str = "/target";

/// One jail, completely.
#[derive(Debug, Clone)]
pub struct Order {
    pub jail: JailRecord,
    /// The first id of its range on the host.
    pub id_base: u32,
    pub profile: Profile,
    pub root: Root,
    pub mounts: Vec<Mount>,
    pub program: Program,
    pub env: BTreeMap<String, String>,
    pub limits: Limits,
    pub deadline_ms: Option<u64>,
    /// Whether it gets the operator's certificate authorities: builds do.
    pub takes_ca_bundle: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Root {
    /// The jail's own throw-away clone of a release.
    Instance,
    /// The tree that a job fills.
    Staging(StagingId),
    /// An image, read-only: the runner's own skeleton.
    Image(ImageId),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub target: String,
    pub source: Source,
    pub read_only: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    Volume(AppName, VolumeName),
    Staging(StagingId),
    /// A folder of the host that is the same for everyone; `epagent dev` and bootstrap jobs.
    Host(HostFolder),
    /// `[build] ca_bundle`.
    CaBundle,
    /// The folder of its own in which the app listens; made where the jail is launched.
    AppSocket,
}

/// The only folders of the host that are ever seen in a jail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostFolder {
    Usr,
    /// Debian's choice between programs: `/usr/bin/awk` is a link through it.
    Alternatives,
    Ssl,
    /// Where Debian packages come from, for a bootstrap job without a mirror of its own.
    Apt,
}

impl HostFolder {
    pub fn path(self) -> &'static str {
        match self {
            HostFolder::Usr => "/usr",
            HostFolder::Alternatives => "/etc/alternatives",
            HostFolder::Ssl => "/etc/ssl",
            HostFolder::Apt => "/etc/apt",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Program {
    /// A command of the image.
    Command(Vec<String>),
    /// Our own unpacker, by descriptor; stdin is the stream that came with the request.
    Unpack(Vec<String>),
}

impl Mount {
    pub fn read_only(target: &str, source: Source) -> Mount {
        Mount { target: target.to_owned(), source, read_only: true }
    }

    pub fn writable(target: &str, source: Source) -> Mount {
        Mount { target: target.to_owned(), source, read_only: false }
    }
}

impl Source {
    /// Whether ids on it are stored from 0 and shown in the jail's range. What belongs to the host is not: there
    /// root's private files have to stay nobody's.
    fn is_idmapped(&self) -> bool {
        matches!(self, Source::Volume(..) | Source::Staging(_))
    }
}

impl Order {
    /// The spec, in which mount number `i` is of [`Order::mounts`]`[i]`.
    pub fn spec(&self, config: &Config) -> Result<JailSpec, WorkError> {
        let id = isolation_id(&self.jail.jail)?;
        let refused = |error: epagent_isolation::id::IdError| WorkError::Isolation(error.into());
        let mounts = self.mounts.iter().enumerate().map(|(index, mount)| {
            Ok(MountSpec {
                target: JailPath::new(mount.target.as_str()).map_err(refused)?,
                source: MountSource::Descriptor {
                    index,
                    idmap: mount.source.is_idmapped(),
                    recursive: false,
                },
                read_only: mount.read_only,
                no_exec: mount.source == Source::AppSocket,
            })
        });
        let cwd = match (&self.root, &self.program) {
            (Root::Image(_), _) | (_, Program::Unpack(_)) => "/",
            _ => APP_DIR,
        };
        let cwd = JailPath::new(cwd).map_err(refused)?;
        let env = self.env.clone();
        let program = match &self.program {
            Program::Command(argv) => JailProgram::Exec { argv: argv.clone(), cwd, env },
            Program::Unpack(argv) => JailProgram::Fd { argv: argv.clone(), cwd, env },
        };
        let (v4, v6) = address_bases(config);
        let spec = JailSpec {
            hostname: self.jail.jail.to_string(),
            id,
            ids: IdRange::new(self.id_base).map_err(refused)?,
            profile: self.profile,
            root: RootSpec::Directory { read_only: matches!(self.root, Root::Image(_)), idmap: true },
            mounts: mounts.collect::<Result<_, WorkError>>()?,
            files: Vec::new(),
            resolv_conf: None,
            hosts: None,
            program,
            user: User::default(),
            limits: self.limits.clone(),
            network: self.jail.slot.map(|slot| NetSpec::nth(config.node, slot, v4, v6)),
            deadline_ms: self.deadline_ms,
            umask: self.umask(),
        };
        spec.check().map_err(|error| WorkError::Isolation(error.into()))?;
        Ok(spec)
    }
}

impl Order {
    /// Who may connect to a socket is who may write to it (unix(7)), and bind(2) applies the umask: an app that listens
    /// for the balancer must not take that from it. Its folder keeps everybody else out.
    fn umask(&self) -> u32 {
        let listens = self.mounts.iter().any(|mount| mount.source == Source::AppSocket);
        if listens { 0 } else { UMASK_DEFAULT }
    }
}

/// What every program finds in its environment unless it is told otherwise.
pub fn default_env() -> BTreeMap<String, String> {
    [
        ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
        ("LANG", "C.UTF-8"),
        ("USER", "root"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into()
}

/// The host's view of itself, as the image `host` has it.
pub fn host_mounts() -> Vec<Mount> {
    [HostFolder::Usr, HostFolder::Alternatives, HostFolder::Ssl]
        .map(|folder| Mount::read_only(folder.path(), Source::Host(folder)))
        .into()
}

/// The bundle of `[build]`, if one is configured: under its own name, and over the tree's where it has one. Not in the
/// folder of the host's own certificates: that one is the host's, whole.
pub fn add_ca_bundle(order: &mut Order, config: &Config, tree_has_one: bool) {
    if config.build.ca_bundle.is_none() {
        return;
    }
    order.mounts.push(Mount::read_only(CA_IN_JAIL, Source::CaBundle));
    let sees_hosts = order.mounts.iter().any(|mount| mount.source == Source::Host(HostFolder::Ssl));
    if tree_has_one && !sees_hosts {
        order.mounts.push(Mount::read_only(CA_BUNDLE, Source::CaBundle));
    }
}
