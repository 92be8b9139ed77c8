//! The HTTP API of `epagentd`, on `admin.sock` (operator-equivalent) and `read.sock` (GET only).
//!
//! Bodies are JSON unless said otherwise; every failure is an [`ApiError`] with a stable code. Times are RFC 3339
//! in UTC. Long work (a deploy, an image) answers 202 with an id at once and goes on whether or not anybody
//! watches.
//!
//! | request | body → answer |
//! |---|---|
//! | `GET /v1/version` | → [`Version`] |
//! | `GET /v1/apps` | → [`App`]s |
//! | `GET /v1/apps/A` | → [`App`] |
//! | `DELETE /v1/apps/A` | → `{}`; stops and removes the app, volumes included |
//! | `POST /v1/deploys` | [`NewDeploy`] → [`Deploy`] in `received`, waiting for its archive |
//! | `PUT /v1/deploys/N/archive` | a tar, plain, gzip or zstd → [`Deploy`] |
//! | `GET /v1/deploys?app=A` | → [`Deploy`]s, newest first |
//! | `GET /v1/deploys/N` | → [`Deploy`] |
//! | `DELETE /v1/deploys/N` | → [`Deploy`]; cancels it, unless it has switched |
//! | `GET /v1/deploys/N/watch?from=S` | → lines of [`DeployUpdate`] until it is over; `from` resumes after a sequence number |
//! | `POST /v1/apps/A/rollback` | [`Rollback`] → [`Deploy`] |
//! | `POST /v1/apps/A/restart`, `…/stop`, `…/start` | → [`Deploy`] (stop: [`App`]) |
//! | `POST /v1/apps/A/scale` | [`Scale`] → [`App`] |
//! | `GET /v1/apps/A/releases` | → [`Release`]s, newest first |
//! | `GET /v1/apps/A/config` | → map of names to values |
//! | `PATCH /v1/apps/A/config` | map of names to values, null unsets → [`Deploy`], or null when nothing runs yet |
//! | `GET /v1/apps/A/secrets` | → [`Secret`]s: names and versions, never values |
//! | `PATCH /v1/apps/A/secrets` | map of names to values, null unsets → [`Deploy`] or null |
//! | `GET /v1/instances?app=A` | → [`Instance`]s |
//! | `GET /v1/apps/A/logs?process=&lines=&follow=` | → lines of [`LogLine`]; `build=dN` for a deploy's build |
//! | `POST /v1/apps/A/exec` | [`Exec`], upgraded to [`EXEC_PROTOCOL`] |
//! | `POST /v1/apps/A/run` | [`Exec`], the same, in a new jail of the current release |
//! | `GET /v1/volumes?app=A`, `DELETE /v1/apps/A/volumes/V` | → [`Volume`]s |
//! | `GET /v1/images`, `DELETE /v1/images/I` | → [`Image`]s |
//! | `POST /v1/images/I/import?format=tar\|layers` | the stream → [`ImageJob`] when done |
//! | `POST /v1/images/I/bootstrap` | [`Bootstrap`] → lines of [`JobUpdate`] until it is over |
//! | `GET /v1/routes`, `GET /v1/routes/T` | → [`Route`]s, by target: what is in force |
//! | `PUT /v1/routes/T` | [`RouteSay`] → [`Route`], once the balancer has it |
//! | `POST /v1/routes/T/release` | [`RouteRelease`] → `{}`; ends a hold |
//! | `POST /v1/routes/T/drain` | [`RouteDrain`] → [`RouteUpstream`] |
//! | `POST /v1/routes/T/clear` | [`RouteClear`] → `{}`; the app's own route is in force again |
//! | `GET /v1/balancer?latency=` | → [`crate::table::Status`] |
//! | `GET /v1/balancer/connections?app=&route=T&limit=&after=` | → [`crate::table::Connections`]; `after` is the last one's `next` |
//! | `POST /v1/balancer/reload` | → [`crate::table::Reloaded`], once a new process is in charge |
//! | `GET /v1/events?app=&after=&follow=` | → [`Event`]s, or lines of them |
//! | `GET /v1/errors` | → [`ErrorRow`]s |
//! | `GET /v1/doctor` | → [`Check`]s |
//! | `GET /v1/status` | → [`Status`] |
//!
//! An exec connection, once upgraded, carries frames both ways: one byte of kind, four bytes of length (big
//! endian, at most 64 KiB), then the payload. Kinds: [`frame`].

mod routes;

pub use routes::*;

use std::collections::BTreeMap;

use epagent_core::phase::Phase;
use epagent_core::verdict::Verdict;
use serde::{Deserialize, Serialize};

/// The value of `Upgrade:` for exec and run.
pub const EXEC_PROTOCOL: &str = "epagent-exec/1";
/// The most bytes of one frame's payload.
pub const FRAME_BYTES_MAX: usize = 64 << 10;
/// The largest archive that is taken, in bytes.
pub const ARCHIVE_BYTES_MAX: u64 = 512 << 20;

/// Kinds of frames on an exec connection.
pub mod frame {
    /// Client to agent: bytes for standard input; empty means end of file.
    pub const STDIN: u8 = 0;
    /// Agent to client.
    pub const STDOUT: u8 = 1;
    /// Agent to client; never with a terminal.
    pub const STDERR: u8 = 2;
    /// Client to agent: rows and columns, two bytes each.
    pub const RESIZE: u8 = 3;
    /// Agent to client, last: a JSON [`super::ExecExit`].
    pub const EXIT: u8 = 4;
}

