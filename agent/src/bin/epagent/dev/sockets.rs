//! The listening sockets of a node. The supervisor owns them for its whole life and lends them to each process it
//! starts, so that a connection made while a process is being restarted waits in the queue instead of failing.

use std::fs::{self, Permissions};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, UnixAddr, bind, listen, shutdown, socket,
};

use super::error::DevError;
use super::layout::{Layout, Users};

/// Connections that may wait to be accepted. The kernel takes the smaller of this and net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// How long an address may be in use: a ring of the balancer that was killed a moment ago is taken down by the
/// kernel after the process is gone, and holds the listener until then.
const IN_USE_WAIT_MAX: Duration = Duration::from_secs(3);
const IN_USE_RETRY: Duration = Duration::from_millis(20);

/// Every socket, bound and listening. Dropping it removes the unix sockets' files.
#[derive(Debug)]
pub struct Sockets {
    admin: Named,
    read: Named,
    runner: Named,
    control: Named,
    lease: Named,
    http: OwnedFd,
    http_address: SocketAddr,
}

/// A unix socket and its file.
#[derive(Debug)]
struct Named {
    fd: OwnedFd,
    path: PathBuf,
}

impl Sockets {
    pub fn make(layout: &Layout, users: Users, http: SocketAddr) -> Result<Self, DevError> {
        // First the one that can fail for a reason of the operator's.
        let (tcp, http_address) =
            listen_tcp(http).map_err(|source| DevError::Listen { address: http, source })?;
        let stream = SockType::Stream;
        Ok(Self {
            admin: Named::make(layout.path("admin.sock"), stream, 0)?,
            read: Named::make(layout.path("read.sock"), stream, 0)?,
            runner: Named::make(layout.path("run/runner.sock"), SockType::SeqPacket, users.brain)?,
            control: Named::make(layout.path("run/balancer.sock"), stream, users.brain)?,
            lease: Named::make(layout.path("run/lease.sock"), stream, 0)?,
            http: tcp,
            http_address,
        })
    }

    /// What was bound; differs from what was asked when the port was 0.
    pub fn http_address(&self) -> SocketAddr {
        self.http_address
    }

    pub fn admin_path(&self) -> &Path {
        &self.admin.path
    }

    /// Refuses connections to the API from here on, those that wait included: at the end nobody is left to answer
    /// them, and the listeners stay open until everything is taken down.
    pub fn refuse_api(&self) {
        for socket in [&self.admin, &self.read] {
            // For a listening unix socket: what comes is refused, and accept no longer waits (unix(7)).
            let _ = shutdown(socket.fd.as_raw_fd(), Shutdown::Read);
            while let Ok(waiting) = rustix::net::accept(&socket.fd) {
                drop(waiting);
            }
        }
    }

    pub fn for_agent(&self) -> Vec<(&'static str, BorrowedFd<'_>)> {
        vec![("admin", self.admin.fd.as_fd()), ("read", self.read.fd.as_fd())]
    }

    pub fn for_runner(&self) -> Vec<(&'static str, BorrowedFd<'_>)> {
        vec![("runner", self.runner.fd.as_fd())]
    }

    pub fn for_balancer(&self) -> Vec<(&'static str, BorrowedFd<'_>)> {
        vec![("http", self.http.as_fd()), ("control", self.control.fd.as_fd())]
    }

    pub fn for_lease(&self) -> Vec<(&'static str, BorrowedFd<'_>)> {
        vec![("lease", self.lease.fd.as_fd())]
    }
}

impl Named {
    fn make(path: PathBuf, kind: SockType, group: u32) -> Result<Self, DevError> {
        match listen_unix(&path, kind, group) {
            Ok(fd) => Ok(Self { fd, path }),
            Err(source) => Err(DevError::Socket { path, source }),
        }
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        // It may be gone with its folder; nobody could be told anyway.
        let _ = fs::remove_file(&self.path);
    }
}

/// Binds `path`, replacing what a killed supervisor left. The folder is root's and locked by us.
fn listen_unix(path: &Path, kind: SockType, group: u32) -> io::Result<OwnedFd> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let fd = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    // Between bind and listen nobody can connect, whatever the mode says.
    fs::set_permissions(path, Permissions::from_mode(0o660))?;
    chown(path, Some(0), Some(group))?;
    listen(&fd, Backlog::new(BACKLOG)?)?;
    Ok(fd)
}

fn listen_tcp(address: SocketAddr) -> io::Result<(OwnedFd, SocketAddr)> {
    let deadline = Instant::now() + IN_USE_WAIT_MAX;
    let listener = loop {
        match TcpListener::bind(address) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                std::thread::sleep(IN_USE_RETRY);
            }
            bound => break bound?,
        }
    };
    // Listening again only changes the length of the queue.
    listen(&listener, Backlog::new(BACKLOG)?)?;
    let bound = listener.local_addr()?;
    Ok((listener.into(), bound))
}
