//! Metrics: in order to the letter, in agreement with status, and served to whoever asks without waiting for
//! whoever does not.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use common::app::App;
use common::client::Client;
use common::prometheus::Scrape;
use common::{Balancer, PATIENCE, host_route, until};

/// A balancer that has answered a few requests, of which one was for nobody.
fn busy(arguments: &[&str]) -> (Balancer, App) {
    let app = App::named("shop");
    let balancer = Balancer::start(arguments);
    // In JSON: the id is in\"st, which has to be escaped in a label too.
    balancer.routes(&host_route("a.example", &[(r#"in\\\"st"#, app.address, "up")]));
    let mut client = Client::connect(balancer.http);
    for _ in 0..10 {
        client.get("a.example", "/");
    }
    client.get("b.example", "/");
    // What is read twice should not change in between.
    drop(client);
    until("the client is gone", || balancer.status().counters.connections_open == 0);
    (balancer, app)
}

fn ask(mut stream: impl Read + Write, request: &str) -> (String, String) {
    stream.write_all(request.as_bytes()).expect("the request is taken");
    let mut response = String::new();
    stream.read_to_string(&mut response).expect("an answer");
    let (head, body) = response.split_once("\r\n\r\n").expect("a head");
    (head.to_owned(), body.to_owned())
}

const SCRAPE: &str = "GET /metrics HTTP/1.1\r\nHost: balancer\r\nAccept: text/plain\r\n\r\n";

#[test]
fn every_line_is_in_order_and_agrees_with_status() {
    let (balancer, _app) = busy(&["--threads", "2"]);
    let scrape = Scrape::read(&balancer.control().metrics().expect("metrics"));
    let status = balancer.status();
    let route = [("route", "a.example")];
    assert_eq!(scrape.value("requests_total", &route), 10.0);
    assert_eq!(scrape.value("requests_ended_total", &[route[0], ("outcome", "passed")]), 10.0);
    assert_eq!(scrape.value("responses_total", &[route[0], ("code", "2xx")]), 10.0);
    assert_eq!(scrape.value("request_duration_seconds_count", &route), 10.0);
    assert_eq!(scrape.value("first_byte_seconds_count", &route), 10.0);
    assert_eq!(scrape.value("request_bytes_total", &route), status.routes[0].bytes_in_total as f64);
    assert_eq!(scrape.value("response_bytes_total", &route), status.routes[0].bytes_out_total as f64);
    let upstream = [("upstream", "in\\\"st"), ("address", &status.upstreams[0].address.to_string())];
    assert_eq!(scrape.value("upstream_requests_total", &upstream), 10.0);
    assert_eq!(scrape.value("upstream_first_byte_seconds_count", &upstream), 10.0);
    assert_eq!(scrape.value("unknown_host_total", &[]), 1.0);
    assert_eq!(scrape.value("http_requests_total", &[]), 11.0);
    assert_eq!(scrape.value("connections_open", &[]), status.counters.connections_open as f64);
    assert_eq!(scrape.value("upstreams", &[("state", "up")]), 1.0);
}

#[test]
fn what_has_left_the_table_has_no_series() {
    let (balancer, app) = busy(&[]);
    balancer.route("c.example", &[("other", app.address, "up")]);
    let text = balancer.control().metrics().expect("metrics");
    Scrape::read(&text);
    assert!(!text.contains("a.example") && text.contains("c.example"));
}

#[test]
fn it_is_asked_over_tcp_and_unix_sockets() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("metrics.sock");
    let unix = format!("unix:{}", path.display());
    let (_balancer, _app) = busy(&["--metrics", &unix]);
    let (head, body) = ask(UnixStream::connect(&path).expect("it listens"), SCRAPE);
    assert!(head.starts_with("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4"), "{head}");
    assert_eq!(Scrape::read(&body).value("http_requests_total", &[]), 11.0);

    let address = common::free_address();
    let (balancer, _app) = busy(&["--metrics", &address.to_string()]);
    let connect = || TcpStream::connect(address).expect("it listens");
    let (head, body) = ask(connect(), SCRAPE);
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
    Scrape::read(&body);
    let (head, body) = ask(connect(), &SCRAPE.replace("GET", "HEAD"));
    assert!(head.starts_with("HTTP/1.1 200") && body.is_empty(), "{head}");
    assert!(ask(connect(), &SCRAPE.replace("/metrics", "/")).0.starts_with("HTTP/1.1 404"));
    assert!(ask(connect(), &SCRAPE.replace("GET", "POST")).0.starts_with("HTTP/1.1 405"));
    assert_eq!(balancer.status().counters.requests, 11, "asking is no request");
}

#[test]
fn whoever_asks_slowly_hinders_nobody() {
    let address = common::free_address();
    let (balancer, _app) = busy(&["--metrics", &address.to_string()]);
    let connect = || {
        let stream = TcpStream::connect(address).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream
    };
    let mut slow: Vec<TcpStream> = (0..15).map(|_| connect()).collect();
    slow.iter_mut().for_each(|stream| stream.write_all(b"GET /met").expect("it is taken"));
    Scrape::read(&ask(connect(), SCRAPE).1);
    balancer.status();
    // They have had their time; then there is room for others, however many have come before.
    until("the slow ones are let go", || {
        slow.iter_mut().all(|stream| matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_)))
    });
    let mut endless = connect();
    let taken = (0..100).map_while(|_| endless.write_all(&[b'x'; 1024]).ok()).count();
    assert!(taken < 100 || matches!(endless.read(&mut [0; 1]), Ok(0) | Err(_)), "an endless head is read");
}