/// The body of every answer that is not 2xx.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiError {
    /// Stable; `epagent explain CODE` tells more.
    pub code: String,
    /// What was attempted, on what, why it failed. May have several lines (a manifest's caret).
    pub message: String,
    /// What to do next.
    pub hint: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Version {
    pub version: String,
    pub node: u16,
    /// None while the runner can't be reached.
    pub runner: Option<String>,
    /// Where the balancer takes HTTP.
    pub http_address: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct App {
    pub app: String,
    /// `running`, `stopped`, `new` (nothing deployed yet), `degraded` (fewer healthy instances than wanted), `idle`
    /// (all of it sleeps until somebody asks for it).
    pub state: String,
    pub release: Option<u32>,
    pub processes: BTreeMap<String, ProcessStatus>,
    pub routes: Vec<String>,
    pub created_at: String,
    /// A deploy that is under way.
    pub deploy: Option<i64>,
    /// Why the agent could not make the app what it should be, if it could not.
    pub trouble: Option<String>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ProcessStatus {
    pub wanted: u32,
    pub running: u32,
    pub healthy: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewDeploy {
    /// Overrides the manifest's.
    #[serde(default)]
    pub app: Option<String>,
    pub manifest: Manifest,
    /// For a Procfile: the image; otherwise an override.
    #[serde(default)]
    pub image: Option<String>,
}

/// The manifest's text as the command read it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Manifest {
    Toml {
        text: String,
    },
    /// `files`: which of the dependency files that are understood lie beside it.
    Procfile {
        text: String,
        files: Vec<String>,
    },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Deploy {
    pub id: i64,
    pub app: String,
    /// `deploy`, `rollback`, `restart`, `config`, `start`.
    pub kind: String,
    pub release: u32,
    pub phase: Phase,
    pub steps: Vec<DeployStep>,
    pub verdict: Option<Verdict>,
    pub created_at: String,
    pub ended_at: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeployStep {
    pub sequence: i64,
    pub phase: Phase,
    pub note: String,
    pub at: String,
}

/// One line of a deploy's watch.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeployUpdate {
    Step(DeployStep),
    /// A line a build or release command printed.
    Output {
        line: String,
    },
    /// The last line.
    Over(Box<Deploy>),
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rollback {
    /// The release to return to; none: the one that served before the current.
    #[serde(default)]
    pub release: Option<u32>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scale {
    pub processes: BTreeMap<String, u32>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Release {
    pub release: u32,
    pub image: String,
    /// `building`, `ready`, `serving`, `failed`, `removed`.
    pub state: String,
    pub config_version: i64,
    pub created_at: String,
    pub bytes: Option<u64>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Secret {
    pub name: String,
    pub version: i64,
    pub set_at: String,
}

/// A row of `epagent ps`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Instance {
    pub app: String,
    pub process: String,
    pub index: u32,
    pub release: u32,
    /// `starting`, `checking`, `healthy`, `unhealthy`, `draining`, `stopping`, `exited`, `waiting` (for a restart);
    /// `idle`: no instance, but a process that sleeps until somebody asks for it.
    pub state: String,
    /// The instance's init as the host sees it.
    pub pid: Option<i32>,
    pub restarts: u32,
    pub started_at: Option<String>,
    pub id: String,
    pub address: Option<String>,
    /// How the one before ended, if one did: `exit code 1`, `killed by SIGSEGV`, `out of memory`.
    pub last_exit: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LogLine {
    pub at: String,
    pub process: String,
    pub index: u32,
    pub instance: String,
    /// `stdout` or `stderr`.
    pub stream: String,
    pub line: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    pub argv: Vec<String>,
    /// For exec: which instance; none: the first healthy one of `web`, else of any process.
    #[serde(default)]
    pub instance: Option<String>,
    #[serde(default)]
    pub process: Option<String>,
    /// Rows and columns of a terminal; none: pipes.
    #[serde(default)]
    pub terminal: Option<(u16, u16)>,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExecExit {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    /// Set when the command could not be started at all.
    pub error: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Volume {
    pub app: String,
    pub volume: String,
    pub path: Option<String>,
    pub quota_bytes: u64,
    pub used_bytes: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Image {
    pub image: String,
    pub id: String,
    pub bytes: u64,
    pub created_at: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ImageJob {
    pub image: String,
    pub id: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bootstrap {
    pub suite: String,
    #[serde(default)]
    pub include: Vec<String>,
}

/// One line of a job's watch.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobUpdate {
    Output {
        line: String,
    },
    /// The last line.
    Over {
        error: Option<ApiError>,
    },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Event {
    pub id: i64,
    pub at: String,
    pub app: Option<String>,
    pub deploy: Option<i64>,
    /// `deploy.phase`, `instance.started`, `instance.exited`, `instance.unhealthy`, `app.scaled`, …
    pub kind: String,
    pub message: String,
}

/// A row of the shared error table: one per code and subject, counted.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ErrorRow {
    pub code: String,
    pub subject: String,
    pub message: String,
    pub count: i64,
    pub first_at: String,
    pub last_at: String,
    pub backtrace: Option<String>,
}

/// One line of `epagent doctor`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Check {
    pub name: String,
    /// `ok`, `warn`, `fail`.
    pub state: String,
    pub message: String,
    pub hint: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub node: u16,
    pub uptime_seconds: u64,
    /// Each process and named loop: `ok`, or what is wrong.
    pub parts: BTreeMap<String, String>,
    pub apps: u32,
    pub instances: u32,
    pub pool_total_bytes: u64,
    pub pool_used_bytes: u64,
    pub table_version: u64,
}
