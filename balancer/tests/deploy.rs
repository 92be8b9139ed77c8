//! Apps change under load: no request fails, none reaches who should not get it, none is lost on the way.

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::app::{App, respond};
use common::client::Client;
use common::{Balancer, free_address, host_route, until};

/// Clients that ask without pause; counts what they got.
struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    threads: Vec<std::thread::JoinHandle<Vec<String>>>,
}

impl Load {
    /// Half of the clients keep their connection, half make a new one for each request; every third
    /// request is a POST.
    fn start(address: SocketAddr, clients: usize) -> Self {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let one = |n: usize| {
            let (stop, answered) = (stop.clone(), answered.clone());
            std::thread::spawn(move || ask_on(address, n.is_multiple_of(2), &stop, &answered))
        };
        let threads = (0..clients).map(one).collect();
        Self { stop, answered, threads }
    }

    fn answered(&self) -> u64 {
        self.answered.load(Ordering::SeqCst)
    }

    /// Waits until so many more requests have been answered.
    fn for_requests(&self, more: u64) {
        let target = self.answered() + more;
        until("the load goes on", || self.answered() >= target);
    }

    /// Ends it, and returns every failure.
    fn finish(self) -> Vec<String> {
        self.stop.store(true, Ordering::SeqCst);
        self.threads.into_iter().flat_map(|thread| thread.join().expect("a client thread")).collect()
    }
}

fn ask_on(address: SocketAddr, keeps: bool, stop: &AtomicBool, answered: &AtomicU64) -> Vec<String> {
    let mut failures = Vec::new();
    let mut client = None;
    for n in 0.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let mut connection = match client.take().filter(|_| keeps) {
            Some(client) => client,
            None => match Client::try_connect(address) {
                Ok(client) => client,
                Err(error) => {
                    failures.push(format!("connect: {error}"));
                    continue;
                }
            },
        };
        let request = match n % 3 {
            0 => "POST /x HTTP/1.1\r\nHost: shop.example\r\nContent-Length: 5\r\n\r\nhello",
            _ => "GET /x HTTP/1.1\r\nHost: shop.example\r\n\r\n",
        };
        match connection.try_send(request).and_then(|()| connection.try_read(false)) {
            Ok(response) if response.status == 200 => {
                answered.fetch_add(1, Ordering::SeqCst);
                client = Some(connection);
            }
            Ok(response) => failures.push(format!("{} {}", response.status, response.text())),
            Err(error) => failures.push(error.to_string()),
        }
    }
    failures
}

#[test]
fn a_draining_app_loses_no_request_and_gets_none() {
    let (old, new) = (App::named("old"), App::named("new"));
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("old", old.address, "up")]);
    let load = Load::start(balancer.http, 8);
    load.for_requests(300);
    balancer.route("shop.example", &[("old", old.address, "draining"), ("new", new.address, "up")]);
    until("the old one is empty", || {
        let old = balancer.upstream("old");
        (old.active_requests, old.active_connections, old.idle_connections) == (0, 0, 0)
    });
    let got = old.request_count();
    load.for_requests(500);
    assert_eq!(old.request_count(), got, "a drained app got a request");
    assert!(new.request_count() > 0);
    drop(old);
    load.for_requests(300);
    assert_eq!(load.finish(), Vec::<String>::new());
}

#[test]
fn a_hundred_tables_a_second_fail_no_request() {
    let apps: Vec<App> = (0..4).map(|_| App::named("app")).collect();
    let balancer = Balancer::start(&["--threads", "2"]);
    let names = ["a", "b", "c", "d"];
    let table = |round: usize| {
        let state = |n: usize| if (n + round).is_multiple_of(4) { "draining" } else { "up" };
        let upstreams: Vec<_> = (0..4).map(|n| (names[n], apps[n].address, state(n))).collect();
        balancer.route("shop.example", &upstreams);
    };
    table(0);
    let load = Load::start(balancer.http, 8);
    let start = Instant::now();
    for round in 1..=200 {
        table(round);
        let next = Duration::from_millis(10 * round as u64);
        std::thread::sleep(next.saturating_sub(start.elapsed()));
    }
    assert!(load.answered() > 200, "only {} requests were answered meanwhile", load.answered());
    assert_eq!(load.finish(), Vec::<String>::new());
    assert_eq!(balancer.status().table_version, 201);
}

#[test]
fn an_app_that_refuses_connections_costs_no_request() {
    let (alive, dead) = (App::named("alive"), free_address());
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("dead", dead, "up"), ("alive", alive.address, "up")]);
    let load = Load::start(balancer.http, 4);
    load.for_requests(500);
    assert_eq!(load.finish(), Vec::<String>::new());
    assert!(balancer.upstream("dead").unreachable && balancer.upstream("dead").connect_errors_total > 0);
    // It comes back, and is found.
    let revived = App::start_on(dead, |_, stream| respond(stream, b"revived"));
    until("the revived app is used", || {
        Client::connect(balancer.http).get("shop.example", "/");
        revived.request_count() > 0
    });
}

#[test]
fn connections_that_apps_close_while_idle_lose_nothing() {
    // It closes each connection a moment after its answer, without saying so: the worst kind of app.
    let app = App::start(|_, stream| {
        respond(stream, b"x");
        std::thread::sleep(Duration::from_millis(3));
        false
    });
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    let mut client = Client::connect(balancer.http);
    for round in 0..300 {
        let response = client.get("shop.example", "/");
        assert_eq!(response.status, 200, "round {round}: {}", response.text());
        std::thread::sleep(Duration::from_millis(round % 6));
    }
    assert!(balancer.status().counters.retried_stale > 0, "the race was never met");
}

#[test]
fn requests_that_must_not_be_repeated_are_not() {
    let app = App::start(|request, stream| request.path() != "/die" && respond(stream, b"x"));
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    let mut client = Client::connect(balancer.http);
    client.get("shop.example", "/");
    let before = app.request_count();
    // On a reused connection, so that a repeatable request would be tried again.
    let response =
        client.send("POST /die HTTP/1.1\r\nHost: shop.example\r\nContent-Length: 1\r\n\r\nx").read();
    assert_eq!((response.status, app.request_count() - before), (502, 1));
    let response = client.get("shop.example", "/die");
    assert_eq!((response.status, response.field("x-epagent-error")), (502, Some("upstream_died")));
}

#[test]
fn requests_spread_over_the_apps_that_are_up() {
    let apps: Vec<App> = (0..3).map(|_| App::named("app")).collect();
    let balancer = Balancer::start(&[]);
    balancer.routes(&host_route(
        "shop.example",
        &[("a", apps[0].address, "up"), ("b", apps[1].address, "up"), ("c", apps[2].address, "down")],
    ));
    let mut client = Client::connect(balancer.http);
    for _ in 0..100 {
        client.get("shop.example", "/");
    }
    let counts: Vec<u64> = apps.iter().map(App::request_count).collect();
    assert_eq!(counts, [50, 50, 0]);
}
