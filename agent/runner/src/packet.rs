//! Packets with descriptors: SOCK_SEQPACKET and SCM_RIGHTS, without waiting.
//!
//! A packet that is larger than [`PACKET_BYTES_MAX`] or carries more than [`DESCRIPTORS_MAX`] descriptors is told from a
//! good one by the kernel's truncation flags; what was received of it is dropped, descriptors included.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use epagent_wire::runner::PACKET_BYTES_MAX;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::stat::{SFlag, fstat};

/// Most descriptors with one packet: stdin, stdout and stderr of an exec.
pub const DESCRIPTORS_MAX: usize = 3;

/// What arrived.
#[derive(Debug)]
pub enum Received {
    Packet {
        bytes: Vec<u8>,
        descriptors: Vec<OwnedFd>,
    },
    /// It was larger than a packet may be, or had more descriptors.
    TooLarge,
    /// Nothing more now.
    Empty,
    /// The other side is gone.
    Closed,
}

/// Takes the next packet.
pub fn receive(socket: BorrowedFd<'_>) -> nix::Result<Received> {
    let mut buffer = vec![0; PACKET_BYTES_MAX];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = rustix::net::RecvAncillaryBuffer::new(&mut space);
    let flags = rustix::net::RecvFlags::DONTWAIT | rustix::net::RecvFlags::CMSG_CLOEXEC;
    let got = match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut buffer)], &mut control, flags) {
        Ok(got) => got,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(Received::Empty),
        Err(rustix::io::Errno::CONNRESET) => return Ok(Received::Closed),
        Err(error) => return Err(Errno::from_raw(error.raw_os_error())),
    };
    let descriptors: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            rustix::net::RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    let cut = rustix::net::ReturnFlags::TRUNC | rustix::net::ReturnFlags::CTRUNC;
    // The buffer has room for one more than may come, because control messages are padded.
    if got.flags.intersects(cut) || descriptors.len() > DESCRIPTORS_MAX {
        return Ok(Received::TooLarge);
    }
    if got.bytes == 0 && descriptors.is_empty() {
        return Ok(Received::Closed);
    }
    buffer.truncate(got.bytes);
    Ok(Received::Packet { bytes: buffer, descriptors })
}

/// Sends a packet; `EAGAIN` when the other side has too much unread.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> nix::Result<()> {
    let raw: Vec<_> = descriptor.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None).map(drop)
}

/// What a descriptor from outside is, as far as that decides whether it may go into a jail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A pipe, socket, regular file or character device: something to read and write, and nothing else.
    Stream,
    /// A memfd whose content can't change any more.
    Sealed,
    /// A folder, a block device, a path without access: it could lead a jail out of its root.
    Other,
}

pub fn kind(descriptor: &impl AsFd) -> Kind {
    let descriptor = descriptor.as_fd();
    let Ok(facts) = fstat(descriptor) else { return Kind::Other };
    let path_only = fcntl(descriptor, FcntlArg::F_GETFL)
        .map_or(true, |flags| OFlag::from_bits_retain(flags).contains(OFlag::O_PATH));
    let sealed = fcntl(descriptor, FcntlArg::F_GET_SEALS).is_ok_and(|seals| {
        let needed = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK;
        SealFlag::from_bits_retain(seals).contains(needed)
    });
    match SFlag::from_bits_truncate(facts.st_mode) & SFlag::S_IFMT {
        _ if path_only => Kind::Other,
        SFlag::S_IFREG if sealed => Kind::Sealed,
        SFlag::S_IFREG | SFlag::S_IFIFO | SFlag::S_IFSOCK | SFlag::S_IFCHR => Kind::Stream,
        _ => Kind::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    fn descriptors_travel_beside_the_packet() {
        let (a, b) = pair();
        let (pipe, _writer) = nix::unistd::pipe().unwrap();
        send(a.as_fd(), b"x", Some(pipe.as_fd())).unwrap();
        let Received::Packet { bytes, descriptors } = receive(b.as_fd()).unwrap() else { panic!() };
        assert_eq!((bytes.as_slice(), descriptors.len()), (&b"x"[..], 1));
        assert!(matches!(receive(b.as_fd()).unwrap(), Received::Empty));
        drop(a);
        assert!(matches!(receive(b.as_fd()).unwrap(), Received::Closed));
    }

    #[test]
    fn what_is_too_large_is_told_as_that() {
        let (a, b) = pair();
        send(a.as_fd(), &vec![b' '; PACKET_BYTES_MAX + 1], None).unwrap();
        assert!(matches!(receive(b.as_fd()).unwrap(), Received::TooLarge));
        let (pipe, _writer) = nix::unistd::pipe().unwrap();
        let many = [pipe.as_raw_fd(); DESCRIPTORS_MAX + 2];
        let control = [ControlMessage::ScmRights(&many)];
        sendmsg::<()>(a.as_raw_fd(), &[IoSlice::new(b"x")], &control, MsgFlags::empty(), None).unwrap();
        assert!(matches!(receive(b.as_fd()).unwrap(), Received::TooLarge));
    }

    #[test]
    fn descriptors_that_lead_elsewhere_are_told_apart() {
        let folder = std::fs::File::open("/").unwrap();
        let path = nix::fcntl::open("/dev/null", OFlag::O_PATH, nix::sys::stat::Mode::empty()).unwrap();
        assert_eq!(kind(&folder), Kind::Other);
        assert_eq!(kind(&path), Kind::Other);
        assert_eq!(kind(&std::fs::File::open("/dev/null").unwrap()), Kind::Stream);
        let memfd = memfd_create("x", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        assert_eq!(kind(&memfd), Kind::Stream);
        fcntl(&memfd, FcntlArg::F_ADD_SEALS(SealFlag::all())).unwrap();
        assert_eq!(kind(&memfd), Kind::Sealed);
    }
}
