//! A runner's connection to one monitor.
//!
//! The socket is non-blocking and belongs in the caller's epoll set ([`AsFd`]); [`Client::next_event`] takes what has
//! arrived. Requests are synchronous with a short timeout: a monitor has nothing to wait for, so one that does not
//! answer within it is broken, not busy. Events arriving meanwhile are kept (at most [`EVENTS_MAX`]).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::monitor::protocol::{
    Answer, Call, Event, ExecCall, MESSAGE_BYTES_MAX, Message, Request, Status, TtySize, VERSION_MAX,
    VERSION_MIN,
};
use crate::sys::message;

/// Events kept while a request waits for its answer. When more come, the connection is given up.
pub const EVENTS_MAX: usize = 64;
/// How long a request may take.
pub const REQUEST_TIMEOUT: Duration = Duration::from_millis(1000);
/// How long the first one may take of a monitor that was just started: it makes its instance before it listens to anybody.
/// That is some milliseconds, and more than a second where every processor is busy.
pub const START_TIMEOUT: Duration = Duration::from_millis(5000);

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
    version: u32,
    id: String,
    last_seq: u64,
    events: VecDeque<Event>,
}

/// A command started by [`Client::exec`].
#[derive(Debug)]
pub struct ExecSession {
    pub session: u32,
    /// In the instance's pid namespace; for show.
    pub pid: i32,
    /// The PTY's master, when a tty was asked for.
    pub master: Option<OwnedFd>,
}

impl Client {
    /// Connects and agrees on a version.
    pub fn connect(path: &Path) -> Result<Client, ClientError> {
        Client::connect_within(path, REQUEST_TIMEOUT)
    }

