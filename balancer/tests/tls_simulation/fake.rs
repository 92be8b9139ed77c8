//! The door below: one connection, whose other end is a pair of byte queues.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use epagent_balancer::core::chunk::{Chunk, Chunks};
use epagent_balancer::core::io::{Completion, Errno, ListenerId, Op, RecvEnd, RecvMode, SendMode, SockId};
use epagent_balancer::door::Door;

use crate::lent::Lent;

/// splitmix64.
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// The wire, seen from both its ends.
#[derive(Default)]
pub struct Wire {
    pub to_server: Vec<u8>,
    pub to_server_fin: bool,
    pub to_client: Vec<u8>,
    pub to_client_fin: bool,
    pub reset: bool,
    /// How much `to_client` may hold.
    pub window: usize,
    /// Most bytes of one receive.
    pub piece: usize,
}

/// What a door below may be asked at the moment.
pub struct Fake {
    pub rng: Rng,
    pub wire: Wire,
    pub sock: SockId,
    pub live: Rc<Cell<usize>>,
    recv: Option<RecvMode>,
    stopping: bool,
    waiting_send: Option<Chunks>,
    /// Of a send that waits for all of it: what was taken.
    taken: Option<usize>,
    stopping_send: bool,
    trying: bool,
    ready: Vec<Completion>,
    pub is_closed: bool,
}

impl Fake {
    pub fn new(rng: Rng, wire: Wire, sock: SockId) -> Self {
        Self {
            rng,
            wire,
            sock,
            live: Rc::default(),
            recv: None,
            stopping: false,
            waiting_send: None,
            taken: None,
            stopping_send: false,
            trying: false,
            ready: Vec::new(),
            is_closed: false,
        }
    }

    fn perform(&mut self, op: Op) {
        assert!(!self.is_closed, "{op:?} on a closed socket");
        match op {
            Op::Recv { mode, .. } => {
                assert!(self.recv.is_none(), "a receive is armed twice");
                self.recv = Some(mode);
            }
            Op::StopRecv { .. } => self.stopping = self.recv.is_some(),
            Op::StopSend { .. } => self.stopping_send = self.waiting_send.is_some(),
            Op::Send { chunks, mode, .. } => {
                assert!(self.waiting_send.is_none() && !self.trying, "two sends at a time");
                assert!(!self.wire.to_client_fin, "a send after FIN");
                assert!(chunks.iter().any(|chunk| !chunk.is_empty()), "a send of nothing");
                self.trying = mode == SendMode::Try;
                self.taken = (mode == SendMode::WaitAll).then_some(0);
                match mode {
                    SendMode::WaitSome | SendMode::WaitAll => self.waiting_send = Some(chunks),
                    SendMode::Try => {
                        let completion = self.take_some(&chunks, 0);
                        self.ready.push(completion);
                    }
                }
            }
            Op::ShutdownWrite { .. } => {
                assert!(self.waiting_send.is_none() && !self.trying, "FIN overtakes a send");
                self.wire.to_client_fin = true;
            }
            Op::Close { reset, .. } => {
                self.is_closed = true;
                self.wire.reset |= reset || self.waiting_send.is_some();
                self.wire.to_client_fin = true;
                self.ready.clear();
            }
            other => panic!("{other:?} is none of this door's"),
        }
    }

