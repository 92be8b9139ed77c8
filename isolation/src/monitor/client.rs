//! A runner's connection to one monitor.
//!
//! The socket is non-blocking and belongs in the caller's epoll set ([`AsFd`]); [`Client::next_event`] takes what has
//! arrived. Requests are synchronous with a short timeout: a monitor has nothing to wait for, so one that does not
//! answer within it is broken, not busy. Events arriving meanwhile are kept (at most [`EVENTS_MAX`]).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use crate::monitor::protocol::{Event, ExecCall, Status, TtySize};

/// Events kept while a request waits for its answer. When more come, the connection is given up.
pub const EVENTS_MAX: usize = 64;
/// How long a request may take.
pub const REQUEST_TIMEOUT: Duration = Duration::from_millis(1000);

/// Why a request to a monitor failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("connect to the monitor at {path}")]
    Connect {
        path: std::path::PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("send {request} to the monitor")]
    Send {
        request: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("receive from the monitor")]
    Receive(#[source] std::io::Error),
    #[error("the monitor closed the connection")]
    Closed,
    #[error("no answer to {request} within {timeout_ms} ms")]
    Timeout { request: &'static str, timeout_ms: u64 },
    #[error("the monitor sent what is not the protocol")]
    Protocol(#[source] serde_json::Error),
    #[error("the monitor answered {request} with {answer}")]
    Unexpected { request: &'static str, answer: String },
    #[error("{request} refused: {error}")]
    Refused { request: &'static str, error: String },
    #[error("this monitor speaks version {version}, {request} needs {needed}")]
    TooOld { request: &'static str, version: u32, needed: u32 },
    #[error("more than {EVENTS_MAX} events unread")]
    Overrun,
}

/// A connection to one monitor.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
}

/// A command started by [`Client::exec`].
#[derive(Debug)]
pub struct ExecSession {
    pub session: u32,
    /// In the host's pid namespace; for show.
    pub pid: i32,
    /// The PTY's master, when a tty was asked for.
    pub master: Option<OwnedFd>,
}

impl Client {
    /// Connects and agrees on a version.
    pub fn connect(_path: &Path) -> Result<Client, ClientError> {
        unimplemented!()
    }
    /// The version agreed on.
    pub fn version(&self) -> u32 {
        unimplemented!()
    }
    /// The instance's id, as the monitor names it.
    pub fn id(&self) -> &str {
        unimplemented!()
    }
    pub fn status(&mut self) -> Result<Status, ClientError> {
        unimplemented!()
    }
    /// From now on events arrive; `started` and `exited` at once if they are past.
    pub fn subscribe(&mut self) -> Result<(), ClientError> {
        unimplemented!()
    }
    pub fn signal(&mut self, _signal: i32) -> Result<(), ClientError> {
        unimplemented!()
    }
    pub fn stop(&mut self, _signal: i32, _grace_ms: u64) -> Result<(), ClientError> {
        unimplemented!()
    }
    pub fn kill(&mut self) -> Result<(), ClientError> {
        unimplemented!()
    }
    /// Ends an exited instance's monitor.
    pub fn release(&mut self) -> Result<(), ClientError> {
        unimplemented!()
    }
    /// `stdio`: exactly three descriptors, or none with `call.tty`.
    pub fn exec(&mut self, _call: ExecCall, _stdio: &[BorrowedFd<'_>]) -> Result<ExecSession, ClientError> {
        unimplemented!()
    }
    pub fn exec_resize(&mut self, _session: u32, _size: TtySize) -> Result<(), ClientError> {
        unimplemented!()
    }
    pub fn exec_signal(&mut self, _session: u32, _signal: i32) -> Result<(), ClientError> {
        unimplemented!()
    }
    /// The next event that has arrived, without waiting; `Ok(None)` when there is none.
    pub fn next_event(&mut self) -> Result<Option<Event>, ClientError> {
        unimplemented!()
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
