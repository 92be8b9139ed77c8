//! The clients: closed loops of small requests, bulk transfers, and connections that do nothing.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::backend::{BODY, DOWN, UP};

/// How long a lone request may wait for its answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// What the clients of one round saw.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    pub done: u64,
    pub failed: u64,
    pub seconds: f64,
    pub p50_us: f64,
    pub p99_us: f64,
}

/// One client of a closed loop.
struct Client {
    stream: TcpStream,
    sent_at: Instant,
    /// What has come of the answer, head and body.
    got: Vec<u8>,
}

/// `connections` clients that each send a request as soon as they have their answer; with `fresh`, each request on
/// a connection of its own.
pub fn requests(to: SocketAddr, connections: usize, fresh: bool, time: Duration) -> Seen {
    let close = if fresh { "Connection: close\r\n" } else { "" };
    let request = format!("GET / HTTP/1.1\r\nHost: bench.example\r\n{close}\r\n");
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("an epoll");
    let mut clients: Vec<Client> = (0..connections).filter_map(|_| Client::connect(to)).collect();
    let mut seen = Seen { failed: (connections - clients.len()) as u64, ..Seen::default() };
    for (index, client) in clients.iter_mut().enumerate() {
        watch(&epoll, &client.stream, index);
        client.send(request.as_bytes());
    }
    let mut latencies: Vec<u32> = Vec::with_capacity(1 << 20);
    let began = Instant::now();
    let mut events = vec![EpollEvent::empty(); 512];
    while began.elapsed() < time && !clients.is_empty() {
        let count = epoll.wait(&mut events, EpollTimeout::from(100_u8)).unwrap_or(0);
        for event in &events[..count] {
            let index = event.data() as usize;
            let client = &mut clients[index];
            match client.receive() {
                Received::More => continue,
                Received::Answer => {
                    seen.done += 1;
                    latencies.push(client.sent_at.elapsed().as_micros() as u32);
                    if !fresh {
                        client.send(request.as_bytes());
                        continue;
                    }
                }
                Received::Failed => seen.failed += 1,
            }
            // Closing takes it off the epoll.
            if let Some(next) = Client::connect(to) {
                *client = next;
                watch(&epoll, &client.stream, index);
                client.send(request.as_bytes());
            } else {
                seen.failed += 1;
            }
        }
    }
    seen.seconds = began.elapsed().as_secs_f64();
    latencies.sort_unstable();
    let at = |share: f64| {
        latencies.get((latencies.len() as f64 * share) as usize).map_or(0.0, |us| f64::from(*us))
    };
    (seen.p50_us, seen.p99_us) = (at(0.5), at(0.99));
    seen
}

fn watch(epoll: &Epoll, stream: &TcpStream, index: usize) {
    epoll.add(stream.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, index as u64)).expect("watching a client");
}

enum Received {
    More,
    Answer,
    Failed,
}

impl Client {
    fn connect(to: SocketAddr) -> Option<Self> {
        let stream = TcpStream::connect(to).ok()?;
        stream.set_nodelay(true).ok()?;
        stream.set_nonblocking(true).ok()?;
        Some(Self { stream, sent_at: Instant::now(), got: Vec::with_capacity(512) })
    }

    fn send(&mut self, request: &[u8]) {
        self.sent_at = Instant::now();
        self.got.clear();
        // So few bytes always fit; a connection that is gone shows when its answer is read.
        let _ = self.stream.write(request);
    }

    fn receive(&mut self) -> Received {
        let mut buffer = [0; 2048];
        match self.stream.read(&mut buffer) {
            Ok(0) => return Received::Failed,
            Ok(count) => self.got.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Received::More,
            Err(_) => return Received::Failed,
        }
        let Some(head) = self.got.windows(4).position(|end| end == b"\r\n\r\n") else {
            return Received::More;
        };
        if !self.got.starts_with(b"HTTP/1.1 200") {
            return Received::Failed;
        }
        match self.got.len() >= head + 4 + BODY.len() {
            true => Received::Answer,
            false => Received::More,
        }
    }
}

/// `streams` transfers at a time, `bytes` in all; the seconds they took, or what went wrong.
pub fn bulk(to: SocketAddr, down: bool, streams: u64, bytes: u64) -> Result<f64, String> {
    let began = Instant::now();
    let workers: Vec<_> =
        (0..streams).map(|_| std::thread::spawn(move || transfer(to, down, bytes / streams))).collect();
    for worker in workers {
        worker.join().map_err(|_| "a transfer panicked".to_owned())?.map_err(|error| error.to_string())?;
    }
    Ok(began.elapsed().as_secs_f64())
}

fn transfer(to: SocketAddr, down: bool, bytes: u64) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.write_all(&[&[if down { DOWN } else { UP }][..], &bytes.to_be_bytes()].concat())?;
    let mut buffer = vec![0; 256 * 1024];
    let mut left = if down { bytes } else { 0 };
    if !down {
        let mut to_send = bytes;
        while to_send > 0 {
            let most = buffer.len().min(to_send as usize);
            to_send -= stream.write(&buffer[..most])? as u64;
        }
        left = 1;
    }
    while left > 0 {
        let most = buffer.len().min(left as usize);
        match stream.read(&mut buffer[..most])? {
            0 => return Err(std::io::Error::other(format!("{left} bytes are missing"))),
            count => left -= count as u64,
        }
    }
    Ok(())
}

/// Opens connections that do nothing, and keeps them. Each has asked and been answered once, so that the front has
/// its upstream connection too.
pub fn idle(to: SocketAddr, count: u64) -> Vec<TcpStream> {
    let mut clients = Vec::new();
    for _ in 0..count {
        let Ok(mut stream) = TcpStream::connect(to) else { break };
        if stream.set_read_timeout(Some(ANSWER_DEADLINE)).is_err() || ask(&mut stream).is_err() {
            break;
        }
        clients.push(stream);
    }
    clients
}

/// One request and its answer, waiting.
pub fn ask(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: bench.example\r\n\r\n")?;
    let mut answer = Vec::new();
    let mut buffer = [0; 1024];
    while !answer.ends_with(BODY) {
        match stream.read(&mut buffer)? {
            0 => return Err(std::io::Error::other("closed before the answer was complete")),
            count => answer.extend_from_slice(&buffer[..count]),
        }
    }
    Ok(())
}
