//! What an instance shall be: the whole order, as data.
//!
//! A [`JailSpec`] says everything about one instance or job except where things are on the host: the root, the mount
//! sources, the logs and the secrets come as open descriptors beside it ([`crate::launch::LaunchFds`]), so that no
//! host path is in it. It is written by the caller, sealed in a memfd, and read by `epagent-jail`; both sides
//! [`check`](JailSpec::check) it. Unknown fields are refused: both ends are of one build.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::id::{IdRange, JailId, JailPath};

/// Most mounts in one spec. Each costs start-up time; set-up with hundreds is slow.
pub const MOUNTS_MAX: usize = 32;
/// Most files in one spec.
pub const FILES_MAX: usize = 32;
/// Most bytes of all files of one spec together.
pub const FILES_BYTES_MAX: usize = 256 * 1024;
/// Most bytes of argv and environment together, secrets not counted.
pub const ARGUMENTS_BYTES_MAX: usize = 256 * 1024;
/// The folder all [`FileSpec`]s are in.
pub const FILES_DIR: &str = "/run/epagent";
/// Where the instance's own resolv.conf, hosts and hostname are, to be bound over those in /etc.
pub const ETC_DIR: &str = "/run/epagent/etc";

/// One instance or job, completely.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailSpec {
    pub id: JailId,
    /// Host ids that are 0..65536 inside.
    pub ids: IdRange,
    pub hostname: String,
    pub profile: Profile,
    pub root: RootSpec,
    #[serde(default)]
    pub mounts: Vec<MountSpec>,
    /// Files below `/run/epagent`, read-only inside.
    #[serde(default)]
    pub files: Vec<FileSpec>,
    /// Text of `/etc/resolv.conf`; `None`: the gateway of [`NetSpec`] as name server.
    #[serde(default)]
    pub resolv_conf: Option<String>,
    /// Text of `/etc/hosts`; `None`: localhost and the instance's own name and addresses.
    #[serde(default)]
    pub hosts: Option<String>,
    pub program: Program,
    #[serde(default)]
    pub user: User,
    #[serde(default)]
    pub limits: Limits,
    /// `None`: a network namespace with loopback alone.
    #[serde(default)]
    pub network: Option<NetSpec>,
    /// The whole instance is killed this long after its start: builds and other jobs.
    #[serde(default)]
    pub deadline_ms: Option<u64>,
    /// Of the app and of what is run in the instance.
    #[serde(default = "umask_default")]
    pub umask: u32,
}

/// What others may not do with what an app makes, unless it says otherwise.
pub const UMASK_DEFAULT: u32 = 0o022;

fn umask_default() -> u32 {
    UMASK_DEFAULT
}

/// How much the processes of an instance may do inside their user namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Profile {
    /// A tenant's app: a short capability list, no namespaces, no mounts.
    App,
    /// A build or release command: like App, and what apt, dpkg, pip and npm need.
    Build,
    /// Making an image with mmdebstrap: may mount, but only in a further, nested user namespace, where the flags
    /// of the mounts made here are locked.
    Bootstrap,
}

/// The root directory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum RootSpec {
    /// The directory given as [`crate::launch::LaunchFds::root`]. A missing mount point is made when it is
    /// writable and is an error when it is not.
    Directory { read_only: bool, idmap: bool },
    /// An empty tmpfs with these symlinks, e.g. `/bin` → `usr/bin` beside a mount on `/usr` (the "host" image).
    /// Read-only once it is set up.
    Tmpfs { size_bytes: u64, symlinks: Vec<SymlinkSpec> },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SymlinkSpec {
    pub path: JailPath,
    pub target: String,
}

/// One mount in the instance. Always nosuid and nodev.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountSpec {
    pub target: JailPath,
    pub source: MountSource,
    #[serde(default)]
    pub read_only: bool,
    #[serde(default)]
    pub no_exec: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum MountSource {
    /// `LaunchFds::mounts[index]`: a directory or a file. `idmap`: its ids 0..65536 become the instance's range;
    /// without, ids are taken as they are on disk (file systems that store shifted ids).
    /// `recursive`: with what is mounted below it.
    Descriptor {
        index: usize,
        idmap: bool,
        #[serde(default)]
        recursive: bool,
    },
    /// An empty tmpfs, counted in the memory limit.
    Tmpfs { size_bytes: u64, mode: u32 },
}

