//! The books: under mixed traffic with aborts on both sides, the access log, the counters, the histograms and
//! the metrics must all say the same, to the last request and byte.

mod common;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use common::app::{App, respond, respond_chunked};
use common::client::Client;
use common::prometheus::Scrape;
use common::{Balancer, free_address, host_route, noise, poll, port_route, until};
use epagent_balancer::control::protocol::StatusQuery;
use epagent_balancer::control::traffic::{Ends, Responses};
use serde_json::Value;

/// How often each kind of traffic comes, from each of the clients' threads.
const ROUNDS: u64 = 12;
const CLIENTS: u64 = 4;

/// Answers by the path, and dies on request.
fn app() -> App {
    App::start(|request, stream| match request.path() {
        "/large" => respond_chunked(stream, &noise(1, 300_000)),
        "/missing" => stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").is_ok(),
        "/dies" => false,
        "/cut" => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf");
            false
        }
        "/switch" => {
            let head = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n";
            let mut said = Vec::new();
            let _ = stream.write_all(head).and_then(|()| stream.read_to_end(&mut said).map(drop));
            let _ = stream.write_all(&said);
            false
        }
        _ => respond(stream, &request.body),
    })
}

fn routes(apps: &[&App], port: u16, held: bool) -> String {
    let upstreams: Vec<(String, SocketAddr)> =
        apps.iter().enumerate().map(|(n, app)| (format!("app{n}"), app.address)).collect();
    let upstreams: Vec<(&str, SocketAddr, &str)> =
        upstreams.iter().map(|(id, address)| (id.as_str(), *address, "up")).collect();
    let own = |host: &str, action: &str| {
        format!(r#"{{"id":"{host}","match":{{"host":"{host}"}},"action":{action}}}"#)
    };
    [
        host_route("shop.example", &upstreams),
        host_route("held.example", if held { &[] } else { &upstreams }),
        own("page.example", r#"{"static":{"body":"a page"}}"#),
        own("moved.example", r#"{"redirect":{"to":"https://shop.example"}}"#),
        own("alias.example", r#"{"alias":{"host":"page.example"}}"#),
        port_route(port, &[("stream", apps[0].address, "up")]),
    ]
    .join(",")
}

/// One client: a bit of everything.
fn traffic(http: SocketAddr, port: u16, seed: u64) {
    let request = |host: &str, path: &str| format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n");
    for round in 0..ROUNDS {
        let mut client = Client::connect(http);
        for (host, path) in [
            ("shop.example", "/"),
            ("shop.example", "/large"),
            ("shop.example", "/missing"),
            ("page.example", "/"),
            ("alias.example", "/"),
            ("moved.example", "/x"),
            ("nobody.example", "/"),
        ] {
            client.get(host, path);
        }
        client.send("HEAD / HTTP/1.1\r\nHost: page.example\r\n\r\n").read_head();
        let body = noise(seed + round, 40_000);
        for host in ["shop.example", "page.example"] {
            client.send(format!("POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: {}\r\n\r\n", body.len()));
            client.send(&body).read();
        }
        client.send(request("shop.example", "/").repeat(5));
        for _ in 0..5 {
            client.read();
        }
        client.send(request("shop.example", "/dies"));
        assert_eq!(client.read().status, 502);
        client.send("broken\r\n\r\n").read();
        let mut cut = Client::connect(http);
        cut.send(request("shop.example", "/cut"));
        assert!(cut.try_read(false).is_err(), "a cut response passed for a whole one");
        // Away in the middle of a body, of a response, and of being held.
        let mut gone = Client::connect(http);
        gone.send("POST / HTTP/1.1\r\nHost: shop.example\r\nContent-Length: 1000\r\n\r\nhello");
        drop(gone);
        let mut gone = Client::connect(http);
        gone.send(request("shop.example", "/large").repeat(20));
        let _ = gone.stream.get_mut().read(&mut [0; 1_000]);
        drop(gone);
        let mut gone = Client::connect(http);
        gone.send(request("held.example", "/"));
        // One that only half-closes would still be owed its answer.
        reset(gone);
        let mut switched = Client::connect(http);
        switched.send(
            "GET /switch HTTP/1.1\r\nHost: shop.example\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n",
        );
        assert_eq!(switched.read().status, 101);
        switched.send("there and back").stream.get_ref().shutdown(Shutdown::Write).expect("half-closed");
        assert_eq!(common::read_all(switched.stream).0, b"there and back");
        let plain = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
        common::write_all(&plain, request("x", "/large").as_bytes());
        plain.shutdown(Shutdown::Write).expect("half-closed");
        assert!(common::read_all(&plain).0.len() > 300_000);
        let mut left = Client::connect(([127, 0, 0, 1], port).into());
        left.send("never mind");
        drop(left);
    }
}

/// Closes with a reset.
fn reset(client: Client) {
    let now = libc::linger { l_onoff: 1, l_linger: 0 };
    nix::sys::socket::setsockopt(client.stream.get_ref(), nix::sys::socket::sockopt::Linger, &now)
        .expect("the option is set");
}

/// What the lines of one route add up to.
#[derive(Debug, Default, PartialEq)]
struct Page {
    ends: Ends,
    responses: Responses,
    bytes: (u64, u64),
    first_bytes: u64,
    held: u64,
}

fn add_up(lines: &[Value]) -> BTreeMap<String, Page> {
    let mut pages: BTreeMap<String, Page> = BTreeMap::new();
    for line in lines {
        let Some(route) = line["route"].as_str() else { continue };
        let page = pages.entry(route.to_owned()).or_default();
        *match line["outcome"].as_str().expect("an outcome") {
            "answered" | "upgraded" | "closed" => &mut page.ends.passed,
            "aborted" => &mut page.ends.aborted,
            "cut" => &mut page.ends.cut,
            "static" | "redirect" | "empty" => &mut page.ends.page,
            _ => &mut page.ends.refused,
        } += 1;
        page.responses.count(line["status"].as_u64().map(|status| status as u16));
        let number = |key: &str| line[key].as_u64().expect("a number");
        page.bytes = (page.bytes.0 + number("bytes_in"), page.bytes.1 + number("bytes_out"));
        page.first_bytes += u64::from(line.get("ttfb_us").is_some());
        page.held += u64::from(line.get("held_us").is_some());
    }
    pages
}

#[test]
fn log_counters_histograms_and_metrics_agree_to_the_last_byte() {
    let apps = [app(), app()];
    let apps: Vec<&App> = apps.iter().collect();
    let port = free_address().port();
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("access.log");
    let log = path.to_str().expect("a path in UTF-8");
    let balancer = Balancer::start(&["--threads", "2", "--access-log", log]);
    balancer.routes(&routes(&apps, port, true));
    let mut held: Vec<Client> = (0..5).map(|_| Client::connect(balancer.http)).collect();
    for client in &mut held {
        client.send("GET / HTTP/1.1\r\nHost: held.example\r\n\r\n");
    }
    let http = balancer.http;
    let clients: Vec<_> =
        (0..CLIENTS).map(|n| std::thread::spawn(move || traffic(http, port, n * 1_000))).collect();
    clients.into_iter().for_each(|client| client.join().expect("the client's checks hold"));
    // Setting the routes again zeroes nothing, and lets the held ones go.
    balancer.routes(&routes(&apps, port, false));
    held.iter_mut().for_each(|client| assert_eq!(client.read().status, 200));
    drop(held);
    until("everything has ended", || {
        let status = balancer.status();
        status.counters.connections_open == 0 && status.routes.iter().all(|route| route.active == 0)
    });
    let status = balancer.control().status_with(StatusQuery { latency: true }).expect("a status");
    let scrape = Scrape::read(&balancer.control().metrics().expect("metrics"));
    let begun: u64 = status.routes.iter().map(|route| route.requests_total).sum();
    let routeless = status.counters.unknown_host + status.counters.refused_bad_request;
    let lines: Vec<Value> = poll("every line is written", || {
        let text = std::fs::read_to_string(&path).ok()?;
        let lines = text.lines().map_while(|line| serde_json::from_str(line).ok()).collect::<Vec<Value>>();
        (lines.len() as u64 >= begun + routeless).then_some(lines)
    });
    assert_eq!(lines.len() as u64, begun + routeless, "a line for each, and no other");
    assert_eq!(status.counters.access_log_dropped, 0);
    let requests = lines.iter().filter(|line| line.get("method").is_some()).count() as u64;
    assert_eq!(requests, status.counters.requests);

    let pages = add_up(&lines);
    for route in &status.routes {
        let nothing = Page::default();
        let page = pages.get(&route.id).unwrap_or(&nothing);
        let latency = route.latency.as_ref().expect("histograms");
        let counted = Page {
            ends: route.ends,
            responses: route.responses,
            bytes: (route.bytes_in_total, route.bytes_out_total),
            first_bytes: latency.first_byte.count(),
            held: latency.held.count(),
        };
        assert_eq!(*page, counted, "route {}", route.id);
        assert_eq!((route.requests_total, latency.duration.count()), (page.ends.total(), page.ends.total()));
        let label = [("route", route.id.as_str())];
        assert_eq!(scrape.value("requests_total", &label), route.requests_total as f64);
        assert_eq!(scrape.sum("requests_ended_total", &label), route.requests_total as f64);
        assert_eq!(scrape.sum("responses_total", &label), route.requests_total as f64);
        assert_eq!(scrape.sum("request_duration_seconds_count", &label), route.requests_total as f64);
        assert_eq!(scrape.value("request_bytes_total", &label), page.bytes.0 as f64);
        assert_eq!(scrape.value("response_bytes_total", &label), page.bytes.1 as f64);
    }
    // The traffic had all of it in it.
    let total = ROUNDS * CLIENTS;
    let shop = &pages["shop.example"];
    assert!(shop.ends.aborted >= total && shop.ends.cut == total && shop.responses.informational == total);
    assert_eq!(pages["page.example"].ends.page, 4 * total, "an alias's are among them");
    assert_eq!((pages["held.example"].ends.passed, pages["held.example"].ends.aborted), (5, total));
    assert!(pages[&format!("port-{port}")].ends.passed >= total);
}
