//! What comes before the first request: PROXY headers, in and out, and routes by the server name of a hello.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};

use common::app::{App, respond};
use common::client::Client;
use common::hello::{client_hello, fatal_alert};
use common::{Balancer, PATIENCE, host_route, poll, proxy, read_all, until};

/// An app that answers with the client's address as it was told.
fn teller() -> App {
    App::start(|request, stream| {
        let told = request.field("x-forwarded-for").unwrap_or("nobody").to_owned();
        respond(stream, told.as_bytes())
    })
}

/// A plain TCP app whose connections are handed to the test.
fn accepting() -> (SocketAddr, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("an address");
    (listener.local_addr().expect("its address"), listener)
}

fn accept(listener: &TcpListener) -> TcpStream {
    listener.set_nonblocking(true).expect("non-blocking");
    let (stream, _) = poll("a connection comes", || listener.accept().ok());
    stream.set_nonblocking(false).expect("blocking");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream.set_nodelay(true).expect("no delay");
    stream
}

fn exactly(mut stream: &TcpStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).expect("all of it");
    bytes
}

/// A header of version 2 for these IPv4 ends.
fn v2(source: (Ipv4Addr, u16), destination: (Ipv4Addr, u16)) -> Vec<u8> {
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
    header.extend_from_slice(&source.0.octets());
    header.extend_from_slice(&destination.0.octets());
    header.extend_from_slice(&source.1.to_be_bytes());
    header.extend_from_slice(&destination.1.to_be_bytes());
    header
}

fn someone() -> Vec<u8> {
    v2((Ipv4Addr::new(203, 0, 113, 7), 1234), (Ipv4Addr::new(198, 51, 100, 1), 80))
}

const GET: &str = "GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n";

#[test]
fn a_proxy_header_names_the_client() {
    let app = teller();
    let balancer = Balancer::start(&["--listen", "http.proxy=127.0.0.1:0"]);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    let address = balancer.listener("http.proxy");
    let local = v2_local();
    for (header, told) in [
        (&someone()[..], "203.0.113.7"),
        (b"PROXY TCP4 192.0.2.9 198.51.100.1 1 80\r\n", "192.0.2.9"),
        (b"PROXY TCP6 2001:db8::9 ::1 1 80\r\n", "2001:db8::9"),
        (b"PROXY TCP6 ::ffff:192.0.2.9 ::1 1 80\r\n", "192.0.2.9"),
        (b"PROXY UNKNOWN\r\n", "127.0.0.1"),
        (&local, "127.0.0.1"),
    ] {
        // In one piece with two requests, and in many.
        let mut client = Client::connect(address);
        client.send([header, GET.as_bytes(), GET.as_bytes()].concat());
        assert_eq!((client.read().text().as_str(), client.read().text().as_str()), (told, told));
        let mut client = Client::connect(address);
        for byte in header.iter().chain(GET.as_bytes()) {
            client.send([*byte]);
        }
        assert_eq!(client.read().text(), told);
    }
    assert_eq!(balancer.status().counters.proxy_header_refused, 0);
}

fn v2_local() -> Vec<u8> {
    b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0".to_vec()
}

#[test]
fn without_a_proper_proxy_header_a_connection_is_reset() {
    let app = teller();
    let balancer = Balancer::start(&["--listen", "http.proxy=127.0.0.1:0", "--header-timeout-ms", "200"]);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    let address = balancer.listener("http.proxy");
    let mut datagram = someone();
    datagram[13] = 0x12;
    for start in [GET.as_bytes(), b"PROXY TCP4 1.2.3.4 5.6.7.8 1\r\n", &datagram, b"\x16\x03\x01\x00\x05"] {
        let before = balancer.status().counters.proxy_header_refused;
        let mut stream = connect(address);
        stream.write_all(start).expect("taken");
        assert_eq!(read_all(&stream), (Vec::new(), Some(ErrorKind::ConnectionReset)));
        assert_eq!(balancer.status().counters.proxy_header_refused, before + 1);
    }
    let mut slow = connect(address);
    slow.write_all(b"PROXY TCP4").expect("taken");
    assert_eq!(read_all(&slow), (Vec::new(), Some(ErrorKind::ConnectionReset)));
    assert_eq!(balancer.status().counters.proxy_header_slow, 1);
    // One that only looks whether we are there is no fault.
    drop(connect(address));
    until("it is gone", || balancer.status().counters.connections_open == 0);
    assert_eq!((app.request_count(), balancer.status().counters.proxy_header_refused), (0, 4));
}

