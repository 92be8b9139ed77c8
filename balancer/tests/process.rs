//! The process: killed, stopped, restarted, crowded, spoken to by strangers.

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use common::app::{App, respond};
use common::client::Client;
use common::{Balancer, checksum, cpu_ticks, noise, poll, until};
use epagent_balancer::control::client::ClientError;
use epagent_balancer::control::protocol::{ErrorCode, Response};
use nix::sys::signal::Signal;

const GET: &str = "GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n";

fn refused(result: Result<impl std::fmt::Debug, ClientError>) -> ErrorCode {
    match result {
        Err(ClientError::Refused(error)) => error.code,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn killed_and_restarted_it_serves_the_queued_from_the_saved_table() {
    let app = App::named("shop");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let dir = tempfile::tempdir().expect("a folder");
    let balancer = Balancer::inheriting(&listener, dir);
    assert!(balancer.status().listeners[0].inherited);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    assert_eq!(Client::connect(balancer.http).get("shop.example", "/").text(), "shop");
    let address = balancer.http;
    let dir = balancer.kill();
    // Nobody accepts now; the socket is held, as a supervisor would, and clients queue.
    let mut queued: Vec<Client> = (0..20).map(|_| Client::connect(address)).collect();
    for client in &mut queued {
        client.send(GET);
    }
    let restart = Instant::now();
    let balancer = Balancer::inheriting(&listener, dir);
    for client in &mut queued {
        assert_eq!(client.read().text(), "shop");
    }
    // It takes some 30 ms; other tests run meanwhile.
    assert!(restart.elapsed() < Duration::from_secs(2), "back after {:?}", restart.elapsed());
    assert_eq!(balancer.status().table_version, 1, "nobody has pushed a table again");
}

#[test]
fn a_saved_table_that_is_garbled_hinders_no_start() {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::write(dir.path().join("table.json"), b"{\"version\":").expect("a half-written table");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let balancer = Balancer::inheriting(&listener, dir);
    assert_eq!(balancer.status().table_version, 0);
    let app = App::named("shop");
    balancer.route("shop.example", &[("a", app.address, "up")]);
    assert_eq!(Client::connect(balancer.http).get("shop.example", "/").text(), "shop");
}

#[test]
fn told_to_stop_it_finishes_what_is_under_way() {
    let app = App::start(|_, stream| {
        std::thread::sleep(Duration::from_millis(300));
        respond(stream, b"late")
    });
    let mut balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    let mut busy = Client::connect(balancer.http);
    busy.send(GET);
    let mut idle = Client::connect(balancer.http);
    idle.get("shop.example", "/");
    until("the app is busy", || app.request_count() == 2);
    balancer.signal(Signal::SIGTERM);
    let response = busy.read();
    assert_eq!(response.text(), "late");
    assert!(idle.is_closed());
    let status = poll("it has ended", || balancer.child.try_wait().expect("its state"));
    assert!(status.success());
}

#[test]
fn told_to_stop_it_ends_within_its_cap() {
    let app = App::start(|_, _| {
        std::thread::sleep(common::PATIENCE);
        false
    });
    let mut balancer = Balancer::start(&["--stop-timeout-ms", "200"]);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    let mut stuck = Client::connect(balancer.http);
    stuck.send(GET);
    until("the app is busy", || app.request_count() == 1);
    let start = Instant::now();
    balancer.signal(Signal::SIGTERM);
    poll("it has ended", || balancer.child.try_wait().expect("its state"));
    assert!(start.elapsed() < Duration::from_secs(4));
}

#[test]
fn tables_that_are_stale_or_wrong_change_nothing() {
    let app = App::named("shop");
    let balancer = Balancer::start(&[]);
    for _ in 0..3 {
        balancer.route("shop.example", &[("a", app.address, "up")]);
    }
    let mut control = balancer.control();
    let table = |text: &str| serde_json::from_str(text).expect("a table");
    assert_eq!(refused(control.set_table(&table(r#"{"version":2}"#))), ErrorCode::StaleVersion);
    assert_eq!(refused(control.set_table(&table(r#"{"version":3}"#))), ErrorCode::StaleVersion);
    let twins = r#"{"version":9,"routes":[{"id":"a","match":{"host":"x"},"action":{"hold":{}}},
                    {"id":"a","match":{"host":"y"},"action":{"hold":{}}}]}"#;
    assert_eq!(refused(control.set_table(&table(twins))), ErrorCode::BadTable);
    for garbage in ["", "{}", "null", "{\"set_table\":{}}", "{\"status\":{\"x\":1}}", "\u{1}"] {
        match control.raw(garbage) {
            Ok(Response::Error(error)) => assert_eq!(error.code, ErrorCode::BadRequest, "{garbage:?}"),
            other => panic!("{garbage:?}: {other:?}"),
        }
    }
    assert_eq!(balancer.status().table_version, 3);
    assert_eq!(Client::connect(balancer.http).get("shop.example", "/").text(), "shop");
}

#[test]
fn a_stranger_may_not_control_it() {
    let balancer = Balancer::start(&["--control-uid", "4242"]);
    let open = || std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(balancer.dir.path(), open()).expect("an open folder");
    std::fs::set_permissions(balancer.control_path(), open()).expect("an open socket");
    // A copy, since the checkout may be closed to other users.
    let program = balancer.dir.path().join("copy");
    std::fs::copy(env!("CARGO_BIN_EXE_epagent-balancer"), &program).expect("a copy");
    let ask = |uid: u32| {
        let mut command = std::process::Command::new("setpriv");
        command
            .args([&format!("--reuid={uid}"), "--clear-groups"])
            .arg(&program)
            .args(["status", "--control"]);
        let output = command.arg(balancer.control_path()).output().expect("setpriv runs");
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    };
    if nix::unistd::geteuid().is_root() {
        assert!(ask(4243).contains("Forbidden"), "{}", ask(4243));
        assert!(ask(4242).contains("table_version"), "{}", ask(4242));
    }
}

#[test]
fn an_endless_request_line_is_cut_off() {
    let balancer = Balancer::start(&[]);
    let mut stream = std::os::unix::net::UnixStream::connect(balancer.control_path()).expect("the socket");
    let block = vec![b'x'; 1 << 20];
    let sent = (0..8).take_while(|_| stream.write_all(&block).is_ok()).count();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    assert!(sent < 8 || answer.contains("longer than"), "{sent} MiB were taken");
    assert_eq!(balancer.status().table_version, 0, "it serves others");
}

#[test]
fn churn_leaks_no_descriptor() {
    let app = App::start(|request, stream| match request.path() {
        "/die" => false,
        "/close" => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nbye");
            false
        }
        _ => respond(stream, &[b'x'; 50_000]),
    });
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    let before = balancer.descriptors();
    for round in 0..1_500 {
        let mut client = Client::connect(balancer.http);
        match round % 6 {
            0 => drop(client.get("shop.example", "/")),
            1 => drop(client.try_get("shop.example", "/die")),
            2 => drop(client.get("shop.example", "/close")),
            // Gone before, while and after it is answered.
            3 => drop(client.send("GET / HT")),
            4 => drop(client.send(GET)),
            _ => drop(client.send("nonsense\r\n\r\n").read()),
        }
    }
    let open = || {
        let counters = balancer.status().counters;
        (counters.connections_open, counters.upstream_connections_open)
    };
    until("all connections are closed", || open() == (0, 0));
    until("all descriptors are closed", || balancer.descriptors() <= before);
    assert_eq!(balancer.status().counters.connections_accepted, 1_500);
}

#[test]
fn at_its_limit_it_leaves_clients_in_the_queue() {
    let app = App::named("shop");
    let balancer = Balancer::start(&["--max-connections", "2"]);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    let mut first: Vec<Client> = (0..2).map(|_| Client::connect(balancer.http)).collect();
    for client in &mut first {
        client.get("shop.example", "/");
    }
    let mut waiting = Client::connect(balancer.http);
    waiting.send(GET);
    until("accepting has paused", || balancer.status().counters.accept_paused_full == 1);
    drop(first);
    assert_eq!(waiting.read().text(), "shop");
}

#[test]
fn out_of_descriptors_it_neither_spins_nor_forgets_clients() {
    let app = App::named("shop");
    let arguments = [&common::IO_ARGUMENTS[..], &["--max-connections", "10000"]].concat();
    // Limited from the start: an accept of the ring's goes by the limit of when it was armed.
    let mut balancer = Balancer::start_with(&arguments, |command| {
        let mut limited = std::process::Command::new("prlimit");
        limited.arg("--nofile=64:64").arg(command.get_program()).args(command.get_args());
        limited.stderr(std::process::Stdio::piped()).spawn()
    });
    balancer.route("shop.example", &[("a", app.address, "up")]);
    let mut clients: Vec<Client> = (0..100).map(|_| Client::connect(balancer.http)).collect();
    until("it has as many descriptors as it may", || descriptors_used(balancer.pid()) >= 64);
    let before = cpu_ticks(balancer.pid());
    std::thread::sleep(Duration::from_millis(500));
    let used = cpu_ticks(balancer.pid()) - before;
    assert!(used < 20, "it used {used} ticks of 10 ms in half a second of shortage");
    // One leaves, and another is served.
    clients.truncate(2);
    clients[0].send(GET);
    assert_eq!(clients[0].read().text(), "shop");
    // And it has said what is the matter, and what to do.
    assert!(balancer.status().counters.accept_backoff > 0);
    let mut said = balancer.child.stderr.take().expect("its standard error");
    drop(balancer);
    let mut text = String::new();
    said.read_to_string(&mut text).expect("what it said");
    assert!(text.contains("cannot accept connections") && text.contains("LimitNOFILE"), "{text}");
}

fn descriptors_used(pid: u32) -> u64 {
    std::fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors").count() as u64
}

#[test]
fn slow_readers_pin_no_memory_and_stall_nobody() {
    let body = noise(9, 20_000_000);
    let sum = checksum(&body);
    let app = App::start(move |request, stream| match request.path() {
        "/large" => respond(stream, &body),
        _ => respond(stream, b"small"),
    });
    // Few buffers: a handful of slow readers could hold them all, if they were let.
    let balancer = Balancer::start(&["--buffers", "32"]);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    let mut fast = Client::connect(balancer.http);
    let mut ask = || {
        let start = Instant::now();
        for _ in 0..300 {
            assert_eq!(fast.get("shop.example", "/").text(), "small");
        }
        start.elapsed()
    };
    let quiet = ask();
    let before_kib = balancer.resident_kib();
    let mut slow: Vec<Client> = (0..40).map(|_| Client::connect(balancer.http)).collect();
    for client in &mut slow {
        client.send("GET /large HTTP/1.1\r\nHost: shop.example\r\n\r\n");
    }
    until("the app has begun with all of them", || app.request_count() == 340);
    let beside = ask();
    // Generous, since other tests run meanwhile; starved of buffers it would take minutes.
    assert!(beside < 5 * quiet + Duration::from_secs(10), "{quiet:?} became {beside:?}");
    let grown_kib = balancer.resident_kib().saturating_sub(before_kib);
    assert!(grown_kib < 40 * 700 + 8_000, "40 slow readers took {grown_kib} KiB");
    // And when they read at last, they get every byte. Linux 6.1 may first wait out the time to its next try to send,
    // which has doubled with each in vain.
    for client in &mut slow[..3] {
        client.stream.get_mut().set_read_timeout(Some(6 * common::PATIENCE)).expect("a timeout");
        assert_eq!(checksum(&client.read().body), sum);
    }
}

#[test]
fn a_reader_that_takes_nothing_is_let_go() {
    let body = noise(9, 20_000_000);
    let app = App::start(move |_, stream| respond(stream, &body));
    let balancer = Balancer::start(&["--body-timeout-ms", "300"]);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    let mut stalled = Client::connect(balancer.http);
    stalled.send(GET);
    until("it is reset", || balancer.status().counters.client_stalled == 1);
    until("its app is free again", || balancer.upstream("a").active_requests == 0);
}

#[test]
fn it_proxies_alone_without_any_control() {
    let app = App::named("alone");
    let listen = common::free_address();
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_epagent-balancer"))
        .args([
            "run",
            "--mode",
            "tcp",
            "--listen",
            &listen.to_string(),
            "--upstream",
            &app.address.to_string(),
        ])
        .args(common::IO_ARGUMENTS)
        .spawn()
        .expect("it starts");
    let mut client = poll("it listens", || TcpStream::connect(listen).ok().map(|_| Client::connect(listen)));
    assert_eq!(client.get("any", "/").text(), "alone");
    let _ = child.kill();
    let _ = child.wait();
}

#[test]
fn it_proxies_to_a_unix_socket() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("app.sock");
    let app = std::os::unix::net::UnixListener::bind(&path).expect("an app");
    std::thread::spawn(move || {
        let (mut stream, _) = app.accept().expect("a connection");
        let mut said = [0; 5];
        stream.read_exact(&mut said).expect("what was said");
        stream.write_all(&said).expect("the echo");
    });
    let listen = common::free_address();
    let upstream = format!("unix:{}", path.display());
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_epagent-balancer"))
        .args(["run", "--mode", "tcp", "--listen", &listen.to_string(), "--upstream", &upstream])
        .args(common::IO_ARGUMENTS)
        .spawn()
        .expect("it starts");
    let mut client = poll("it listens", || TcpStream::connect(listen).ok());
    client.write_all(b"hello").expect("taken");
    let mut heard = Vec::new();
    client.read_to_end(&mut heard).expect("the echo, and the end");
    assert_eq!(heard, b"hello");
    let _ = child.kill();
    let _ = child.wait();
}
