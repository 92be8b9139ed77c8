//! One connection between the core, which knows plain text, and a door, which carries ciphertext.
//!
//! ```text
//!               StartTls                  hello, finished          EndTls: goodbye sent
//!   (plain) ───────────▶ handshake ──────────────────▶ open ──────────────────────────▶ open, TlsEnded
//!      ▲                     │ SecureFailed              │
//!      └─────────────────────┘                           └── Close ──▶ gone
//! ```
//!
//! Like the core's, its operations are functions of its state: events change the state, and
//! [`Conn::settle`] then sends, receives and answers what follows from it.
//!
//! *Receiving.* During the handshake it receives on its own, a little at a time. Later the core's receive is
//! the door's, mode and all, except that one that ends when something came goes on until there is plain
//! text. What came with the last of the handshake is held until the core asks.
//!
//! *Sending.* See [`Outgoing`]. A try is encrypted whole, since it has to be over at once; a send that waits
//! is encrypted a piece at a time. So a client that does not take what it is sent costs one piece beside what
//! waits in the core; no buffer of the core's is held.

use std::sync::Arc;

use rustls::ServerConfig;
use smallvec::smallvec;

use super::outgoing::Outgoing;
use super::session::{Fault, RECORD_BYTES, RECORD_OVERHEAD_BYTES, Sealed, Session};
use crate::core::chunk::Chunk;
use crate::core::io::{AfterSend, Completion, Errno, Op, RecvEnd, RecvMode, SendMode, SockId};
use crate::core::secure::TlsFault;

/// Most plain text that is encrypted for one send that waits for all of it to be taken.
const WAIT_ALL_BYTES: usize = 4 * RECORD_BYTES;
/// The same of one that waits for some: what slow clients get.
const WAIT_SOME_BYTES: usize = RECORD_BYTES;
/// Most ciphertext on its way out: of a send that waits, behind one that was tried.
pub const OUT_BYTES_MAX: usize = 2 * (WAIT_ALL_BYTES / RECORD_BYTES) * (RECORD_BYTES + RECORD_OVERHEAD_BYTES);
/// Most that is received at a time during the handshake.
const HANDSHAKE_RECV_BYTES: u32 = 16 * 1024;

/// A TLS connection.
pub struct Conn {
    pub sock: SockId,
    session: Session,
    is_open: bool,
    /// Why there will be no TLS; said once no receive is armed any more.
    failing: Option<TlsFault>,
    /// The core's receive.
    recv: Option<Receiving>,
    armed: Armed,
    /// Plain text that nobody has asked for yet.
    held: Vec<u8>,
    /// How the stream ends after that.
    end: Option<RecvEnd>,
    out: Outgoing,
    /// A send of the door's is under way.
    flying: bool,
    /// The core's send.
    send: Option<Sending>,
    /// Taken, but beyond what the core offered: told with its next send.
    surplus_bytes: usize,
    /// The client takes nothing more.
    is_dead: bool,
    goodbye: Goodbye,
}

/// A receive that the core has asked for.
struct Receiving {
    mode: RecvMode,
    /// What it has brought.
    fed_bytes: usize,
    is_stopping: bool,
}

/// Whose receive is armed at the door.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Armed {
    Off,
    /// The handshake's.
    Own,
    Core,
}

impl Receiving {
    /// How much more it may bring.
    fn room(&self) -> usize {
        match self.mode {
            RecvMode::Many => usize::MAX,
            RecvMode::Once { limit_bytes } => (limit_bytes as usize).saturating_sub(self.fed_bytes),
        }
    }
}

/// A send that the core has asked for.
struct Sending {
    mode: SendMode,
    offered_bytes: usize,
    is_stopping: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Goodbye {
    Unsaid,
    /// It is in the queue; the core waits for it.
    Saying,
    Said,
}

/// Where what follows from an event goes.
pub struct Effects<'a> {
    pub down: &'a mut Vec<Op>,
    pub up: &'a mut Vec<Completion>,
    /// Any vector; kept to be filled again.
    pub scratch: &'a mut Vec<u8>,
}

