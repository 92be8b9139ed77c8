//! Limits: who is turned away when there would be too many, with what words, and that nobody else notices.

mod common;

use std::io::{self, ErrorKind, Read};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use common::app::{App, respond};
use common::client::{Client, Response};
use common::{Balancer, free_address, until};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket};

/// A connection from this address of our own.
fn from(source: [u8; 4], to: SocketAddr) -> TcpStream {
    try_from(source, to).expect("a connection")
}

fn try_from(source: [u8; 4], to: SocketAddr) -> io::Result<TcpStream> {
    let made = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let source = SocketAddr::new(IpAddr::from(source), 0);
    bind(made.as_raw_fd(), &SockaddrStorage::from(source))?;
    connect(made.as_raw_fd(), &SockaddrStorage::from(to))?;
    let stream = TcpStream::from(made);
    stream.set_read_timeout(Some(common::PATIENCE))?;
    Ok(stream)
}

/// Whether there was a reset; it may come before the client has seen that it is connected.
fn is_reset(connection: io::Result<TcpStream>) -> bool {
    let heard = connection.and_then(|mut stream| stream.read(&mut [0]));
    heard.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
}

fn limited(limits: &str, app: SocketAddr) -> String {
    format!(
        r#"{{"id":"shop","match":{{"host":"shop.example"}},"limits":{limits},"action":{}}}"#,
        common::proxy(&[("s", app, "up")])
    )
}

fn code(response: &Response) -> (u16, Option<&str>) {
    (response.status, response.field("x-epagent-error"))
}

#[test]
fn a_full_listener_resets_whoever_comes_and_has_room_again_when_one_leaves() {
    let app = App::named("shop");
    let balancer = Balancer::start(&["--listener-max-connections", "2"]);
    balancer.route("shop.example", &[("s", app.address, "up")]);
    let mut clients: Vec<Client> = (0..2).map(|_| Client::connect(balancer.http)).collect();
    for client in &mut clients {
        assert_eq!(client.get("shop.example", "/").text(), "shop");
    }
    assert!(is_reset(TcpStream::connect(balancer.http)));
    assert_eq!(balancer.status().counters.shed_connections, 1);
    assert_eq!(clients[0].get("shop.example", "/").text(), "shop", "who is served goes on");
    drop(clients.pop());
    until("there is room", || balancer.status().counters.connections_open == 1);
    assert_eq!(Client::connect(balancer.http).get("shop.example", "/").text(), "shop");
}

#[test]
fn one_source_can_not_take_the_listener_from_the_others() {
    let app = App::named("shop");
    let balancer = Balancer::start(&["--source-max-connections", "2"]);
    balancer.route("shop.example", &[("s", app.address, "up")]);
    let greedy: Vec<TcpStream> = (0..2).map(|_| from([127, 0, 0, 7], balancer.http)).collect();
    until("both are in", || balancer.status().counters.connections_open == 2);
    assert!((0..5).all(|_| is_reset(try_from([127, 0, 0, 7], balancer.http))));
    let mut other = Client::over(from([127, 0, 0, 8], balancer.http));
    assert_eq!(other.get("shop.example", "/").text(), "shop");
    assert_eq!(balancer.status().counters.shed_sources, 5);
    drop(greedy);
    until("they are gone", || balancer.status().counters.connections_open == 1);
    let mut again = Client::over(from([127, 0, 0, 7], balancer.http));
    assert_eq!(again.get("shop.example", "/").text(), "shop");
}

#[test]
fn a_source_that_connects_too_often_is_reset() {
    let balancer = Balancer::start(&["--source-connections-per-second", "3"]);
    let reset = (0..20).filter(|_| {
        is_reset(try_from([127, 0, 0, 7], balancer.http).and_then(|stream| {
            stream.set_read_timeout(Some(Duration::from_millis(30)))?;
            Ok(stream)
        }))
    });
    let reset = reset.count() as u64;
    assert!((10..=17).contains(&reset), "{reset} of 20 were reset");
    assert_eq!(balancer.status().counters.shed_sources, reset);
}

#[test]
fn too_many_requests_are_told_when_to_come_back_and_the_connection_goes_on() {
    let app = App::named("shop");
    let balancer = Balancer::start(&[]);
    let other = common::host_route("other.example", &[("o", app.address, "up")]);
    let limits = r#"{"requests_per_second":1,"burst":3}"#;
    balancer.routes(&format!("{},{other}", limited(limits, app.address)));
    let mut client = Client::connect(balancer.http);
    for _ in 0..3 {
        assert_eq!(client.get("shop.example", "/").text(), "shop");
    }
    let refused = client.get("shop.example", "/");
    assert_eq!(code(&refused), (429, Some("rate_limited")));
    assert_eq!(refused.field("retry-after"), Some("1"));
    assert_eq!(client.get("other.example", "/").text(), "shop", "another route is another matter");
    until("a second has passed", || client.get("shop.example", "/").status == 200);
    assert!(balancer.status().counters.rate_limited >= 1);
    assert!(app.request_count() <= 7, "what is refused never reaches the app");
}

