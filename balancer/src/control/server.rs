//! The listening end of the control socket. It is driven by one poll loop: nothing here waits, except for a
//! peer that does not take its answer, and that for at most two seconds.
//!
//! A peer may be told later ([`Reply::Later`]): it is kept with its deadline and the loop goes on. What it says
//! meanwhile stays in its socket until it has been told, so that answers keep the order of their questions.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};

use super::audit::Actor;
use super::protocol::{ControlError, ErrorCode, LINE_BYTES_MAX, Request, Response, Waited};

/// Most control connections at a time; one more is closed at once.
pub const PEERS_MAX: usize = 16;
/// How long a peer may take to accept its answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// Most bytes read from one peer before the others have their turn.
const READ_BYTES: usize = 64 * 1024;

/// The control socket and who is connected to it.
pub struct ControlServer {
    listener: UnixListener,
    /// Besides root, this uid may speak.
    allowed_uid: Option<u32>,
    peers: Vec<Peer>,
}

struct Peer {
    stream: UnixStream,
    actor: Actor,
    /// What has come of the current line.
    line: Vec<u8>,
    /// It is to be told by then.
    waiting_until: Option<Instant>,
    /// It is to be told what comes of the handover under way.
    awaits_handover: bool,
    gone: bool,
}

/// What a request comes to.
pub enum Reply {
    Now(Response),
    /// [`ControlServer::tell_waiting`] answers it, at the latest then.
    Later(Instant),
    /// [`ControlServer::tell_handover`] answers it.
    AtHandover,
}

impl ControlServer {
    /// Takes over a listening unix stream socket.
    pub fn new(listener: OwnedFd, allowed_uid: Option<u32>) -> io::Result<Self> {
        let listener = UnixListener::from(listener);
        listener.set_nonblocking(true)?;
        Ok(Self { listener, allowed_uid, peers: Vec::new() })
    }

    /// What to poll, and for what.
    pub fn polled(&self) -> Vec<PollFd<'_>> {
        let peers = self.peers.iter().map(Peer::polled);
        std::iter::once(PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)).chain(peers).collect()
    }

    /// Takes in what has come, and answers each complete request with what `handle` makes of it.
    pub fn serve(&mut self, mut handle: impl FnMut(Actor, Request) -> Reply) {
        self.accept();
        for peer in &mut self.peers {
            match peer.is_waiting() {
                true => peer.notice_hangup(),
                false => peer.read(),
            }
            while !peer.is_waiting()
                && let Some(line) = peer.take_line()
            {
                let reply = match serde_json::from_slice(&line) {
                    Ok(request) => handle(peer.actor, request),
                    Err(error) => Reply::Now(refusal(ErrorCode::BadRequest, error.to_string())),
                };
                match reply {
                    Reply::Now(response) => peer.answer(&response),
                    Reply::Later(at) => peer.waiting_until = Some(at),
                    Reply::AtHandover => peer.awaits_handover = true,
                }
            }
            if peer.line.len() >= LINE_BYTES_MAX {
                let message = format!("a request is longer than {LINE_BYTES_MAX} bytes");
                peer.answer(&refusal(ErrorCode::BadRequest, message));
                peer.gone = true;
            }
        }
        self.peers.retain(|peer| !peer.gone);
    }

    /// When the next waiting peer is to be told.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.peers.iter().filter_map(|peer| peer.waiting_until).min()
    }

    /// Tells every peer that waits.
    pub fn tell_waiting(&mut self, waited: &Waited) {
        self.tell(waited, |_| true);
    }

    /// Tells those whose time is up.
    pub fn tell_expired(&mut self, now: Instant, waited: &Waited) {
        self.tell(waited, |until| until <= now);
    }

    /// Tells those that asked for a handover what came of it.
    pub fn tell_handover(&mut self, outcome: &Response) {
        for peer in self.peers.iter_mut().filter(|peer| peer.awaits_handover) {
            peer.awaits_handover = false;
            peer.answer(outcome);
        }
        self.peers.retain(|peer| !peer.gone);
    }

    /// The listening socket.
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Connections a successor can go on with. One in the middle of a request is told to try again.
    pub fn hand_on(&mut self) -> Vec<BorrowedFd<'_>> {
        for peer in self.peers.iter_mut().filter(|peer| !peer.line.is_empty()) {
            peer.answer(&refusal(ErrorCode::Busy, "a new process takes over: try again".to_owned()));
            peer.gone = true;
        }
        self.peers.retain(|peer| !peer.gone);
        self.peers.iter().map(|peer| peer.stream.as_fd()).collect()
    }

    /// Goes on with connections of a predecessor's.
    pub fn adopt(&mut self, peers: Vec<OwnedFd>) {
        for stream in peers.into_iter().map(UnixStream::from) {
            self.peers.push(Peer::new(stream));
        }
    }

    fn tell(&mut self, waited: &Waited, whom: impl Fn(Instant) -> bool) {
        for peer in &mut self.peers {
            if peer.waiting_until.take_if(|until| whom(*until)).is_some() {
                peer.answer(&Response::Waited(waited.clone()));
            }
        }
        self.peers.retain(|peer| !peer.gone);
    }

    fn accept(&mut self) {
        // Errors of accepting are passing ones; the next poll tries again.
        while let Ok((stream, _)) = self.listener.accept() {
            if stream.set_write_timeout(Some(ANSWER_TIMEOUT)).is_err() || self.peers.len() >= PEERS_MAX {
                continue;
            }
            let mut peer = Peer::new(stream);
            match peer.actor {
                Actor::Peer { uid, .. } if uid == 0 || Some(uid) == self.allowed_uid => self.peers.push(peer),
                _ => {
                    let message = "this uid may not control the balancer".to_owned();
                    peer.answer(&refusal(ErrorCode::Forbidden, message));
                }
            }
        }
    }
}

