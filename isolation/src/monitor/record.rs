//! How an instance ended, as it is told to subscribers and written to `exit.json` in the log folder.

use serde::{Deserialize, Serialize};

/// The end of one instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    pub id: String,
    pub reason: ExitReason,
    /// Asked for by whom, if anybody.
    pub cause: Option<StopCause>,
    /// The memory limit was hit and the kernel killed for it.
    pub oom_killed: bool,
    /// Microseconds since 1970; 0 when the app never started.
    pub started_at_us: u64,
    pub exited_at_us: u64,
    pub memory_peak_bytes: Option<u64>,
    pub cpu_us: Option<u64>,
    pub log_dropped_bytes: u64,
}

/// How the app's main process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ExitReason {
    Exited {
        code: i32,
    },
    Signaled {
        signal: i32,
        core_dumped: bool,
    },
    /// The app never ran. `code` is what a shell would say: 127 command not found, 126 not executable, 125 set-up.
    StartFailed {
        step: String,
        error: String,
        code: i32,
    },
    /// Init was killed before it could report a status: everything was killed at once.
    Killed,
}

/// Why an instance was stopped by the monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StopCause {
    /// A client's `stop`, and the app ended within its grace.
    Stop,
    /// A client's `stop`, and what was left after the grace was killed.
    StopForced,
    /// A client's `kill`.
    Kill,
    /// [`crate::spec::JailSpec::deadline_ms`] passed.
    Deadline,
}
