//! The door: what it may answer to what the core asks, and that the core asks nothing outside the contract.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};

use epagent_balancer::core::chunk::{Chunk, Chunks};
use epagent_balancer::core::io::{
    AfterSend, Completion, Errno, ListenerId, Op, RawSocket, RecvEnd, RecvMode, SendMode, SockId,
};
use epagent_balancer::table::Address;

use super::World;
use crate::actors::{AppConn, Rng, take_front};
use crate::far::{Conn, Far, StreamEnd};
use crate::lent::Lent;
use crate::secure::{self, DoorTls};

/// A socket as the door has it.
#[derive(Default)]
pub struct DoorSock {
    pub conn: usize,
    pub recv: Option<RecvMode>,
    pub(super) stopping: bool,
    pub waiting_send: Option<(Chunks, SendMode)>,
    /// What was taken of a send that waits for all of it, and whether it is being stopped.
    pub(super) taken: usize,
    pub(super) send_stopping: bool,
    pub(super) waits_since: u64,
    /// A send that does not wait, whose completion comes with the next batch.
    pub trying: bool,
    /// What its end comes to, when nothing follows from it: it is told with whatever completes next.
    pub(super) untold: Option<Completion>,
    /// The bytes of the last send, when FIN is to follow as soon as they are taken.
    pub(super) last_bytes: Option<usize>,
    pub tls: DoorTls,
}

/// A listener as the door has it.
#[derive(Default)]
pub struct DoorListener {
    pub(super) accepting: bool,
    pub(super) stopping: bool,
    pub queue: VecDeque<usize>,
}

impl World {
    pub(super) fn accept_some(&mut self, index: usize, groups: &mut Vec<Vec<Completion>>) {
        let mut group = Vec::new();
        let id = ListenerId(index as u32);
        let listener = &mut self.listeners[index];
        while listener.accepting && self.rng.one_in(2) {
            let Some(conn) = listener.queue.pop_front() else { break };
            self.unadopted.insert(conn as i32, conn);
            let peer = Some(SocketAddr::from(([192, 0, 2, conn as u8], 1024 + conn as u16)));
            group.push(Completion::Accepted { listener: id, raw: RawSocket(conn as i32), peer });
        }
        let failed = listener.accepting && self.rng.one_in(200);
        if listener.stopping || failed {
            (listener.accepting, listener.stopping) = (false, false);
            let error = failed.then_some(Errno(libc::EMFILE));
            group.push(Completion::AcceptEnded { listener: id, error });
        }
        groups.push(group);
    }

    pub(super) fn complete_recv(&mut self, id: SockId, group: &mut Vec<Completion>) {
        let Some(sock) = self.socks.get_mut(&id) else { return };
        let (rng, conn) = (&mut self.rng, &mut self.conns[sock.conn].0);
        let Some(mode) = sock.recv else { return };
        if !rng.one_in(2) && !sock.stopping {
            return;
        }
        let (mut end, before) = (None, group.len());
        let (bounded, mut left) = match mode {
            RecvMode::Many => (false, usize::MAX),
            RecvMode::Once { limit_bytes } => (true, limit_bytes as usize),
        };
        for _ in 0..1 + rng.below(8) {
            if conn.reset || conn.to_core.is_empty() {
                break;
            }
            if rng.one_in(30) {
                end = Some(RecvEnd::NoBuffers);
                break;
            }
            let most = if rng.one_in(3) { 20 } else { 16_384 }.min(left);
            let size = 1 + rng.below(most as u64) as usize;
            let bytes = take_front(&mut conn.to_core, size);
            left -= bytes.len();
            group.push(Completion::Received { sock: id, chunk: Lent::chunk(bytes, &self.live) });
            if left == 0 || rng.one_in(if bounded { 3 } else { 30 }) {
                end = Some(RecvEnd::Ended);
                break;
            }
        }
        if bounded && group.len() > before {
            end = end.or(Some(RecvEnd::Ended));
        }
        if end.is_none() {
            if conn.reset {
                end = Some(RecvEnd::Failed(Errno(libc::ECONNRESET)));
            } else if conn.to_core_fin && conn.to_core.is_empty() {
                end = Some(secure::end_of_stream(rng, self.mode, sock.tls));
            } else if sock.stopping {
                end = Some(RecvEnd::Ended);
            }
        }
        if let Some(why) = end {
            (sock.recv, sock.stopping) = (None, false);
            group.push(Completion::RecvEnded { sock: id, why });
        }
    }