    fn complete_recv(&mut self, out: &mut Vec<Completion>) {
        let Some(mode) = self.recv.filter(|_| self.stopping || self.rng.one_in(2)) else { return };
        let (sock, mut end) = (self.sock, None);
        let mut room = match mode {
            RecvMode::Many => usize::MAX,
            RecvMode::Once { limit_bytes } => limit_bytes as usize,
        };
        for _ in 0..1 + self.rng.below(4) {
            if self.wire.reset || self.wire.to_server.is_empty() {
                break;
            }
            if self.rng.one_in(30) {
                end = Some(RecvEnd::NoBuffers);
                break;
            }
            let size = (1 + self.rng.below(self.wire.piece)).min(room);
            room -= size;
            let bytes = take_front(&mut self.wire.to_server, size);
            out.push(Completion::Received { sock, chunk: Lent::chunk(bytes, &self.live) });
            if room == 0 || self.rng.one_in(20) {
                end = Some(RecvEnd::Ended);
                break;
            }
        }
        if end.is_none() {
            if self.wire.reset {
                end = Some(RecvEnd::Failed(Errno(libc::ECONNRESET)));
            } else if self.wire.to_server_fin && self.wire.to_server.is_empty() {
                end = Some(RecvEnd::Eof);
            } else if self.stopping || (mode != RecvMode::Many && !out.is_empty()) {
                end = Some(RecvEnd::Ended);
            }
        }
        if let Some(why) = end {
            (self.recv, self.stopping) = (None, false);
            out.push(Completion::RecvEnded { sock, why });
        }
    }

    fn complete_send(&mut self, out: &mut Vec<Completion>) {
        let Some(mut chunks) = self.waiting_send.take() else { return };
        let room = self.wire.window.saturating_sub(self.wire.to_client.len());
        let (sock, mut before) = (self.sock, self.taken.unwrap_or(0));
        if self.wire.reset || (room > 0 && self.rng.one_in(2)) {
            let Completion::Sent { bytes, .. } = self.take_some(&chunks, 1) else {
                self.stopping_send = false;
                return out.push(Completion::SendFailed { sock, error: Errno(libc::ECONNRESET) });
            };
            before += bytes;
            advance(&mut chunks, bytes);
            self.stopping_send |= self.taken.is_none() || chunks.is_empty();
        }
        match std::mem::take(&mut self.stopping_send) {
            true => out.push(Completion::Sent { sock, bytes: before }),
            false => {
                self.taken = self.taken.map(|_| before);
                self.waiting_send = Some(chunks);
            }
        }
    }

    /// What becomes of a send of which at least `least` bytes are taken, if the peer takes any at all.
    fn take_some(&mut self, chunks: &[Chunk], least: usize) -> Completion {
        let (sock, wire) = (self.sock, &mut self.wire);
        if wire.reset {
            return Completion::SendFailed { sock, error: Errno(libc::ECONNRESET) };
        }
        let bytes: Vec<u8> = chunks.iter().flat_map(|chunk| chunk.iter().copied()).collect();
        let most = bytes.len().min(wire.window.saturating_sub(wire.to_client.len()));
        let count = if self.rng.one_in(3) { self.rng.below(most + 1).max(least) } else { most };
        wire.to_client.extend_from_slice(&bytes[..count]);
        Completion::Sent { sock, bytes: count }
    }
}

/// The door, while others look at what is behind it.
pub struct FakeDoor(pub Rc<RefCell<Fake>>);

impl Door for FakeDoor {
    fn add_listener(&mut self, _: ListenerId, _: Arc<OwnedFd>) {}

    fn remove_listener(&mut self, _: ListenerId) {}

    fn apply(&mut self, ops: &mut Vec<Op>) -> io::Result<()> {
        ops.drain(..).for_each(|op| self.0.borrow_mut().perform(op));
        Ok(())
    }

    fn wait(&mut self, _: Option<Duration>, completions: &mut Vec<Completion>) -> io::Result<()> {
        let mut fake = self.0.borrow_mut();
        if !fake.is_closed {
            fake.trying = false;
            completions.append(&mut fake.ready);
            fake.complete_send(completions);
            fake.complete_recv(completions);
        }
        Ok(())
    }
}

fn advance(chunks: &mut Chunks, mut count: usize) {
    while let Some(first) = chunks.first_mut() {
        if first.len() > count {
            return first.advance(count);
        }
        count -= first.len();
        chunks.remove(0);
    }
}

/// Takes up to `count` bytes off the front.
pub fn take_front(bytes: &mut Vec<u8>, count: usize) -> Vec<u8> {
    let rest = bytes.split_off(count.min(bytes.len()));
    std::mem::replace(bytes, rest)
}

/// Bytes that tell where in a stream they are.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = Rng(seed);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend_from_slice(&rng.next().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
