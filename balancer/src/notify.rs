//! Telling the service manager how it goes: sd_notify(3), the part of it that a balancer needs.
//!
//! `READY=1`, `STOPPING=1`, `RELOADING=1`, `MAINPID=`, `STATUS=`, `WATCHDOG=1`, and the descriptor store, into
//! which every socket goes that we have bound ourselves: after a crash the next process is handed it as it was,
//! with who waits in its queue. Sockets of a `.socket` unit are the manager's own already.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};
use rustix::time::{ClockId, clock_gettime};

/// The way to the service manager; there may be none.
#[derive(Debug, Default)]
pub struct Notifier {
    manager: Option<(OwnedFd, SocketAddrUnix)>,
}

impl Notifier {
    /// By `NOTIFY_SOCKET`: a path, or behind an `@` an abstract name.
    pub fn from_environment() -> Self {
        let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return Self::default() };
        let address = match name.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddrUnix::new_abstract_name(name),
            None => SocketAddrUnix::new(&*name),
        };
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        );
        Self { manager: socket.ok().zip(address.ok()) }
    }

    pub fn is_there(&self) -> bool {
        self.manager.is_some()
    }

    /// Lines of `NAME=VALUE`. A manager that does not listen misses them.
    pub fn say(&self, lines: &str) {
        self.send(lines, &[]);
    }

    /// What is shown as the state of the service.
    pub fn status(&self, text: &str) {
        self.say(&format!("STATUS={text}"));
    }

    /// A reload begins; it ends with `READY=1`.
    pub fn reloading(&self) {
        let now = clock_gettime(ClockId::Monotonic);
        let usec = now.tv_sec * 1_000_000 + now.tv_nsec / 1_000;
        self.say(&format!("RELOADING=1\nMONOTONIC_USEC={usec}"));
    }

    /// Keeps a descriptor for the next process, should this one crash.
    pub fn store(&self, name: &str, descriptor: BorrowedFd<'_>) {
        self.send(&format!("FDSTORE=1\nFDNAME={name}"), &[descriptor]);
    }

    /// Lets go of it.
    pub fn forget(&self, name: &str) {
        self.say(&format!("FDSTOREREMOVE=1\nFDNAME={name}"));
    }

    fn send(&self, lines: &str, descriptors: &[BorrowedFd<'_>]) {
        let Some((socket, address)) = &self.manager else { return };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            beside.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let text = [IoSlice::new(lines.as_bytes())];
        // It may be restarting itself; nothing of ours depends on it.
        let _ = rustix::net::sendmsg_addr(socket.as_fd(), address, &text, &mut beside, SendFlags::NOSIGNAL);
    }
}
