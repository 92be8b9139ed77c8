//! HTTP through real sockets: who gets a request, and that every byte of it arrives.

mod common;

use std::io::{Read, Write};
use std::net::SocketAddr;

use common::app::{App, respond, respond_chunked};
use common::client::Client;
use common::{Balancer, checksum, host_route, noise, until};

#[test]
fn one_connection_reaches_a_different_app_with_each_request() {
    let (shop, blog, any) = (App::named("shop"), App::named("blog"), App::named("any"));
    let balancer = Balancer::start(&[]);
    balancer.routes(&format!(
        "{},{},{}",
        host_route("shop.example", &[("s", shop.address, "up")]),
        host_route("blog.example", &[("b", blog.address, "up")]),
        host_route("*.wild.example", &[("w", any.address, "up")])
    ));
    let mut client = Client::connect(balancer.http);
    for (host, name) in [
        ("shop.example", "shop"),
        ("blog.example", "blog"),
        ("SHOP.example:8080", "shop"),
        ("blog.example.", "blog"),
        ("a.b.wild.example", "any"),
        ("shop.example", "shop"),
    ] {
        assert_eq!(client.get(host, "/").text(), name, "{host}");
    }
}

#[test]
fn requests_without_a_route_have_answers_of_their_own() {
    let balancer = Balancer::start(&[]);
    let mut client = Client::connect(balancer.http);
    let none = client.get("shop.example", "/");
    assert_eq!((none.status, none.field("x-epagent-error")), (503, Some("no_routes")));
    let app = App::named("shop");
    balancer.route("shop.example", &[("s", app.address, "up")]);
    let unknown = client.get("other.example", "/");
    assert_eq!((unknown.status, unknown.field("x-epagent-error")), (404, Some("unknown_host")));
    assert_eq!(client.get("shop.example", "/").text(), "shop", "the connection goes on after them");
    let counters = balancer.status().counters;
    assert_eq!((counters.no_routes, counters.unknown_host), (1, 1));
}

#[test]
fn large_bodies_arrive_whole_both_ways() {
    let app = App::echo();
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("s", app.address, "up")]);
    let mut client = Client::connect(balancer.http);
    for (round, len) in [0, 1, 5_000, 70_000, 1_000_000, 12_000_000].into_iter().enumerate() {
        let body = noise(round as u64, len);
        let mut wire =
            format!("POST / HTTP/1.1\r\nHost: shop.example\r\nContent-Length: {len}\r\n\r\n").into_bytes();
        wire.extend_from_slice(&body);
        let response = client.send(&wire).read();
        assert_eq!(
            (response.body.len(), checksum(&response.body)),
            (len, checksum(&body)),
            "{len} by length"
        );
        let mut wire = b"PUT / HTTP/1.1\r\nHost: shop.example\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
        for part in body.chunks(33_333) {
            wire.extend_from_slice(format!("{:X}\r\n", part.len()).as_bytes());
            wire.extend_from_slice(part);
            wire.extend_from_slice(b"\r\n");
        }
        wire.extend_from_slice(b"0\r\n\r\n");
        let response = client.send(&wire).read();
        assert_eq!(
            (response.body.len(), checksum(&response.body)),
            (len, checksum(&body)),
            "{len} in chunks"
        );
        assert_eq!(response.field("transfer-encoding"), Some("chunked"));
    }
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let app = App::start(|request, stream| respond(stream, request.path().as_bytes()));
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("s", app.address, "up")]);
    let mut client = Client::connect(balancer.http);
    let wire: String = (0..200).map(|n| format!("GET /{n} HTTP/1.1\r\nHost: shop.example\r\n\r\n")).collect();
    client.send(wire);
    for n in 0..200 {
        assert_eq!(client.read().text(), format!("/{n}"));
    }
}

