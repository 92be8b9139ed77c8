//! The loop's side of the connections: accepting, reading, answering, and letting go.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use epagent_wire::runner::{Message, Refusal, RefusalCode, Reply};
use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::socket::{SockFlag, accept4, getsockopt, sockopt::PeerCredentials};

use crate::packet::Received;
use crate::peers::{PeerId, To};
use crate::server::{Server, Token};

/// Packets taken from one connection before others have their turn.
const PACKETS_PER_TURN: usize = 16;

impl Server {
    pub fn accept(&mut self) {
        let Ok(socket) = accept4(self.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)
        else {
            return;
        };
        let socket = crate::sys::own(socket);
        let uid = getsockopt(&socket, PeerCredentials).map_or(u32::MAX, |peer| peer.uid());
        let why = match uid {
            uid if uid != 0 && uid != self.config.brain_uid => {
                format!("uid {uid} may not speak to the runner")
            }
            _ if self.peers.is_full() => "too many connections".to_owned(),
            _ => return self.welcome(socket),
        };
        let refusal = Refusal { code: RefusalCode::BadRequest, message: why };
        if let Ok(bytes) = serde_json::to_vec(&Message::Reply { id: 0, result: Err(refusal) }) {
            let _ = crate::packet::send(socket.as_fd(), &bytes, None);
        }
        // Closed with something unread, it would be a reset to the other side, ahead of the words just sent.
        let _ = crate::packet::receive(socket.as_fd());
    }

    fn welcome(&mut self, socket: OwnedFd) {
        let id = self.next_serial();
        if self.watch(&socket, Token::Peer(id)).is_ok() {
            self.peers.insert(id, socket);
        }
    }

    pub fn serve_peer(&mut self, id: PeerId, flags: EpollFlags) {
        let gone = flags.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR);
        if gone && self.peers.is_behind(id) {
            return self.drop_peer(id);
        }
        if flags.contains(EpollFlags::EPOLLOUT) {
            let sent = self.peers.get(id).map_or(Ok(()), |peer| peer.flush());
            if sent.is_err() {
                return self.drop_peer(id);
            }
        }
        for _ in 0..PACKETS_PER_TURN {
            if self.peers.is_behind(id) {
                break;
            }
            let Some(peer) = self.peers.get(id) else { return };
            match peer.receive() {
                Ok(Received::Packet { bytes, descriptors }) => self.packet(id, &bytes, descriptors),
                Ok(Received::TooLarge) => {
                    let message =
                        "the packet is larger, or has more descriptors, than a packet may".to_owned();
                    let refusal = Refusal { code: RefusalCode::BadRequest, message };
                    self.answer(To { peer: id, call: 0 }, Err(refusal));
                }
                Ok(Received::Empty) => break,
                Ok(Received::Closed) | Err(_) => return self.drop_peer(id),
            }
        }
        self.set_interest(id);
    }

    /// Reads from those that have taken all their replies, writes to the others.
    pub fn set_interest(&mut self, id: PeerId) {
        let behind = self.peers.is_behind(id);
        let flags = if behind { EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN };
        let mut event = EpollEvent::new(flags, Token::Peer(id).number());
        let Some(peer) = self.peers.get(id) else { return };
        if self.epoll.modify(&*peer, &mut event).is_err() {
            self.drop_peer(id);
        }
    }

    /// Out of the set first: forked children may hold the connection open a moment longer.
    pub fn drop_peer(&mut self, id: PeerId) {
        if let Some(peer) = self.peers.get(id) {
            let _ = self.epoll.delete(&*peer);
        }
        self.peers.remove(id);
    }

    pub fn answer(&mut self, to: To, result: Result<Reply, Refusal>) {
        self.answer_with(to, result, None);
    }

    pub fn answer_with(&mut self, to: To, result: Result<Reply, Refusal>, descriptor: Option<OwnedFd>) {
        match self.peers.answer(to, result, descriptor) {
            true => self.drop_peer(to.peer),
            false => self.set_interest(to.peer),
        }
    }

    pub fn tell(&mut self, event: &epagent_wire::runner::Event) {
        for lost in self.peers.tell(event) {
            self.drop_peer(lost);
        }
        for id in self.peers.ids() {
            self.set_interest(id);
        }
    }
}
