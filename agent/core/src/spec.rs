//! What a release asks for: the manifest after validation.
//!
//! `epagent.toml` and `Procfile` are two spellings of one [`AppSpec`]; nothing past the parser knows which it was.
//! Every limit has a default, so that an app that says nothing is bounded all the same.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::name::{AppName, ImageName, ProcessName, VolumeName};

/// One app as its manifest describes it. Immutable once it is part of a release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppSpec {
    pub app: AppName,
    pub image: ImageName,
    /// Names of secrets that must be set before the app may start.
    pub secrets: BTreeSet<String>,
    /// Shell commands run in order in the build jail, in `/app`.
    pub build: Vec<String>,
    /// A shell command run once per release, before its instances start.
    pub release: Option<String>,
    pub env: BTreeMap<String, String>,
    pub processes: BTreeMap<ProcessName, ProcessSpec>,
    pub volumes: BTreeMap<VolumeName, VolumeSpec>,
    pub routes: Vec<RouteSpec>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSpec {
    /// A shell command, run in `/app` with `$PORT` set.
    pub command: String,
    /// How many instances, 0 to [`INSTANCES_MAX`], unless `epagent scale` says otherwise.
    pub instances: u32,
    /// It may be stopped while nobody asks for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sleep: Option<SleepSpec>,
    #[serde(default)]
    pub listen: Listen,
    pub deploy: Strategy,
    pub stop: StopSpec,
    pub health: HealthSpec,
    pub limits: Limits,
}

/// The most instances of one process on one node.
pub const INSTANCES_MAX: u32 = 64;
/// The port an app is told to listen on. Each instance has an address of its own, so one number serves all.
pub const APP_PORT: u16 = 8000;

/// Where a process takes requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Listen {
    /// At `$PORT`, on the instance's own address.
    #[default]
    Tcp,
    /// At the unix socket `$SOCKET`, in a folder that the app shares with the balancer alone.
    Unix,
}

/// When a process that nobody asks for is stopped; a request that comes then waits until it is started again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SleepSpec {
    pub idle_after_ms: u64,
}

impl Default for SleepSpec {
    fn default() -> Self {
        Self { idle_after_ms: 300_000 }
    }
}

/// How a new release takes over from the old one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// New instances start beside the old ones and take over when healthy.
    Overlap,
    /// Requests are held, the old instances stop, the new ones start and are checked. Never two at a time, so
    /// this is the default for an app with a volume.
    Replace,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopSpec {
    /// A signal's name without `SIG`: `TERM`, `INT`, `QUIT`, `HUP`, `USR1`, `USR2`.
    pub signal: String,
    /// How long the instance has to end by itself before it is killed.
    pub grace_ms: u64,
}

impl Default for StopSpec {
    fn default() -> Self {
        Self { signal: "TERM".to_owned(), grace_ms: 10_000 }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthSpec {
    pub check: Check,
    pub interval_ms: u64,
    pub timeout_ms: u64,
    /// Successes in a row until an instance counts as healthy.
    pub rise: u32,
    /// Failures in a row until a healthy instance counts as unhealthy.
    pub fall: u32,
    /// How long a new instance may take to become healthy before its deploy fails.
    pub deadline_ms: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Check {
    /// `GET` of this path answers 200–399.
    Http(String),
    /// A TCP connection to `$PORT` is accepted.
    Tcp,
    /// This shell command ends with 0 inside the instance.
    Exec(String),
    /// The process runs. For processes that serve no port.
    Running,
}

impl Check {
    /// Whether it runs something in the instance.
    pub fn is_command(&self) -> bool {
        matches!(self, Check::Exec(_))
    }
}

impl HealthSpec {
    pub fn new(check: Check) -> Self {
        Self { check, interval_ms: 1_000, timeout_ms: 2_000, rise: 1, fall: 3, deadline_ms: 60_000 }
    }
}

/// What one instance may use. Each of these is enforced by the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes of memory, tmpfs included; the instance is killed as a whole past it (memory.max, memory.oom.group).
    pub memory_bytes: u64,
    /// Share of one processor in percent: 50 is half a core, 200 is two (cpu.max).
    pub cpu_percent: u32,
    /// Processes and threads (pids.max).
    pub pids: u32,
    /// Open descriptors per process (RLIMIT_NOFILE).
    pub nofile: u32,
    /// Bytes that may be written to the instance's own root, outside of volumes (btrfs quota).
    pub disk_bytes: u64,
    /// Bytes per second read from each disk of the pool, and as many written (io.max). `None`: as many as the node
    /// allows.
    ///
    /// Absent in JSON it is [`IO_BYTES_PER_S_UNSAID`]: so it is in a release from before there was this limit, and a
    /// runner of that time takes the message.
    #[serde(default = "io_unsaid", skip_serializing_if = "is_io_unsaid")]
    pub io_bytes_per_s: Option<u64>,
}

/// Below what any disk or network volume gives that a node is likely to have, so that one app never has all of it, and
/// far above what serving requests takes; a start reads its files within seconds. It is what absence means in releases
/// and messages, so it must stay.
pub const IO_BYTES_PER_S_UNSAID: u64 = 100 << 20;

fn io_unsaid() -> Option<u64> {
    Some(IO_BYTES_PER_S_UNSAID)
}

fn is_io_unsaid(rate: &Option<u64>) -> bool {
    *rate == io_unsaid()
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_bytes: 512 << 20,
            cpu_percent: 100,
            pids: 256,
            nofile: 4096,
            disk_bytes: 512 << 20,
            io_bytes_per_s: io_unsaid(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// Where the volume appears in every instance of the app.
    pub path: String,
    pub quota_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteSpec {
    pub matches: RouteMatch,
    pub process: ProcessName,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RouteMatch {
    /// A host name in lower case; `*.example.org` matches each name one label below.
    Host(String),
    /// A TCP port of the balancer's.
    Port(u16),
}

impl AppSpec {
    /// The processes that some route leads to; only these are told a port and need one open.
    pub fn is_routed(&self, process: &ProcessName) -> bool {
        self.routes.iter().any(|route| route.process == *process)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_from_before_the_io_limit_has_the_default_and_is_written_as_it_was() {
        let old = r#"{"memory_bytes":1,"cpu_percent":2,"pids":3,"nofile":4,"disk_bytes":5}"#;
        let limits: Limits = serde_json::from_str(old).unwrap();
        assert_eq!(limits.io_bytes_per_s, Some(100 << 20));
        assert_eq!(serde_json::to_string(&limits).unwrap(), old);
        for io_bytes_per_s in [None, Some(1 << 20)] {
            let said = Limits { io_bytes_per_s, ..limits.clone() };
            let text = serde_json::to_string(&said).unwrap();
            assert_eq!(serde_json::from_str::<Limits>(&text).unwrap(), said, "{text}");
        }
    }
}