    pub(super) fn complete_send(&mut self, id: SockId, group: &mut Vec<Completion>) {
        let Some(sock) = self.socks.get_mut(&id) else { return };
        sock.trying = sock.untold.is_some();
        let (rng, conn) = (&mut self.rng, &mut self.conns[sock.conn].0);
        let room = conn.window.saturating_sub(conn.to_far.len());
        let failed = conn.reset || conn.core_closed;
        let stopping = sock.send_stopping;
        if !(failed || stopping || (room > 0 && rng.one_in(2))) {
            return;
        }
        let Some((mut chunks, mode)) = sock.waiting_send.take() else { return };
        if failed {
            group.push(Completion::SendFailed { sock: id, error: Errno(libc::EPIPE) });
            return;
        }
        let bytes = if stopping && rng.one_in(2) { 0 } else { take_some(rng, conn, &chunks, room) };
        sock.taken += bytes;
        advance(&mut chunks, bytes);
        // Waiting for all of it, a door goes on by itself; it may as well end with less.
        if mode == SendMode::WaitAll && !chunks.is_empty() && !stopping && !rng.one_in(10) {
            sock.waiting_send = Some((chunks, mode));
            return;
        }
        group.push(Completion::Sent { sock: id, bytes: std::mem::take(&mut sock.taken) });
        sock.send_stopping = false;
    }

    pub(super) fn apply(&mut self, op: Op) {
        match op {
            Op::Accept(id) => {
                let listener = &mut self.listeners[id.0 as usize];
                assert!(!std::mem::replace(&mut listener.accepting, true), "accept is armed twice");
            }
            Op::StopAccept(id) => {
                let listener = &mut self.listeners[id.0 as usize];
                assert!(listener.accepting, "stopping an accept that is not armed");
                listener.stopping = true;
            }
            Op::Adopt { raw, sock } => {
                let conn = self.unadopted.remove(&raw.0).expect("adopted once");
                self.insert(sock, conn);
            }
            Op::Refuse { raw } => {
                let conn = self.unadopted.remove(&raw.0).expect("refused once");
                (self.conns[conn].0.reset, self.conns[conn].0.core_closed) = (true, true);
            }
            Op::Connect { sock, address } => self.connect(sock, address),
            Op::Recv { sock, mode } => {
                let sock = self.socks.get_mut(&sock).expect("receiving from an open socket");
                assert!(sock.recv.is_none(), "a receive is armed twice");
                assert!(sock.tls != DoorTls::Handshake, "a receive during the handshake");
                sock.recv = Some(mode);
            }
            Op::StopRecv { sock } => {
                // It may have ended by itself in this batch.
                let sock = self.socks.get_mut(&sock).expect("stopping an open socket");
                sock.stopping = sock.recv.is_some();
            }
            Op::Send { sock, chunks, mode, after } => self.send(sock, chunks, mode, after),
            Op::StopSend { sock } => {
                let sock = self.socks.get_mut(&sock).expect("stopping a send of an open socket");
                sock.send_stopping = sock.waiting_send.is_some();
            }
            Op::StartTls { sock, said, .. } => self.start_tls(sock, &said),
            Op::EndTls { sock } => self.end_tls(sock),
            Op::ShutdownWrite { sock } => {
                let sock = &self.socks[&sock];
                assert!(sock.tls == DoorTls::Off, "FIN without a goodbye");
                assert!(sock.waiting_send.is_none() && !sock.trying, "FIN overtakes a send");
                self.conns[sock.conn].0.to_far_fin = true;
            }
            Op::Close { sock, reset } => {
                let sock = self.socks.remove(&sock).expect("closing an open socket");
                let conn = &mut self.conns[sock.conn].0;
                conn.core_closed = true;
                // As the kernel does: unread data turns the close into a reset, and so does a cut send.
                if reset || !conn.to_core.is_empty() || sock.waiting_send.is_some() {
                    conn.reset = true;
                    conn.to_far.clear();
                }
                conn.to_far_fin = true;
            }
        }
    }

