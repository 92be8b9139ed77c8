//! Listening on a unix socket's path.
//!
//! A path outlives the process that bound it, so one that is taken may be a live balancer's or a dead one's.
//! Whether anybody listens decides; two processes that start at once take turns at deciding, by a lock on the
//! folder. The file stays when we end: whoever comes next finds nobody listening, and replaces it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, FlockOperation, Mode, OFlags, chmod, flock, lstat, open, unlink};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getsockname, listen, socket_with,
};

use crate::table::UnixPath;

/// Who may connect: the owner and the group, which the folder narrows further.
const MODE: u32 = 0o660;
/// The kernel lowers it to net.core.somaxconn.
const BACKLOG: i32 = i32::MAX;
/// How long another process may hold the folder's lock.
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a socket is looked at until somebody is said to listen: the kernel takes a killed process's ring down,
/// and the accept that waits in it, a moment after the process itself.
const DYING: Duration = Duration::from_millis(500);
const PAUSE: Duration = Duration::from_millis(5);

/// Why nothing listens on a path.
#[derive(Debug, thiserror::Error)]
pub enum UnixListenError {
    #[error("cannot listen on unix:{}: another process listens there; `ss -lxp` shows which", path.display())]
    InUse { path: PathBuf },
    #[error("cannot listen on unix:{}: what stands there is no socket, and is left alone", path.display())]
    NoSocket { path: PathBuf },
    #[error("cannot listen on unix:{}", path.display())]
    Bind {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// A listening socket at this path, in place of one that nobody listens on.
pub fn bound(path: &UnixPath) -> Result<OwnedFd, UnixListenError> {
    let path = Path::new(path.as_str());
    let failed = |error: Errno| UnixListenError::Bind { path: path.to_owned(), source: error.into() };
    let _turn = lock_folder(path).map_err(failed)?;
    let socket = stream_socket().map_err(failed)?;
    let address = SocketAddrUnix::new(path).map_err(failed)?;
    match bind(&socket, &address) {
        Err(Errno::ADDRINUSE) => {
            remove_stale(path, &address)?;
            bind(&socket, &address).map_err(failed)?;
        }
        done => done.map_err(failed)?,
    }
    // Nobody can connect before it listens, so it is never open to more than it should be.
    chmod(path, Mode::from_raw_mode(MODE)).and_then(|()| listen(&socket, BACKLOG)).map_err(failed)?;
    Ok(socket)
}

/// The path of a listening unix socket, where it has one.
pub fn path_of(socket: impl AsFd) -> Option<String> {
    let address: SocketAddrUnix = getsockname(socket).ok()?.try_into().ok()?;
    Some(address.path()?.to_str().ok()?.to_owned())
}

/// Removes a socket that a dead process left behind, or one that is dying leaves, and nothing else.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), UnixListenError> {
    let deadline = Instant::now() + DYING;
    loop {
        match remove_if_stale(path, address) {
            Err(UnixListenError::InUse { .. }) if Instant::now() < deadline => std::thread::sleep(PAUSE),
            done => return done,
        }
    }
}

fn remove_if_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), UnixListenError> {
    let failed = |error: Errno| UnixListenError::Bind { path: path.to_owned(), source: error.into() };
    let found = lstat(path).map_err(failed)?;
    if FileType::from_raw_mode(found.st_mode) != FileType::Socket {
        return Err(UnixListenError::NoSocket { path: path.to_owned() });
    }
    match stream_socket().and_then(|probe| connect(&probe, address)) {
        Err(Errno::CONNREFUSED) => unlink(path).map_err(failed),
        // Its queue may be full, or it is of another kind: somebody is there.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => {
            Err(UnixListenError::InUse { path: path.to_owned() })
        }
        Err(error) => Err(failed(error)),
    }
}

/// The lock of the folder a path is in, until dropped.
fn lock_folder(path: &Path) -> rustix::io::Result<OwnedFd> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let folder = open(folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let deadline = Instant::now() + LOCK_TIMEOUT;
    loop {
        match flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                std::thread::sleep(PAUSE);
            }
            done => return done.map(|()| folder),
        }
    }
}

fn stream_socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use super::*;

    fn place() -> (tempfile::TempDir, PathBuf, UnixPath) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("front.sock");
        let parsed = path.to_str().unwrap().parse().unwrap();
        (dir, path, parsed)
    }

    #[test]
    fn it_is_open_to_owner_and_group_and_knows_its_path() {
        let (_dir, path, parsed) = place();
        let socket = bound(&parsed).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        assert_eq!(path_of(&socket).as_deref(), path.to_str());
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn what_a_dead_process_left_is_replaced() {
        let (_dir, path, parsed) = place();
        drop(UnixListener::bind(&path).unwrap());
        assert!(UnixStream::connect(&path).is_err());
        let _socket = bound(&parsed).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn what_a_dying_process_still_holds_for_a_moment_is_replaced() {
        let (_dir, path, parsed) = place();
        let dying = UnixListener::bind(&path).unwrap();
        let end = std::thread::spawn(move || {
            std::thread::sleep(DYING / 10);
            drop(dying);
        });
        let _socket = bound(&parsed).unwrap();
        end.join().unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_live_one_is_refused_also_when_its_queue_is_full() {
        let (_dir, path, parsed) = place();
        let live = UnixListener::bind(&path).unwrap();
        assert!(matches!(bound(&parsed), Err(UnixListenError::InUse { .. })));
        listen(&live, 0).unwrap();
        let mut waiting = Vec::new();
        while let Ok(stream) =
            stream_socket().and_then(|socket| connect(&socket, &SocketAddrUnix::new(&path)?).map(|()| socket))
        {
            waiting.push(stream);
        }
        assert!(matches!(bound(&parsed), Err(UnixListenError::InUse { .. })));
        assert!(std::fs::metadata(&path).unwrap().file_type().is_socket());
    }

    #[test]
    fn what_is_no_stream_socket_is_left_alone() {
        let (_dir, path, parsed) = place();
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(bound(&parsed), Err(UnixListenError::NoSocket { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        std::fs::remove_file(&path).unwrap();
        let _datagrams = UnixDatagram::bind(&path).unwrap();
        assert!(matches!(bound(&parsed), Err(UnixListenError::InUse { .. })));
    }

    #[test]
    fn of_two_that_start_at_once_over_a_dead_ones_file_one_listens() {
        for _ in 0..50 {
            let (_dir, path, parsed) = place();
            drop(UnixListener::bind(&path).unwrap());
            let start = std::sync::Barrier::new(2);
            let both = std::thread::scope(|scope| {
                let begin = || {
                    start.wait();
                    bound(&parsed)
                };
                [scope.spawn(begin), scope.spawn(begin)].map(|one| one.join().unwrap())
            });
            assert_eq!(both.iter().filter(|one| one.is_ok()).count(), 1);
            UnixStream::connect(&path).unwrap();
        }
    }
}