#[test]
fn head_and_bodiless_statuses_leave_the_connection_in_step() {
    let app = App::start(|request, stream| {
        let wire: &[u8] = match request.path() {
            "/head" => b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
            "/204" => b"HTTP/1.1 204 No Content\r\n\r\n",
            "/304" => b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n",
            "/hints" => b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
            _ => b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlast",
        };
        stream.write_all(wire).is_ok()
    });
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("s", app.address, "up")]);
    let mut client = Client::connect(balancer.http);
    let head = client.send("HEAD /head HTTP/1.1\r\nHost: shop.example\r\n\r\n").read_head();
    assert_eq!(head.field("content-length"), Some("1000"));
    assert_eq!(client.get("shop.example", "/204").status, 204);
    assert_eq!(client.get("shop.example", "/304").status, 304);
    assert_eq!(client.get("shop.example", "/hints").status, 103);
    assert_eq!(client.read().text(), "ok");
    assert_eq!(client.get("shop.example", "/last").text(), "last");
    assert_eq!(app.connection_count(), 1, "one upstream connection carried them all");
}

#[test]
fn an_expectation_is_met_by_the_app() {
    let app = App::echo();
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("s", app.address, "up")]);
    let mut client = Client::connect(balancer.http);
    client.send("POST / HTTP/1.1\r\nHost: shop.example\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n");
    assert_eq!(client.read().status, 100);
    assert_eq!(client.send("hello").read().text(), "hello");
}

#[test]
fn an_upgraded_connection_carries_bytes_both_ways_and_its_half_close() {
    let app = App::start(|request, stream| {
        assert_eq!(request.field("connection"), Some("upgrade"));
        let hello = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\nhello ";
        stream.write_all(hello).expect("hello");
        let mut said = Vec::new();
        stream.read_to_end(&mut said).expect("everything until the half-close");
        stream.write_all(&said).expect("the echo");
        false
    });
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("s", app.address, "up")]);
    let mut client = Client::connect(balancer.http);
    client.send("GET / HTTP/1.1\r\nHost: shop.example\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n");
    let switched = client.read();
    assert_eq!((switched.status, switched.field("upgrade")), (101, Some("echo")));
    until("it counts as a connection", || balancer.upstream("s").active_connections == 1);
    let body = noise(1, 3_000_000);
    let (sent, mut writer) = (body.clone(), client.stream.get_ref().try_clone().expect("a second handle"));
    let sender = std::thread::spawn(move || {
        writer.write_all(&sent).expect("the bytes are taken");
        writer.shutdown(std::net::Shutdown::Write).expect("half-closed");
    });
    let mut got = Vec::new();
    client.stream.read_to_end(&mut got).expect("the echo");
    sender.join().expect("the sender");
    assert_eq!(&got[..6], b"hello ");
    assert_eq!(checksum(&got[6..]), checksum(&body));
    until("nothing is left of it", || balancer.upstream("s").active_connections == 0);
}

#[test]
fn an_old_client_gets_a_body_without_chunks() {
    let body = noise(7, 200_000);
    let sent = body.clone();
    let app = App::start(move |_, stream| respond_chunked(stream, &sent));
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("s", app.address, "up")]);
    let mut client = Client::connect(balancer.http);
    let response = client.send("GET / HTTP/1.0\r\nHost: shop.example\r\n\r\n").read();
    assert_eq!(response.field("transfer-encoding"), None);
    assert_eq!(checksum(&response.body), checksum(&body));
    assert!(client.is_closed());
}

#[test]
fn the_app_learns_the_client_from_the_balancer_alone() {
    let app = App::start(|request, stream| {
        let fields: Vec<String> =
            request.fields.iter().map(|(name, value)| format!("{name}={value}")).collect();
        respond(stream, fields.join("\n").as_bytes())
    });
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("s", app.address, "up")]);
    let forged = "X-Forwarded-For: 6.6.6.6\r\nx_forwarded_for: 6.6.6.6\r\nForwarded: for=6.6.6.6\r\n\
                  X-Real-IP: 6.6.6.6\r\nX-Forwarded-Host: evil\r\nConnection: x-secret, cookie\r\nX-Secret: 1\r\n\
                  Cookie: a=b\r\nKeep-Alive: 5\r\nTE: trailers\r\nProxy-Connection: x\r\nX-Other: kept\r\n";
    let mut client = Client::connect(balancer.http);
    let seen = client.send(format!("GET / HTTP/1.1\r\nHost: Shop.example\r\n{forged}\r\n")).read().text();
    let expected = [
        "Host=Shop.example",
        "Cookie=a=b",
        "X-Other=kept",
        "X-Forwarded-For=127.0.0.1",
        "X-Forwarded-Proto=http",
        "X-Forwarded-Host=Shop.example",
        "Forwarded=for=127.0.0.1;host=Shop.example;proto=http",
    ];
    let lines: Vec<_> = seen.lines().filter(|line| !line.starts_with("X-Request-Id=")).collect();
    assert_eq!(lines, expected);
}

