//! What a day brings, in seconds: routes that change all the time, a thousand that wait, apps that crash,
//! clients that come, go and break off, and thousands that only sit there.
//!
//! | variable | | `make soak` |
//! |---|---|---|
//! | `EPAGENT_TEST_LOAD_SECONDS` | how long loads last | minutes |
//! | `EPAGENT_TEST_CHURN_SECONDS` | how long connections are opened and broken | an hour |
//! | `EPAGENT_TEST_IDLE`, `EPAGENT_TEST_BUSY` | connections beside each other | 9,000 and 500 |

mod common;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::app::{App, respond};
use common::client::Client;
use common::generations::descriptors;
use common::load::Load;
use common::{Balancer, free_address, host_route, noise, poll, port_route, proxy, until};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{setsockopt, sockopt};

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

fn seconds(name: &str, default: u64) -> Duration {
    Duration::from_secs(setting(name, default))
}

fn reset(stream: &TcpStream) {
    let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(stream, sockopt::Linger, &linger).expect("linger");
}

#[test]
fn a_hundred_route_changes_a_second_fail_nobody() {
    let apps = [App::named("a"), App::named("b")];
    let balancer = Balancer::start(&["--threads", "2"]);
    let port = free_address().port();
    let table = |step: u64| {
        // The instances take turns, another host comes and goes, and so does a listener.
        let (up, down) = (step % 2, 1 - step % 2);
        let instance = |n: u64, state| (["a", "b"][n as usize], apps[n as usize].address, state);
        let shop = host_route("shop.example", &[instance(up, "up"), instance(down, "draining")]);
        let other = host_route(&format!("host-{step}.example"), &[instance(up, "up")]);
        let db = port_route(port, &[instance(up, "up")]);
        if step.is_multiple_of(4) { [shop, other, db].join(",") } else { [shop, other].join(",") }
    };
    balancer.routes(&table(0));
    let load = Load::start(balancer.http, (4, 2), |response| matches!(response.body.as_slice(), b"a" | b"b"));
    let (start, length) = (Instant::now(), seconds("EPAGENT_TEST_LOAD_SECONDS", 10));
    let mut step = 0;
    while start.elapsed() < length {
        step += 1;
        assert_eq!(balancer.routes(&table(step)).problems, []);
        let due = start + Duration::from_millis(10 * step);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    let (failures, answered) = load.finish();
    println!("{step} changes and {answered} requests in {:?}", start.elapsed());
    assert_eq!(failures, Vec::<String>::new(), "of {answered}");
    assert!(answered > 100 && step > 10 * length.as_secs(), "{step} changes, {answered} requests");
    let drained = |id: &str| balancer.upstream(id).active_requests == 0;
    until("nothing is left anywhere", || drained("a") && drained("b"));
}

#[test]
fn a_thousand_that_wait_are_all_answered_and_of_more_the_oldest_are_shed() {
    raise_descriptor_limit();
    const MOST: usize = 1_000;
    const MORE: usize = 50;
    let (now, peak) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let (counted, highest) = (now.clone(), peak.clone());
    let app = App::start(move |_, stream| {
        highest.fetch_max(counted.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(5));
        counted.fetch_sub(1, Ordering::SeqCst);
        respond(stream, b"shop")
    });
    let balancer = Balancer::start(&[]);
    let route = |action: &str| {
        let limits = format!(r#"{{"max_requests":{MOST},"max_age_ms":60000}}"#);
        format!(r#"{{"id":"shop","match":{{"host":"shop.example"}},"action":{action},"hold":{limits}}}"#)
    };
    balancer.routes(&route(r#"{"hold":{}}"#));
    let mut clients: Vec<Client> = (0..MOST + MORE).map(|_| Client::connect(balancer.http)).collect();
    for (n, client) in clients.iter_mut().enumerate() {
        client.send("GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n");
        // One after the other, so that who is oldest is known.
        if !(MORE..MOST).contains(&n) {
            until("it waits", || balancer.status().routes[0].held_total > n as u64);
        }
    }
    until("all wait", || balancer.status().routes[0].held == MOST as u64);
    for client in &mut clients[..MORE] {
        let response = client.read();
        assert_eq!((response.status, response.field("x-epagent-error")), (503, Some("hold_shed")));
    }
    let released = Instant::now();
    balancer.routes(&route(&proxy(&[("a", app.address, "up")])));
    for client in &mut clients[MORE..] {
        assert_eq!(client.read().text(), "shop");
    }
    let took = released.elapsed();
    println!("{MOST} released in {took:?}, at most {} at a time at the app", peak.load(Ordering::SeqCst));
    assert_eq!((app.request_count(), balancer.status().counters.hold_shed), (MOST as u64, MORE as u64));
    assert!(took < Duration::from_secs(15), "the release took {took:?}");
}

/// An app that can crash: from one moment on it reads nothing more and answers nothing more, and every
/// connection of its is reset.
struct Mortal {
    address: SocketAddr,
    shared: Arc<MortalState>,
}

#[derive(Default)]
struct MortalState {
    dead: AtomicBool,
    open: Mutex<Vec<TcpStream>>,
    /// Requests read and not yet answered, by their numbers.
    carried: Mutex<BTreeSet<u64>>,
    answered: Mutex<BTreeSet<u64>>,
}

impl Mortal {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("an address");
        let (address, shared) = (listener.local_addr().expect("its address"), Arc::<MortalState>::default());
        let state = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if state.dead.load(Ordering::SeqCst) {
                    return;
                }
                state.open.lock().expect("unpoisoned").push(stream.try_clone().expect("a second handle"));
                let state = state.clone();
                std::thread::spawn(move || state.serve(stream));
            }
        });
        Self { address, shared }
    }

    /// What it carried in that moment.
    fn crash(&self) -> BTreeSet<u64> {
        let carried = self.shared.carried.lock().expect("unpoisoned");
        self.shared.dead.store(true, Ordering::SeqCst);
        for stream in self.shared.open.lock().expect("unpoisoned").drain(..) {
            reset(&stream);
            let _ = stream.shutdown(std::net::Shutdown::Read);
            drop(stream);
        }
        // Wakes the accepting thread, which then closes the listener.
        let _ = TcpStream::connect(self.address);
        carried.clone()
    }
}

impl MortalState {
    fn serve(&self, mut stream: TcpStream) {
        let mut text = Vec::new();
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = stream.read(&mut bytes) {
            text.extend_from_slice(&bytes[..count]);
            let Some(end) = text.windows(4).position(|four| four == b"\r\n\r\n") else { continue };
            let head = String::from_utf8(text.drain(..end + 4).collect()).expect("a head");
            let number = head.split_whitespace().nth(1).and_then(|path| path[1..].parse().ok());
            let number: u64 = number.expect("a number for a path");
            {
                let mut carried = self.carried.lock().expect("unpoisoned");
                if self.dead.load(Ordering::SeqCst) {
                    return;
                }
                carried.insert(number);
            }
            std::thread::sleep(Duration::from_millis(20));
            let mut carried = self.carried.lock().expect("unpoisoned");
            if self.dead.load(Ordering::SeqCst) || !respond(&mut stream, b"done") {
                return;
            }
            carried.remove(&number);
            self.answered.lock().expect("unpoisoned").insert(number);
        }
    }
}

#[test]
fn a_crashed_app_fails_the_requests_it_carried_and_no_others() {
    let (mortal, healthy) = (Mortal::start(), Mortal::start());
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("m", mortal.address, "up"), ("h", healthy.address, "up")]);
    let (next, over) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
    let address = balancer.http;
    let ask_on = || {
        let (next, over) = (next.clone(), over.clone());
        // POST, so that nothing may be repeated: what a connection has carried is lost with it.
        std::thread::spawn(move || {
            let (mut client, mut failed) = (Client::connect(address), Vec::new());
            while !over.load(Ordering::SeqCst) {
                let number = next.fetch_add(1, Ordering::SeqCst);
                client.send(format!(
                    "POST /{number} HTTP/1.1\r\nHost: shop.example\r\nContent-Length: 0\r\n\r\n"
                ));
                let response = client.read();
                match (response.status, response.field("x-epagent-error")) {
                    (200, None) => assert_eq!(response.text(), "done"),
                    (502, Some("upstream_died")) => failed.push(number),
                    other => panic!("request {number}: {other:?}"),
                }
                if response.field("connection") == Some("close") {
                    client = Client::connect(address);
                }
            }
            failed
        })
    };
    let threads: Vec<_> = (0..16).map(|_| ask_on()).collect();
    until("both are busy", || {
        [&mortal, &healthy].iter().all(|app| app.shared.answered.lock().expect("unpoisoned").len() > 50)
    });
    let carried = mortal.crash();
    let since = next.load(Ordering::SeqCst);
    until("the load goes on", || next.load(Ordering::SeqCst) > since + 200);
    over.store(true, Ordering::SeqCst);
    let failed: BTreeSet<u64> =
        threads.into_iter().flat_map(|thread| thread.join().expect("no other failure")).collect();
    assert!(!carried.is_empty(), "it carried nothing when it crashed");
    assert!(carried.is_subset(&failed), "carried {carried:?}, failed {failed:?}");
    // Beyond those it had read, only what was on its way to it, and nothing that anybody has answered.
    let lost = balancer.upstream("m").request_errors_total;
    assert_eq!((failed.len() as u64, balancer.upstream("h").request_errors_total), (lost, 0));
    for app in [&mortal, &healthy] {
        let answered = app.shared.answered.lock().expect("unpoisoned");
        assert!(failed.is_disjoint(&answered), "a request that was answered failed");
    }
}

