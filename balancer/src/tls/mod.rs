//! TLS termination: a decorator around any door, so that the core never sees ciphertext.
//!
//! ```text
//!   core ◀── plain text ──▶ TlsDoor ◀── ciphertext ──▶ door (ring, epoll, a fake)
//!                             │ one Conn for each socket with TLS: the door's contract, kept
//!                             ├── Session: rustls, over bytes
//!                             └── Outgoing: records on their way, and what counts as sent
//!
//!   Context: configuration, tickets ── Certificates: who is shown what ◀── Folder: files, reloaded
//! ```
//!
//! | module | idea |
//! |---|---|
//! | this one | which socket has TLS, and which has not: those pass through untouched |
//! | [`conn`] | one connection's state machine |
//! | [`session`] | rustls without buffers; why a handshake fails |
//! | [`outgoing`] | ciphertext that waits |
//! | [`context`], [`certificates`] | what connections share; which certificate is shown |
//! | [`folder`], [`x509`] | certificates in files; when they are valid |
//! | [`acme`] | the files by which an ACME client proves that it is us |
//!
//! Faults each have a counter and a code ([`crate::core::secure::TlsFault`]). An end without a goodbye is
//! told from one with it ([`crate::core::io::RecvEnd::Cut`]). What a connection may cost is bounded: see
//! [`conn`] and [`session`]; how long a handshake may take is the core's to say (`head_timeout_ms`).
//!
//! kTLS is not used: the kernel cannot be handed the tickets and key updates that rustls keeps.

pub mod acme;
pub mod certificates;
mod conn;
pub mod context;
pub mod folder;
mod outgoing;
mod session;
pub mod x509;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use self::conn::{Conn, Effects, Next};
use self::context::Context;
use self::session::{HANDSHAKE_BYTES_MAX, RECORD_BYTES};
use crate::core::chunk::Chunk;
use crate::core::io::{Completion, ListenerId, Op, SockId};
use crate::core::secure::TlsFault;
use crate::door::Door;

/// A door whose sockets may speak TLS.
pub struct TlsDoor<D> {
    inner: D,
    context: Arc<Context>,
    /// By the index of their sockets.
    conns: Vec<Option<Box<Conn>>>,
    open: usize,
    /// What operations have led to, for the next wait.
    ready: Vec<Completion>,
    /// What the door underneath said.
    heard: Vec<Completion>,
    /// What it is to do.
    down: Vec<Op>,
    scratch: Vec<u8>,
}

/// What rustls allocates for a connection while its handshake lasts, which is when it needs most.
const RUSTLS_BYTES: usize = 16 * 1024;

/// The most memory that a connection may take: what it has heard of a record or a handshake, what was in that,
/// and records on their way out.
pub fn connection_bytes_max() -> usize {
    let heard = 2 * HANDSHAKE_BYTES_MAX + 2 * RECORD_BYTES;
    size_of::<Conn>() + RUSTLS_BYTES + heard + conn::OUT_BYTES_MAX
}

impl<D: Door> TlsDoor<D> {
    pub fn new(inner: D, context: Arc<Context>) -> Self {
        Self {
            inner,
            context,
            conns: Vec::new(),
            open: 0,
            ready: Vec::new(),
            heard: Vec::new(),
            down: Vec::new(),
            scratch: Vec::new(),
        }
    }

    fn perform(&mut self, op: Op) {
        match op {
            Op::StartTls { sock, http, said } => self.start(sock, http, &said),
            Op::Recv { sock, mode } if self.has(sock) => self.on_op(sock, |conn, _| conn.recv(mode)),
            Op::StopRecv { sock } if self.has(sock) => self.on_op(sock, Conn::stop_recv),
            Op::Send { sock, chunks, mode, .. } if self.has(sock) => {
                self.on_op(sock, |conn, fx| conn.send(&chunks, mode, fx));
            }
            Op::StopSend { sock } if self.has(sock) => self.on_op(sock, Conn::stop_send),
            Op::EndTls { sock } => self.on_op(sock, Conn::end),
            Op::Close { sock, .. } if self.has(sock) => self.close(sock, op),
            op => self.down.push(op),
        }
    }

    fn start(&mut self, sock: SockId, http: bool, said: &Chunk) {
        let index = sock.index as usize;
        if index >= self.conns.len() {
            self.conns.resize_with(index + 1, || None);
        }
        match Conn::new(sock, self.context.config(http)) {
            Ok(conn) => {
                self.conns[index] = Some(Box::new(conn));
                self.open += 1;
            }
            Err(_) => {
                let (fault, last_words) = (TlsFault::Broken, Chunk::owned(Vec::new()));
                return self.ready.push(Completion::SecureFailed { sock, fault, last_words });
            }
        }
        self.on_op(sock, |conn, fx| {
            if !said.is_empty() {
                conn.received(said, fx);
            }
        });
    }