/// Whether the connection goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Next {
    GoOn,
    /// The socket is plain again.
    Plain,
}

impl Conn {
    pub fn new(sock: SockId, config: Arc<ServerConfig>) -> Result<Self, rustls::Error> {
        Ok(Self {
            sock,
            session: Session::new(config)?,
            is_open: false,
            failing: None,
            recv: None,
            armed: Armed::Off,
            held: Vec::new(),
            end: None,
            out: Outgoing::default(),
            flying: false,
            send: None,
            surplus_bytes: 0,
            is_dead: false,
            goodbye: Goodbye::Unsaid,
        })
    }

    /// Does what follows from its state.
    pub fn settle(&mut self, fx: &mut Effects<'_>) -> Next {
        if let Some(fault) = self.failing {
            if self.armed != Armed::Off {
                return Next::GoOn;
            }
            // Words cannot be put behind a send that a client does not take; they are for nobody then.
            let left = std::mem::take(&mut self.out).into_bytes();
            let last_words = Chunk::owned(if self.flying { Vec::new() } else { left });
            fx.up.push(Completion::SecureFailed { sock: self.sock, fault, last_words });
            return Next::Plain;
        }
        self.settle_send(fx);
        self.settle_recv(fx);
        Next::GoOn
    }

    fn settle_send(&mut self, fx: &mut Effects<'_>) {
        if self.flying {
            return;
        }
        // What is ahead of the core waits until the core offers it again.
        if !self.out.is_empty() && (self.send.is_some() || self.out.ahead_bytes() == 0) {
            let mode = self.send.as_ref().map_or(SendMode::WaitAll, |send| send.mode);
            self.flying = true;
            fx.down.push(Op::Send {
                sock: self.sock,
                chunks: self.out.chunks(),
                mode,
                after: AfterSend::GoOn,
            });
        } else if self.goodbye == Goodbye::Saying {
            self.goodbye = Goodbye::Said;
            fx.up.push(Completion::TlsEnded { sock: self.sock });
        }
    }

    fn settle_recv(&mut self, fx: &mut Effects<'_>) {
        let sock = self.sock;
        if !self.is_open {
            if self.armed == Armed::Off {
                self.armed = Armed::Own;
                let mode = RecvMode::Once { limit_bytes: HANDSHAKE_RECV_BYTES };
                fx.down.push(Op::Recv { sock, mode });
            }
            return;
        }
        let Some(recv) = &mut self.recv else { return };
        let room = recv.room().min(self.held.len());
        if room > 0 {
            recv.fed_bytes += room;
            let rest = self.held.split_off(room);
            let chunk = Chunk::owned(std::mem::replace(&mut self.held, rest));
            fx.up.push(Completion::Received { sock, chunk });
        }
        let stopped = recv.is_stopping || (recv.fed_bytes > 0 && recv.mode != RecvMode::Many);
        let why = match self.end.filter(|_| self.held.is_empty()) {
            Some(end) => end,
            None if self.armed == Armed::Core => return,
            None if stopped => RecvEnd::Ended,
            // The handshake's last receive is about to end by itself.
            None if self.armed == Armed::Own => return,
            None => {
                self.armed = Armed::Core;
                return fx.down.push(Op::Recv { sock, mode: recv.mode });
            }
        };
        if self.armed == Armed::Core && !recv.is_stopping {
            fx.down.push(Op::StopRecv { sock });
        }
        self.recv = None;
        fx.up.push(Completion::RecvEnded { sock, why });
    }