#[test]
fn connections_that_come_go_and_break_off_leave_nothing_behind() {
    let body = noise(7, 200_000);
    let app = App::start(move |request, stream| match request.path() {
        "/die" => false,
        "/half" => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nhalf");
            false
        }
        "/large" => respond(stream, &body),
        _ => respond(stream, b"small"),
    });
    // Small buffers, so that all of their memory is in use before it is measured.
    let balancer = Balancer::start(&["--threads", "2", "--buffer-bytes", "4096"]);
    let port = free_address().port();
    let routes = [
        host_route("shop.example", &[("a", app.address, "up")]),
        port_route(port, &[("t", app.address, "up")]),
    ];
    balancer.routes(&routes.join(","));
    let (http, tcp) = (balancer.http, SocketAddr::from(([127, 0, 0, 1], port)));
    let before = descriptors(balancer.pid());
    let length = seconds("EPAGENT_TEST_CHURN_SECONDS", 5);
    let churn = |length: Duration| {
        let start = Instant::now();
        let come_and_go = |seed: u64| {
            std::thread::spawn(move || {
                let mut round = seed;
                while start.elapsed() < length {
                    round =
                        round.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    // Broken off anywhere, and so with any outcome.
                    let _ = break_off(round >> 33, http, tcp);
                }
            })
        };
        let threads: Vec<_> = (1..=4).map(come_and_go).collect();
        threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
        until("all connections are closed", || {
            let counters = balancer.status().counters;
            (counters.connections_open, counters.upstream_connections_open) == (0, 0)
        });
        balancer.resident_kib()
    };
    // What a first round needs it keeps.
    let warm = churn(length / 2);
    let after = churn(length);
    until("all descriptors are closed", || descriptors(balancer.pid()) <= before);
    println!("{} connections; {warm} KiB, then {after} KiB", balancer.status().counters.connections_accepted);
    assert!(after < warm + 4_096, "from {warm} KiB to {after} KiB");
    // Buffers that were lent and never given back would be missing now.
    let status = balancer.status();
    for _ in 0..20 {
        assert_eq!(Client::connect(balancer.http).get("shop.example", "/large").body.len(), 200_000);
    }
    assert_eq!(balancer.status().counters.no_buffers, status.counters.no_buffers);
}

