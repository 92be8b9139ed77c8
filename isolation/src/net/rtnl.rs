//! A small door to rtnetlink(7): links, addresses, default routes. No `ip` process, no dependency.
//!
//! A request is built as bytes ([`Message`]), sent, and answered by one acknowledgement or one dump. The socket
//! works in the network namespace of the process that made it.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};

/// The kernel answers requests at once; this only bounds a surprise.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// The kernel's dumps come in pieces of at most 32 KiB.
const ANSWER_BYTES_MAX: usize = 32 << 10;

const NLM_F_REQUEST: u16 = libc::NLM_F_REQUEST as u16;
const NLM_F_ACK: u16 = libc::NLM_F_ACK as u16;
const NLM_F_DUMP: u16 = libc::NLM_F_DUMP as u16;
const NLM_F_NEW: u16 = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
const HEADER_BYTES: usize = 16;
/// linux/veth.h; libc has no name for it.
const VETH_INFO_PEER: u16 = 1;
/// linux/if_addr.h
const IFA_LOCAL: u16 = 2;
const IFA_ADDRESS: u16 = 1;
/// linux/if_link.h
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;

/// An interface as a dump tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    pub index: u32,
    pub name: String,
}

/// A netlink socket.
#[derive(Debug)]
pub(crate) struct Rtnl {
    socket: OwnedFd,
    sequence: u32,
}

