//! The monitor's socket: connections of runners, their requests in, answers and events out.
//!
//! A client that does not read loses its connection: nothing is queued here beyond the socket's own buffer.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::SocketFlags;
use serde::Deserialize;

use super::core::ClientId;
use crate::monitor::protocol::{Call, MESSAGE_BYTES_MAX, Message};
use crate::sys::message::{self, Packet};

/// Connections at one time; the runner needs one, and a session of `exec` another.
const CLIENTS_MAX: usize = 32;

#[derive(Debug)]
pub(super) struct Server {
    listener: OwnedFd,
    clients: BTreeMap<ClientId, OwnedFd>,
    last_client: ClientId,
}

/// What a client said.
#[derive(Debug)]
pub(super) enum Incoming {
    Call {
        seq: u64,
        call: Box<Call>,
        fds: Vec<OwnedFd>,
    },
    /// Not a request this build knows.
    Unknown {
        seq: u64,
        request: String,
    },
    /// Nothing to read after all.
    Nothing,
    /// It left, or does not speak the protocol.
    Gone,
}

impl Server {
    pub(super) fn new(listener: OwnedFd) -> Server {
        Server { listener, clients: BTreeMap::new(), last_client: 0 }
    }

    pub(super) fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    pub(super) fn clients(&self) -> impl Iterator<Item = (ClientId, BorrowedFd<'_>)> {
        self.clients.iter().map(|(id, socket)| (*id, socket.as_fd()))
    }

    /// Takes a waiting connection, if its peer is root and there is room.
    pub(super) fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let Ok(socket) = rustix::net::accept_with(&self.listener, flags) else { return };
        let is_root = rustix::net::sockopt::socket_peercred(&socket).is_ok_and(|peer| peer.uid.is_root());
        if is_root && self.clients.len() < CLIENTS_MAX {
            self.last_client += 1;
            self.clients.insert(self.last_client, socket);
        }
    }

    pub(super) fn receive(&self, client: ClientId) -> Incoming {
        let Some(socket) = self.clients.get(&client) else { return Incoming::Nothing };
        match message::receive(socket.as_fd(), MESSAGE_BYTES_MAX) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Incoming::Nothing,
            Ok(None) | Err(_) => Incoming::Gone,
            Ok(Some(packet)) => parse(packet),
        }
    }

    pub(super) fn forget(&mut self, client: ClientId) {
        self.clients.remove(&client);
    }

    /// Sends, or tells that the client is to be given up.
    pub(super) fn send(&self, client: ClientId, message: &Message, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let Some(socket) = self.clients.get(&client) else { return Ok(()) };
        message::send(socket.as_fd(), &serde_json::to_vec(message)?, fds)
    }
}

/// The part of a request that every version has.
#[derive(Deserialize)]
struct Envelope {
    seq: u64,
    #[serde(rename = "type")]
    request: String,
}

fn parse(packet: Packet) -> Incoming {
    let Ok(envelope) = serde_json::from_slice::<Envelope>(&packet.bytes) else { return Incoming::Gone };
    match serde_json::from_slice::<Call>(&packet.bytes) {
        Ok(call) => Incoming::Call { seq: envelope.seq, call: Box::new(call), fds: packet.fds },
        Err(_) => Incoming::Unknown { seq: envelope.seq, request: envelope.request },
    }
}