/// One connection that is closed, or reset, at some point of its life.
fn break_off(choice: u64, http: SocketAddr, tcp: SocketAddr) -> std::io::Result<()> {
    let mut client = Client::try_connect(if choice.is_multiple_of(5) { tcp } else { http })?;
    let path = ["/", "/die", "/half", "/large"][(choice / 5 % 4) as usize];
    let request = format!("GET {path} HTTP/1.1\r\nHost: shop.example\r\n\r\n");
    let said = match choice / 20 % 4 {
        0 => request.len() / 2,
        _ => request.len(),
    };
    client.try_send(&request.as_bytes()[..said])?;
    match choice / 80 % 4 {
        0 => {}
        1 => {
            let mut some = vec![0; (choice / 320 % 5_000) as usize];
            let _ = client.stream.get_mut().set_read_timeout(Some(Duration::from_millis(20)));
            client.stream.read_exact(&mut some)?;
        }
        _ if said == request.len() => _ = client.try_read(false)?,
        _ => {}
    }
    if (choice / 2_000).is_multiple_of(2) {
        reset(client.stream.get_ref());
    }
    Ok(())
}

fn raise_descriptor_limit() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("the limit");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("up to the hard limit");
}

/// Proportional set size of a process, in KiB.
fn pss_kib(pid: u32) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("its memory");
    let line = rollup.lines().find(|line| line.starts_with("Pss:")).expect("Pss");
    line.split_whitespace().nth(1).expect("a size").parse().expect("a number")
}