#[test]
fn one_source_that_is_too_fast_leaves_the_route_to_the_others() {
    let app = App::named("shop");
    let balancer = Balancer::start(&[]);
    let limits = r#"{"requests_per_second":20,"burst":20,"per_source":{"requests_per_second":1,"burst":2}}"#;
    balancer.routes(&limited(limits, app.address));
    let mut greedy = Client::over(from([127, 0, 0, 7], balancer.http));
    let statuses: Vec<u16> = (0..30).map(|_| greedy.get("shop.example", "/").status).collect();
    assert!(statuses.iter().filter(|status| **status == 200).count() <= 4, "{statuses:?}");
    // Thirty would have been more than the route takes.
    let mut modest = Client::over(from([127, 0, 0, 8], balancer.http));
    assert_eq!(modest.get("shop.example", "/").text(), "shop");
}

#[test]
fn a_full_route_answers_503_and_its_held_requests_count() {
    let app = App::named("shop");
    let balancer = Balancer::start(&[]);
    let two = r#"{"connections_max":2}"#;
    let holding = limited(two, app.address).replace(r#""state":"up""#, r#""state":"down""#);
    balancer.routes(&holding);
    let mut held: Vec<Client> = (0..2).map(|_| Client::connect(balancer.http)).collect();
    for client in &mut held {
        client.send("GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n");
    }
    until("both are held", || balancer.status().routes[0].held == 2);
    assert_eq!(code(&Client::connect(balancer.http).get("shop.example", "/")), (503, Some("route_full")));
    assert_eq!(balancer.status().counters.route_full, 1);
    balancer.routes(&limited(two, app.address));
    assert!(held.iter_mut().all(|client| client.read().text() == "shop"));
    assert_eq!(Client::connect(balancer.http).get("shop.example", "/").text(), "shop");
}

#[test]
fn a_source_may_have_its_share_of_a_route_and_no_more() {
    let app = App::start(|request, stream| {
        if request.path() == "/slow" {
            std::thread::sleep(Duration::from_millis(500));
        }
        respond(stream, b"done")
    });
    let balancer = Balancer::start(&[]);
    balancer.routes(&limited(r#"{"per_source":{"connections_max":1}}"#, app.address));
    let mut busy = Client::over(from([127, 0, 0, 7], balancer.http));
    busy.send("GET /slow HTTP/1.1\r\nHost: shop.example\r\n\r\n");
    until("it is at work", || app.request_count() == 1);
    let mut more = Client::over(from([127, 0, 0, 7], balancer.http));
    assert_eq!(code(&more.get("shop.example", "/")), (429, Some("source_full")));
    let mut other = Client::over(from([127, 0, 0, 8], balancer.http));
    assert_eq!(other.get("shop.example", "/").text(), "done");
    assert_eq!(busy.read().text(), "done");
    assert_eq!(more.get("shop.example", "/").text(), "done", "its share is free again");
    assert_eq!(balancer.status().counters.source_full, 1);
}

#[test]
fn plain_connections_beyond_a_limit_are_reset() {
    let app = App::named("shop");
    let balancer = Balancer::start(&[]);
    let port = free_address().port();
    let route = common::port_route(port, &[("s", app.address, "up")]);
    balancer.routes(&route.replace(r#""action""#, r#""limits":{"connections_max":1},"action""#));
    let connect = || TcpStream::connect(("127.0.0.1", port));
    let first = connect().expect("a connection");
    until("it is in", || balancer.status().routes[0].active == 1);
    assert!(is_reset(connect()));
    assert_eq!(balancer.status().counters.route_full, 1);
    drop(first);
    until("it is gone", || balancer.status().routes[0].active == 0);
    let _second = connect().expect("a connection");
    until("there is room again", || balancer.status().routes[0].requests_total == 3);
}

#[test]
fn a_full_pool_lets_a_burst_wait_and_sheds_what_goes_on() {
    let app = App::named("shop");
    let balancer = Balancer::start(&["--max-connections", "2", "--overload-grace-ms", "400"]);
    balancer.route("shop.example", &[("s", app.address, "up")]);
    let fill = || (0..2).map(|_| Client::connect(balancer.http)).collect::<Vec<_>>();
    let clients = fill();
    until("it is full", || balancer.status().counters.connections_open == 2);
    let mut patient = Client::connect(balancer.http);
    drop(clients);
    assert_eq!(patient.get("shop.example", "/").text(), "shop", "a burst waits and is served");
    drop(patient);
    until("all are gone", || balancer.status().counters.connections_open == 0);
    let clients = fill();
    until("it is full", || balancer.status().counters.connections_open == 2);
    let start = Instant::now();
    assert!(is_reset(TcpStream::connect(balancer.http)));
    assert!(start.elapsed() < Duration::from_secs(10), "told after {:?}", start.elapsed());
    assert!(is_reset(TcpStream::connect(balancer.http)), "the next at once");
    assert!(balancer.status().counters.shed_connections >= 2);
    drop(clients);
    until("there is room", || balancer.status().counters.connections_open == 0);
    assert_eq!(Client::connect(balancer.http).get("shop.example", "/").text(), "shop");
}

#[test]
fn limits_that_make_no_sense_are_refused() {
    let balancer = Balancer::start(&[]);
    let app = free_address();
    for limits in
        [r#"{"connections_max":0}"#, r#"{"burst":5}"#, r#"{"per_source":{"requests_per_second":2000000}}"#]
    {
        let line = format!(r#"{{"set_table":{{"version":9,"routes":[{}]}}}}"#, limited(limits, app));
        let answer = balancer.control().raw(&line).expect("an answer");
        let text = format!("{answer:?}");
        assert!(text.contains("has a limit that cannot be"), "{text}");
    }
}
