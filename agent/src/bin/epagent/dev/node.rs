//! The node's number, and what is derived from it.
//!
//! Several agents run side by side on one kernel. Each holds a number for life by binding the abstract unix socket
//! `@epagent-node-N`, which vanishes with its process; every kernel object the node makes carries that number.
//! Instances outlive a killed supervisor, so a number whose cgroup still exists is taken too, unless this state
//! folder was the one that used it and did not come to an orderly end.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::Path;

use super::error::DevError;
use super::layout::Layout;

/// 1 to 127.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Node(u8);

/// The highest number: each node has a /20 of 100.96.0.0/11, which has room for 512, and a 2²⁴ block of ids
/// above 2³¹, which has room for 128.
pub const NODE_MAX: u8 = 127;
/// Ranges of 65,536 ids per node.
pub const ID_RANGES: u32 = 256;

impl Node {
    pub fn new(number: u8) -> Option<Self> {
        (1..=NODE_MAX).contains(&number).then_some(Self(number))
    }

    pub fn all() -> impl Iterator<Item = Node> {
        (1..=NODE_MAX).map(Node)
    }

    pub fn number(self) -> u8 {
        self.0
    }

    pub fn cgroup(self) -> String {
        format!("epagent-{}", self.0)
    }

    /// How the names of its host-side network devices begin.
    pub fn veth_prefix(self) -> String {
        format!("ep{}-", self.0)
    }

    pub fn nft_table(self) -> String {
        format!("epagent_{}", self.0)
    }

    /// A /20 of 100.96.0.0/11, part of the block carriers use between themselves (RFC 6598).
    pub fn v4_block(self) -> String {
        let base = u32::from(Ipv4Addr::new(100, 96, 0, 0)) + u32::from(self.0) * 4096;
        format!("{}/20", Ipv4Addr::from(base))
    }

    /// A /64 of a unique local prefix (RFC 4193).
    pub fn v6_block(self) -> String {
        format!("{}/64", Ipv6Addr::new(0xfd65, 0x7061, 0x6765, u16::from(self.0), 0, 0, 0, 0))
    }

    pub fn id_base(self) -> u32 {
        0x8000_0000 + u32::from(self.0) * (ID_RANGES << 16)
    }
}

/// A number that is held. Dropping it lets it go.
#[derive(Debug)]
pub struct Claim {
    pub node: Node,
    _socket: OwnedFd,
}

/// Takes the number this folder had before, else the lowest free one, and notes it.
pub fn claim(layout: &Layout) -> Result<Claim, DevError> {
    let before = remembered(layout);
    let unclean = layout.path("unclean").exists();
    let candidates = before.into_iter().chain(Node::all().filter(|node| Some(*node) != before));
    for node in candidates {
        let ours_still = unclean && Some(node) == before;
        if !ours_still && cgroup_exists(Path::new("/sys/fs/cgroup"), node) {
            continue;
        }
        let Some(socket) = hold(node).map_err(|source| DevError::NodeSocket { node, source })? else {
            continue;
        };
        let path = layout.path("node");
        fs::write(&path, format!("{}\n", node.0)).map_err(|source| DevError::Folder { path, source })?;
        return Ok(Claim { node, _socket: socket });
    }
    Err(DevError::NoNode)
}

fn remembered(layout: &Layout) -> Option<Node> {
    fs::read_to_string(layout.path("node")).ok()?.trim().parse().ok().and_then(Node::new)
}

/// None: somebody else holds it.
fn hold(node: Node) -> io::Result<Option<OwnedFd>> {
    let address = SocketAddr::from_abstract_name(format!("epagent-node-{}", node.0))?;
    match UnixListener::bind_addr(&address) {
        Ok(socket) => Ok(Some(socket.into())),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether a cgroup of this node exists in any hierarchy: directly below the mount point on a pure v2 system, one
/// level down on a hybrid one.
pub fn cgroup_exists(mount: &Path, node: Node) -> bool {
    let name = node.cgroup();
    if mount.join(&name).exists() {
        return true;
    }
    let Ok(hierarchies) = fs::read_dir(mount) else {
        return false;
    };
    hierarchies.flatten().any(|hierarchy| hierarchy.path().join(&name).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_as_documented() {
        let node = Node::new(3).unwrap();
        assert_eq!(node.v4_block(), "100.96.48.0/20");
        assert_eq!(node.v6_block(), "fd65:7061:6765:3::/64");
        assert_eq!(node.id_base(), 2_197_815_296);
        assert_eq!(Node::new(127).unwrap().v6_block(), "fd65:7061:6765:7f::/64");
    }

    #[test]
    fn blocks_stay_within_their_space() {
        let last = Node::new(NODE_MAX).unwrap();
        assert!(last.v4_block().starts_with("100.103."));
        assert!(
            last.id_base().checked_add(ID_RANGES << 16).is_none()
                || last.id_base() < u32::MAX - (ID_RANGES << 16)
        );
        assert!(Node::new(0).is_none() && Node::new(128).is_none());
    }

    #[test]
    fn two_never_hold_one_number() {
        // Far from the low numbers that a real agent on this machine would take.
        let node = Node::new(NODE_MAX - 1).unwrap();
        let first = hold(node).unwrap();
        assert!(first.is_some());
        assert!(hold(node).unwrap().is_none());
        drop(first);
        assert!(hold(node).unwrap().is_some());
    }
}
