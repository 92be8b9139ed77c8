//! Holding: requests wait while nobody can take them, within bounds, and are released as soon as somebody can.

mod common;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use common::app::{App, respond};
use common::client::Client;
use common::{Balancer, free_address, poll, proxy, until};

const GET: &str = "GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n";

fn held(balancer: &Balancer) -> u64 {
    balancer.status().routes.iter().map(|route| route.held).sum()
}

fn holding(limits: &str) -> String {
    format!(r#"{{"id":"shop","match":{{"host":"shop.example"}},"action":{{"hold":{{}}}},"hold":{limits}}}"#)
}

fn proxying(upstreams: &[(&str, SocketAddr, &str)]) -> String {
    format!(r#"{{"id":"shop","match":{{"host":"shop.example"}},"action":{}}}"#, proxy(upstreams))
}

#[test]
fn five_hundred_held_requests_are_all_answered_on_release() {
    let app = App::named("shop");
    let balancer = Balancer::start(&[]);
    balancer.routes(&holding(r#"{"max_requests":1000,"max_age_ms":30000}"#));
    let mut clients: Vec<Client> = (0..500).map(|_| Client::connect(balancer.http)).collect();
    for (n, client) in clients.iter_mut().enumerate() {
        match n % 2 {
            0 => client.send(GET),
            _ => client.send("POST / HTTP/1.1\r\nHost: shop.example\r\nContent-Length: 5\r\n\r\nhello"),
        };
    }
    until("all are held", || held(&balancer) == 500);
    assert_eq!(app.request_count(), 0);
    let route = balancer.status().routes.remove(0);
    assert!(route.oldest_held_ms < 20_000);
    let released = Instant::now();
    balancer.routes(&proxying(&[("a", app.address, "up")]));
    for client in &mut clients {
        assert_eq!(client.read().text(), "shop");
    }
    assert!(released.elapsed() < Duration::from_secs(5), "release took {:?}", released.elapsed());
    assert_eq!((held(&balancer), app.request_count()), (0, 500));
}

#[test]
fn a_full_hold_queue_sheds_its_oldest() {
    let app = App::named("shop");
    let balancer = Balancer::start(&[]);
    balancer.routes(&holding(r#"{"max_requests":3,"max_age_ms":30000}"#));
    let mut clients = Vec::new();
    for n in 1..=5 {
        let mut client = Client::connect(balancer.http);
        client.send(GET);
        until("it is held", || balancer.status().routes[0].held_total == n);
        clients.push(client);
    }
    for client in &mut clients[..2] {
        let response = client.read();
        let facts = (response.status, response.field("x-epagent-error"), response.field("retry-after"));
        assert_eq!(facts, (503, Some("hold_shed"), Some("5")));
    }
    balancer.routes(&proxying(&[("a", app.address, "up")]));
    for client in &mut clients[2..] {
        assert_eq!(client.read().text(), "shop");
    }
    assert_eq!(balancer.status().counters.hold_shed, 2);
}

#[test]
fn a_held_request_ages_out() {
    let balancer = Balancer::start(&[]);
    balancer.routes(&holding(r#"{"max_requests":10,"max_age_ms":200}"#));
    let start = Instant::now();
    let mut client = Client::connect(balancer.http);
    let response = client.send(GET).read();
    assert_eq!((response.status, response.field("x-epagent-error")), (503, Some("hold_expired")));
    assert!(start.elapsed() >= Duration::from_millis(200) && start.elapsed() < Duration::from_secs(5));
    assert_eq!(client.send(GET).read().status, 503, "the connection goes on");
    assert_eq!(balancer.status().counters.hold_expired, 2);
}

#[test]
fn requests_for_an_app_that_restarts_wait_for_it() {
    let address = free_address();
    let balancer = Balancer::start(&[]);
    balancer.routes(&proxying(&[("a", address, "up")]));
    let mut clients: Vec<Client> = (0..50).map(|_| Client::connect(balancer.http)).collect();
    for client in &mut clients {
        client.send(GET);
    }
    until("all are held", || held(&balancer) == 50);
    // Nobody tells the balancer: it finds out.
    let app = App::start_on(address, |_, stream| respond(stream, b"back"));
    let back = Instant::now();
    assert_eq!(clients[0].read().text(), "back");
    assert!(back.elapsed() < Duration::from_secs(3), "found after {:?}", back.elapsed());
    for client in &mut clients[1..] {
        assert_eq!(client.read().text(), "back");
    }
    assert_eq!(app.request_count(), 50);
}

#[test]
fn a_held_upload_is_buffered_within_bounds_and_passed_on_whole() {
    let app = App::echo();
    let balancer = Balancer::start(&[]);
    balancer.routes(&holding(r#"{"max_requests":10,"max_age_ms":30000}"#));
    let body = common::noise(3, 8_000_000);
    let (sent, address) = (body.clone(), balancer.http);
    let before_kib = balancer.resident_kib();
    let client = std::thread::spawn(move || {
        let mut client = Client::connect(address);
        client.send("PUT / HTTP/1.1\r\nHost: shop.example\r\nContent-Length: 8000000\r\n\r\n");
        client.send(&sent).read()
    });
    until("it is held", || held(&balancer) == 1);
    let grown_kib = poll("the upload stalls", || {
        let taken = balancer.status().counters.bytes_from_clients;
        std::thread::sleep(Duration::from_millis(50));
        (taken > 0 && balancer.status().counters.bytes_from_clients == taken)
            .then(|| balancer.resident_kib().saturating_sub(before_kib))
    });
    assert!(grown_kib < 4_000, "one held upload took {grown_kib} KiB");
    balancer.routes(&proxying(&[("a", app.address, "up")]));
    let response = client.join().expect("the client");
    assert_eq!(common::checksum(&response.body), common::checksum(&body));
}

#[test]
fn a_held_client_that_leaves_is_forgotten() {
    let balancer = Balancer::start(&[]);
    balancer.routes(&holding(r#"{"max_requests":10,"max_age_ms":30000}"#));
    let mut client = Client::connect(balancer.http);
    client.send(GET);
    until("it is held", || held(&balancer) == 1);
    nix::sys::socket::setsockopt(
        client.stream.get_ref(),
        nix::sys::socket::sockopt::Linger,
        &nix::libc::linger { l_onoff: 1, l_linger: 0 },
    )
    .expect("linger");
    drop(client);
    until("it is forgotten", || held(&balancer) == 0);
    assert_eq!(balancer.status().counters.client_aborted, 1);
}

#[test]
fn requests_held_for_a_route_that_goes_away_are_told_so() {
    let balancer = Balancer::start(&[]);
    let other = common::host_route("other.example", &[]);
    balancer.routes(&format!("{},{other}", holding(r#"{"max_requests":10,"max_age_ms":30000}"#)));
    let mut client = Client::connect(balancer.http);
    client.send(GET);
    until("it is held", || held(&balancer) == 1);
    balancer.routes(&other);
    assert_eq!(client.read().field("x-epagent-error"), Some("unknown_host"));
}
