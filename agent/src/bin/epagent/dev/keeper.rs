//! What is kept for the balancer, so that it can hand over and outlive its crashes.
//!
//! The balancer speaks to us as it does to systemd, by sd_notify(3): `MAINPID=` when another process of it is in
//! charge, `FDSTORE=1` and `FDSTOREREMOVE=1` for sockets that it has bound itself. Only the process in charge is
//! heard. At its next start it is given what it had stored; and always the folder of the programs, since the path
//! of a checkout may be closed to it.

use std::fs::{self, File, Permissions};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::sys::socket::{setsockopt, sockopt};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::error::DevError;
use super::layout::{Layout, Users, VIEW};

/// Where it lies below the state folder.
const SOCKET: &str = "run/notify.sock";
/// Most sockets that are kept.
const STORED_MAX: usize = 200;
/// Longest notification.
const MESSAGE_BYTES_MAX: usize = 8 << 10;

#[derive(Debug)]
pub struct Keeper {
    socket: UnixDatagram,
    path: PathBuf,
    programs: OwnedFd,
    stored: Vec<(String, OwnedFd)>,
}

/// What the balancer said that is somebody else's to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    /// This process is in charge from here on.
    MainPid(i32),
}

impl Keeper {
    pub fn new(layout: &Layout, users: Users, binaries: &Path) -> Result<Self, DevError> {
        let path = layout.path(SOCKET);
        let socket = bind(&path, users.balancer);
        let socket = socket.map_err(|source| DevError::Socket { path: path.clone(), source })?;
        let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let programs = File::options().read(true).custom_flags(flags.bits()).open(binaries);
        let programs =
            programs.map_err(|source| DevError::Folder { path: binaries.to_owned(), source })?.into();
        Ok(Self { socket, path, programs, stored: Vec::new() })
    }

    /// `NOTIFY_SOCKET`, as the balancer sees it.
    pub fn address(&self) -> PathBuf {
        Path::new(VIEW).join(SOCKET)
    }

    /// What the balancer is given at its start.
    pub fn descriptors(&self) -> impl Iterator<Item = (&str, BorrowedFd<'_>)> {
        let stored = self.stored.iter().map(|(name, socket)| (name.as_str(), socket.as_fd()));
        std::iter::once(("program", self.programs.as_fd())).chain(stored)
    }

    /// Takes in what the process in charge, which has this pid, has said; one thing at a time for the caller.
    pub fn hear(&mut self, in_charge: i32) -> Option<Heard> {
        loop {
            let (sender, text, descriptor) = self.receive().ok()??;
            if sender != in_charge {
                continue;
            }
            let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            match (value("FDNAME"), descriptor) {
                (Some(name), Some(socket)) if value("FDSTORE") == Some("1") => self.store(name, socket),
                (Some(name), None) if value("FDSTOREREMOVE") == Some("1") => {
                    self.stored.retain(|(known, _)| known != name);
                }
                _ => {}
            }
            if let Some(pid) = value("MAINPID").and_then(|pid| pid.parse().ok()) {
                return Some(Heard::MainPid(pid));
            }
        }
    }

    /// Sockets that can be told apart by their names are kept once; the others come by their inodes.
    fn store(&mut self, name: &str, socket: OwnedFd) {
        let inode = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).map(|stat| stat.st_ino).ok();
        let same =
            |(known, kept): &(String, OwnedFd)| known == name && inode(kept.as_fd()) == inode(socket.as_fd());
        let plain = !name.is_empty() && !name.contains(':');
        if plain && self.stored.len() < STORED_MAX && !self.stored.iter().any(same) {
            self.stored.push((name.to_owned(), socket));
        }
    }

    /// Who sent the next message, what it says, and what came along.
    fn receive(&self) -> rustix::io::Result<Option<(i32, String, Option<OwnedFd>)>> {
        let mut text = vec![0; MESSAGE_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8), ScmCredentials(1))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = match recvmsg(&self.socket, &mut [IoSliceMut::new(&mut text)], &mut beside, flags) {
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            received => received?,
        };
        let (mut sender, mut descriptor) = (0, None);
        for message in beside.drain() {
            match message {
                RecvAncillaryMessage::ScmCredentials(who) => sender = who.pid.as_raw_nonzero().get(),
                RecvAncillaryMessage::ScmRights(mut rights) => descriptor = rights.next(),
                _ => {}
            }
        }
        text.truncate(received.bytes);
        Ok(Some((sender, String::from_utf8_lossy(&text).into_owned(), descriptor)))
    }
}

impl AsFd for Keeper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // It may be gone with its folder.
        let _ = fs::remove_file(&self.path);
    }
}

/// Binds the socket for this user, in place of one that a killed supervisor left.
fn bind(path: &Path, user: u32) -> io::Result<UnixDatagram> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = UnixDatagram::bind(path)?;
    // Before anybody can send, so that every message says whose it is.
    setsockopt(&socket, sockopt::PassCred, &true)?;
    fs::set_permissions(path, Permissions::from_mode(0o620))?;
    chown(path, Some(0), Some(user))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keeper(dir: &Path) -> (Keeper, UnixDatagram) {
        let layout = Layout::open(dir).unwrap();
        fs::create_dir(layout.path("run")).unwrap();
        let users = Users { brain: 0, balancer: 0, lease: 0 };
        let keeper = Keeper::new(&layout, users, Path::new("/bin")).unwrap();
        let sender = UnixDatagram::unbound().unwrap();
        sender.connect(layout.path(SOCKET)).unwrap();
        (keeper, sender)
    }

    fn send(sender: &UnixDatagram, text: &str, descriptor: Option<BorrowedFd<'_>>) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut beside = rustix::net::SendAncillaryBuffer::new(&mut space);
        let descriptors: Vec<BorrowedFd<'_>> = descriptor.into_iter().collect();
        if !descriptors.is_empty() {
            beside.push(rustix::net::SendAncillaryMessage::ScmRights(&descriptors));
        }
        let text = [io::IoSlice::new(text.as_bytes())];
        rustix::net::sendmsg(sender, &text, &mut beside, rustix::net::SendFlags::empty()).unwrap();
    }

    fn names(keeper: &Keeper) -> Vec<String> {
        keeper.descriptors().map(|(name, _)| name.to_owned()).collect()
    }

    #[test]
    fn sockets_are_kept_until_they_are_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let (mut keeper, sender) = keeper(dir.path());
        let own = std::process::id() as i32;
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        for name in ["tcp-1.route", "tcp-1.route", "tcp-2.route", "not:a:name", ""] {
            send(&sender, &format!("FDSTORE=1\nFDNAME={name}"), Some(socket.as_fd()));
        }
        assert_eq!(keeper.hear(own), None);
        assert_eq!(names(&keeper), ["program", "tcp-1.route", "tcp-2.route"]);
        send(&sender, "FDSTOREREMOVE=1\nFDNAME=tcp-1.route", None);
        send(&sender, "READY=1\nMAINPID=77\nSTATUS=x", None);
        assert_eq!(keeper.hear(own), Some(Heard::MainPid(77)));
        assert_eq!(names(&keeper), ["program", "tcp-2.route"]);
    }

    #[test]
    fn only_the_process_in_charge_is_heard() {
        let dir = tempfile::tempdir().unwrap();
        let (mut keeper, sender) = keeper(dir.path());
        send(&sender, "MAINPID=77", None);
        assert_eq!(keeper.hear(1), None);
    }
}
