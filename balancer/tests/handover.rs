//! Handing over to a new process: nobody notices, and what does not come up changes nothing.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use common::app::{App, respond};
use common::client::Client;
use common::generations::{Generations, descriptors, lives, living, resident_kib};
use common::load::Load;
use common::{Balancer, free_address, host_route, port_route, proxy, read_all, until};
use epagent_balancer::control::client::ClientError;
use epagent_balancer::control::protocol::ErrorCode;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const GET: &str = "GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n";

/// The inode of the listening socket on a port.
fn inode(port: u16) -> String {
    let table = std::fs::read_to_string("/proc/net/tcp").expect("the sockets of this namespace");
    let local = format!(":{port:04X}");
    let line = table.lines().find(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields.len() > 9 && fields[1].ends_with(&local) && fields[3] == "0A"
    });
    line.expect("a listening socket").split_whitespace().nth(9).expect("an inode").to_owned()
}

/// Says back what it is told, on every connection.
fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("an address");
    let address = listener.local_addr().expect("its address");
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let copy = stream.try_clone().expect("a second handle");
            std::thread::spawn(move || std::io::copy(&mut { copy }, &mut { stream }));
        }
    });
    address
}

/// A connection through to an echo.
struct Tunnel(TcpStream);

impl Tunnel {
    fn open(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
        stream.set_read_timeout(Some(common::PATIENCE)).expect("a timeout");
        let mut tunnel = Self(stream);
        tunnel.works();
        tunnel
    }

    fn works(&mut self) {
        self.0.write_all(b"ping").expect("taken");
        let mut said = [0; 4];
        self.0.read_exact(&mut said).expect("the echo");
        assert_eq!(&said, b"ping");
    }
}

