//! The lease process: votes and deadlines of an HA pair. Idle without a pair, but in place.
//!
//! It is apart from the agent because an upgrade or a database migration of the agent must not fence an app, and
//! so it has no SQL, no HTTP and no async runtime. What is here today is its place in the system: its user, its
//! state folder, and the socket `lease` that monitors will be fed deadlines over. Whoever connects is told, in one
//! line of JSON, that no pair is configured, and is let go.
//!
//! ```text
//!   start ─▶ take `lease` from the supervisor ─▶ idle ──SIGTERM──▶ end, 0
//!                                               │  ▲
//!                                 a connection ─┴──┘ hello, close
//! ```

#![deny(unsafe_code)]

// The same file as in the agent's library, which this process must not link (it would bring SQL and HTTP along).
#[path = "../../src/activation/mod.rs"]
mod activation;

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::ExitCode;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use sd_notify::NotifyState;

use activation::{ActivationError, Inherited};

/// The version of what is said on the `lease` socket.
const PROTOCOL: u32 = 1;

fn main() -> ExitCode {
    epagent_log::start("epagent-lease");
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut message = error.to_string();
            let mut cause = std::error::Error::source(&error);
            while let Some(inner) = cause {
                message.push_str(&format!(": {inner}"));
                cause = inner.source();
            }
            tracing::error!("{message}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum LeaseError {
    #[error("usage: epagent-lease --state DIR")]
    Usage,
    #[error("the state folder {path} can't be opened")]
    State { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Activation(#[from] ActivationError),
    #[error("signals can't be waited for")]
    Signals(#[source] Errno),
    #[error("the lease socket can't be waited for")]
    Wait(#[source] io::Error),
}

fn run() -> Result<(), LeaseError> {
    let state = state_folder(std::env::args().skip(1))?;
    std::fs::read_dir(&state).map_err(|source| LeaseError::State { path: state, source })?;
    let mut inherited = Inherited::from_env()?;
    let listener = inherited.take_unix("lease")?;
    for name in inherited.names() {
        tracing::warn!("the socket {name} is not used here");
    }
    drop(inherited);
    serve(&listener, &ending_signals()?)
}

fn state_folder(mut args: impl Iterator<Item = String>) -> Result<PathBuf, LeaseError> {
    match (args.next().as_deref(), args.next(), args.next()) {
        (Some("--state"), Some(folder), None) => Ok(PathBuf::from(folder)),
        _ => Err(LeaseError::Usage),
    }
}

/// SIGTERM and SIGINT, as a descriptor.
fn ending_signals() -> Result<SignalFd, LeaseError> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    set.thread_block().map_err(LeaseError::Signals)?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC).map_err(LeaseError::Signals)
}

/// Answers every connection until a signal asks for the end.
fn serve(listener: &UnixListener, ending: &SignalFd) -> Result<(), LeaseError> {
    listener.set_nonblocking(true).map_err(LeaseError::Wait)?;
    // Nobody may listen: then nobody waits for it either.
    let _ = sd_notify::notify(&[NotifyState::Ready, NotifyState::Status("idle: no pair is configured")]);
    // Often enough that one late turn is no missed one.
    let turn = sd_notify::watchdog_enabled().map(|interval| interval / 3);
    let timeout = match turn.map(PollTimeout::try_from) {
        Some(Ok(timeout)) => timeout,
        _ => PollTimeout::NONE,
    };
    loop {
        if turn.is_some() {
            let _ = sd_notify::notify(&[NotifyState::Watchdog]);
        }
        let mut waiting = [
            PollFd::new(ending.as_fd(), PollFlags::POLLIN),
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut waiting, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(LeaseError::Wait(errno.into())),
        }
        if waiting[0].any() == Some(true) {
            return Ok(());
        }
        match listener.accept() {
            Ok((stream, _)) => greet(&stream),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            // The peer went away while it was queued.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => return Err(LeaseError::Wait(error)),
        }
    }
}

/// One line, which fits any socket buffer; a peer that is gone already misses nothing.
fn greet(mut stream: &UnixStream) {
    let hello = serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "protocol": PROTOCOL,
        "pair": null,
        "message": "no pair configured",
    });
    let _ = stream.set_nonblocking(true);
    let _ = stream.write_all(format!("{hello}\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_folder_is_the_only_argument() {
        let parse = |args: &[&str]| state_folder(args.iter().map(|arg| arg.to_string()));
        assert_eq!(parse(&["--state", "/x"]).unwrap(), PathBuf::from("/x"));
        for args in [&[][..], &["--state"], &["--states", "/x"], &["--state", "/x", "y"]] {
            assert!(parse(args).is_err(), "{args:?}");
        }
    }
}
