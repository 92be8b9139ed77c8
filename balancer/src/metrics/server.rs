//! The server that Prometheus asks: `GET /metrics`, one request a connection.
//!
//! ```text
//! accepted ──▶ Reading ──head complete──▶ Writing ──all taken──▶ closed
//!                 └────────── 5 seconds in all, or anything odd ──▶ closed
//! ```
//!
//! It is driven by the control thread's poll loop and never waits. It is no place for strangers: it belongs on
//! a private address or a unix socket, knows no users, and counts nothing it is asked.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname};

use super::text::CONTENT_TYPE;

/// Most connections at a time; one more is closed at once.
const PEERS_MAX: usize = 16;
/// From accepting to the last byte.
const PEER_TIMEOUT: Duration = Duration::from_secs(5);
/// A longer request head is not read to its end.
const HEAD_BYTES_MAX: usize = 8 * 1024;

/// A listening socket and who is connected to it.
pub struct MetricsServer {
    listener: Listener,
    peers: Vec<Peer>,
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A connection, whatever its kind.
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

struct Peer {
    stream: Stream,
    until: Instant,
    state: State,
}

enum State {
    /// What has come of the head.
    Reading(Vec<u8>),
    /// What is still to be taken.
    Writing(Vec<u8>),
    Gone,
}

impl MetricsServer {
    /// Takes over a listening stream socket.
    pub fn new(listener: OwnedFd) -> io::Result<Self> {
        use std::os::fd::AsRawFd;
        let address: SockaddrStorage = getsockname(listener.as_raw_fd())?;
        let listener = match address.family() {
            Some(AddressFamily::Unix) => Listener::Unix(UnixListener::from(listener)),
            _ => Listener::Tcp(TcpListener::from(listener)),
        };
        match &listener {
            Listener::Tcp(listener) => listener.set_nonblocking(true)?,
            Listener::Unix(listener) => listener.set_nonblocking(true)?,
        }
        Ok(Self { listener, peers: Vec::new() })
    }

    pub fn listener(&self) -> BorrowedFd<'_> {
        match &self.listener {
            Listener::Tcp(listener) => listener.as_fd(),
            Listener::Unix(listener) => listener.as_fd(),
        }
    }

    /// What to poll, and for what.
    pub fn polled(&self) -> Vec<PollFd<'_>> {
        let peers = self.peers.iter().map(Peer::polled);
        std::iter::once(PollFd::new(self.listener(), PollFlags::POLLIN)).chain(peers).collect()
    }

    /// When the next peer has had its time.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.peers.iter().map(|peer| peer.until).min()
    }

    /// Goes on with every peer as far as that is possible now; `render` makes the text when one asks.
    pub fn serve(&mut self, now: Instant, mut render: impl FnMut() -> Option<String>) {
        while let Some(stream) = self.accept() {
            if self.peers.len() < PEERS_MAX {
                let state = State::Reading(Vec::new());
                self.peers.push(Peer { stream, until: now + PEER_TIMEOUT, state });
            }
        }
        // Peers that ask at the same time get the same text.
        let mut text: Option<Option<String>> = None;
        for peer in &mut self.peers {
            peer.go_on(|| text.get_or_insert_with(&mut render).clone());
            if peer.until <= now {
                peer.state = State::Gone;
            }
        }
        self.peers.retain(|peer| !matches!(peer.state, State::Gone));
    }

    fn accept(&self) -> Option<Stream> {
        // Errors of accepting are passing ones; the next poll tries again.
        let stream = match &self.listener {
            Listener::Tcp(listener) => Stream::Tcp(listener.accept().ok()?.0),
            Listener::Unix(listener) => Stream::Unix(listener.accept().ok()?.0),
        };
        match &stream {
            Stream::Tcp(stream) => stream.set_nonblocking(true).ok()?,
            Stream::Unix(stream) => stream.set_nonblocking(true).ok()?,
        }
        Some(stream)
    }
}

impl Peer {
    fn polled(&self) -> PollFd<'_> {
        let flags = match self.state {
            State::Writing(_) => PollFlags::POLLOUT,
            State::Reading(_) | State::Gone => PollFlags::POLLIN,
        };
        PollFd::new(self.stream.as_fd(), flags)
    }

    fn go_on(&mut self, render: impl FnOnce() -> Option<String>) {
        if let State::Reading(head) = &mut self.state {
            let mut bytes = [0; 1024];
            loop {
                match self.stream.read(&mut bytes) {
                    Ok(count) if count > 0 && head.len() < HEAD_BYTES_MAX => {
                        head.extend_from_slice(&bytes[..count]);
                    }
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Ok(_) | Err(_) => return self.state = State::Gone,
                }
            }
            if !head.windows(4).any(|end| end == b"\r\n\r\n") {
                return;
            }
            self.state = State::Writing(answer(head, render));
        }
        if let State::Writing(rest) = &mut self.state {
            while !rest.is_empty() {
                match self.stream.write(rest) {
                    Ok(count) => drop(rest.drain(..count)),
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                    Err(_) => break,
                }
            }
            self.state = State::Gone;
        }
    }
}

/// The response to a complete head.
fn answer(head: &[u8], render: impl FnOnce() -> Option<String>) -> Vec<u8> {
    let line = head.split(|b| *b == b'\r').next().unwrap_or_default();
    let mut words = line.split(|b| *b == b' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = target.split(|b| *b == b'?').next().unwrap_or_default();
    let (status, body) = match (method, path) {
        (b"GET" | b"HEAD", b"/metrics") => match render() {
            Some(text) => ("200 OK", text),
            None => ("503 Service Unavailable", "A data-path thread did not answer in time.\n".to_owned()),
        },
        (b"GET" | b"HEAD", _) => ("404 Not Found", "Ask for /metrics.\n".to_owned()),
        _ => ("405 Method Not Allowed", "Ask with GET.\n".to_owned()),
    };
    let kind = if status.starts_with("200") { CONTENT_TYPE } else { "text/plain; charset=utf-8" };
    let allow = if status.starts_with("405") { "Allow: GET, HEAD\r\n" } else { "" };
    let mut out = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n{allow}Connection: close\r\n\r\n",
        body.len()
    );
    if method != b"HEAD" {
        out.push_str(&body);
    }
    out.into_bytes()
}

impl Read for Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.read(bytes),
            Stream::Unix(stream) => stream.read(bytes),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.write(bytes),
            Stream::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Tcp(stream) => stream.as_fd(),
            Stream::Unix(stream) => stream.as_fd(),
        }
    }
}
