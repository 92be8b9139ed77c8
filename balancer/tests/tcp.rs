//! Plain TCP by port: both ends are carried through as what they were, and connections can be held.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use common::{Balancer, checksum, free_address, noise, port_route, read_all, until};
use nix::sys::socket::{Backlog, MsgFlags, listen, send, setsockopt, sockopt};

/// An app that handles each connection with `serve`, on a thread of its own.
fn app(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("an address");
    let address = listener.local_addr().expect("its address");
    let serve = std::sync::Arc::new(serve);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let serve = serve.clone();
            std::thread::spawn(move || serve(stream));
        }
    });
    address
}

fn reset(stream: TcpStream) {
    setsockopt(&stream, sockopt::Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 }).expect("linger");
}

fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
    stream.set_read_timeout(Some(common::PATIENCE)).expect("a timeout");
    stream
}

fn routed(upstream: SocketAddr) -> (Balancer, u16) {
    let balancer = Balancer::start(&[]);
    let port = free_address().port();
    let ack = balancer.routes(&port_route(port, &[("db", upstream, "up")]));
    assert_eq!(ack.problems, []);
    (balancer, port)
}

#[test]
fn bytes_and_half_closes_pass_both_ways() {
    // It answers only once the client has said all: a half-close that is lost would hang here.
    let upstream = app(|mut stream| {
        let (said, _) = read_all(&stream);
        stream.write_all(&said).expect("the echo");
    });
    let (balancer, port) = routed(upstream);
    let body = noise(5, 16_000_000);
    let mut client = connect(port);
    client.write_all(&body).expect("taken");
    client.shutdown(Shutdown::Write).expect("half-closed");
    let (got, end) = read_all(&client);
    assert_eq!((got.len(), checksum(&got), end), (body.len(), checksum(&body), None));
    until("nothing is left of it", || balancer.upstream("db").active_connections == 0);
}

/// Sends a byte as urgent between others, three times.
fn urge(mut stream: &TcpStream) {
    for _ in 0..3 {
        stream.write_all(b"abc").expect("taken");
        send(stream.as_raw_fd(), b"d", MsgFlags::MSG_OOB).expect("taken");
        stream.write_all(b"efg").expect("taken");
    }
}

#[test]
fn urgent_bytes_keep_their_place_and_hold_nothing_up() {
    let all = b"abcdefgabcdefgabcdefg";
    let upstream = app(move |mut stream| {
        let mut said = [0; 21];
        while stream.read_exact(&mut said).is_ok() {
            assert_eq!(&said, all);
            urge(&stream);
        }
    });
    let (_balancer, port) = routed(upstream);
    let mut client = connect(port);
    client.set_nodelay(true).expect("no delay");
    for _ in 0..20 {
        urge(&client);
        let mut heard = [0; 21];
        client.read_exact(&mut heard).expect("all of it, without another word");
        assert_eq!(&heard, all);
    }
}

#[test]
fn an_app_may_half_close_first() {
    let upstream = app(|mut stream| {
        stream.write_all(b"banner").expect("the banner");
        stream.shutdown(Shutdown::Write).expect("half-closed");
        let (said, end) = read_all(&stream);
        assert_eq!((said.as_slice(), end), (&b"late words"[..], None));
    });
    let (balancer, port) = routed(upstream);
    let mut client = connect(port);
    let (banner, _) = read_all(&client);
    assert_eq!(banner, b"banner");
    client.write_all(b"late words").expect("taken");
    drop(client);
    until("nothing is left of it", || balancer.upstream("db").active_connections == 0);
}

#[test]
fn a_reset_is_a_reset_on_the_other_side() {
    let (told, heard) = std::sync::mpsc::channel();
    let upstream = app(move |mut stream| {
        let mut first = [0; 1];
        stream.read_exact(&mut first).expect("the first byte");
        if first == *b"r" {
            return reset(stream);
        }
        stream.write_all(b"k").expect("a byte back");
        told.send(read_all(&stream).1).expect("the test listens");
    });
    let (_balancer, port) = routed(upstream);
    let mut client = connect(port);
    client.write_all(b"r").expect("taken");
    assert_eq!(read_all(&client).1, Some(ErrorKind::ConnectionReset));
    let mut client = connect(port);
    client.write_all(b"x").expect("taken");
    client.read_exact(&mut [0; 1]).expect("a byte back");
    reset(client);
    assert_eq!(
        heard.recv_timeout(common::PATIENCE).expect("the app heard"),
        Some(ErrorKind::ConnectionReset)
    );
}

