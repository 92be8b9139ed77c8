//! HTTP/1.1, case by case with the section it comes from, against the running balancer.
//!
//! Each case is a raw request and what must become of it: passed on to the app, or answered by the balancer
//! with a status, the connection closed, and nothing of it ever seen by the app.

mod common;

use std::sync::{Arc, Mutex};

use common::Balancer;
use common::app::{App, respond};
use common::client::Client;

/// What must become of a request.
#[derive(Clone, Copy)]
enum Then {
    /// The app gets this request line.
    Passed(&'static str),
    /// The balancer answers this and closes; the app sees nothing.
    Refused(u16),
}

use Then::{Passed, Refused};

const HOST: &str = "Host: shop.example\r\n";

struct Case {
    section: &'static str,
    what: &'static str,
    request: String,
    then: Then,
}

fn case(section: &'static str, what: &'static str, request: impl Into<String>, then: Then) -> Case {
    Case { section, what, request: request.into(), then }
}

/// A GET with these further header lines.
fn get(lines: &str) -> String {
    format!("GET / HTTP/1.1\r\n{HOST}{lines}\r\n")
}

/// A POST with these further header lines, and then these bytes.
fn post(lines: &str, after: &str) -> String {
    format!("POST / HTTP/1.1\r\n{HOST}{lines}\r\n{after}")
}

const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: shop.example\r\n\r\n";

fn request_lines() -> Vec<Case> {
    let slash = Passed("GET / HTTP/1.1");
    vec![
        case("9112 §3", "a plain request", get(""), slash),
        case(
            "9112 §2.2",
            "an empty line before the request line is skipped",
            format!("\r\n{}", get("")),
            slash,
        ),
        case("9112 §2.2", "a bare LF ends no line", format!("GET / HTTP/1.1\n{HOST}\n"), Refused(400)),
        case(
            "9112 §2.2",
            "a bare CR is no line end",
            format!("GET / HTTP/1.1\r{HOST}\r\n\r\n"),
            Refused(400),
        ),
        case(
            "9112 §2.2",
            "a blank before the first field",
            "GET / HTTP/1.1\r\n Host: shop.example\r\n\r\n",
            Refused(400),
        ),
        case(
            "9112 §3",
            "two blanks between the parts",
            format!("GET  / HTTP/1.1\r\n{HOST}\r\n"),
            Refused(400),
        ),
        case("9112 §3", "a tab between the parts", format!("GET\t/ HTTP/1.1\r\n{HOST}\r\n"), Refused(400)),
        case("9112 §3", "four parts", format!("GET / / HTTP/1.1\r\n{HOST}\r\n"), Refused(400)),
        case("9112 §3", "HTTP/0.9", "GET /\r\n\r\n", Refused(400)),
        case("9112 §3.1", "a method that is no token", format!("G(T / HTTP/1.1\r\n{HOST}\r\n"), Refused(400)),
        case(
            "9110 §9.1",
            "an unknown method is the app's affair",
            format!("BREW / HTTP/1.1\r\n{HOST}\r\n"),
            Passed("BREW / HTTP/1.1"),
        ),
        case("9110 §9.3.6", "CONNECT", "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", Refused(405)),
        case("9112 §2.3", "HTTP/2.0", format!("GET / HTTP/2.0\r\n{HOST}\r\n"), Refused(505)),
        case(
            "9112 §2.3",
            "HTTP/1.2 is understood as HTTP/1.1",
            format!("GET / HTTP/1.2\r\n{HOST}\r\n"),
            slash,
        ),
        case("9112 §2.3", "a version in lower case", format!("GET / http/1.1\r\n{HOST}\r\n"), Refused(400)),
        case(
            "9112 §2.3",
            "a version with more digits",
            format!("GET / HTTP/1.10\r\n{HOST}\r\n"),
            Refused(400),
        ),
        case("9113 §3.4", "the HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Refused(505)),
        case("8446 §4", "a TLS hello", "\u{16}\u{3}\u{1}\u{2}\r\n\r\n", Refused(400)),
    ]
}

fn targets() -> Vec<Case> {
    let with = |target: &str| format!("GET {target} HTTP/1.1\r\n{HOST}\r\n");
    vec![
        case("9112 §3.2.1", "origin form with a query", with("/a?b=c&d"), Passed("GET /a?b=c&d HTTP/1.1")),
        case("9112 §3.2.2", "absolute form", with("http://shop.example/a?b"), Passed("GET /a?b HTTP/1.1")),
        case(
            "9112 §3.2.2",
            "absolute form without a path",
            with("http://shop.example"),
            Passed("GET / HTTP/1.1"),
        ),
        case(
            "9112 §3.2.2",
            "absolute form, a query alone",
            with("http://shop.example?q"),
            Passed("GET /?q HTTP/1.1"),
        ),
        case(
            "9112 §3.2.2",
            "absolute form overrides Host",
            "GET http://shop.example/x HTTP/1.1\r\nHost: other.example\r\n\r\n",
            Passed("GET /x HTTP/1.1"),
        ),
        case("9110 §4.2.4", "user information", with("http://u:p@shop.example/"), Refused(400)),
        case("9110 §4.2.1", "another scheme", with("ftp://shop.example/"), Refused(400)),
        case(
            "9112 §3.2.4",
            "asterisk form",
            format!("OPTIONS * HTTP/1.1\r\n{HOST}\r\n"),
            Passed("OPTIONS * HTTP/1.1"),
        ),
        case("9112 §3.2.4", "asterisk form is for OPTIONS", with("*"), Refused(400)),
        case("9112 §3.2", "a target without a slash", with("x"), Refused(400)),
        case("9112 §3.2", "a fragment", with("/a#b"), Refused(400)),
        case("9112 §3.2", "a byte beyond ASCII", with("/\u{e9}"), Refused(400)),
        case("9112 §3.2", "a control byte", with("/\u{1}"), Refused(400)),
    ]
}

fn hosts() -> Vec<Case> {
    let slash = Passed("GET / HTTP/1.1");
    let with = |lines: &str| format!("GET / HTTP/1.1\r\n{lines}\r\n");
    vec![
        case("9112 §3.2", "no Host", with(""), Refused(400)),
        case("9112 §3.2", "two Hosts", with(&format!("{HOST}{HOST}")), Refused(400)),
        case("9112 §3.2", "an empty Host", with("Host:\r\n"), Refused(400)),
        case("9112 §3.2", "a list of hosts", with("Host: shop.example, other.example\r\n"), Refused(400)),
        case("9112 §3.2", "a Host with a path", with("Host: shop.example/x\r\n"), Refused(400)),
        case("9112 §3.2", "a Host with user information", with("Host: x@shop.example\r\n"), Refused(400)),
        case("9110 §7.2", "a Host with a port", with("Host: shop.example:8080\r\n"), slash),
        case("9110 §4.2.3", "a Host in upper case", with("Host: SHOP.EXAMPLE\r\n"), slash),
        case(
            "3986 §3.2.3",
            "a Host with a port that is none",
            with("Host: shop.example:http\r\n"),
            Refused(400),
        ),
        case(
            "9112 §3.2",
            "a broken Host beside an absolute target",
            "GET http://shop.example/ HTTP/1.1\r\nHost: a b\r\n\r\n",
            Refused(400),
        ),
    ]
}

fn fields() -> Vec<Case> {
    let slash = Passed("GET / HTTP/1.1");
    vec![
        case("9112 §5.1", "a blank before the colon", get("X : y\r\n"), Refused(400)),
        case(
            "9112 §5.1",
            "a tab before the colon of a length",
            post("Content-Length\t: 5\r\n", "hello"),
            Refused(400),
        ),
        case("9112 §5.1", "blanks around the value", get("X: \t y \t\r\n"), slash),
        case("9112 §5.2", "a folded line", get("X: y\r\n z\r\n"), Refused(400)),
        case("9112 §5.2", "a line folded with a tab", get("X: y\r\n\tz\r\n"), Refused(400)),
        case("9112 §5", "a line without a colon", get("X\r\n"), Refused(400)),
        case("9110 §5.1", "an empty name", get(": y\r\n"), Refused(400)),
        case("9110 §5.1", "a name that is no token", get("X(: y\r\n"), Refused(400)),
        case("9110 §5.5", "NUL in a value", get("X: a\0b\r\n"), Refused(400)),
        case("9110 §5.5", "a bare CR in a value", get("X: a\rb\r\n"), Refused(400)),
        case("9110 §5.5", "a bare LF in a value", get("X: a\nTransfer-Encoding: chunked\r\n"), Refused(400)),
        case("9110 §5.5", "bytes beyond ASCII in a value", get("X: \u{e9}\r\n"), slash),
        case("9110 §5.5", "an empty value", get("X:\r\n"), slash),
    ]
}

fn lengths() -> Vec<Case> {
    let refused =
        |what, lines: &str| case("9112 §6.3", what, post(lines, &format!("hello{SMUGGLED}")), Refused(400));
    vec![
        case("9112 §6.2", "a length", post("Content-Length: 5\r\n", "hello"), Passed("POST / HTTP/1.1")),
        case("9112 §6.2", "no length is no body", post("", ""), Passed("POST / HTTP/1.1")),
        refused("two different lengths", "Content-Length: 5\r\nContent-Length: 6\r\n"),
        refused("the same length twice", "Content-Length: 5\r\nContent-Length: 5\r\n"),
        refused("a list of lengths", "Content-Length: 5, 5\r\n"),
        refused("a signed length", "Content-Length: +5\r\n"),
        refused("a negative length", "Content-Length: -5\r\n"),
        refused("a length in hexadecimal", "Content-Length: 0x5\r\n"),
        refused("a length with a blank inside", "Content-Length: 5 5\r\n"),
        refused("an empty length", "Content-Length:\r\n"),
        refused("a length beyond 64 bits", "Content-Length: 99999999999999999999\r\n"),
        refused(
            "a length with an underscore beside a real one",
            "Content-Length: 5\r\nContent-Length: 0_5\r\n",
        ),
    ]
}

fn codings() -> Vec<Case> {
    let chunks = format!("5\r\nhello\r\n0\r\n\r\n{SMUGGLED}");
    let refused = |section, what, lines: &str| case(section, what, post(lines, &chunks), Refused(400));
    vec![
        case(
            "9112 §7.1",
            "chunked",
            post("Transfer-Encoding: chunked\r\n", "5\r\nhello\r\n0\r\n\r\n"),
            Passed("POST / HTTP/1.1"),
        ),
        case(
            "9112 §7",
            "codings are named without regard to case",
            post("Transfer-Encoding: CHUNKED\r\n", "0\r\n\r\n"),
            Passed("POST / HTTP/1.1"),
        ),
        refused(
            "9112 §6.1",
            "CL.TE: a length and a coding",
            "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        ),
        refused(
            "9112 §6.1",
            "TE.CL: a coding and a length",
            "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
        ),
        refused(
            "9112 §6.3",
            "TE.TE: a second, unknown coding line",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n",
        ),
        refused("9112 §7.1", "chunked twice", "Transfer-Encoding: chunked, chunked\r\n"),
        refused(
            "9112 §7.1",
            "chunked on two lines",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        ),
        refused("9112 §6.3", "chunked is not last", "Transfer-Encoding: chunked, gzip\r\n"),
        refused("9112 §6.3", "a coding other than chunked", "Transfer-Encoding: identity\r\n"),
        refused("9112 §6.3", "a coding that only looks like chunked", "Transfer-Encoding: xchunked\r\n"),
        refused("9112 §6.3", "chunked in quotes", "Transfer-Encoding: \"chunked\"\r\n"),
        refused("9112 §6.3", "chunked behind a vertical tab", "Transfer-Encoding: \u{b}chunked\r\n"),
        refused("9112 §6.3", "chunked with a parameter", "Transfer-Encoding: chunked;q=1\r\n"),
        refused("9112 §6.3", "an empty coding", "Transfer-Encoding:\r\n"),
        refused("9112 §5.2", "a folded coding", "Transfer-Encoding:\r\n chunked\r\n"),
        case(
            "9112 §6.1",
            "a coding we do not know before chunked",
            post("Transfer-Encoding: gzip, chunked\r\n", &chunks),
            Refused(501),
        ),
        case(
            "9112 §6.1",
            "a coding in HTTP/1.0",
            format!("POST / HTTP/1.0\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n{chunks}"),
            Refused(400),
        ),
    ]
}

/// The head of these is fine and is passed on: it is the body that must be refused, and what follows it
/// must never be taken for a request.
fn chunks() -> Vec<Case> {
    let refused = |section, what, body: &str| {
        case(
            section,
            what,
            post("Transfer-Encoding: chunked\r\n", &format!("{body}{SMUGGLED}")),
            Refused(400),
        )
    };
    vec![
        refused("9112 §7.1", "a size that is no number", "x\r\n"),
        refused("9112 §7.1", "a size with a prefix", "0x5\r\nhello\r\n0\r\n\r\n"),
        refused("9112 §7.1", "a signed size", "+5\r\nhello\r\n0\r\n\r\n"),
        refused("9112 §7.1", "a blank before a size", " 5\r\nhello\r\n0\r\n\r\n"),
        refused("9112 §7.1", "a blank after a size", "5 \r\nhello\r\n0\r\n\r\n"),
        refused("9112 §7.1", "a size that overflows", "10000000000000005\r\nhello\r\n0\r\n\r\n"),
        refused("9112 §7.1", "a bare LF after a size", "5\nhello\r\n0\r\n\r\n"),
        refused("9112 §7.1", "a bare LF after the data", "5\r\nhello\n0\r\n\r\n"),
        refused("9112 §7.1", "data longer than its size", "5\r\nhello!\r\n0\r\n\r\n"),
        refused("9112 §7.1.1", "a bare LF in an extension", "5;a\nb\r\nhello\r\n0\r\n\r\n"),
        refused("9112 §7.1.1", "a bare CR in an extension", "5;a\rb\r\nhello\r\n0\r\n\r\n"),
        refused(
            "9112 §7.1.1",
            "an endless extension",
            &format!("5;{}\r\nhello\r\n0\r\n\r\n", "a".repeat(300)),
        ),
        refused("9112 §7.1.2", "a trailer that is no field", "0\r\nno field\r\n\r\n"),
        refused("9112 §7.1.2", "a bare LF after the last chunk", "0\r\n\n"),
    ]
}

/// An app that notes the request lines it sees.
fn app() -> (App, Arc<Mutex<Vec<String>>>) {
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    let noted = seen.clone();
    let app = App::start(move |request, stream| {
        noted.lock().expect("unpoisoned").push(request.line.clone());
        respond(stream, b"ok")
    });
    (app, seen)
}

#[test]
fn every_request_is_passed_on_or_refused_as_its_section_says() {
    let (app, seen) = app();
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    let cases = [request_lines(), targets(), hosts(), fields(), lengths(), codings(), chunks()];
    let mut failures = Vec::new();
    for Case { section, what, request, then } in cases.into_iter().flatten() {
        seen.lock().expect("unpoisoned").clear();
        let mut client = Client::connect(balancer.http);
        let _ = client.try_send(&request);
        let status = client.try_read(false).map(|response| response.status).ok();
        let lines = seen.lock().expect("unpoisoned").clone();
        let fine = match then {
            Passed(line) => status == Some(200) && lines == [line],
            Refused(expected) => status == Some(expected) && client.is_closed() && lines.is_empty(),
        };
        if !fine {
            failures.push(format!("RFC {section}: {what}: answered {status:?}, the app saw {lines:?}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert_eq!(balancer.upstream("a").active_requests, 0);
}

#[test]
fn a_chunked_body_is_passed_on_with_extensions_and_trailers() {
    let app = App::echo();
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    let body = "00005;name=\"value\"\r\nhello\r\n6\r\n world\r\n0\r\n\r\n";
    let mut client = Client::connect(balancer.http);
    // The app here knows no extensions, so only the plain form is echoed; the other is judged by its end.
    client.send(post("Transfer-Encoding: chunked\r\n", "5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"));
    assert_eq!(client.read().text(), "hello world");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("an address");
    balancer.route("shop.example", &[("b", listener.local_addr().expect("its address"), "up")]);
    let trailed = body.replace("0\r\n\r\n", "0\r\nX-Sum: 1\r\n\r\n");
    client.send(post("Transfer-Encoding: chunked\r\n", &trailed));
    let (stream, _) = listener.accept().expect("a connection");
    stream.set_read_timeout(Some(common::PATIENCE)).expect("a timeout");
    let mut got = Vec::new();
    common::until("the whole body has come", || {
        let mut part = [0; 4096];
        let count = std::io::Read::read(&mut &stream, &mut part).expect("bytes");
        got.extend_from_slice(&part[..count]);
        String::from_utf8_lossy(&got).ends_with(&trailed)
    });
}

#[test]
fn responses_that_could_be_read_in_two_ways_are_not_passed_on() {
    // RFC 9112 §6.3, §2.2 and §4: what an app must not say.
    let bad: [&'static [u8]; 12] = [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5x\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length : 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\n X: y\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 2000 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 099 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/2.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 O\0K\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"220 smtp.example ESMTP\r\n\r\n",
    ];
    let app = App::start(move |request, stream| {
        let n: usize = request.path()[1..].parse().expect("a number");
        let _ = std::io::Write::write_all(stream, bad[n]);
        true
    });
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    let mut client = Client::connect(balancer.http);
    for (n, wire) in bad.iter().enumerate() {
        let response = client.get("shop.example", &format!("/{n}"));
        let facts = (response.status, response.field("x-epagent-error"));
        assert_eq!(facts, (502, Some("upstream_bad_response")), "{}", String::from_utf8_lossy(wire));
    }
}

#[test]
fn the_same_length_said_twice_by_an_app_is_passed_on_once() {
    // RFC 9110 §8.6.
    let app = App::start(|_, stream| {
        let wire = b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\nContent-Length: 5\r\n\r\nhello";
        std::io::Write::write_all(stream, wire).is_ok()
    });
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    let response = Client::connect(balancer.http).get("shop.example", "/");
    let lengths = response.fields.iter().filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    assert_eq!((response.text().as_str(), lengths.count()), ("hello", 1));
}