    /// Ciphertext came in.
    pub fn received(&mut self, cipher: &[u8], fx: &mut Effects<'_>) {
        if self.failing.is_some() || self.end.is_some() {
            return;
        }
        let mut replies = Vec::new();
        let heard = self.session.hear(cipher, fx.scratch, &mut replies);
        if self.goodbye == Goodbye::Unsaid {
            self.out.push_own(replies);
        }
        let heard = match heard {
            Ok(heard) => heard,
            Err(Fault(_)) if self.is_open => {
                self.end = Some(RecvEnd::Failed(Errno(libc::EPROTO)));
                return;
            }
            Err(Fault(fault)) => {
                self.failing = Some(fault);
                return;
            }
        };
        match self.held.is_empty() {
            true => self.held = heard.plain,
            false => self.held.extend_from_slice(&heard.plain),
        }
        if let Some(secured) = heard.secured {
            self.is_open = true;
            fx.up.push(Completion::Secured { sock: self.sock, secured });
        }
        if heard.closed {
            self.end = Some(RecvEnd::Eof);
        }
    }

    /// A receive of the door's ended.
    pub fn recv_ended(&mut self, why: RecvEnd, fx: &mut Effects<'_>) {
        let armed = std::mem::replace(&mut self.armed, Armed::Off);
        match why {
            RecvEnd::Ended => {}
            RecvEnd::NoBuffers if armed == Armed::Core => {
                if self.recv.take().is_some() {
                    fx.up.push(Completion::RecvEnded { sock: self.sock, why });
                }
            }
            RecvEnd::NoBuffers => {}
            RecvEnd::Eof | RecvEnd::Cut | RecvEnd::Failed(_) if !self.is_open => {
                self.failing.get_or_insert(TlsFault::Gone);
            }
            RecvEnd::Eof | RecvEnd::Cut => {
                self.end.get_or_insert(RecvEnd::Cut);
            }
            RecvEnd::Failed(_) => {
                self.end.get_or_insert(why);
            }
        }
    }

    /// A send of the door's ended.
    pub fn sent(&mut self, bytes: usize, fx: &mut Effects<'_>) {
        self.flying = false;
        self.surplus_bytes += self.out.taken(bytes);
        if let Some(send) = &self.send
            && (self.surplus_bytes > 0 || send.is_stopping || send.mode == SendMode::Try)
        {
            let offered_bytes = send.offered_bytes;
            self.send = None;
            self.tell_sent(offered_bytes, fx);
        }
    }

    fn tell_sent(&mut self, offered_bytes: usize, fx: &mut Effects<'_>) {
        let bytes = self.surplus_bytes.min(offered_bytes);
        self.surplus_bytes -= bytes;
        fx.up.push(Completion::Sent { sock: self.sock, bytes });
    }

    /// A send of the door's failed.
    pub fn send_failed(&mut self, error: Errno, fx: &mut Effects<'_>) {
        self.flying = false;
        self.is_dead = true;
        self.out = Outgoing::default();
        let was_saying = std::mem::replace(&mut self.goodbye, Goodbye::Said) == Goodbye::Saying;
        if self.send.take().is_some() || was_saying {
            fx.up.push(Completion::SendFailed { sock: self.sock, error });
        } else if !self.is_open {
            self.failing.get_or_insert(TlsFault::Gone);
        }
    }

    /// The core wants to receive.
    pub fn recv(&mut self, mode: RecvMode) {
        self.recv = Some(Receiving { mode, fed_bytes: 0, is_stopping: false });
    }

    /// The core does no longer.
    pub fn stop_recv(&mut self, fx: &mut Effects<'_>) {
        let Some(recv) = &mut self.recv else { return };
        if !std::mem::replace(&mut recv.is_stopping, true) && self.armed == Armed::Core {
            fx.down.push(Op::StopRecv { sock: self.sock });
        }
    }

