//! The words between the core and a door: operations out, completions in.
//!
//! They are few on purpose. Everything a door does with a socket is one of [`Op`]; everything it may say is
//! one of [`Completion`]. The core names sockets by [`SockId`], which it makes itself and never uses twice
//! within a door's memory, so that an answer meant for a closed socket is recognised and dropped.

use std::fmt;
use std::net::SocketAddr;

use super::chunk::{Chunk, Chunks};
use super::refusal::Refusal;
use super::secure::{Secured, TlsFault};
use crate::table::Address;

/// Milliseconds on a clock that never goes back; where it starts does not matter.
pub type Millis = u64;

/// A socket as the core knows it: a slot and how often the slot has been used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SockId {
    pub index: u32,
    /// Below 2^[`GENERATION_BITS`], then from 0 again.
    pub generation: u32,
}

/// How many bits of a generation there are; the rest of a 64-bit token is a door's own.
pub const GENERATION_BITS: u32 = 28;

/// A listening socket. Never reused within a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ListenerId(pub u32);

/// An accepted socket that the core has not named yet; only the door knows what the number means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RawSocket(pub i32);

/// An error number of the system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

impl Errno {
    /// Whether the process or the machine ran short of something, rather than the peer failing.
    pub fn is_shortage(self) -> bool {
        matches!(self.0, libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS | libc::EADDRNOTAVAIL)
    }

    /// The error in words, and what an operator can do about it where that is known.
    pub fn advice(self) -> String {
        match self.0 {
            libc::EMFILE => format!("{self}; raise LimitNOFILE= (ulimit -n), or lower --max-connections"),
            libc::ENFILE => format!("{self}; raise the sysctl fs.file-max"),
            libc::EADDRNOTAVAIL => format!("{self}; widen the sysctl net.ipv4.ip_local_port_range"),
            _ => self.to_string(),
        }
    }

    /// Whether a connect failed because as many wait at a unix socket as may.
    pub fn is_full_queue(self) -> bool {
        self.0 == libc::EAGAIN
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Refusal::of(*self) {
            Some(refusal) => refusal.fmt(f),
            None => std::io::Error::from_raw_os_error(self.0).fmt(f),
        }
    }
}

/// How long a receive stays armed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecvMode {
    /// Until it is stopped or ends by itself. What fast flows use.
    Many,
    /// Until something came, and for no more than this. What bulk flows use, so that they cannot overshoot
    /// what their other side takes.
    Once { limit_bytes: u32 },
}

/// How long a send goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SendMode {
    /// It ends at once, with what the socket's buffer takes now (perhaps nothing).
    Try,
    /// It ends when some was taken.
    WaitSome,
    /// It ends when all was taken, or it is stopped. A door may end it with less.
    WaitAll,
}

/// What the core does once a send is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterSend {
    /// Nothing: of one that does not wait, a door may tell with whatever completes next.
    Nothing,
    /// It goes on with the socket.
    GoOn,
    /// FIN, as soon as all was taken, so that a door may let the two travel together.
    Fin,
}

/// What the core asks of a door. Operations on one socket take effect in the order given.
#[derive(Debug)]
pub enum Op {
    /// Start accepting; ends with [`Completion::AcceptEnded`].
    Accept(ListenerId),
    /// End accepting. Sockets accepted before it takes effect still arrive.
    StopAccept(ListenerId),
    /// Give an accepted socket its name.
    Adopt { raw: RawSocket, sock: SockId },
    /// Close an accepted socket at once, with a reset.
    Refuse { raw: RawSocket },
    /// Make a socket and connect it; answered by `Connected` or `ConnectFailed`.
    Connect { sock: SockId, address: Address },
    /// Start receiving; ends with [`Completion::RecvEnded`]. At most one is armed for a socket.
    Recv { sock: SockId, mode: RecvMode },
    /// End receiving. What was received before it takes effect still arrives.
    StopRecv { sock: SockId },
    /// Send; at most one is under way for a socket.
    Send { sock: SockId, chunks: Chunks, mode: SendMode, after: AfterSend },
    /// End a send that waits; it answers with what was taken. One that has just ended is no fault.
    StopSend { sock: SockId },
    /// Speak TLS on an accepted socket, as the server, beginning with what has been read of it. Nothing may
    /// be sent or received until `Secured` or `SecureFailed` has answered. With `http`, that is the
    /// application protocol agreed on; else any will do.
    StartTls { sock: SockId, http: bool, said: Chunk },
    /// Say TLS's goodbye, after everything else; answered by `TlsEnded`, or `SendFailed`.
    EndTls { sock: SockId },
    /// Send FIN: the peer sees the end of the stream.
    ShutdownWrite { sock: SockId },
    /// Cancel whatever is under way and close; with `reset` the peer sees RST. Nothing more is said of it.
    Close { sock: SockId, reset: bool },
}

/// What a door answers.
#[derive(Debug)]
pub enum Completion {
    /// A connection came in, from this address where there is one.
    Accepted { listener: ListenerId, raw: RawSocket, peer: Option<SocketAddr> },
    /// Accepting ended: stopped (`None`) or failed.
    AcceptEnded { listener: ListenerId, error: Option<Errno> },
    /// The socket is connected.
    Connected { sock: SockId },
    /// It is not, and never will be.
    ConnectFailed { sock: SockId, error: Errno },
    /// Bytes came in.
    Received { sock: SockId, chunk: Chunk },
    /// Receiving ended.
    RecvEnded { sock: SockId, why: RecvEnd },
    /// The send is over and this much of it was taken; less than all of it is not an error.
    Sent { sock: SockId, bytes: usize },
    /// The handshake is done; what is received and sent from here on is plain text.
    Secured { sock: SockId, secured: Box<Secured> },
    /// There will be no TLS: the socket is plain again, and `last_words` are to be sent to it as they are;
    /// where there are none it can only be closed.
    SecureFailed { sock: SockId, fault: TlsFault, last_words: Chunk },
    /// The goodbye was taken.
    TlsEnded { sock: SockId },
    /// The send failed; the peer takes no more.
    SendFailed { sock: SockId, error: Errno },
}

/// Why receiving ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecvEnd {
    /// The peer sent FIN.
    Eof,
    /// The peer sent FIN without TLS's goodbye before it: whether that is the end, nobody can tell.
    Cut,
    /// Every shared buffer was in use.
    NoBuffers,
    /// It was stopped, or was for one chunk, or the kernel ended it for reasons of its own.
    Ended,
    /// The connection is gone.
    Failed(Errno),
}
