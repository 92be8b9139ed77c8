//! What `epagentd` may ask of `epagent-runner`.
//!
//! One SOCK_SEQPACKET unix socket; each packet is one JSON value of at most [`PACKET_BYTES_MAX`]. The agent sends
//! [`Call`]s; the runner sends [`Message`]s: one reply per call, and events in between. Descriptors travel beside
//! the packet (SCM_RIGHTS) in the order the request names them; a packet with other descriptors than its request
//! takes is refused.
//!
//! The runner believes none of it. It keeps its own durable tables of apps, releases and jails, checks every
//! request against them, and answers [`Refusal`] to what does not fit. Every request may be sent again: what is
//! done already is not done twice.

use std::collections::{BTreeMap, BTreeSet};

pub use epagent_core::exit::Exit;
use epagent_core::name::{AppName, ImageName, JailId, ReleaseNumber, VolumeName};
use epagent_core::spec::Limits;
use serde::{Deserialize, Serialize};

use crate::said::Said;

/// The version of this protocol; the runner refuses a `Hello` with another.
pub const PROTOCOL: u32 = 1;
/// The largest packet either side sends. A packet that is larger is cut by the kernel and refused.
pub const PACKET_BYTES_MAX: usize = 128 << 10;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Call {
    /// Chosen by the caller; comes back in the reply.
    pub id: u64,
    pub request: Request,
}

/// The closed list. What is not here can't be asked for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// First on every connection. Replies [`Reply::Hello`].
    Hello {
        protocol: u32,
    },
    /// Everything that exists: jails, releases, volumes, images, pool. Replies [`Reply::World`].
    Observe,
    /// What the runner logged after record `after` of its run `run`. Replies [`Reply::Said`].
    Said {
        run: u64,
        after: u64,
    },

    /// Gives the app an id range and an address block, durably.
    AppEnsure {
        app: AppName,
    },
    /// Forgets the app and removes its releases, volumes and logs. Refused while a jail of it runs.
    AppRemove {
        app: AppName,
    },

    /// Descriptor: the stream to read. Starts a job jail with nothing but an empty tree that unpacks the stream;
    /// the tree becomes the image when the job ends well. Replies [`Reply::Started`].
    ImageImport {
        image: ImageName,
        format: ArchiveFormat,
    },
    /// Starts a job that makes a Debian tree with these packages. Replies [`Reply::Started`].
    ImageBootstrap {
        image: ImageName,
        suite: String,
        include: BTreeSet<String>,
    },
    /// Refused while a release or a jail uses it.
    ImageRemove {
        image: ImageName,
    },

    /// Descriptor: the app's archive. Clones the image into the tree of a new release and starts a job jail in it
    /// that unpacks the archive into `/app`. Replies [`Reply::Started`].
    BuildUnpack {
        app: AppName,
        release: ReleaseNumber,
        image: ImageName,
        format: ArchiveFormat,
    },
    /// Runs a shell command in the tree that is being built, with what `[build]` in the runner's own configuration
    /// adds: certificate authorities, proxies, package indexes, limits. Replies [`Reply::Started`].
    BuildRun {
        app: AppName,
        release: ReleaseNumber,
        command: String,
        env: BTreeMap<String, String>,
    },
    /// Makes the tree that was built the release's, for good.
    BuildSeal {
        app: AppName,
        release: ReleaseNumber,
    },
    /// Drops a tree that was not sealed.
    BuildAbort {
        app: AppName,
        release: ReleaseNumber,
    },
    /// Refused while a jail of it exists.
    ReleaseRemove {
        app: AppName,
        release: ReleaseNumber,
    },

    /// Makes the volume or changes its quota.
    VolumeEnsure {
        app: AppName,
        volume: VolumeName,
        quota_bytes: u64,
    },
    /// Refused while a jail has it mounted.
    VolumeRemove {
        app: AppName,
        volume: VolumeName,
    },

    /// Starts a jail on a throw-away copy of a release. Descriptor, if `with_secrets`: a sealed memfd with a JSON
    /// map of environment variables. Replies [`Reply::Started`]; sent again for an id that exists, the same.
    Start {
        jail: JailId,
        start: Start,
    },
    /// Signals the app and kills the jail after `grace_ms`. Replies at once; [`Event::Exited`] follows.
    Stop {
        jail: JailId,
        signal: String,
        grace_ms: u64,
    },
    /// Removes what is left of a jail that ended: its root, cgroup and record. Its log stays until `LogRemove`.
    Forget {
        jail: JailId,
    },
    /// Runs a command in a running jail. Descriptors: stdin, stdout, stderr, unless a terminal is asked for; then
    /// the reply carries the terminal's master. Replies [`Reply::Exec`].
    Exec {
        jail: JailId,
        argv: Vec<String>,
        env: BTreeMap<String, String>,
        terminal: Option<TerminalSize>,
    },
    ExecResize {
        jail: JailId,
        exec: u32,
        size: TerminalSize,
    },
    /// Ends the command and what it started, as its terminal's closing would.
    ExecKill {
        jail: JailId,
        exec: u32,
    },
    /// What the jail listens on and uses. Replies [`Reply::Inspect`].
    Inspect {
        jail: JailId,
    },
    /// Replies [`Reply::Log`] with a descriptor of the jail's log folder, read-only.
    LogOpen {
        jail: JailId,
    },
    LogRemove {
        jail: JailId,
    },
    /// Replies [`Reply::Socket`] with a connection to the socket that the app of a running jail listens on.
    SocketOpen {
        jail: JailId,
    },
}

