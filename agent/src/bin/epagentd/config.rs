//! `epagentd.toml`, and what files in `conf.d` change of it.

use std::path::{Path, PathBuf};

use epagent_conf::{ConfError, Daemon, Loaded};
use epagent_core::name::ImageName;
use epagent_syslog::Server;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub node: u16,
    /// Holds the database, the key of the secrets and uploads under way. 0700.
    pub state_dir: PathBuf,
    /// Where the runner's and the balancer's sockets are.
    pub run_dir: PathBuf,
    /// For a `Procfile`, which names none.
    pub default_image: ImageName,
    /// Beside root, members of this group may use `admin.sock`.
    pub admin_gid: u32,
    /// Where the balancer listens, to tell users.
    pub http_address: String,
    #[serde(default)]
    pub limits: Bounds,
    #[serde(default)]
    pub log: LogConfig,
}

/// Where logs go beside the journal and the apps' own log files.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// A server that gets all of it: `tls://logs.example:6514`, `tcp://10.0.0.5:601`.
    pub syslog: Option<Server>,
    /// The authorities that may vouch for it, as PEM; without it the host's own.
    pub ca: Option<PathBuf>,
    /// Whether it gets what apps print, too.
    pub apps: bool,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { syslog: None, ca: None, apps: true }
    }
}

/// Bounds on what the agent keeps.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Bounds {
    /// Bytes of one uploaded archive.
    pub archive_bytes: u64,
    /// Releases of one app that are kept for a rollback.
    pub releases_kept: usize,
    /// Ended instances and jobs of one app whose logs are kept.
    pub logs_kept: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { archive_bytes: epagent_wire::api::ARCHIVE_BYTES_MAX, releases_kept: 5, logs_kept: 20 }
    }
}

impl Config {
    pub fn read(path: &Path) -> Result<Loaded<Self>, ConfError> {
        epagent_conf::load(Daemon::Agent, path)
    }
}