impl Peer {
    fn new(stream: UnixStream) -> Self {
        // Who connected, also when a predecessor accepted it. Nobody is called -1.
        let actor = match getsockopt(&stream, sockopt::PeerCredentials) {
            Ok(credentials) => Actor::Peer { uid: credentials.uid(), pid: credentials.pid() },
            Err(_) => Actor::Peer { uid: u32::MAX, pid: 0 },
        };
        Self { stream, actor, line: Vec::new(), waiting_until: None, awaits_handover: false, gone: false }
    }

    fn is_waiting(&self) -> bool {
        self.waiting_until.is_some() || self.awaits_handover
    }

    /// One that waits is only watched for its end, which poll reports unasked.
    fn polled(&self) -> PollFd<'_> {
        let flags = if self.is_waiting() { PollFlags::empty() } else { PollFlags::POLLIN };
        PollFd::new(self.stream.as_fd(), flags)
    }

    fn notice_hangup(&mut self) {
        let mut polled = [self.polled()];
        let ended = poll(&mut polled, PollTimeout::ZERO).is_ok_and(|count| count > 0);
        self.gone |= ended;
    }

    fn read(&mut self) {
        let _ = self.stream.set_nonblocking(true);
        let mut bytes = [0; 8 * 1024];
        let mut total = 0;
        while total < READ_BYTES && self.line.len() < LINE_BYTES_MAX {
            match self.stream.read(&mut bytes) {
                Ok(0) => {
                    self.gone = true;
                    break;
                }
                Ok(count) => {
                    self.line.extend_from_slice(&bytes[..count]);
                    total += count;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.gone = true;
                    break;
                }
            }
        }
    }

    fn take_line(&mut self) -> Option<Vec<u8>> {
        let newline = self.line.iter().position(|b| *b == b'\n')?;
        let rest = self.line.split_off(newline + 1);
        let mut line = std::mem::replace(&mut self.line, rest);
        line.pop();
        Some(line)
    }

    fn answer(&mut self, response: &Response) {
        let Ok(mut text) = serde_json::to_vec(response) else {
            self.gone = true;
            return;
        };
        text.push(b'\n');
        let _ = self.stream.set_nonblocking(false);
        if self.stream.write_all(&text).is_err() {
            self.gone = true;
        }
    }
}

/// An answer that nothing was changed.
pub fn refusal(code: ErrorCode, message: String) -> Response {
    Response::Error(ControlError { code, message })
}