/// The name of the feature without which no app listens on a unix socket.
pub const FEATURE_APP_SOCKETS: &str = "unix sockets of apps (Linux 6.16)";
/// What the socket is called in the folder that the app and the balancer share.
pub const SOCKET_NAME: &str = "app.sock";
/// Where the app finds it.
pub const SOCKET_IN_JAIL: &str = "/run/app/app.sock";

/// What a new jail on a release is like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Start {
    pub app: AppName,
    pub release: ReleaseNumber,
    /// A shell command, or the arguments of a program.
    pub command: Command,
    pub env: BTreeMap<String, String>,
    pub limits: Limits,
    pub volumes: BTreeMap<VolumeName, String>,
    pub with_secrets: bool,
    /// The app listens on a unix socket, in a folder that it shares with the balancer alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub socket: bool,
    /// A job that is killed past this; none for an instance.
    pub deadline_ms: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Run by `/bin/sh -c` with `exec` in front where that is safe, so that signals reach the app itself.
    Shell(String),
    Argv(Vec<String>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ArchiveFormat {
    /// Told apart by the first bytes: plain, gzip or zstd.
    Tar,
    /// The layers of an OCI image, framed as `storage` documents.
    Layers,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    pub rows: u16,
    pub columns: u16,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    Reply { id: u64, result: Result<Reply, Refusal> },
    Event(Event),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    Hello {
        protocol: u32,
        version: String,
        node: u16,
    },
    World(Box<World>),
    /// The same, when it is larger than a packet: one descriptor comes with it, a memfd with the [`World`] as JSON.
    WorldFile,
    Said(Said),
    /// The jail that does it. For a job: its end comes as [`Event::Exited`] and in [`World::jails`].
    Started {
        jail: JailId,
        address: Option<String>,
    },
    Exec {
        exec: u32,
    },
    Inspect(Inspection),
    /// One descriptor comes with it.
    Log,
    /// One descriptor comes with it.
    Socket,
    Done,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    Exited { jail: JailId, exit: Exit },
    ExecExited { jail: JailId, exec: u32, exit: Exit },
}

/// A request that was not carried out, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    pub code: RefusalCode,
    /// What was attempted, on what, and why it failed.
    pub message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalCode {
    /// Not a request of the closed list, or with wrong fields or descriptors.
    BadRequest,
    /// The runner has no such app, image, release, volume or jail.
    NotFound,
    /// It exists and belongs to another app.
    NotYours,
    /// It is in use, or in a state that does not allow this.
    Conflict,
    /// A bound was reached: jails, apps, addresses.
    Exhausted,
    /// The pool is full.
    NoSpace,
    /// The kernel or the file system failed.
    System,
}

/// All that the runner has, as it is now.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct World {
    pub apps: BTreeSet<AppName>,
    pub jails: Vec<Jail>,
    pub images: Vec<Image>,
    pub releases: Vec<Release>,
    pub volumes: Vec<Volume>,
    pub pool: Pool,
    /// Jails whose logs are kept.
    pub logs: BTreeSet<JailId>,
    pub features: Vec<Feature>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Jail {
    pub id: JailId,
    /// None for jobs on images.
    pub app: Option<AppName>,
    pub release: Option<ReleaseNumber>,
    pub purpose: Purpose,
    pub state: JailState,
    /// The instance's init as the host sees it.
    pub pid: Option<i32>,
    /// Where the instance is reached from this host.
    pub address: Option<String>,
    /// Milliseconds since the epoch.
    pub started_at_ms: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Started by [`Request::Start`].
    Start,
    ImageImport {
        image: ImageName,
    },
    ImageBootstrap {
        image: ImageName,
    },
    BuildUnpack,
    BuildRun {
        command: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JailState {
    Starting,
    Running,
    Exited(Exit),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Image {
    pub name: ImageName,
    pub id: String,
    pub bytes: u64,
    pub created_at_ms: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Release {
    pub app: AppName,
    pub release: ReleaseNumber,
    pub sealed: bool,
    pub bytes: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Volume {
    pub app: AppName,
    pub volume: VolumeName,
    pub quota_bytes: u64,
    pub used_bytes: u64,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Pool {
    pub total_bytes: u64,
    pub used_bytes: u64,
    pub reserve_bytes: u64,
}

/// One kernel feature that was probed, for `epagent doctor`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Feature {
    pub name: String,
    pub present: bool,
    /// What is used in its place when it is absent.
    pub fallback: String,
    /// How to come to have it; empty: by a newer kernel.
    #[serde(default)]
    pub advice: String,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Inspection {
    /// `0.0.0.0:3000`, `[::]:8000`, `127.0.0.1:5000`: as the kernel lists them inside the jail.
    pub listening: Vec<String>,
    pub memory_bytes: u64,
    pub cpu_usec: u64,
    pub pids: u64,
}