    /// The core wants to send.
    pub fn send(&mut self, chunks: &[Chunk], mode: SendMode, fx: &mut Effects<'_>) {
        debug_assert!(self.send.is_none(), "two sends at a time");
        let offered_bytes = chunks.iter().map(|chunk| chunk.len()).sum();
        if self.is_dead {
            fx.up.push(Completion::SendFailed { sock: self.sock, error: Errno(libc::EPIPE) });
        } else if self.surplus_bytes > 0 || (self.flying && mode == SendMode::Try) {
            // While something of the protocol's own has not been taken, nothing else can be.
            self.tell_sent(offered_bytes, fx);
        } else if self.seal(chunks, offered_bytes, mode, fx.scratch).is_err() {
            fx.up.push(Completion::SendFailed { sock: self.sock, error: Errno(libc::EPROTO) });
        } else {
            self.send = Some(Sending { mode, offered_bytes, is_stopping: false });
        }
    }

    /// The core would rather know what has been taken.
    pub fn stop_send(&mut self, fx: &mut Effects<'_>) {
        let Some(send) = self.send.as_mut().filter(|send| !send.is_stopping) else { return };
        send.is_stopping = true;
        if self.flying {
            fx.down.push(Op::StopSend { sock: self.sock });
        }
    }

    /// Encrypts of the chunks what is not encrypted yet, as far as it should be now.
    fn seal(
        &mut self,
        chunks: &[Chunk],
        offered_bytes: usize,
        mode: SendMode,
        record: &mut Vec<u8>,
    ) -> Result<(), Sealed> {
        let mut skip = self.out.ahead_bytes();
        let most = match mode {
            SendMode::Try => usize::MAX,
            _ if skip > 0 => return Ok(()),
            SendMode::WaitSome => WAIT_SOME_BYTES,
            SendMode::WaitAll => WAIT_ALL_BYTES,
        };
        let mut left = most.min(offered_bytes.saturating_sub(skip));
        let (mut cipher, mut records) = (Vec::with_capacity(left + left / 64 + 64), Vec::new());
        let mut seal = |plain: &[u8]| {
            let start = cipher.len();
            self.session.seal(plain, &mut cipher)?;
            records.push((cipher.len() - start, plain.len()));
            Ok(())
        };
        record.clear();
        for chunk in chunks {
            let past = skip.min(chunk.len());
            skip -= past;
            let mut bytes = &chunk[past..];
            bytes = &bytes[..bytes.len().min(left)];
            while !bytes.is_empty() {
                let size = bytes.len().min(RECORD_BYTES - record.len());
                let (piece, rest) = bytes.split_at(size);
                (bytes, left) = (rest, left - size);
                if record.is_empty() && (size == RECORD_BYTES || left == 0) {
                    // A record of one piece needs no copy.
                    seal(piece)?;
                    continue;
                }
                record.extend_from_slice(piece);
                if record.len() == RECORD_BYTES || left == 0 {
                    seal(record)?;
                    record.clear();
                }
            }
        }
        self.out.push(cipher, records);
        Ok(())
    }

    /// The core has sent all it will.
    pub fn end(&mut self, fx: &mut Effects<'_>) {
        let mut goodbye = Vec::new();
        if self.is_dead {
            fx.up.push(Completion::SendFailed { sock: self.sock, error: Errno(libc::EPIPE) });
            return;
        }
        // One that cannot be said any more (the alert of an error was the last word) is none to wait for.
        let _ = self.session.goodbye(&mut goodbye);
        self.out.push_own(goodbye);
        self.goodbye = Goodbye::Saying;
    }

    /// The socket is about to be closed: a goodbye goes before it, if it has not been said and can be said
    /// at once.
    pub fn close(mut self, fx: &mut Effects<'_>) {
        let idle = self.is_open && !self.is_dead && !self.flying && self.out.is_empty();
        let mut goodbye = Vec::new();
        if idle && self.goodbye == Goodbye::Unsaid && self.session.goodbye(&mut goodbye).is_ok() {
            fx.down.push(Op::Send {
                sock: self.sock,
                chunks: smallvec![Chunk::owned(goodbye)],
                mode: SendMode::Try,
                after: AfterSend::GoOn,
            });
        }
    }
}
