//! What monitors and runners say to each other: JSON, one message per SOCK_SEQPACKET packet.
//!
//! A monitor lives as long as its instance, so months-old monitors meet newer runners. Hence:
//! the first message of a client is `hello` with the versions it speaks, the monitor answers with the one chosen;
//! unknown fields are ignored; an unknown request is answered `unsupported`; an unknown event is skipped.
//!
//! | version | adds |
//! |---|---|
//! | 1 (the floor) | `status`, `subscribe`, `signal`, `stop`, `kill`, `release`; events `started`, `exited` |
//! | 2 | `exec`, `exec-resize`, `exec-signal` with events `exec-exited`; event `log-dropped`; `status.log_dropped_bytes` |
//!
//! A monitor never sends a client anything newer than the version agreed on with it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::id::JailPath;
use crate::monitor::record::ExitRecord;
use crate::spec::User;

/// The oldest version this build speaks.
pub const VERSION_MIN: u32 = 1;
/// The newest version this build speaks.
pub const VERSION_MAX: u32 = 2;
/// Largest message. A longer one ends the connection.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Most descriptors with one message: stdin, stdout, stderr of an exec.
pub const MESSAGE_FDS_MAX: usize = 3;

/// A request with the number its answer will carry.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    pub seq: u64,
    #[serde(flatten)]
    pub call: Call,
}

/// What a client may ask.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Call {
    /// Always first.
    Hello {
        versions: Vec<u32>,
    },
    Status,
    /// From now on, send events to this connection. What is already true is sent at once.
    Subscribe,
    /// A signal to the app's main process.
    Signal {
        signal: i32,
    },
    /// The signal to the app's main process, then everything is killed after `grace_ms`.
    Stop {
        signal: i32,
        grace_ms: u64,
    },
    /// Everything is killed now.
    Kill,
    /// Version 2. With three descriptors (stdin, stdout, stderr), or with none and `tty`: then the answer carries
    /// the PTY's master. The command lives as long as this connection.
    Exec(ExecCall),
    /// Version 2.
    ExecResize {
        session: u32,
        size: TtySize,
    },
    /// Version 2. To the command's process group.
    ExecSignal {
        session: u32,
        signal: i32,
    },
    /// The exit record has been taken: an exited monitor ends. Refused while the instance runs.
    Release,
}

/// A command to run beside the app, under the same lockdown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecCall {
    pub argv: Vec<String>,
    pub cwd: JailPath,
    /// Added to the app's own environment, secrets included.
    pub env: BTreeMap<String, String>,
    #[serde(default)]
    pub user: Option<User>,
    #[serde(default)]
    pub tty: Option<TtySize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TtySize {
    pub rows: u16,
    pub columns: u16,
}

/// Whatever a monitor sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Message {
    Answer {
        seq: u64,
        #[serde(flatten)]
        answer: Answer,
    },
    Event {
        event: Event,
    },
}

/// The answer to one [`Call`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Answer {
    Hello {
        version: u32,
        id: String,
    },
    Status(Status),
    /// Done, or begun in the case of `stop` and `kill`.
    Ok,
    /// The command runs as the session of this number. With the PTY's master as descriptor when one was asked for.
    Exec {
        session: u32,
        pid: i32,
    },
    /// Understood and not possible, with the reason.
    Refused {
        error: String,
    },
    /// Not known to this monitor or not part of the agreed version.
    Unsupported {
        request: String,
    },
}

/// What happened, for subscribers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Event {
    Started {
        pid: i32,
        started_at_us: u64,
    },
    Exited {
        record: ExitRecord,
    },
    /// Version 2: sum so far of log bytes that the log writer could not take.
    LogDropped {
        total_bytes: u64,
    },
    /// Version 2.
    ExecExited {
        session: u32,
        outcome: ExecOutcome,
    },
    /// An event of a later version.
    #[serde(other)]
    Unknown,
}

/// How an exec'ed command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ExecOutcome {
    Exited {
        code: i32,
    },
    Signaled {
        signal: i32,
    },
    /// It never ran; `code` is what a shell would return: 127 not found, 126 not executable, 125 set-up failed.
    Failed {
        error: String,
        code: i32,
    },
}

/// Where the instance stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub id: String,
    pub state: State,
    /// The instance's init in the host's pid namespace, from its clone until it is reaped.
    pub pid: Option<i32>,
    /// Microseconds since 1970; 0 before the app was started.
    pub started_at_us: u64,
    /// Present in state `exited`.
    #[serde(default)]
    pub record: Option<ExitRecord>,
    /// What set-up left out, e.g. `/etc/hosts` in a read-only image without that file.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Version 2.
    #[serde(default)]
    pub log_dropped_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    Starting,
    Running,
    Stopping,
    Exited,
}
