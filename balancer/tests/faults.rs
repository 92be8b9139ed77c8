//! Each bad input or fault has its own answer.
//!
//! | fault | the client sees | counter |
//! |---|---|---|
//! | no route at all; none for the host | 503 `no_routes`; 404 `unknown_host` | the same |
//! | no upstream; all of them down | 503 `no_upstreams`; 503 `all_down` | the same |
//! | upstream resets before its answer; in its head | 502 `upstream_died` | the same |
//! | upstream resets in its body | a reset | `upstream_died_midway` |
//! | upstream answers no HTTP; not at all | 502 `upstream_bad_response`; 504 `upstream_timeout` | the same |
//! | slow head; slow body; slow reader | 408 `slow_head`; 408 `slow_body`; a reset | `refused_slow_*`, `client_stalled` |
//! | too large a head; malformed; CONNECT | 431 `head_too_large`; 400 `bad_request`; 405 | `refused_*` |
//! | too many requests; of one source; at all | 429 `rate_limited`, `source_full`; 503 `route_full` | the same |
//! | listener full | a reset | `shed_connections` |
//! | bad PROXY header | a reset | see `preface.rs` |
//! | expired certificate | none: the one before stays in force | see `tls.rs` |
//! | out of descriptors | waits, and is served | `accept_backoff`, see `process.rs` |
//! | port in use | the process says which, and by whom to find out | |
//!
//! What limits answer is tested in `limits.rs`, and upstreams that are down in `health.rs`.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::app::{App, respond};
use common::client::Client;
use common::{Balancer, host_route, until};
use epagent_balancer::control::protocol::Counters;
use nix::sys::socket::{setsockopt, sockopt};

fn reset(stream: &TcpStream) {
    setsockopt(stream, sockopt::Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 }).expect("linger");
}

/// An app that says this to each request, and then resets the connection.
fn resetting(words: &'static [u8]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("an address");
    let address = listener.local_addr().expect("its address");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(words);
            // What was said is on its way before the reset.
            std::thread::sleep(Duration::from_millis(50));
            reset(&stream);
        }
    });
    address
}

/// What a client is told, and which counter tells of it.
fn check(balancer: &Balancer, wire: &str, status: u16, code: &str, counter: fn(&Counters) -> u64) {
    let before = counter(&balancer.status().counters);
    let response = Client::connect(balancer.http).send(wire).read();
    assert_eq!((response.status, response.field("x-epagent-error")), (status, Some(code)), "{wire:?}");
    assert_eq!(counter(&balancer.status().counters), before + 1, "{code} is counted once");
}

#[test]
fn requests_that_cannot_be_routed_or_read_say_why() {
    let app = App::named("shop");
    let balancer = Balancer::start(&["--header-timeout-ms", "300"]);
    check(&balancer, "GET / HTTP/1.1\r\nHost: a\r\n\r\n", 503, "no_routes", |c| c.no_routes);
    balancer.route("shop.example", &[("s", app.address, "up")]);
    check(&balancer, "GET / HTTP/1.1\r\nHost: a\r\n\r\n", 404, "unknown_host", |c| c.unknown_host);
    check(&balancer, "GET / HTTP/1.1\r\nHost: sh", 408, "slow_head", |c| c.refused_slow_head);
    check(&balancer, "GET / HTTP/1.1\r\n\r\n", 400, "bad_request", |c| c.refused_bad_request);
    let connect = "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n";
    check(&balancer, connect, 405, "method_not_allowed", |c| c.refused_method);
    check(&balancer, "GET / HTTP/3.0\r\nHost: a\r\n\r\n", 505, "http_version", |c| c.refused_version);
    let many = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "A: b\r\n".repeat(200));
    check(&balancer, &many, 431, "head_too_large", |c| c.refused_large_head);
}