/// A small file made for the instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileSpec {
    /// Below `/run/epagent`.
    pub path: JailPath,
    pub content: String,
    /// Permission bits, e.g. `0o644`. The owner is [`JailSpec::user`].
    pub mode: u32,
}

/// What runs as the app.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Program {
    /// A command of the image. `argv[0]` without a slash is searched in the `PATH` of `env`, inside.
    /// A missing `cwd` is an error.
    Exec { argv: Vec<String>, cwd: JailPath, env: BTreeMap<String, String> },
    /// The static executable given as [`crate::launch::LaunchFds::program`]: works in an empty root.
    Fd { argv: Vec<String>, cwd: JailPath, env: BTreeMap<String, String> },
}

impl Program {
    /// Arguments, working directory and environment, whichever kind it is.
    pub fn parts(&self) -> (&[String], &JailPath, &BTreeMap<String, String>) {
        match self {
            Program::Exec { argv, cwd, env } | Program::Fd { argv, cwd, env } => (argv, cwd, env),
        }
    }
}

/// Who the app is, inside.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
}

/// Every limit has a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Hard limit; page cache, tmpfs and kernel memory of the instance included.
    pub memory_bytes: u64,
    /// Share of one CPU: 50 is half a CPU, 200 two CPUs.
    pub cpu_percent: u32,
    /// Processes and threads, our init included.
    pub pids: u32,
    /// Bytes per second read from each of [`crate::launch::LaunchConfig::disks`], and as many written. `None`: as much
    /// as they give.
    pub io_bytes_per_s: Option<u64>,
    /// Open files per process. Cut to the hard limit the caller itself has.
    pub open_files: u64,
    /// Largest core file.
    pub core_bytes: u64,
    /// Largest file a process may write.
    pub file_bytes: u64,
    /// Size of each of /tmp, /run and /dev/shm (which count in `memory_bytes` too).
    pub tmpfs_bytes: u64,
    /// One log file (there are two: current and previous).
    pub log_bytes: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            memory_bytes: 256 << 20,
            cpu_percent: 100,
            pids: 128,
            io_bytes_per_s: Some(100 << 20),
            open_files: 8192,
            core_bytes: 0,
            file_bytes: 16 << 30,
            tmpfs_bytes: 64 << 20,
            log_bytes: 8 << 20,
        }
    }
}

/// The instance's link to the world: a routed veth pair, no bridge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetSpec {
    /// Node number: part of every interface and table name.
    pub node: u16,
    /// The host side is named `ep<node>-<slot>`. One instance per slot at a time.
    pub slot: u32,
    /// A /31; the host's side is the instance's gateway.
    pub v4: Option<Pair<Ipv4Addr>>,
    /// A /127.
    pub v6: Option<Pair<Ipv6Addr>>,
    pub mtu: u32,
}

/// The two ends of one link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pair<A> {
    pub host: A,
    pub inside: A,
}

impl NetSpec {
    /// The link of slot `slot` in a node's address block: the `slot`-th /31 and /127 from the given bases.
    pub fn nth(node: u16, slot: u32, v4_base: Ipv4Addr, v6_base: Option<Ipv6Addr>) -> NetSpec {
        let v4 = u32::from(v4_base).wrapping_add(slot.wrapping_mul(2));
        let v6 = v6_base.map(|base| u128::from(base).wrapping_add(u128::from(slot) * 2));
        NetSpec {
            node,
            slot,
            v4: Some(Pair { host: v4.into(), inside: v4.wrapping_add(1).into() }),
            v6: v6.map(|v6| Pair { host: v6.into(), inside: v6.wrapping_add(1).into() }),
            mtu: 1500,
        }
    }

    /// Name of the host's side, e.g. `ep7-12`.
    pub fn link(&self) -> String {
        format!("ep{}-{}", self.node, self.slot)
    }
}

/// Why a spec is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {why}")]
pub struct SpecError {
    pub field: String,
    pub why: String,
}