fn failed(result: Result<u32, ClientError>) -> String {
    match result {
        Err(ClientError::Refused(error)) if error.code == ErrorCode::HandoverFailed => error.message,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_new_process_takes_over_with_listeners_table_and_counts() {
    let app = App::named("shop");
    let balancer = Generations::start(&[]);
    let port = free_address().port();
    let routes = [
        host_route("shop.example", &[("a", app.address, "up")]),
        port_route(port, &[("a", app.address, "up")]),
    ];
    balancer.routes(&routes.join(","));
    assert_eq!(Client::connect(balancer.http).get("shop.example", "/").text(), "shop");
    let before = (inode(balancer.http.port()), inode(port));
    let old = balancer.pid();
    let pid = balancer.reload().expect("it hands over");
    assert_ne!(pid, old);
    assert_eq!(balancer.pid(), pid, "the control socket is the new one's");
    until("the old one has drained", || !lives(old));
    assert_eq!((inode(balancer.http.port()), inode(port)), before);
    assert_eq!(Client::connect(balancer.http).get("shop.example", "/").text(), "shop");
    assert_eq!(Client::connect(([127, 0, 0, 1], port).into()).get("any", "/").text(), "shop");
    // The old one's last word may still be on its way.
    until("totals go on", || {
        let status = balancer.status();
        (status.table_version, status.counters.requests, status.draining.len()) == (1, 2, 0)
    });
    // The listener still belongs to its route.
    balancer.routes(&routes[0]);
    until("nobody listens", || TcpStream::connect(("127.0.0.1", port)).is_err());
}

#[test]
fn under_load_a_handover_fails_nobody() {
    let app = App::named("shop");
    let switching = App::start(|_, stream| {
        let _ = stream
            .write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n");
        let copy = stream.try_clone().expect("a second handle");
        let _ = std::io::copy(&mut { copy }, stream);
        false
    });
    let balancer = Generations::start(&["--threads", "2"]);
    let port = free_address().port();
    let shop = host_route("shop.example", &[("a", app.address, "up")]);
    let chat = host_route("chat.example", &[("chat", switching.address, "up")]);
    let db = port_route(port, &[("db", echo(), "up")]);
    let waiting =
        |action: &str| format!(r#"{{"id":"late","match":{{"host":"late.example"}},"action":{action}}}"#);
    balancer.routes(&[&shop, &chat, &db, &waiting(r#"{"hold":{}}"#)].map(|r| r.as_str()).join(","));
    let load = Load::start(balancer.http, (6, 2), |response| response.text() == "shop");
    load.wait_for(200);
    let mut websocket = Client::connect(balancer.http);
    websocket.send("GET / HTTP/1.1\r\nHost: chat.example\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n");
    assert_eq!(websocket.read().status, 101);
    let mut tunnel = Tunnel::open(port);
    let mut held: Vec<Client> = (0..50).map(|_| Client::connect(balancer.http)).collect();
    for client in &mut held {
        client.send("GET / HTTP/1.1\r\nHost: late.example\r\n\r\n");
    }
    until("all are held", || balancer.status().routes.iter().map(|route| route.held).sum::<u64>() == 50);
    let inode_before = inode(balancer.http.port());
    for _ in 0..2 {
        balancer.reload().expect("it hands over");
        load.wait_for(500);
    }
    assert_eq!(inode(balancer.http.port()), inode_before);
    tunnel.works();
    websocket.send("ping");
    let mut said = [0; 4];
    websocket.stream.read_exact(&mut said).expect("the echo");
    let status = balancer.status();
    let held_now: u64 = status.routes.iter().map(|route| route.held).sum();
    let carried = |id: &str| status.upstreams.iter().find(|up| up.id == id).map(|up| up.active_connections);
    assert_eq!((held_now, carried("db"), carried("chat")), (50, Some(1), Some(1)), "it is all still counted");
    assert!(!status.draining.is_empty());
    // A table given to the newest releases what the oldest holds.
    let released = proxy(&[("a", app.address, "up")]);
    balancer.routes(&[&shop, &chat, &db, &waiting(&released)].map(|r| r.as_str()).join(","));
    for client in &mut held {
        let response = client.read();
        assert_eq!((response.text().as_str(), response.field("connection")), ("shop", Some("close")));
    }
    drop((tunnel, websocket));
    until("all old ones have drained", || living() == [balancer.pid()]);
    let (failures, answered) = load.finish();
    assert_eq!(failures, Vec::<String>::new(), "of {answered}");
}

#[test]
fn connections_in_the_queue_are_served_by_the_next() {
    let app = App::named("shop");
    let balancer = Generations::start(&["--max-connections", "2"]);
    balancer.routes(&host_route("shop.example", &[("a", app.address, "up")]));
    let mut busy: Vec<Client> = (0..2).map(|_| Client::connect(balancer.http)).collect();
    for client in &mut busy {
        client.get("shop.example", "/");
    }
    until("accepting has paused", || balancer.status().counters.accept_paused_full >= 1);
    let mut queued: Vec<Client> = (0..8).map(|_| Client::connect(balancer.http)).collect();
    for client in &mut queued {
        client.send("GET / HTTP/1.1\r\nHost: shop.example\r\nConnection: close\r\n\r\n");
    }
    let old = balancer.pid();
    balancer.reload().expect("it hands over");
    let began = Instant::now();
    for mut client in queued {
        assert_eq!(client.read().text(), "shop");
    }
    for mut client in busy {
        let response = client.get("shop.example", "/");
        assert_eq!((response.text().as_str(), response.field("connection")), ("shop", Some("close")));
    }
    until("the old one has drained", || !lives(old));
    assert!(began.elapsed() < Duration::from_secs(5), "its end was noticed after {:?}", began.elapsed());
}

#[test]
fn a_program_that_does_not_come_up_changes_nothing() {
    let app = App::named("shop");
    let balancer = Generations::start_copy(&[]);
    balancer.routes(&host_route("shop.example", &[("a", app.address, "up")]));
    let (program, good) = (balancer.program(), balancer.dir.path().join("good"));
    std::fs::rename(&program, &good).expect("the good one is set aside");
    let mut kept = Client::connect(balancer.http);
    let mut tunnel_like = Client::connect(balancer.http);
    tunnel_like.get("shop.example", "/");
    let old = balancer.pid();
    let broken: [(&str, &[u8], &str); 5] = [
        ("missing", b"", "No such file"),
        ("garbage", b"\x7fELFgarbage", "Exec format error"),
        ("ends", b"#!/bin/sh\nexit 3\n", "ended before it was ready"),
        ("babbles", b"#!/bin/sh\nexec echo nonsense >&0\n", "not understood"),
        ("hangs", b"#!/bin/sh\nexec sleep 1000\n", "not ready within 5 s"),
    ];
    for (what, contents, why) in broken {
        let _ = std::fs::remove_file(&program);
        if what != "missing" {
            std::fs::write(&program, contents).expect("another program");
            std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).expect("executable");
        }
        let message = failed(balancer.reload());
        assert!(message.contains(why), "{what}: {message}");
        assert_eq!(balancer.pid(), old, "{what}");
        assert_eq!(kept.get("shop.example", "/").text(), "shop", "{what}");
        assert_eq!(Client::connect(balancer.http).get("shop.example", "/").text(), "shop", "{what}");
        until("nothing is left of it", || living() == [old]);
    }
    // And it has not lost the ability.
    std::fs::rename(&good, &program).expect("the good one is back");
    let pid = balancer.reload().expect("it hands over");
    assert_ne!(pid, old);
    assert_eq!(kept.get("shop.example", "/").field("connection"), Some("close"));
}

#[test]
fn a_table_given_during_a_handover_is_in_force_after_it() {
    let (app, other) = (App::named("shop"), App::named("other"));
    let balancer = Generations::start_copy(&[]);
    balancer.routes(&host_route("shop.example", &[("a", app.address, "up")]));
    // A new process that takes its time.
    let (program, real) = (balancer.program(), balancer.dir.path().join("real"));
    std::fs::rename(&program, &real).expect("the real one is set aside");
    let slow = format!("#!/bin/sh\nsleep 1\nexec {} \"$@\"\n", real.display());
    std::fs::write(&program, slow).expect("a slow one");
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).expect("executable");
    let old = balancer.pid();
    std::thread::scope(|scope| {
        let reloading = scope.spawn(|| balancer.reload());
        until("the new one is there", || living().len() > 1);
        let port = free_address().port();
        let routes = [
            host_route("shop.example", &[("b", other.address, "up")]),
            port_route(port, &[("b", other.address, "up")]),
        ];
        balancer.routes(&routes.join(","));
        assert_eq!(balancer.pid(), old, "it was given to the old one");
        reloading.join().expect("no panic").expect("it hands over");
        assert_eq!(balancer.status().table_version, 2);
        assert_eq!(Client::connect(balancer.http).get("shop.example", "/").text(), "other");
        until("the old one has drained", || !lives(old));
        assert_eq!(Client::connect(([127, 0, 0, 1], port).into()).get("any", "/").text(), "other");
    });
}

#[test]
fn a_new_process_killed_at_once_takes_only_its_own_along() {
    let app = App::named("shop");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let dir = tempfile::tempdir().expect("a folder");
    let balancer = Generations::of(|| Balancer::inheriting(&listener, dir));
    let port = free_address().port();
    let db = port_route(port, &[("db", echo(), "up")]);
    let shop = host_route("shop.example", &[("a", app.address, "up")]);
    balancer.routes(&[shop.as_str(), &db].join(","));
    let mut kept = Client::connect(balancer.http);
    kept.get("shop.example", "/");
    let mut tunnel = Tunnel::open(port);
    let new = balancer.reload().expect("it hands over");
    kill(Pid::from_raw(new as i32), Signal::SIGKILL).expect("it can be killed");
    until("it is dead", || !lives(new));
    tunnel.works();
    assert_eq!(kept.get("shop.example", "/").text(), "shop");
    // As a supervisor would: the next one is handed the socket, and serves who queued meanwhile.
    let mut queued = Client::connect(balancer.http);
    queued.send(GET);
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::copy(balancer.dir.path().join("table.json"), dir.path().join("table.json")).expect("its table");
    let _next = Balancer::inheriting(&listener, dir);
    assert_eq!(queued.read().text(), "shop");
    tunnel.works();
}

#[test]
fn at_the_end_of_its_cap_a_draining_process_resets_who_is_left() {
    let balancer = Generations::start(&["--drain-timeout-ms", "300"]);
    let port = free_address().port();
    balancer.routes(&port_route(port, &[("db", echo(), "up")]));
    let mut tunnel = Tunnel::open(port);
    let old = balancer.pid();
    balancer.reload().expect("it hands over");
    tunnel.works();
    assert_eq!(read_all(&mut tunnel.0).1, Some(ErrorKind::ConnectionReset));
    until("it has ended", || !lives(old));
    assert_eq!(balancer.upstream("db").active_connections, 0);
}

#[test]
fn of_many_draining_processes_the_oldest_are_told_to_end() {
    let balancer = Generations::start(&["--stop-timeout-ms", "100"]);
    let port = free_address().port();
    balancer.routes(&port_route(port, &[("db", echo(), "up")]));
    let mut tunnels = vec![Tunnel::open(port)];
    for generation in 1..=5 {
        balancer.reload().expect("it hands over");
        tunnels.push(Tunnel::open(port));
        let draining = usize::min(generation, 3);
        until("no more than three drain", || balancer.status().draining.len() == draining);
    }
    until("the others have ended", || living().len() == 4);
    for (generation, tunnel) in tunnels.iter_mut().enumerate() {
        match generation {
            0 | 1 => assert_eq!(read_all(&mut tunnel.0).1, Some(ErrorKind::ConnectionReset)),
            _ => tunnel.works(),
        }
    }
    assert_eq!(balancer.upstream("db").active_connections, 4);
}

#[test]
fn twenty_handovers_under_load_leak_nothing() {
    let app = App::start(|_, stream| respond(stream, &[b'x'; 3_000]));
    let balancer = Generations::start(&[]);
    balancer.routes(&host_route("shop.example", &[("a", app.address, "up")]));
    let load = Load::start(balancer.http, (3, 1), |response| response.body.len() == 3_000);
    let mut after_first = None;
    for _ in 0..20 {
        load.wait_for(50);
        let pid = balancer.reload().expect("it hands over");
        load.wait_for(50);
        after_first.get_or_insert_with(|| resident_kib(pid));
    }
    let (failures, answered) = load.finish();
    assert_eq!(failures, Vec::<String>::new(), "of {answered}");
    let pid = balancer.pid();
    until("all old ones have drained", || living() == [pid]);
    until("no connection is left", || balancer.status().counters.upstream_connections_open == 0);
    assert_eq!(balancer.status().counters.requests, answered, "totals go on");
    let fresh = Balancer::start(&[]);
    until("it has no more descriptors than a fresh one", || descriptors(pid) <= descriptors(fresh.pid()));
    let (first, last) = (after_first.expect("twenty handovers"), resident_kib(pid));
    assert!(last < first + 3_000, "from {first} KiB to {last} KiB");
}

#[test]
fn a_signal_hands_over_too() {
    let app = App::named("shop");
    let balancer = Generations::start(&[]);
    balancer.routes(&host_route("shop.example", &[("a", app.address, "up")]));
    let old = balancer.pid();
    balancer.signal(Signal::SIGUSR2);
    until("a new one is in charge", || balancer.pid() != old);
    until("the old one has drained", || !lives(old));
    let start = Instant::now();
    assert_eq!(Client::connect(balancer.http).get("shop.example", "/").text(), "shop");
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn control_connections_go_along() {
    let balancer = Generations::start(&[]);
    let mut control = balancer.control();
    let old = control.status().expect("a status").pid;
    let new = balancer.reload().expect("it hands over");
    assert_ne!(new, old);
    assert_eq!(control.status().expect("a status on the same connection").pid, new);
}

#[test]
fn a_new_process_that_has_checked_nobody_yet_turns_nobody_away() {
    let app = App::named("shop");
    let balancer = Generations::start(&[]);
    let check = r#""all_down":"answer","health":{"active":{"check":{"http":{"path":"/"}},"rise":2}}"#;
    let upstream = format!(r#""upstreams":[{{"id":"a","address":"{}","state":"up"}}]"#, app.address);
    let action = format!(r#"{{"proxy":{{{check},{upstream}}}}}"#);
    balancer.routes(&format!(r#"{{"id":"shop","match":{{"host":"shop.example"}},"action":{action}}}"#));
    for _ in 0..5 {
        let answer = Client::connect(balancer.http).get("shop.example", "/");
        assert_eq!((answer.status, answer.text().as_str()), (200, "shop"));
        balancer.reload().expect("it hands over");
    }
}

#[test]
fn what_an_old_process_holds_is_given_to_an_upstream_that_it_has_to_check_first() {
    let app = App::named("shop");
    let balancer = Generations::start(&["--drain-timeout-ms", "15000"]);
    let table = |upstreams: &str| {
        let check = r#""health":{"active":{"check":{"http":{"path":"/"}},"rise":2,"interval_ms":100}}"#;
        let action = format!(r#"{{"proxy":{{{check},"upstreams":[{upstreams}]}}}}"#);
        balancer.routes(&format!(r#"{{"id":"shop","match":{{"host":"shop.example"}},"action":{action}}}"#))
    };
    table("");
    let mut client = Client::connect(balancer.http);
    client.send(GET);
    until("it is held", || balancer.status().routes[0].held == 1);
    balancer.reload().expect("it hands over");
    table(&format!(r#"{{"id":"new","address":"{}","state":"up"}}"#, app.address));
    assert_eq!(client.read().text(), "shop");
}