#[test]
fn upstreams_that_break_off_cost_their_request_and_are_named() {
    let balancer = Balancer::start(&["--response-timeout-ms", "300"]);
    let silent = App::start(|_, _| {
        std::thread::sleep(Duration::from_secs(2));
        false
    });
    let routes: Vec<String> = [
        ("before", resetting(b"")),
        ("head", resetting(b"HTTP/1.1 200 OK\r\nContent-Le")),
        ("body", resetting(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")),
        ("noise", resetting(b"SSH-2.0-OpenSSH\r\n\r\n")),
        ("silent", silent.address),
    ]
    .iter()
    .map(|(name, address)| host_route(&format!("{name}.example"), &[(*name, *address, "up")]))
    .collect();
    balancer.routes(&routes.join(","));
    let get = |name: &str| format!("GET / HTTP/1.1\r\nHost: {name}.example\r\n\r\n");
    check(&balancer, &get("before"), 502, "upstream_died", |c| c.upstream_died);
    check(&balancer, &get("head"), 502, "upstream_died", |c| c.upstream_died);
    check(&balancer, &get("noise"), 502, "upstream_bad_response", |c| c.upstream_bad_response);
    check(&balancer, &get("silent"), 504, "upstream_timeout", |c| c.upstream_timeout);
    // The length was promised: only a broken connection tells the client that the rest is missing.
    let mut client = Client::connect(balancer.http);
    let end = client.try_get("body.example", "/").expect_err("half a response");
    assert_eq!(end.kind(), ErrorKind::ConnectionReset);
    assert_eq!(balancer.status().counters.upstream_died_midway, 1);
    for name in ["before", "head", "body", "noise", "silent"] {
        assert_eq!(balancer.upstream(name).request_errors_total, 1, "{name}");
    }
}

#[test]
fn a_slow_body_is_given_up_and_its_app_is_free_for_others() {
    let app = App::echo();
    let balancer = Balancer::start(&["--body-timeout-ms", "300"]);
    balancer.route("shop.example", &[("s", app.address, "up")]);
    let post = "POST / HTTP/1.1\r\nHost: shop.example\r\nContent-Length: 100\r\n\r\nonly this";
    check(&balancer, post, 408, "slow_body", |c| c.refused_slow_body);
    until("the app has been let go", || balancer.upstream("s").active_requests == 0);
    assert_eq!(Client::connect(balancer.http).get("shop.example", "/").status, 200);
}

#[test]
fn a_reader_that_takes_nothing_is_bounded_in_bytes_and_time_and_harms_nobody() {
    let app = App::start(|request, stream| match request.path() {
        "/endless" => {
            let head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n";
            let mut sent = stream.write_all(head);
            while sent.is_ok() {
                sent = stream.write_all(&[b'x'; 64 * 1024]);
            }
            false
        }
        _ => respond(stream, b"quick"),
    });
    let balancer = Balancer::start(&["--body-timeout-ms", "1000"]);
    balancer.route("shop.example", &[("s", app.address, "up")]);
    let mut slow = Client::connect(balancer.http);
    let before_kib = balancer.resident_kib();
    slow.send("GET /endless HTTP/1.1\r\nHost: shop.example\r\n\r\n");
    until("it stalls", || balancer.upstream("s").active_requests == 1);
    let start = Instant::now();
    while balancer.status().counters.client_stalled == 0 {
        assert!(start.elapsed() < common::PATIENCE, "it is never given up");
        let asked = Instant::now();
        assert_eq!(Client::connect(balancer.http).get("shop.example", "/").text(), "quick");
        assert!(asked.elapsed() < Duration::from_secs(2), "another waited {:?}", asked.elapsed());
        let grown_kib = balancer.resident_kib().saturating_sub(before_kib);
        assert!(grown_kib < 16_000, "one slow reader took {grown_kib} KiB");
        std::thread::sleep(Duration::from_millis(20));
    }
    until("its app is free", || balancer.upstream("s").active_requests == 0);
}

#[test]
fn a_port_that_is_in_use_ends_the_start_with_its_name() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("its address").to_string();
    let output = Command::new(env!("CARGO_BIN_EXE_epagent-balancer"))
        .args(["--http", &address])
        .args(common::IO_ARGUMENTS)
        .stderr(Stdio::piped())
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(said.contains(&format!("cannot listen on {address}: the port is in use")), "{said}");
}