    fn close(&mut self, sock: SockId, op: Op) {
        // Nothing more is said of it.
        self.ready.retain(|completion| socket_of(completion) != Some(sock));
        let conn = self.conns[sock.index as usize].take();
        self.open -= 1;
        if let (Some(conn), Op::Close { reset: false, .. }) = (conn, &op) {
            let (down, up, scratch) = (&mut self.down, &mut self.ready, &mut self.scratch);
            conn.close(&mut Effects { down, up, scratch });
        }
        self.down.push(op);
    }

    /// An operation of the core's on a socket with TLS; what it leads to is said with the next wait.
    fn on_op(&mut self, sock: SockId, act: impl FnOnce(&mut Conn, &mut Effects<'_>)) {
        let mut ready = std::mem::take(&mut self.ready);
        self.on_event(sock, &mut ready, act);
        self.ready = ready;
    }

    /// Something happened to a socket with TLS: takes it in, and does what follows.
    fn on_event(
        &mut self,
        sock: SockId,
        up: &mut Vec<Completion>,
        act: impl FnOnce(&mut Conn, &mut Effects<'_>),
    ) {
        let Some(slot) = self.conns.get_mut(sock.index as usize) else { return };
        let Some(conn) = slot.as_mut().filter(|conn| conn.sock == sock) else { return };
        let mut fx = Effects { down: &mut self.down, up, scratch: &mut self.scratch };
        act(conn, &mut fx);
        if conn.settle(&mut fx) == Next::Plain {
            *slot = None;
            self.open -= 1;
        }
    }

    fn has(&self, sock: SockId) -> bool {
        let conn = self.conns.get(sock.index as usize).and_then(Option::as_ref);
        conn.is_some_and(|conn| conn.sock == sock)
    }

    fn translate(&mut self, completion: Completion, up: &mut Vec<Completion>) {
        let Some(sock) = socket_of(&completion).filter(|sock| self.has(*sock)) else {
            return up.push(completion);
        };
        match completion {
            Completion::Received { chunk, .. } => {
                self.on_event(sock, up, |conn, fx| conn.received(&chunk, fx));
            }
            Completion::RecvEnded { why, .. } => {
                self.on_event(sock, up, |conn, fx| conn.recv_ended(why, fx));
            }
            Completion::Sent { bytes, .. } => self.on_event(sock, up, |conn, fx| conn.sent(bytes, fx)),
            Completion::SendFailed { error, .. } => {
                self.on_event(sock, up, |conn, fx| conn.send_failed(error, fx));
            }
            other => up.push(other),
        }
    }
}

impl<D: Door> Door for TlsDoor<D> {
    fn add_listener(&mut self, id: ListenerId, socket: Arc<OwnedFd>) {
        self.inner.add_listener(id, socket);
    }

    fn remove_listener(&mut self, id: ListenerId) {
        self.inner.remove_listener(id);
    }

    fn apply(&mut self, ops: &mut Vec<Op>) -> io::Result<()> {
        if self.open == 0 && !ops.iter().any(|op| matches!(op, Op::StartTls { .. })) {
            return self.inner.apply(ops);
        }
        for op in ops.drain(..) {
            self.perform(op);
        }
        self.inner.apply(&mut self.down)
    }

    fn wait(&mut self, timeout: Option<Duration>, completions: &mut Vec<Completion>) -> io::Result<()> {
        if self.open == 0 && self.ready.is_empty() {
            return self.inner.wait(timeout, completions);
        }
        let timeout = if self.ready.is_empty() { timeout } else { Some(Duration::ZERO) };
        let mut heard = std::mem::take(&mut self.heard);
        self.inner.wait(timeout, &mut heard)?;
        completions.append(&mut self.ready);
        for completion in heard.drain(..) {
            self.translate(completion, completions);
        }
        self.heard = heard;
        self.inner.apply(&mut self.down)
    }
}

/// The socket of a completion that concerns a connection's bytes.
fn socket_of(completion: &Completion) -> Option<SockId> {
    match completion {
        Completion::Received { sock, .. }
        | Completion::RecvEnded { sock, .. }
        | Completion::Sent { sock, .. }
        | Completion::SendFailed { sock, .. }
        | Completion::Secured { sock, .. }
        | Completion::SecureFailed { sock, .. }
        | Completion::TlsEnded { sock } => Some(*sock),
        _ => None,
    }
}
