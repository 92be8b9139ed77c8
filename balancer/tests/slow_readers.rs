//! Clients that read slowly, beside clients in a hurry: the former take a bounded part of the memory and none
//! of the others' time.
//!
//! `EPAGENT_TEST_SLOW_READERS` says how many there are.

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Balancer, free_address, port_route, until};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, setsockopt, socket, sockopt};

const SLOW: usize = 300;
const FAST: usize = 64;
/// Round trips of each fast client.
const TRIPS: usize = 150;

/// An app that sends without end to whoever says `d`, and echoes to others.
fn app() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("an address");
    let address = listener.local_addr().expect("its address");
    let serve = |mut stream: TcpStream| {
        let mut first = [0; 1];
        if stream.read_exact(&mut first).is_err() {
            return;
        }
        let mut piece = vec![0; 64 * 1024];
        while first == *b"d" && stream.write_all(&piece).is_ok() {}
        while stream.read_exact(&mut piece[..64]).is_ok() && stream.write_all(&piece[..64]).is_ok() {}
    };
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let small = std::thread::Builder::new().stack_size(64 * 1024);
            small.spawn(move || serve(stream)).expect("a thread");
        }
    });
    address
}

/// A client that has asked for more than it will read, with a small receive buffer.
fn slow_reader(port: u16) -> TcpStream {
    let made = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).expect("a socket");
    setsockopt(&made, sockopt::RcvBuf, &(16 * 1024)).expect("a small buffer");
    let address = SockaddrIn::new(127, 0, 0, 1, port);
    connect(std::os::fd::AsRawFd::as_raw_fd(&made), &address).expect("a connection");
    let mut stream = TcpStream::from(made);
    stream.write_all(b"d").expect("taken");
    stream.set_nonblocking(true).expect("it does not block");
    stream
}

/// The 99th percentile of the round trips of many clients at once.
fn p99(port: u16) -> Duration {
    let client = || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
        stream.set_nodelay(true).expect("no delay");
        stream.write_all(b"p").expect("taken");
        let mut message = [7; 64];
        let trip = |_| {
            let start = Instant::now();
            stream.write_all(&message).expect("taken");
            stream.read_exact(&mut message).expect("the echo");
            start.elapsed()
        };
        (0..TRIPS).map(trip).collect::<Vec<_>>()
    };
    let mut trips: Vec<Duration> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..FAST).map(|_| scope.spawn(client)).collect();
        clients.into_iter().flat_map(|client| client.join().expect("a client")).collect()
    });
    trips.sort();
    trips[trips.len() * 99 / 100]
}

#[test]
fn slow_readers_take_neither_the_memory_nor_the_time_of_others() {
    let count =
        std::env::var("EPAGENT_TEST_SLOW_READERS").map_or(SLOW, |text| text.parse().expect("a number"));
    let balancer = Balancer::start(&[]);
    let port = free_address().port();
    assert_eq!(balancer.routes(&port_route(port, &[("a", app(), "up")])).problems, []);
    let quiet = p99(port).max(p99(port));
    let before_kib = balancer.resident_kib();
    let mut slow: Vec<TcpStream> = (0..count).map(|_| slow_reader(port)).collect();
    until("all of them are served", || balancer.upstream("a").active_connections == count as u64);
    let passed = || balancer.status().counters.bytes_from_upstreams;
    let mut last = 0;
    until("they hold what they can", || {
        std::thread::sleep(Duration::from_millis(300));
        let so_far = passed();
        so_far - std::mem::replace(&mut last, so_far) < 1_000_000
    });
    let bound = quiet.mul_f64(1.5) + Duration::from_millis(20);
    let over = AtomicBool::new(false);
    let beside = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut piece = [0; 2048];
            while !over.load(Ordering::Relaxed) {
                for stream in &mut slow {
                    // Nothing there yet is as good.
                    let _ = stream.read(&mut piece);
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        // Other tests share the machine: what counts is that it can be done.
        let told =
            |beside: &Duration| println!("p99 alone {quiet:?}, beside {count} slow readers {beside:?}");
        let beside = (0..5).map(|_| p99(port)).inspect(told).find(|beside| *beside < bound);
        over.store(true, Ordering::Relaxed);
        beside
    });
    let status = balancer.status();
    assert!(beside.is_some(), "the round trips of {quiet:?} all became longer than {bound:?}");
    assert!(status.memory.waiting_bytes <= status.memory.waiting_bytes_max);
    assert!(status.memory.lent_buffers <= status.memory.lent_buffers_max);
    assert_eq!((status.counters.shed_memory, status.counters.connections_open), (0, count as u64));
    let grown_kib = balancer.resident_kib().saturating_sub(before_kib);
    let bound_kib = (status.memory.buffers_bytes + status.memory.waiting_bytes_max) / 1024;
    assert!(grown_kib < bound_kib, "{count} slow readers took {grown_kib} KiB, of {bound_kib} that they may");
}