#[test]
fn a_header_is_never_guessed_where_none_is_required() {
    let app = teller();
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    let mut client = Client::connect(balancer.http);
    client.send(format!("PROXY TCP4 192.0.2.9 198.51.100.1 1 80\r\n{GET}"));
    assert_eq!(client.read().status, 400);
    assert_eq!(app.request_count(), 0);
}

#[test]
fn an_upstream_is_told_of_the_client_by_a_header() {
    let (upstream, listener) = accepting();
    let balancer =
        Balancer::start(&["--listen", "tcp-7001=127.0.0.1:0", "--listen", "tcp-7001.proxy=127.0.0.1:0"]);
    let told = proxy(&[("db", upstream, "up")]).replace(r#""up"}"#, r#""up","proxy_protocol":true}"#);
    balancer.routes(&format!(r#"{{"id":"db","match":{{"port":7001}},"action":{told}}}"#));
    let mut client = connect(balancer.listener("tcp-7001"));
    client.write_all(b"hello").expect("taken");
    let stream = accept(&listener);
    let ours = match client.local_addr().expect("an address") {
        SocketAddr::V4(v4) => v4,
        SocketAddr::V6(_) => panic!("it connected by IPv4"),
    };
    let theirs = balancer.listener("tcp-7001");
    let expected = v2((*ours.ip(), ours.port()), (Ipv4Addr::LOCALHOST, theirs.port()));
    assert_eq!(exactly(&stream, expected.len() + 5), [&expected[..], b"hello"].concat());
    // What a header in front said is passed on.
    let mut client = connect(balancer.listener("tcp-7001.proxy"));
    client.write_all(&[&someone()[..], b"again"].concat()).expect("taken");
    assert_eq!(exactly(&accept(&listener), 28 + 5), [&someone()[..], b"again"].concat());
    // Who is not known is not made up.
    let mut client = connect(balancer.listener("tcp-7001.proxy"));
    client.write_all(b"PROXY UNKNOWN\r\nx").expect("taken");
    assert_eq!(exactly(&accept(&listener), 29).last(), Some(&b'x'));
}

fn sni_route(id: &str, name: &str, upstream: SocketAddr) -> String {
    format!(r#"{{"id":"{id}","match":{{"sni":"{name}"}},"action":{}}}"#, proxy(&[(id, upstream, "up")]))
}

#[test]
fn tls_is_passed_through_unopened_by_its_server_name() {
    let apps = [accepting(), accepting(), accepting()];
    let balancer = Balancer::start(&["--listen", "sni=127.0.0.1:0", "--listen", "sni.proxy=127.0.0.1:0"]);
    let routes = [("exact", "db.example"), ("parent", "*.db.example"), ("any", "*")];
    let routes: Vec<String> =
        routes.iter().zip(&apps).map(|((id, name), (upstream, _))| sni_route(id, name, *upstream)).collect();
    balancer.routes(&routes.join(","));
    for (name, app) in
        [(Some("DB.example"), 0), (Some("a.b.db.example"), 1), (Some("other.example"), 2), (None, 2)]
    {
        for (size, header) in [(16_384, false), (40, false), (100, true)] {
            let hello = client_hello(name, size);
            let address = balancer.listener(if header { "sni.proxy" } else { "sni" });
            let mut client = connect(address);
            if header {
                client.write_all(&someone()).expect("taken");
            }
            for piece in hello.chunks(113) {
                client.write_all(piece).expect("taken");
            }
            client.write_all(b"and more").expect("taken");
            let mut stream = accept(&apps[app].1);
            assert_eq!(exactly(&stream, hello.len() + 8), [&hello[..], b"and more"].concat(), "{name:?}");
            stream.write_all(b"back").expect("taken");
            assert_eq!(exactly(&client, 4), b"back");
        }
    }
    until("all are over", || balancer.upstream("any").active_connections == 0);
}

#[test]
fn a_tls_client_without_a_route_gets_the_alert_that_says_so() {
    let (upstream, _listener) = accepting();
    let balancer = Balancer::start(&["--listen", "sni=127.0.0.1:0", "--header-timeout-ms", "300"]);
    balancer.routes(&sni_route("db", "db.example", upstream));
    let address = balancer.listener("sni");
    let ask = |bytes: &[u8]| {
        let mut client = connect(address);
        client.write_all(bytes).expect("taken");
        read_all(&client)
    };
    assert_eq!(ask(&client_hello(Some("other.example"), 999)), (fatal_alert(112), None));
    assert_eq!(ask(&client_hello(None, 999)), (fatal_alert(112), None));
    assert_eq!(ask(&client_hello(Some("192.0.2.1"), 999)), (fatal_alert(47), None));
    assert_eq!(ask(GET.as_bytes()), (fatal_alert(10), None));
    assert_eq!(ask(&[22, 3, 1, 0x40, 1]), (fatal_alert(50), None));
    let counters = balancer.status().counters;
    assert_eq!((counters.sni_unrouted, counters.hello_refused), (2, 3));
    assert_eq!(
        ask(&client_hello(Some("db.example"), 999)[..50]),
        (Vec::new(), Some(ErrorKind::ConnectionReset))
    );
    assert_eq!(balancer.status().counters.hello_slow, 1);
}

#[test]
fn a_tls_client_is_held_with_its_hello() {
    let (upstream, listener) = accepting();
    let balancer = Balancer::start(&["--listen", "sni=127.0.0.1:0"]);
    let held = r#"{"id":"db","match":{"sni":"db.example"},"action":{"hold":{}}}"#;
    balancer.routes(held);
    let hello = client_hello(Some("db.example"), 999);
    let mut client = connect(balancer.listener("sni"));
    client.write_all(&hello).expect("taken");
    until("it is held", || balancer.status().routes[0].held == 1);
    // Its route goes, and another one takes its name.
    balancer.routes(&sni_route("other", "*.example", upstream));
    assert_eq!(exactly(&accept(&listener), hello.len()), hello);
}

#[test]
fn a_dual_stack_listener_shows_ipv4_clients_as_such() {
    let app = teller();
    let balancer = Balancer::start(&["--listen", "http=[::]:0"]);
    balancer.routes(&host_route("shop.example", &[("a", app.address, "up")]));
    let port = balancer.listeners("http")[1].port();
    for (host, told) in [("127.0.0.1", "127.0.0.1"), ("::1", "::1")] {
        let mut client =
            Client::connect((host.parse::<std::net::IpAddr>().expect("an address"), port).into());
        assert_eq!(client.get("shop.example", "/").text(), told);
    }
}

#[test]
fn what_cannot_be_listened_on_says_why() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = format!("http={}", taken.local_addr().expect("its address"));
    for (listen, why) in [
        (taken.as_str(), "the port is in use"),
        ("http=192.0.2.1:80", "no interface here has this address"),
        ("gopher=127.0.0.1:70", "names no kind of listener"),
        ("http=nowhere", "is neither IP:PORT nor unix:PATH"),
    ] {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_epagent-balancer"));
        let output = command.args(["--listen", listen]).output().expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(why), "{said}");
    }
}

#[test]
fn it_passes_tls_on_alone_without_any_control() {
    let (upstream, listener) = accepting();
    let address = common::free_address();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_epagent-balancer"));
    command.args(["run", "--mode", "sni", "--upstream-proxy-protocol"]);
    command.args(["--listen", &address.to_string(), "--upstream", &upstream.to_string()]);
    let _alone = Killed(command.spawn().expect("it starts"));
    let mut client = poll("it listens", || TcpStream::connect(address).ok());
    let hello = client_hello(Some("db.example"), 999);
    client.write_all(&hello).expect("taken");
    let got = exactly(&accept(&listener), 28 + hello.len());
    assert_eq!(got[28..], hello);
}

/// A child that does not outlive its test.
struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
