//! What monitor and init say to each other: JSON packets over an unnamed socket pair. One build, no versions.
//!
//! The channel is also init's lifeline. When the monitor is gone, init reads the end of the stream and ends with
//! everything below it; this works even if the parent-death signal was missed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use crate::monitor::protocol::{ExecCall, ExecOutcome, TtySize};
use crate::sys::message::{self, Packet};

/// Largest packet: an exec call as large as the monitor's own protocol lets it in.
const PACKET_BYTES_MAX: usize = crate::monitor::protocol::MESSAGE_BYTES_MAX;

/// Monitor to init.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ToInit {
    /// Ids are mapped. With the detached mounts: the root's first if `root`, then the rest.
    Begin {
        root: bool,
    },
    /// The monitor is still there after init has set its parent-death signal.
    Go,
    /// To the app's main process.
    Signal {
        signal: i32,
    },
    /// With three descriptors, or none for a terminal.
    Exec {
        session: u32,
        call: ExecCall,
    },
    ExecResize {
        session: u32,
        size: TtySize,
    },
    ExecSignal {
        session: u32,
        signal: i32,
    },
    /// The client that asked for it is gone.
    ExecHangUp {
        session: u32,
    },
}

/// Init to monitor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum FromInit {
    /// The parent-death signal is set; is anybody there?
    Alive,
    /// The app's program runs.
    Started {
        notes: Vec<String>,
    },
    /// It does not and will not.
    StartFailed {
        step: String,
        error: String,
        code: i32,
    },
    AppExited {
        code: i32,
    },
    AppSignaled {
        signal: i32,
        core_dumped: bool,
    },
    /// With the terminal's master if one was asked for.
    ExecStarted {
        session: u32,
        pid: i32,
    },
    ExecRefused {
        session: u32,
        error: String,
    },
    ExecEnded {
        session: u32,
        outcome: ExecOutcome,
    },
}

pub(super) fn send(channel: BorrowedFd<'_>, what: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = serde_json::to_vec(what)?;
    if bytes.len() > PACKET_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "message too large"));
    }
    message::send(channel, &bytes, fds)
}

/// `None`: the other side is gone.
pub(super) fn receive<T: for<'de> Deserialize<'de>>(
    channel: &OwnedFd,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    match message::receive(channel.as_fd(), PACKET_BYTES_MAX)? {
        None => Ok(None),
        Some(Packet { bytes, fds }) => Ok(Some((serde_json::from_slice(&bytes)?, fds))),
    }
}