#[test]
fn an_app_that_dies_in_the_middle_of_a_request_costs_that_request_alone() {
    let app = App::start(|request, stream| match request.path() {
        "/die" => false,
        "/half" => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf");
            false
        }
        "/garbage" => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\nContent-Length: 1\n\nx");
            false
        }
        _ => respond(stream, b"fine"),
    });
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("s", app.address, "up")]);
    let mut client = Client::connect(balancer.http);
    let died = client.send("POST /die HTTP/1.1\r\nHost: shop.example\r\nContent-Length: 0\r\n\r\n").read();
    assert_eq!((died.status, died.field("x-epagent-error")), (502, Some("upstream_died")));
    let garbage = client.get("shop.example", "/garbage");
    assert_eq!((garbage.status, garbage.field("x-epagent-error")), (502, Some("upstream_bad_response")));
    assert_eq!(client.get("shop.example", "/fine").text(), "fine");
    // The length was promised: only a broken connection tells the client that the rest is missing.
    assert!(client.try_get("shop.example", "/half").is_err());
    let counters = balancer.status().counters;
    assert_eq!(
        (counters.upstream_died, counters.upstream_bad_response, counters.upstream_died_midway),
        (1, 1, 1)
    );
}

#[test]
fn a_silent_app_is_given_up_after_its_time() {
    let app = App::start(|_, _| {
        std::thread::sleep(common::PATIENCE);
        false
    });
    let balancer = Balancer::start(&["--response-timeout-ms", "300"]);
    balancer.route("shop.example", &[("s", app.address, "up")]);
    let response = Client::connect(balancer.http).get("shop.example", "/");
    assert_eq!((response.status, response.field("x-epagent-error")), (504, Some("upstream_timeout")));
}

#[test]
fn slow_and_large_heads_are_cut_off() {
    let balancer = Balancer::start(&["--header-timeout-ms", "300"]);
    let mut slow = Client::connect(balancer.http);
    slow.send("GET / HTTP/1.1\r\nHost: sh");
    assert_eq!(slow.read().status, 408);
    assert!(slow.is_closed());
    let mut large = Client::connect(balancer.http);
    let head = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "x".repeat(40_000));
    let _ = large.try_send(head);
    assert_eq!(large.read().status, 431);
    let mut many = Client::connect(balancer.http);
    many.send(format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "A: b\r\n".repeat(200)));
    assert_eq!(many.read().status, 431);
    let mut silent = Client::connect(balancer.http);
    assert!(silent.is_closed(), "a client that says nothing is let go");
    let counters = balancer.status().counters;
    assert_eq!((counters.refused_slow_head, counters.refused_large_head), (1, 2));
}

#[test]
fn an_upload_refused_early_still_shows_its_answer() {
    // An app that answers before the body has come, and closes.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("an address");
    let address: SocketAddr = listener.local_addr().expect("its address");
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        let mut head = [0; 4096];
        let _ = stream.read(&mut head);
        stream.write_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig").expect("the answer");
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = common::read_all(&stream);
    });
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("s", address, "up")]);
    let mut client = Client::connect(balancer.http);
    client.send("POST / HTTP/1.1\r\nHost: shop.example\r\nContent-Length: 50000000\r\n\r\n");
    let _ = client.try_send(vec![b'x'; 3_000_000]);
    let response = client.read();
    assert_eq!((response.status, response.text().as_str()), (413, "big"));
    drop(client);
    server.join().expect("the app");
}
