//! Those who speak to the runner: connections, greeted or not, with what is still to be sent to them.
//!
//! ```text
//!  accepted ──(uid)──▶ silent ──(hello)──▶ greeted ──▶ (gone)
//! ```
//!
//! Every queue is bounded. While something waits to be sent to a connection, nothing is read from it; one that lets
//! more events wait than [`OUT_PACKETS_MAX`] is dropped and has to observe the world anew.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use epagent_wire::runner::{Event, Message, PACKET_BYTES_MAX, Refusal, RefusalCode, Reply};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{Shutdown, shutdown};

use crate::packet;

/// Connections at once. The agent has one, a person with a debugger another.
pub const PEERS_MAX: usize = 16;
/// Packets that wait for one connection.
const OUT_PACKETS_MAX: usize = 1_024;
/// Bytes that wait for one connection.
const OUT_BYTES_MAX: usize = 8 << 20;

pub type PeerId = u64;

/// Where a reply goes. The connection may be gone by then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct To {
    pub peer: PeerId,
    pub call: u64,
}

#[derive(Debug)]
pub struct Peer {
    socket: OwnedFd,
    pub greeted: bool,
    out: VecDeque<Outgoing>,
}

#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    descriptor: Option<OwnedFd>,
}

#[derive(Debug, Default)]
pub struct Peers {
    peers: BTreeMap<PeerId, Peer>,
}

impl Peers {
    pub fn insert(&mut self, id: PeerId, socket: OwnedFd) {
        self.peers.insert(id, Peer { socket, greeted: false, out: VecDeque::new() });
    }

    pub fn is_full(&self) -> bool {
        self.peers.len() >= PEERS_MAX
    }

    pub fn get(&mut self, id: PeerId) -> Option<&mut Peer> {
        self.peers.get_mut(&id)
    }

    /// Ends the connection. Forked children have copies of its descriptor, hence the shutdown.
    pub fn remove(&mut self, id: PeerId) {
        if let Some(peer) = self.peers.remove(&id) {
            let _ = shutdown(std::os::fd::AsRawFd::as_raw_fd(&peer.socket), Shutdown::Both);
        }
    }

    /// Those for whom something waits.
    pub fn is_behind(&self, id: PeerId) -> bool {
        self.peers.get(&id).is_some_and(|peer| !peer.out.is_empty())
    }

    /// Answers a call. Whether the connection is to be given up.
    pub fn answer(&mut self, to: To, result: Result<Reply, Refusal>, descriptor: Option<OwnedFd>) -> bool {
        let (bytes, descriptor) = encode(to.call, result, descriptor);
        let Some(peer) = self.peers.get_mut(&to.peer) else { return false };
        peer.push(Outgoing { bytes, descriptor }).is_err()
    }

    /// Tells all that have said hello. Those that are to be given up.
    pub fn tell(&mut self, event: &Event) -> Vec<PeerId> {
        let Ok(bytes) = serde_json::to_vec(&Message::Event(event.clone())) else { return Vec::new() };
        let mut lost = Vec::new();
        for (id, peer) in self.peers.iter_mut().filter(|(_, peer)| peer.greeted) {
            if peer.push(Outgoing { bytes: bytes.clone(), descriptor: None }).is_err() {
                lost.push(*id);
            }
        }
        lost
    }

    pub fn ids(&self) -> Vec<PeerId> {
        self.peers.keys().copied().collect()
    }
}

impl Peer {
    pub fn receive(&self) -> nix::Result<packet::Received> {
        packet::receive(self.socket.as_fd())
    }

    fn push(&mut self, packet: Outgoing) -> nix::Result<()> {
        self.out.push_back(packet);
        self.flush()?;
        let bytes: usize = self.out.iter().map(|packet| packet.bytes.len()).sum();
        match self.out.len() > OUT_PACKETS_MAX || bytes > OUT_BYTES_MAX {
            true => Err(Errno::ENOBUFS),
            false => Ok(()),
        }
    }

    /// Sends what can be sent now.
    pub fn flush(&mut self) -> nix::Result<()> {
        while let Some(packet) = self.out.front() {
            let descriptor = packet.descriptor.as_ref().map(|descriptor| descriptor.as_fd());
            match packet::send(self.socket.as_fd(), &packet.bytes, descriptor) {
                Ok(()) => drop(self.out.pop_front()),
                Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::EINTR) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The packet of a reply. A world that is larger than a packet goes beside it, in a memfd.
fn encode(
    call: u64,
    result: Result<Reply, Refusal>,
    descriptor: Option<OwnedFd>,
) -> (Vec<u8>, Option<OwnedFd>) {
    let world = match &result {
        Ok(Reply::World(world)) => serde_json::to_vec(world).ok(),
        _ => None,
    };
    let bytes = serde_json::to_vec(&Message::Reply { id: call, result }).unwrap_or_default();
    if bytes.len() <= PACKET_BYTES_MAX {
        return (bytes, descriptor);
    }
    let (result, file) = match world.and_then(|world| in_file(&world).ok()) {
        Some(file) => (Ok(Reply::WorldFile), Some(file)),
        None => {
            let message = format!("the reply is larger than the {PACKET_BYTES_MAX} bytes of a packet");
            (Err(Refusal { code: RefusalCode::System, message }), None)
        }
    };
    (serde_json::to_vec(&Message::Reply { id: call, result }).unwrap_or_default(), file)
}

fn in_file(bytes: &[u8]) -> std::io::Result<OwnedFd> {
    use std::io::{Seek, Write};
    let mut file = std::fs::File::from(memfd_create("world", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use epagent_wire::runner::World;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    fn peers() -> (Peers, OwnedFd) {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let mut peers = Peers::default();
        peers.insert(1, ours);
        (peers, theirs)
    }

    #[test]
    fn a_connection_that_reads_nothing_is_given_up() {
        let (mut peers, _theirs) = peers();
        peers.get(1).unwrap().greeted = true;
        let event = Event::Exited { jail: "shop-aaaaaaaa".parse().unwrap(), exit: Default::default() };
        let given_up = (0..100_000).find(|_| !peers.tell(&event).is_empty());
        assert!(given_up.is_some_and(|sent| sent > OUT_PACKETS_MAX), "{given_up:?}");
    }

    #[test]
    fn a_large_world_comes_in_a_file() {
        let (mut peers, theirs) = peers();
        let logs = (0..4_096).map(|n| format!("{}-{n:0>8}", "a".repeat(30)).parse().unwrap()).collect();
        let world = World { logs, ..World::default() };
        assert!(!peers.answer(To { peer: 1, call: 5 }, Ok(Reply::World(Box::new(world))), None));
        let packet::Received::Packet { bytes, mut descriptors } = packet::receive(theirs.as_fd()).unwrap()
        else {
            panic!("no packet")
        };
        let message: Message = serde_json::from_slice(&bytes).unwrap();
        assert!(matches!(message, Message::Reply { id: 5, result: Ok(Reply::WorldFile) }));
        let file = std::fs::File::from(descriptors.pop().unwrap());
        let world: World = serde_json::from_reader(file).unwrap();
        assert_eq!(world.logs.len(), 4_096);
    }
}