    /// The same, with a time of its own for the first answer.
    pub fn connect_within(path: &Path, timeout: Duration) -> Result<Client, ClientError> {
        let connect = || -> io::Result<OwnedFd> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
            rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
            Ok(socket)
        };
        let socket = connect().map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        let mut client =
            Client { socket, version: 0, id: String::new(), last_seq: 0, events: VecDeque::new() };
        let versions = (VERSION_MIN..=VERSION_MAX).collect();
        match client.request_within(timeout, "hello", 0, Call::Hello { versions }, &[])? {
            (Answer::Hello { version, id }, _) => Ok(Client { version, id, ..client }),
            (other, _) => Err(unexpected("hello", &other)),
        }
    }

    /// The version agreed on.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The instance's id, as the monitor names it.
    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn status(&mut self) -> Result<Status, ClientError> {
        match self.request("status", 1, Call::Status, &[])? {
            (Answer::Status(status), _) => Ok(status),
            (other, _) => Err(unexpected("status", &other)),
        }
    }

    /// From now on events arrive; `started` and `exited` at once if they are past.
    pub fn subscribe(&mut self) -> Result<(), ClientError> {
        self.done("subscribe", 1, Call::Subscribe)
    }

    /// A signal to the app's main process.
    pub fn signal(&mut self, signal: i32) -> Result<(), ClientError> {
        self.done("signal", 1, Call::Signal { signal })
    }

    /// The signal to the app's main process, and after `grace_ms` the end of everything. Returns at once.
    pub fn stop(&mut self, signal: i32, grace_ms: u64) -> Result<(), ClientError> {
        self.done("stop", 1, Call::Stop { signal, grace_ms })
    }

    /// The end of everything, at once.
    pub fn kill(&mut self) -> Result<(), ClientError> {
        self.done("kill", 1, Call::Kill)
    }

    /// Ends an exited instance's monitor.
    pub fn release(&mut self) -> Result<(), ClientError> {
        self.done("release", 1, Call::Release)
    }

    /// Runs a command in the instance, for as long as this connection lives. `stdio`: exactly three descriptors, or
    /// none with `call.tty`. Its end is told by [`Event::ExecExited`] on this connection, subscribed or not.
    pub fn exec(&mut self, call: ExecCall, stdio: &[BorrowedFd<'_>]) -> Result<ExecSession, ClientError> {
        match self.request("exec", 2, Call::Exec(call), stdio)? {
            (Answer::Exec { session, pid }, mut fds) => Ok(ExecSession { session, pid, master: fds.pop() }),
            (other, _) => Err(unexpected("exec", &other)),
        }
    }

    pub fn exec_resize(&mut self, session: u32, size: TtySize) -> Result<(), ClientError> {
        self.done("exec-resize", 2, Call::ExecResize { session, size })
    }

    /// To the command's process group.
    pub fn exec_signal(&mut self, session: u32, signal: i32) -> Result<(), ClientError> {
        self.done("exec-signal", 2, Call::ExecSignal { session, signal })
    }

    /// The next event that has arrived, without waiting; `Ok(None)` when there is none.
    /// Events kept from requests come first: call this until `None` after each request, not only when readable.
    pub fn next_event(&mut self) -> Result<Option<Event>, ClientError> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            match self.receive()? {
                None => return Ok(None),
                Some((Message::Event { event: Event::Unknown }, _)) => {}
                Some((Message::Event { event }, _)) => return Ok(Some(event)),
                // The late answer to a request that timed out.
                Some((Message::Answer { .. }, _)) => {}
            }
        }
    }

    fn done(&mut self, request: &'static str, since: u32, call: Call) -> Result<(), ClientError> {
        match self.request(request, since, call, &[])? {
            (Answer::Ok, _) => Ok(()),
            (other, _) => Err(unexpected(request, &other)),
        }
    }

    fn request(
        &mut self,
        request: &'static str,
        since: u32,
        call: Call,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Answer, Vec<OwnedFd>), ClientError> {
        self.request_within(REQUEST_TIMEOUT, request, since, call, fds)
    }

    /// Sends and waits for the answer, keeping events that come before it. What the agreed version does not have is
    /// not even sent.
    fn request_within(
        &mut self,
        timeout: Duration,
        request: &'static str,
        since: u32,
        call: Call,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Answer, Vec<OwnedFd>), ClientError> {
        if since > 0 && self.version < since {
            return Err(ClientError::TooOld { request, version: self.version, needed: since });
        }
        self.last_seq += 1;
        let expected = self.last_seq;
        let bytes = serde_json::to_vec(&Request { seq: expected, call }).map_err(ClientError::Protocol)?;
        message::send(self.socket.as_fd(), &bytes, fds)
            .map_err(|source| ClientError::Send { request, source })?;
        let deadline = Instant::now() + timeout;
        loop {
            match self.receive()? {
                Some((Message::Answer { seq, answer }, fds)) if seq == expected => {
                    return checked(request, self.version, since, answer).map(|answer| (answer, fds));
                }
                Some((Message::Answer { .. }, _)) | Some((Message::Event { event: Event::Unknown }, _)) => {}
                Some((Message::Event { .. }, _)) if self.events.len() >= EVENTS_MAX => {
                    return Err(ClientError::Overrun);
                }
                Some((Message::Event { event }, _)) => self.events.push_back(event),
                None if !self.wait(deadline)? => {
                    return Err(ClientError::Timeout { request, timeout_ms: timeout.as_millis() as u64 });
                }
                None => {}
            }
        }
    }

    /// Waits for a message; false when the deadline has passed.
    fn wait(&self, deadline: Instant) -> Result<bool, ClientError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let mut polled = [PollFd::new(&self.socket, PollFlags::IN)];
        let left = Timespec::try_from(left).ok();
        match rustix::event::poll(&mut polled, left.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(true),
            Err(errno) => Err(ClientError::Receive(errno.into())),
        }
    }

    /// One message, if one is there.
    fn receive(&mut self) -> Result<Option<(Message, Vec<OwnedFd>)>, ClientError> {
        match message::receive(self.socket.as_fd(), MESSAGE_BYTES_MAX) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Err(ClientError::Closed),
            Err(source) => Err(ClientError::Receive(source)),
            Ok(None) => Err(ClientError::Closed),
            Ok(Some(packet)) => {
                let message = serde_json::from_slice(&packet.bytes).map_err(ClientError::Protocol)?;
                Ok(Some((message, packet.fds)))
            }
        }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn checked(request: &'static str, version: u32, needed: u32, answer: Answer) -> Result<Answer, ClientError> {
    match answer {
        Answer::Refused { error } => Err(ClientError::Refused { request, error }),
        Answer::Unsupported { .. } => Err(ClientError::TooOld { request, version, needed }),
        answer => Ok(answer),
    }
}

fn unexpected(request: &'static str, answer: &Answer) -> ClientError {
    ClientError::Unexpected { request, answer: format!("{answer:?}") }
}