#[test]
fn thousands_of_idle_connections_beside_busy_ones_fit_into_64_mib() {
    raise_descriptor_limit();
    let idle = setting("EPAGENT_TEST_IDLE", 2_000) as usize;
    let busy = setting("EPAGENT_TEST_BUSY", 100) as usize;
    let silent = TcpListener::bind("127.0.0.1:0").expect("an address");
    let app = App::start(|_, stream| respond(stream, &[b'x'; 2_000]));
    let balancer = Balancer::start(&[]);
    let port = free_address().port();
    let routes = [
        host_route("shop.example", &[("a", app.address, "up")]),
        port_route(port, &[("t", silent.local_addr().expect("its address"), "up")]),
    ];
    balancer.routes(&routes.join(","));
    let empty = pss_kib(balancer.pid());
    // Each of both sides, so that nothing waits in a queue.
    let mut tunnels: Vec<(TcpStream, TcpStream)> = (0..idle)
        .map(|_| {
            let near = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
            (near, silent.accept().expect("its other side").0)
        })
        .collect();
    let with_idle = pss_kib(balancer.pid());
    let load = Load::start(balancer.http, (busy.min(8), 0), |response| response.body.len() == 2_000);
    let mut kept: Vec<Client> = (0..busy).map(|_| Client::connect(balancer.http)).collect();
    for _ in 0..5 {
        // All of them at a time.
        kept.iter_mut().for_each(|client| _ = client.send("GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n"));
        for client in &mut kept {
            assert_eq!(client.read().body.len(), 2_000);
        }
    }
    let with_both = pss_kib(balancer.pid());
    assert_eq!(load.finish().0, Vec::<String>::new());
    println!("PSS: {empty} KiB, with {idle} idle {with_idle} KiB, with {busy} busy {with_both} KiB");
    assert!(with_both < 64 * 1024, "it takes {with_both} KiB");
    assert_eq!(balancer.upstream("t").active_connections, idle as u64);
    // They were idle, not dead.
    for (_, far) in &mut tunnels {
        far.write_all(b"!").expect("taken");
    }
    for (near, _) in &mut tunnels {
        near.set_read_timeout(Some(common::PATIENCE)).expect("a timeout");
        near.read_exact(&mut [0; 1]).expect("it came through");
    }
    drop(tunnels);
    poll("all are closed", || (balancer.upstream("t").active_connections == 0).then_some(()));
}
