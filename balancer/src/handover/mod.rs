//! Handing over to a successor: an upgrade, or a restart, that no client notices.
//!
//! The running balancer executes its program anew, gives the new process its listening sockets and its table,
//! and goes on serving until that one says that it is ready. Then it calls off its accepts and drains: what it
//! carries it carries to the end, within a cap. Nothing is bound a second time, so the queues of the listening
//! sockets, and who waits in them, are the same throughout.
//!
//! ```text
//!   old                                         launcher (the old program)             new
//!    │ reload: a socketpair, then exec ─────────────▶│
//!    │── Launch [folder of the program] ────────────▶│── exec, with the channel as stdin ──▶│
//!    │◀───────────────────── Launched [its pidfd] ───│ ends                                 │
//!    │── Hello [table], Sockets [listeners], Given ────────────────────────────────────────▶│ starts threads
//!    │   serves on; a new table is passed on ──── Table ───────────────────────────────────▶│
//!    │◀──────────────────────────────────────────────────────────── Ready, or Failed ───────│
//!    │ calls off its accepts
//!    │── Go [control connections, channels of those that still drain] ─────────────────────▶│ accepts
//!    │ tells the service manager MAINPID=, answers who asked
//!    │ drains                                                                               │
//!    │◀──────── Table, Status, End ─────────────────────────────────────────────────────────│
//!    │───────── Taken, Report, Starving ───────────────────────────────────────────────────▶│
//!    ▼ its channel closes with it
//! ```
//!
//! Until `Go` nothing has happened: whatever goes wrong with the new process (it cannot be executed, ends,
//! speaks another version of this, says nothing for [`READY_TIMEOUT`]) it is killed, the old one goes on, and
//! says why. A process that launches another by way of a third that ends at once is not its parent: the new
//! process belongs to whoever supervises the old one from its first moment on, and dies with it where the old
//! one does (see [`Lifeline`]).
//!
//! While it drains a process holds clients of its own, whom only a new table can release. So whoever has the
//! control socket passes each table on to all of those before it, and its status has their counts: an upstream
//! is empty when no process has anything left for it. That is why channels to older ones are handed on too.
//!
//! | module | |
//! |---|---|
//! | [`channel`] | the words above, and the socketpair they go over |
//! | [`launch`] | executing the program on disk, by way of the launcher |
//! | [`giving`] | the old process, until `Go` |
//! | [`taking`] | the new process, until `Go` |
//! | [`predecessors`] | the new process, while old ones drain |
//! | [`endowment`] | what any process starts with |

pub mod channel;
pub mod endowment;
pub mod giving;
pub mod launch;
pub mod lifeline;
pub mod predecessors;
pub mod taking;

use std::time::Duration;

pub use lifeline::Lifeline;

/// The version of [`channel::Message`]. A successor that speaks another is refused.
pub const PROTOCOL: u32 = 1;
/// How long a new process may take until it is ready.
pub const READY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the launcher may take; it only executes.
pub const LAUNCH_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a draining process may take to answer before it is left to itself.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// Most processes that drain at a time; the oldest is told to end when there is one more.
pub const DRAINING_MAX: usize = 3;
/// In the environment of a process that is handed something on its standard input.
pub const ENVIRONMENT: &str = "EPAGENT_BALANCER_HANDOVER";

/// Why a handover did not come about. The old process goes on as if nothing had been.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    #[error("one is under way already")]
    Busy,
    #[error("this process drains: its successor is in charge")]
    Draining,
    #[error("cannot {what}")]
    System {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot speak to the new process")]
    Channel(#[from] channel::ChannelError),
    #[error("cannot execute {program}: {why}")]
    Execute { program: String, why: String },
    #[error("the new process ended before it was ready; what it wrote to standard error may say why")]
    Ended,
    #[error("the new process could not start: {why}")]
    Failed { why: String },
    #[error("a data-path thread did not call off its accepts in time")]
    Accepting,
    #[error("the new process was not ready within {} s", READY_TIMEOUT.as_secs())]
    Late,
    #[error("the new process speaks version {theirs} of the handover, this one {PROTOCOL}")]
    Protocol { theirs: u32 },
    #[error("standard input is no channel of a handover")]
    NoChannel,
    #[error("the old process ended before it had handed everything over")]
    Orphaned,
    #[error("a {what} was expected in the handover")]
    Missing { what: &'static str },
}
