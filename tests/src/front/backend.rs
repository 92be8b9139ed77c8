//! What stands behind the fronts: an HTTP server with one fixed answer, on TCP and on a unix socket, and a server
//! that streams or swallows bytes.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::Backlog;

/// What every request is answered with.
pub const BODY: &[u8; 64] = b"hello from the bench backend: 64 bytes that nobody has to read..";

/// Asks for so many bytes, or announces them: one byte of kind, then the count, big-endian.
pub const DOWN: u8 = b'd';
pub const UP: u8 = b'u';

pub fn run(http: &str, unix: &str, bulk: &str) {
    let bulk = TcpListener::bind(bulk).expect("the bulk listener");
    std::thread::spawn(move || {
        for stream in bulk.incoming().flatten() {
            std::thread::spawn(move || serve_bulk(stream));
        }
    });
    let tcp = TcpListener::bind(http).expect("the HTTP listener");
    let _ = std::fs::remove_file(unix);
    let unix = UnixListener::bind(unix).expect("the unix listener");
    // Hundreds of connections at once find room.
    nix::sys::socket::listen(&tcp, Backlog::MAXCONN).expect("a longer queue");
    nix::sys::socket::listen(&unix, Backlog::MAXCONN).expect("a longer queue");
    serve_http(tcp, unix);
}

fn serve_bulk(mut stream: TcpStream) {
    let mut asked = [0; 9];
    if stream.read_exact(&mut asked).is_err() {
        return;
    }
    let mut left = u64::from_be_bytes(asked[1..].try_into().expect("eight bytes"));
    let mut buffer = vec![b'x'; 256 * 1024];
    while left > 0 {
        let most = buffer.len().min(left as usize);
        let moved = match asked[0] {
            DOWN => stream.write(&buffer[..most]),
            _ => stream.read(&mut buffer[..most]),
        };
        match moved {
            Ok(count @ 1..) => left -= count as u64,
            _ => return,
        }
    }
    if asked[0] == UP {
        let _ = stream.write_all(b"!");
    }
}

/// A connection of either kind.
struct Conn {
    socket: OwnedFd,
    /// What has come of the request under way.
    request: Vec<u8>,
}

fn serve_http(tcp: TcpListener, unix: UnixListener) {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("an epoll");
    let mut conns: HashMap<u64, Conn> = HashMap::new();
    let watch = |fd: &OwnedFd| epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, fd.as_raw_fd() as u64));
    tcp.set_nonblocking(true).expect("non-blocking");
    unix.set_nonblocking(true).expect("non-blocking");
    let (tcp_key, unix_key) = (tcp.as_raw_fd() as u64, unix.as_raw_fd() as u64);
    epoll.add(tcp.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, tcp_key)).expect("watching");
    epoll.add(unix.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, unix_key)).expect("watching");
    let keep = answer("");
    let close = answer("Connection: close\r\n");
    let mut events = vec![EpollEvent::empty(); 512];
    loop {
        let count = epoll.wait(&mut events, EpollTimeout::NONE).unwrap_or(0);
        for event in &events[..count] {
            let key = event.data();
            if key == tcp_key || key == unix_key {
                loop {
                    let accepted: std::io::Result<OwnedFd> = if key == tcp_key {
                        tcp.accept().map(|(stream, _)| {
                            let _ = stream.set_nodelay(true);
                            stream.into()
                        })
                    } else {
                        unix.accept().map(|(stream, _)| stream.into())
                    };
                    let Ok(socket) = accepted else { break };
                    if watch(&socket).is_ok() {
                        let key = socket.as_raw_fd() as u64;
                        conns.insert(key, Conn { socket, request: Vec::new() });
                    }
                }
                continue;
            }
            let Some(conn) = conns.get_mut(&key) else { continue };
            if !conn.serve(&keep, &close) {
                conns.remove(&key);
            }
        }
    }
}

impl Conn {
    /// Reads once and answers once; false when the connection is over.
    fn serve(&mut self, keep: &[u8], close: &[u8]) -> bool {
        let mut buffer = [0; 4096];
        let count = match nix::unistd::read(&self.socket, &mut buffer) {
            Ok(0) => return false,
            Ok(count) => count,
            Err(errno) => return std::io::Error::from(errno).kind() == ErrorKind::WouldBlock,
        };
        let request = if self.request.is_empty() {
            &buffer[..count]
        } else {
            self.request.extend_from_slice(&buffer[..count]);
            &self.request
        };
        if !request.ends_with(b"\r\n\r\n") {
            if self.request.is_empty() {
                self.request.extend_from_slice(&buffer[..count]);
            }
            return true;
        }
        let closing = request.windows(7).any(|word| word.eq_ignore_ascii_case(b": close"));
        let written = nix::unistd::write(&self.socket, if closing { close } else { keep });
        self.request.clear();
        written.is_ok() && !closing
    }
}

fn answer(extra: &str) -> Vec<u8> {
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n{extra}\r\n",
        BODY.len()
    );
    [head.as_bytes(), BODY].concat()
}