#[test]
fn a_held_connection_is_dialled_later_with_what_it_said() {
    let upstream = app(|mut stream| {
        let mut said = [0; 5];
        stream.read_exact(&mut said).expect("what the client said first");
        stream.write_all(&said).expect("the echo");
    });
    let balancer = Balancer::start(&[]);
    let port = free_address().port();
    let held = format!(r#"{{"id":"db","match":{{"port":{port}}},"action":{{"hold":{{}}}}}}"#);
    balancer.routes(&held);
    let mut client = connect(port);
    client.write_all(b"early").expect("taken");
    until("it is held", || balancer.status().routes[0].held == 1);
    balancer.routes(&held.replace(r#"{"hold":{}}"#, &common::proxy(&[("db", upstream, "up")])));
    assert_eq!(read_all(&client).0, b"early");
}

#[test]
fn connections_to_a_draining_app_go_on_and_are_counted() {
    let upstream = app(|mut stream| {
        let copy = stream.try_clone().expect("a second handle");
        let _ = std::io::copy(&mut { copy }, &mut stream);
    });
    let (balancer, port) = routed(upstream);
    let mut client = connect(port);
    client.write_all(b"a").expect("taken");
    client.read_exact(&mut [0; 1]).expect("the echo");
    balancer.routes(&port_route(port, &[("db", upstream, "draining")]));
    client.write_all(b"b").expect("taken");
    client.read_exact(&mut [0; 1]).expect("it goes on");
    assert_eq!(balancer.upstream("db").active_connections, 1);
    drop(client);
    until("it is empty", || balancer.upstream("db").active_connections == 0);
}

#[test]
fn a_tunnel_in_which_nothing_moves_is_closed_after_its_time() {
    const TIME: Duration = Duration::from_millis(1500);
    let upstream = app(|mut stream| {
        stream.read_exact(&mut [0; 2]).expect("what is said");
        stream.write_all(b"yes").expect("the answer");
        read_all(&stream);
    });
    let balancer = Balancer::start(&["--tunnel-timeout-ms", &TIME.as_millis().to_string()]);
    let port = free_address().port();
    balancer.routes(&port_route(port, &[("db", upstream, "up")]));
    let mut client = connect(port);
    client.write_all(b"hi").expect("taken");
    client.read_exact(&mut [0; 3]).expect("the answer");
    let quiet = Instant::now();
    read_all(&client);
    // An answer that counted as movement once more when its end was told would make that twice the time.
    let closed_after = quiet.elapsed();
    assert!(closed_after >= TIME - TIME / 10 && closed_after < TIME + TIME / 2, "after {closed_after:?}");
}

#[test]
fn a_client_that_goes_away_while_its_app_is_connected_to_is_noticed() {
    // Its queue has room for one, and it accepts nobody: the next connect goes on and on.
    let full = TcpListener::bind("127.0.0.1:0").expect("an address");
    listen(&full, Backlog::new(0).expect("a number")).expect("with less room");
    let address = full.local_addr().expect("its address");
    let _first = TcpStream::connect(address).expect("room for one");
    let balancer = Balancer::start(&["--connect-timeout-ms", "600000"]);
    let port = free_address().port();
    balancer.routes(&port_route(port, &[("db", address, "up")]));
    let client = connect(port);
    let open = || balancer.status().counters.upstream_connections_open;
    until("it is connected to", || open() == 1);
    reset(client);
    until("it is gone", || open() == 0);
}

#[test]
fn a_port_that_cannot_be_bound_is_said_and_hinders_nothing() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("its address").port();
    let balancer = Balancer::start(&[]);
    let app = common::app::App::named("shop");
    let ack = balancer.routes(&format!(
        "{},{}",
        port_route(port, &[]),
        common::host_route("shop.example", &[("s", app.address, "up")])
    ));
    assert_eq!(ack.problems.len(), 1);
    assert_eq!(ack.problems[0].route.as_deref(), Some(format!("port-{port}").as_str()));
    assert!(ack.problems[0].message.contains("in use"), "{}", ack.problems[0].message);
    let mut client = common::client::Client::connect(balancer.http);
    assert_eq!(client.get("shop.example", "/").text(), "shop");
}

#[test]
fn a_listener_goes_with_its_route() {
    let upstream = app(drop);
    let (balancer, port) = routed(upstream);
    assert!(TcpStream::connect(("127.0.0.1", port)).is_ok());
    balancer.routes("");
    until("nobody listens", || TcpStream::connect(("127.0.0.1", port)).is_err());
    balancer.routes(&port_route(port, &[("db", upstream, "up")]));
    assert!(TcpStream::connect(("127.0.0.1", port)).is_ok());
}