    fn insert(&mut self, id: SockId, conn: usize) {
        let sock = DoorSock { conn, ..DoorSock::default() };
        assert!(self.socks.insert(id, sock).is_none(), "a socket id is used twice");
    }

    fn connect(&mut self, sock: SockId, address: Address) {
        let Address::Tcp(address) = address else { panic!("an address of no app: {address}") };
        let IpAddr::V4(ip) = address.ip() else { panic!("an address of no app: {address}") };
        let app = usize::from(ip.octets()[3]);
        let state = self.apps[app].state;
        let open = self.judging.fails_open() && state == "down";
        assert!(state == "up" || open, "a connect to an app that is {state}");
        let window = 64 + self.rng.below(100_000) as usize;
        let far = match ip.octets()[2] {
            0 => Far::App { app, conn: AppConn { ups: self.judging.ups(app), ..AppConn::default() } },
            _ => Far::StreamApp { app, end: StreamEnd::default() },
        };
        self.conns.push((Conn { window, ..Conn::default() }, far));
        self.insert(sock, self.conns.len() - 1);
        // Short of descriptors, or the queue of a unix socket is full: neither says that the app is gone.
        let passing = [libc::EMFILE, libc::EAGAIN].into_iter().find(|_| self.rng.one_in(100));
        self.ready.push(if self.apps[app].listening && passing.is_none() {
            Completion::Connected { sock }
        } else {
            let error = Errno(passing.unwrap_or(libc::ECONNREFUSED));
            self.conns.last_mut().expect("just pushed").0.reset = true;
            Completion::ConnectFailed { sock, error }
        });
    }

    fn send(&mut self, id: SockId, chunks: Chunks, mode: SendMode, after: AfterSend) {
        let sock = self.socks.get_mut(&id).expect("sending on an open socket");
        assert!(sock.waiting_send.is_none() && !sock.trying, "two sends at a time");
        assert!(matches!(sock.tls, DoorTls::Off | DoorTls::On), "a send in state {:?}", sock.tls);
        let conn = &mut self.conns[sock.conn].0;
        assert!(!conn.to_far_fin, "a send after FIN");
        sock.last_bytes = (after == AfterSend::Fin).then(|| chunks.iter().map(|chunk| chunk.len()).sum());
        if mode != SendMode::Try {
            (sock.waiting_send, sock.taken, sock.waits_since) = (Some((chunks, mode)), 0, self.now);
            return;
        }
        sock.trying = true;
        let room = conn.window.saturating_sub(conn.to_far.len());
        let offered: usize = chunks.iter().map(|chunk| chunk.len()).sum();
        let over = if conn.reset {
            Completion::SendFailed { sock: id, error: Errno(libc::ECONNRESET) }
        } else {
            Completion::Sent { sock: id, bytes: take_some(&mut self.rng, conn, &chunks, room) }
        };
        // What failed, or was taken in part, is told at once.
        let whole = matches!(over, Completion::Sent { bytes, .. } if bytes == offered);
        match whole && after == AfterSend::Nothing && self.rng.one_in(2) {
            true => sock.untold = Some(over),
            false => self.ready.push(over),
        }
    }
}

/// Drops the first bytes.
fn advance(chunks: &mut Chunks, mut bytes: usize) {
    while let Some(first) = chunks.first_mut() {
        if first.len() > bytes {
            return first.advance(bytes);
        }
        bytes -= first.len();
        chunks.remove(0);
    }
}

/// Takes what fits, or a random part of it.
fn take_some(rng: &mut Rng, conn: &mut Conn, chunks: &[Chunk], room: usize) -> usize {
    let mut bytes = Vec::new();
    chunks.iter().for_each(|chunk| bytes.extend_from_slice(chunk));
    let most = bytes.len().min(room);
    let count = if rng.one_in(4) { rng.below(most as u64 + 1) as usize } else { most };
    conn.to_far.extend_from_slice(&bytes[..count]);
    count
}