impl Rtnl {
    pub(crate) fn open() -> io::Result<Rtnl> {
        let kind = SocketType::RAW;
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, kind, SocketFlags::CLOEXEC, None)?;
        rustix::net::sockopt::set_socket_timeout(
            &socket,
            rustix::net::sockopt::Timeout::Recv,
            Some(ANSWER_TIMEOUT),
        )?;
        Ok(Rtnl { socket, sequence: 0 })
    }

    /// A veth pair: `name` here, `peer` in the network namespace `inside`.
    pub(crate) fn add_veth(
        &mut self,
        name: &str,
        peer: &str,
        inside: BorrowedFd<'_>,
        mtu: u32,
    ) -> io::Result<()> {
        let mut message = Message::link(0, 0, 0);
        message.text(libc::IFLA_IFNAME, name);
        message.number(libc::IFLA_MTU, mtu);
        message.nested(libc::IFLA_LINKINFO, |info| {
            info.text(IFLA_INFO_KIND, "veth");
            info.nested(IFLA_INFO_DATA, |data| {
                data.nested(VETH_INFO_PEER, |end| {
                    end.0.extend(link_header(0, 0, 0));
                    end.text(libc::IFLA_IFNAME, peer);
                    end.number(libc::IFLA_MTU, mtu);
                    end.number(libc::IFLA_NET_NS_FD, inside.as_raw_fd() as u32);
                });
            });
        });
        self.change(libc::RTM_NEWLINK, NLM_F_NEW, message)
    }

    /// Deletes a link; fine when there is none.
    pub(crate) fn delete_link(&mut self, name: &str) -> io::Result<()> {
        let mut message = Message::link(0, 0, 0);
        message.text(libc::IFLA_IFNAME, name);
        match self.change(libc::RTM_DELLINK, 0, message) {
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            result => result,
        }
    }

    pub(crate) fn set_up(&mut self, index: u32) -> io::Result<()> {
        let up = libc::IFF_UP as u32;
        self.change(libc::RTM_NEWLINK, 0, Message::link(index, up, up))
    }

    /// Adds an address. IPv6 without duplicate address detection: there is nobody else on the link.
    pub(crate) fn add_address(&mut self, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        let flags = if address.is_ipv6() { libc::IFA_F_NODAD as u8 } else { 0 };
        let mut message = Message(vec![family(address), prefix, flags, 0]);
        message.0.extend(index.to_ne_bytes());
        message.address(IFA_LOCAL, address);
        message.address(IFA_ADDRESS, address);
        self.change(libc::RTM_NEWADDR, NLM_F_NEW, message)
    }

    pub(crate) fn add_default_route(&mut self, index: u32, gateway: IpAddr) -> io::Result<()> {
        let [table, protocol] = [libc::RT_TABLE_MAIN, libc::RTPROT_STATIC];
        let header = [family(gateway), 0, 0, 0, table, protocol, libc::RT_SCOPE_UNIVERSE, libc::RTN_UNICAST];
        let mut message = Message(header.to_vec());
        message.0.extend(0u32.to_ne_bytes());
        message.address(libc::RTA_GATEWAY, gateway);
        message.number(libc::RTA_OIF, index);
        self.change(libc::RTM_NEWROUTE, NLM_F_NEW, message)
    }

    /// A route that answers "host unreachable" for what no more specific one takes.
    pub(crate) fn add_unreachable(&mut self, base: IpAddr, prefix: u8) -> io::Result<()> {
        self.change(libc::RTM_NEWROUTE, NLM_F_NEW, unreachable(base, prefix))
    }

    pub(crate) fn delete_unreachable(&mut self, base: IpAddr, prefix: u8) -> io::Result<()> {
        self.change(libc::RTM_DELROUTE, 0, unreachable(base, prefix))
    }

    /// All links of this namespace.
    pub(crate) fn links(&mut self) -> io::Result<Vec<Link>> {
        let mut links = Vec::new();
        self.dump(libc::RTM_GETLINK, Message::link(0, 0, 0), |body| {
            let index = body.get(4..8).map_or(0, number);
            let name = attributes(body.get(16..).unwrap_or_default())
                .find(|(kind, _)| *kind == libc::IFLA_IFNAME)
                .map(|(_, value)| String::from_utf8_lossy(value).trim_end_matches('\0').to_owned());
            links.extend(name.map(|name| Link { index, name }));
        })?;
        Ok(links)
    }

    /// Index of the link `name`. Asked for alone: a dump of all links grows with the number of instances.
    pub(crate) fn index(&mut self, name: &str) -> io::Result<u32> {
        let mut message = Message::link(0, 0, 0);
        message.text(libc::IFLA_IFNAME, name);
        let mut index = None;
        let sequence = self.send(libc::RTM_GETLINK, NLM_F_REQUEST | NLM_F_ACK, message)?;
        self.receive(sequence, |body| index = body.get(4..8).map(number))?;
        index.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
    }

    /// Output interfaces of default routes in the main table, of both families.
    pub(crate) fn default_route_links(&mut self) -> io::Result<Vec<u32>> {
        let mut found = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let mut message = Message(vec![0; 12]);
            message.0[0] = family as u8;
            self.dump(libc::RTM_GETROUTE, message, |body| {
                let (Some(&prefix), Some(&table)) = (body.get(1), body.get(4)) else { return };
                let unicast = body.get(7) == Some(&libc::RTN_UNICAST);
                if prefix != 0 || table != libc::RT_TABLE_MAIN || !unicast {
                    return;
                }
                let output =
                    attributes(body.get(12..).unwrap_or_default()).find(|(kind, _)| *kind == libc::RTA_OIF);
                found.extend(output.map(|(_, value)| number(value)));
            })?;
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    /// Sends a request and waits for its acknowledgement.
    fn change(&mut self, kind: u16, flags: u16, message: Message) -> io::Result<()> {
        let sequence = self.send(kind, NLM_F_REQUEST | NLM_F_ACK | flags, message)?;
        self.receive(sequence, |_| {})
    }

    fn dump(&mut self, kind: u16, message: Message, each: impl FnMut(&[u8])) -> io::Result<()> {
        let sequence = self.send(kind, NLM_F_REQUEST | NLM_F_DUMP, message)?;
        self.receive(sequence, each)
    }

    fn send(&mut self, kind: u16, flags: u16, message: Message) -> io::Result<u32> {
        self.sequence += 1;
        let mut bytes = Vec::with_capacity(HEADER_BYTES + message.0.len());
        bytes.extend(((HEADER_BYTES + message.0.len()) as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(self.sequence.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(message.0);
        rustix::net::sendmsg(
            &self.socket,
            &[IoSlice::new(&bytes)],
            &mut rustix::net::SendAncillaryBuffer::default(),
            rustix::net::SendFlags::empty(),
        )?;
        Ok(self.sequence)
    }

    /// Reads until the acknowledgement or the end of the dump, handing each answer's body on.
    fn receive(&mut self, sequence: u32, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        let mut buffer = vec![0; ANSWER_BYTES_MAX];
        loop {
            let mut parts = [IoSliceMut::new(&mut buffer)];
            let mut control = rustix::net::RecvAncillaryBuffer::default();
            let length =
                rustix::net::recvmsg(&self.socket, &mut parts, &mut control, RecvFlags::empty())?.bytes;
            let mut rest = &buffer[..length];
            while rest.len() >= HEADER_BYTES {
                let size = (number(rest) as usize).clamp(HEADER_BYTES, rest.len());
                let kind = u16::from_ne_bytes([rest[4], rest[5]]);
                let ours = number(&rest[8..]) == sequence;
                let body = &rest[HEADER_BYTES..size];
                rest = &rest[aligned(size).min(rest.len())..];
                match kind as i32 {
                    _ if !ours => {}
                    libc::NLMSG_ERROR => {
                        return match number(body) as i32 {
                            0 => Ok(()),
                            errno => Err(io::Error::from_raw_os_error(-errno)),
                        };
                    }
                    libc::NLMSG_DONE => return Ok(()),
                    _ => each(body),
                }
            }
        }
    }
}

/// A request's body under construction: a fixed header, then attributes.
struct Message(Vec<u8>);

impl Message {
    fn link(index: u32, flags: u32, change: u32) -> Message {
        Message(link_header(index, flags, change).to_vec())
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.0.extend(((4 + value.len()) as u16).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(aligned(self.0.len()), 0);
    }

    fn text(&mut self, kind: u16, value: &str) {
        self.attribute(kind, &[value.as_bytes(), b"\0"].concat());
    }

    fn number(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_ne_bytes());
    }

    fn address(&mut self, kind: u16, value: IpAddr) {
        match value {
            IpAddr::V4(v4) => self.attribute(kind, &v4.octets()),
            IpAddr::V6(v6) => self.attribute(kind, &v6.octets()),
        }
    }

    fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Message)) {
        let mut inner = Message(Vec::new());
        fill(&mut inner);
        self.attribute(kind | libc::NLA_F_NESTED as u16, &inner.0);
    }
}

/// struct ifinfomsg
fn link_header(index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&change.to_ne_bytes());
    header
}

fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { libc::AF_INET as u8 } else { libc::AF_INET6 as u8 }
}

/// Attributes of an answer: kind and value.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let header = bytes.get(..4)?;
        let size = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]);
        let value = bytes.get(4..size)?;
        bytes = bytes.get(aligned(size)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn aligned(length: usize) -> usize {
    (length + 3) & !3
}

/// The 32-bit number at the start of `bytes`; 0 if there are too few.
fn number(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |chunk| u32::from_ne_bytes(*chunk))
}

fn unreachable(base: IpAddr, prefix: u8) -> Message {
    let [table, protocol] = [libc::RT_TABLE_MAIN, libc::RTPROT_STATIC];
    let header =
        [family(base), prefix, 0, 0, table, protocol, libc::RT_SCOPE_UNIVERSE, libc::RTN_UNREACHABLE];
    let mut message = Message(header.to_vec());
    message.0.extend(0u32.to_ne_bytes());
    message.address(libc::RTA_DST, base);
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_read_back() {
        let mut message = Message(Vec::new());
        message.text(3, "ep7-1");
        message.number(4, 1400);
        assert_eq!(message.0.len() % 4, 0);
        let read: Vec<_> = attributes(&message.0).collect();
        assert_eq!(read, [(3, &b"ep7-1\0"[..]), (4, &1400u32.to_ne_bytes()[..])]);
    }

    #[test]
    fn a_broken_answer_ends_the_reading() {
        assert_eq!(attributes(&[1, 0, 0, 0, 9, 9]).count(), 0, "an attribute shorter than its header");
        assert_eq!(attributes(&[200, 0, 1, 0, 9]).count(), 0, "an attribute longer than the packet");
    }

    #[test]
    fn every_namespace_has_a_loopback() {
        let links = Rtnl::open().and_then(|mut rtnl| rtnl.links()).unwrap();
        assert!(links.contains(&Link { index: 1, name: "lo".into() }), "{links:?}");
    }
}
