//! The process stays within the memory that it says it may come to use, whatever a crowd does.

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use common::app::{App, respond};
use common::client::Client;
use common::{Balancer, free_address, host_route, port_route, until};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, setsockopt, socket, sockopt};

/// Most client connections of the balancer.
const CONNECTIONS: usize = 300;

/// An app that sends without end, until its peer is gone.
fn flood() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("an address");
    let address = listener.local_addr().expect("its address");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let small = std::thread::Builder::new().stack_size(128 * 1024);
            let send = move || while stream.write_all(&[7; 16 * 1024]).is_ok() {};
            small.spawn(send).expect("a thread");
        }
    });
    address
}

/// A client that takes little.
fn slow_reader(port: u16) -> TcpStream {
    let made = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).expect("a socket");
    setsockopt(&made, sockopt::RcvBuf, &(16 * 1024)).expect("a small buffer");
    let address = SockaddrIn::new(127, 0, 0, 1, port);
    connect(std::os::fd::AsRawFd::as_raw_fd(&made), &address).expect("a connection");
    TcpStream::from(made)
}

fn says(address: SocketAddr, text: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).expect("a connection");
    stream.write_all(text.as_bytes()).expect("taken");
    stream
}

/// Resident memory of the process without what is mapped of files, which comes and goes as the kernel likes
/// (proc(5), status). Not of smaps_rollup, which Linux 6.1 cuts short while the process maps pages.
fn anonymous_bytes(balancer: &Balancer) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", balancer.pid())).expect("its status");
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).expect("RssAnon");
    line.split_whitespace().nth(1).expect("a size").parse::<u64>().expect("a number") * 1024
}

#[test]
fn a_crowd_at_its_worst_stays_within_the_bound_that_is_shown() {
    let most = CONNECTIONS.to_string();
    let small = ["--max-connections", &most, "--buffers", "64", "--buffer-bytes", "8192"];
    let patient = ["--header-timeout-ms", "120000", "--body-timeout-ms", "120000"];
    let balancer = Balancer::start(&[&small[..], &patient].concat());
    let port = free_address().port();
    let routes = [host_route("held.example", &[]), port_route(port, &[("flood", flood(), "up")])].join(",");
    assert_eq!(balancer.routes(&routes).problems, []);
    let bound = balancer.status().memory.bound;
    assert_eq!(bound.total_bytes, bound.parts().iter().map(|(_, bytes)| bytes).sum::<u64>());
    let idle = anonymous_bytes(&balancer);

    // A third each: heads that do not end, bodies of requests that are held, and slow readers.
    let field = format!("X-Long: {}\r\n", "x".repeat(31_000));
    let head = format!("GET / HTTP/1.1\r\nHost: held.example\r\n{field}");
    let heads: Vec<TcpStream> = (0..CONNECTIONS / 3).map(|_| says(balancer.http, &head)).collect();
    let body = format!(
        "POST / HTTP/1.1\r\nHost: held.example\r\n{field}Content-Length: 1000000\r\n\r\n{}",
        "b".repeat(60_000)
    );
    let bodies: Vec<TcpStream> = (0..CONNECTIONS / 3).map(|_| says(balancer.http, &body)).collect();
    let mut slow: Vec<TcpStream> = (0..CONNECTIONS / 3).map(|_| slow_reader(port)).collect();
    until("all are there, and what waits has come", || {
        let status = balancer.status();
        for stream in &mut slow {
            let _ = stream.read(&mut [0; 256]).expect("something");
        }
        status.counters.connections_open == CONNECTIONS as u64
            && status.routes.iter().any(|route| route.held == bodies.len() as u64)
            && status.memory.waiting_bytes > 1 << 20
    });
    let (used, status) = (balancer.resident_kib() * 1024, balancer.status());
    assert!(used < bound.total_bytes, "{used} bytes, of {bound}");
    // What the crowd has made it grow by is below what the bound has for a crowd, and a good part of it.
    let grown = anonymous_bytes(&balancer).saturating_sub(idle);
    let crowd =
        bound.receive_buffers_bytes + bound.waiting_bytes + bound.connections_bytes + bound.kept_bytes;
    let share =
        crowd * CONNECTIONS as u64 / (CONNECTIONS as u64 + epagent_balancer::core::config::Config::SLACK);
    assert!(grown < crowd, "it has grown by {grown} bytes, of {crowd}");
    assert!(grown > share / 20, "it has grown by {grown} bytes only: {share} says nothing");
    assert!(status.memory.waiting_bytes <= status.memory.waiting_bytes_max);
    assert_eq!(status.counters.connections_open, (heads.len() + bodies.len() + slow.len()) as u64);
    eprintln!("{idle} bytes idle, {grown} more with the crowd, {used} with files, at most {bound}");
}

#[test]
fn heads_that_do_not_end_are_turned_away_when_they_fill_the_memory_for_them_and_others_are_served() {
    let patient = ["--header-timeout-ms", "120000"];
    let balancer = Balancer::start(&patient);
    let app = App::start(|_, stream| respond(stream, b"small"));
    balancer.routes(&host_route("shop.example", &[("a", app.address, "up")]));
    let head = format!("GET / HTTP/1.1\r\nHost: shop.example\r\nX-Long: {}", "x".repeat(31_000));
    let most = balancer.status().memory.kept_bytes_max;
    let heads: Vec<TcpStream> = (0..most / 31_000 + 100).map(|_| says(balancer.http, &head)).collect();
    until("some are turned away", || balancer.status().counters.shed_memory >= 90);
    let status = balancer.status();
    assert!(status.memory.kept_bytes < most + (1 << 20), "{} of {most}", status.memory.kept_bytes);
    assert!(status.counters.shed_memory < heads.len() as u64 / 2, "{}", status.counters.shed_memory);
    for _ in 0..20 {
        assert_eq!(Client::connect(balancer.http).get("shop.example", "/").body, b"small");
    }
    drop(heads);
    until("nothing is kept any more", || balancer.status().memory.kept_bytes == 0);
}
