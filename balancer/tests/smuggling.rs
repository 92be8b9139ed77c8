//! Request smuggling and its relatives, class by class: what the balancer answers, and what of it an app has
//! ever seen. The app here keeps every byte it gets, and reads them as strictly as the RFC allows.
//!
//! The classes are those of the field: CL.TE, TE.CL, TE.TE and CL.0 (Kettle, "HTTP Desync Attacks", 2019, and
//! "Browser-Powered Desync Attacks", 2022), TERM.EXT, EXT.TERM and SPILL in chunked bodies ("Funky Chunks", 2025;
//! a bare LF in CVE-2025-22871), h2c upgrades ("h2c Smuggling", 2020), `Expect` and early answers ("HTTP/1.1
//! must die", 2025), and queues of responses that are out of step.

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};

use common::client::Client;
use common::recorder::{Recorder, read_all_requests};
use common::{Balancer, PATIENCE, until};

/// What must become of what a client sends.
enum Then {
    /// Answered with this by the balancer, which closes; the app never sees a byte.
    Refused(u16),
    /// The head is fine, and the body turns out not to be: the app sees that head and is cut off, the client
    /// is told with this.
    Cut(u16),
    /// The app sees exactly these requests, each with its body.
    Seen(&'static [(&'static str, &'static str)]),
}

use Then::{Cut, Refused, Seen};

struct Case {
    class: &'static str,
    what: &'static str,
    sent: Vec<u8>,
    then: Then,
}

const HOST: &str = "Host: shop.example\r\n";
const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: shop.example\r\n\r\n";

fn case(class: &'static str, what: &'static str, sent: impl AsRef<[u8]>, then: Then) -> Case {
    Case { class, what, sent: sent.as_ref().to_vec(), then }
}

/// A POST with these lines, and then these bytes.
fn post(lines: &str, after: &str) -> String {
    format!("POST / HTTP/1.1\r\n{HOST}{lines}\r\n{after}")
}

fn two_lengths() -> Vec<Case> {
    let chunks = format!("0\r\n\r\n{SMUGGLED}");
    let te = "Transfer-Encoding: chunked\r\n";
    let refused = |class, what, lines: &str| case(class, what, post(lines, &chunks), Refused(400));
    vec![
        refused("CL.TE, 9112 §6.3", "a length, then chunked", &format!("Content-Length: 6\r\n{te}")),
        refused("TE.CL, 9112 §6.3", "chunked, then a length", &format!("{te}Content-Length: 4\r\n")),
        refused(
            "CL.TE, 9112 §6.3",
            "a length of nothing beside chunked",
            &format!("Content-Length: 0\r\n{te}"),
        ),
        refused("CL.CL, 9112 §6.3", "two lengths", "Content-Length: 0\r\nContent-Length: 48\r\n"),
        refused("CL.CL, 9110 §8.6", "a list of lengths", "Content-Length: 0, 48\r\n"),
        refused("CL.CL, 9110 §8.6", "the same length in a list", "Content-Length: 48,48\r\n"),
        refused(
            "CL.CL, 9112 §5.1",
            "a second length with a blank",
            "Content-Length: 0\r\nContent-Length : 48\r\n",
        ),
        refused("CL.CL, 9110 §8.6", "a plus sign", "Content-Length: +48\r\n"),
        refused("CL.CL, 9110 §8.6", "a form feed", "Content-Length: 48\u{c}\r\n"),
        refused("CL.CL, 9110 §8.6", "a no-break space", "Content-Length: 48\u{a0}\r\n"),
        refused("CL.CL, 9110 §8.6", "digits of another script", "Content-Length: \u{ff14}\u{ff18}\r\n"),
        refused("CL.0, 9112 §5.2", "a folded length", "Content-Length:\r\n 48\r\n"),
        refused("CL.0, 9110 §8.6", "a length with an exponent", "Content-Length: 4e1\r\n"),
    ]
}

fn hidden_codings() -> Vec<Case> {
    let chunks = format!("0\r\n\r\n{SMUGGLED}");
    let hidden = |what, line: &str| {
        case("TE.TE, 9112 §6.1", what, post(&format!("Content-Length: 53\r\n{line}"), &chunks), Refused(400))
    };
    vec![
        hidden("a blank before the colon", "Transfer-Encoding : chunked\r\n"),
        hidden("a tab before the colon", "Transfer-Encoding\t: chunked\r\n"),
        hidden("a vertical tab before the coding", "Transfer-Encoding: \u{b}chunked\r\n"),
        hidden("a NUL after the coding", "Transfer-Encoding: chunked\0\r\n"),
        hidden("NUL in the name", "Transfer-\0Encoding: chunked\r\n"),
        hidden("behind a bare LF", "X: y\nTransfer-Encoding: chunked\r\n"),
        hidden("behind a bare CR", "X: y\rTransfer-Encoding: chunked\r\n"),
        hidden("behind CR CR LF", "X: y\r\r\nTransfer-Encoding: chunked\r\n"),
        hidden("on a folded line", "X: y\r\n Transfer-Encoding: chunked\r\n"),
        hidden("folded after its colon", "Transfer-Encoding:\r\n chunked\r\n"),
        hidden("another coding beside it", "Transfer-Encoding: chunked\r\nTransfer-Encoding: cow\r\n"),
        hidden("an empty element after it", "Transfer-Encoding: chunked,\r\n"),
        hidden("in quotes", "Transfer-Encoding: \"chunked\"\r\n"),
        hidden("something like it", "Transfer-Encoding: xchunked\r\n"),
        hidden("identity", "Transfer-Encoding: identity\r\n"),
        hidden("a name beyond ASCII", "Transfer\u{2010}Encoding: chunked\r\n"),
        case(
            "TE.TE, 9112 §6.1",
            "a coding we do not know before it",
            post("Transfer-Encoding: gzip, chunked\r\n", &chunks),
            Refused(501),
        ),
        case(
            "TE.TE, CGI",
            "its twin with an underscore goes no further",
            post("Content-Length: 5\r\nTransfer_Encoding: chunked\r\n", "0\r\n\r\n"),
            Seen(&[("POST / HTTP/1.1", "0\r\n\r\n")]),
        ),
        case(
            "CL.CL, CGI",
            "a length with an underscore goes no further",
            post("Content_Length: 50\r\nContent-Length: 2\r\n", "ok"),
            Seen(&[("POST / HTTP/1.1", "ok")]),
        ),
        case(
            "9110 §5.6.3",
            "blanks where they may be",
            post("Transfer-Encoding: \t chunked \t\r\n", "2\r\nok\r\n0\r\n\r\n"),
            Seen(&[("POST / HTTP/1.1", "ok")]),
        ),
        case(
            "9110 §7.6.1",
            "Connection cannot take the length away",
            post("Content-Length: 2\r\nConnection: content-length, transfer-encoding, host\r\n", "ok"),
            Seen(&[("POST / HTTP/1.1", "ok")]),
        ),
    ]
}

fn bodies() -> Vec<Case> {
    let cut = |class, what, body: &str| {
        let sent = post("Transfer-Encoding: chunked\r\n", &format!("{body}{SMUGGLED}"));
        case(class, what, sent, Cut(400))
    };
    vec![
        case(
            "CL.0",
            "a body that looks like a request is a body",
            post("Content-Length: 46\r\n", SMUGGLED),
            Seen(&[("POST / HTTP/1.1", SMUGGLED)]),
        ),
        case(
            "CL.0, 9110 §9.3.1",
            "also that of a GET",
            format!("GET / HTTP/1.1\r\n{HOST}Content-Length: 46\r\n\r\n{SMUGGLED}"),
            Seen(&[("GET / HTTP/1.1", SMUGGLED)]),
        ),
        case(
            "9112 §9.3.2",
            "what follows a body is the next request, and judged as one",
            format!("{}{SMUGGLED}", post("Content-Length: 2\r\n", "ok")),
            Seen(&[("POST / HTTP/1.1", "ok"), ("GET /smuggled HTTP/1.1", "")]),
        ),
        cut("TERM.EXT, 9112 §7.1", "a size ended by LF", "2\nok\r\n0\r\n\r\n"),
        cut("TERM.EXT, 9112 §7.1", "a size ended by CR", "2\rok\r\n0\r\n\r\n"),
        cut("TERM.EXT, 9112 §7.1", "a size ended by CR CR LF", "2\r\r\nok\r\n0\r\n\r\n"),
        cut(
            "EXT.TERM, 9112 §7.1.1",
            "an extension ended by LF",
            "2;\nxx\r\n10\r\n\r\nGET / HTTP/1.1\r\n0\r\n\r\n",
        ),
        cut("EXT.TERM, 9112 §7.1.1", "a CR in an extension", "2;a\rb\r\nok\r\n0\r\n\r\n"),
        cut("EXT.TERM, 9112 §7.1.1", "a NUL in an extension", "2;\0\r\nok\r\n0\r\n\r\n"),
        cut("SPILL, 9112 §7.1", "data ended by LF", "2\r\nok\n0\r\n\r\n"),
        cut("SPILL, 9112 §7.1", "data longer than its size", "2\r\nokok\r\n0\r\n\r\n"),
        cut("SPILL, 9112 §7.1", "data shorter than its size", "9\r\nok\r\n0\r\n\r\n"),
        cut("9112 §7.1", "a last chunk ended by LF LF", "0\n\n"),
        cut("9112 §7.1", "a last chunk and a lone LF", "0\r\n\n"),
        cut("9112 §7.1", "a size with a prefix", "0x2\r\nok\r\n0\r\n\r\n"),
        cut("9112 §7.1", "a size with a sign", "-2\r\nok\r\n0\r\n\r\n"),
        cut("9112 §7.1", "a size that wraps around", "10000000000000002\r\nok\r\n0\r\n\r\n"),
        cut("9112 §7.1", "a blank after the size", "2 \r\nok\r\n0\r\n\r\n"),
        cut("9112 §7.1", "no size", "\r\nok\r\n0\r\n\r\n"),
        cut("9112 §7.1.2", "a trailer with a blank before its colon", "0\r\nX : y\r\n\r\n"),
        cut("9112 §7.1.2", "a folded trailer", "0\r\nX: y\r\n z\r\n\r\n"),
    ]
}

fn lines_and_hosts() -> Vec<Case> {
    let refused = |class, what, sent: &str| case(class, what, format!("{sent}{SMUGGLED}"), Refused(400));
    vec![
        refused("9112 §2.2", "lines ended by LF", "GET / HTTP/1.1\nHost: shop.example\n\n"),
        refused("9112 §2.2", "lines ended by CR", "GET / HTTP/1.1\rHost: shop.example\r\r"),
        refused("9112 §2.2", "a request line ended by CR CR LF", &format!("GET / HTTP/1.1\r\r\n{HOST}\r\n")),
        refused("9112 §2.2", "an empty line of CR CR LF", &format!("GET / HTTP/1.1\r\n{HOST}\r\r\n")),
        refused("9112 §2.2", "a blank before the first field", &format!("GET / HTTP/1.1\r\n {HOST}\r\n")),
        refused("9112 §3", "HTTP/0.9", "GET /\r\n"),
        refused("9112 §3", "two versions", &format!("GET / HTTP/1.1 HTTP/1.1\r\n{HOST}\r\n")),
        refused("9112 §3", "a request hidden in the target", &format!("GET /\tHTTP/1.1\r\n{HOST}\r\n")),
        refused("9112 §3.2", "two hosts", &format!("GET / HTTP/1.1\r\n{HOST}Host: evil.example\r\n\r\n")),
        refused(
            "9112 §3.2",
            "a host on a folded line",
            "GET / HTTP/1.1\r\nX: y\r\n Host: shop.example\r\n\r\n",
        ),
        refused(
            "9112 §3.2.2",
            "a target without an authority",
            &format!("GET http:///x HTTP/1.1\r\n{HOST}\r\n"),
        ),
        refused(
            "9110 §4.2.4",
            "an authority with user information",
            &format!("GET http://shop.example@evil.example/ HTTP/1.1\r\n{HOST}\r\n"),
        ),
        refused(
            "9112 §3.2.2",
            "an authority with a backslash",
            &format!("GET http://shop.example\\@evil.example/ HTTP/1.1\r\n{HOST}\r\n"),
        ),
        case(
            "9112 §3.2.2",
            "an absolute target goes before Host, and is all the app sees",
            "GET http://shop.example/x HTTP/1.1\r\nHost: evil.example\r\n\r\n",
            Seen(&[("GET /x HTTP/1.1", "")]),
        ),
        case(
            "9112 §3.2.1",
            "two slashes are a path, not an authority",
            format!("GET //evil.example/x HTTP/1.1\r\n{HOST}\r\n"),
            Seen(&[("GET //evil.example/x HTTP/1.1", "")]),
        ),
        case(
            "9110 §9.3.8",
            "TRACE shows what proxies add",
            format!("TRACE / HTTP/1.1\r\n{HOST}\r\n"),
            Refused(405),
        ),
        case(
            "9110 §9.3.6",
            "CONNECT",
            format!("CONNECT shop.example:80 HTTP/1.1\r\n{HOST}\r\n"),
            Refused(405),
        ),
        case("9113 §3.4", "the preface of HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Refused(505)),
        case(
            "h2c, 9113 §3.1",
            "an upgrade to HTTP/2 goes no further",
            format!(
                "GET / HTTP/1.1\r\n{HOST}Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\
                 HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"
            ),
            Seen(&[("GET / HTTP/1.1", "")]),
        ),
        case(
            "h2c, 9110 §7.8",
            "nor in company",
            format!(
                "GET / HTTP/1.1\r\n{HOST}Connection: Upgrade\r\nUpgrade: websocket, h2c\r\nUpgrade: h2c\r\n\r\n"
            ),
            Seen(&[("GET / HTTP/1.1", "")]),
        ),
    ]
}

fn ok() -> Vec<u8> {
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok".to_vec()
}

/// What went wrong with a case, if anything.
fn judge(balancer: &Balancer, app: &Recorder, Case { sent, then, .. }: &Case) -> Result<(), String> {
    app.forget();
    let mut client = Client::connect(balancer.http);
    let _ = client.try_send(sent);
    let answers = if let Seen(requests) = then { requests.len() } else { 1 };
    let statuses: Vec<Option<u16>> =
        (0..answers).map(|_| client.try_read(false).ok().map(|response| response.status)).collect();
    let (expected, closed) = match then {
        Refused(status) | Cut(status) => (vec![Some(*status)], client.is_closed()),
        Seen(requests) => (vec![Some(200); requests.len()], true),
    };
    if statuses != expected || !closed {
        return Err(format!("answered {statuses:?}, closed: {closed}"));
    }
    let bytes = app.bytes();
    let shown = || format!("the app got {:?}", String::from_utf8_lossy(&bytes));
    match then {
        Refused(_) if !bytes.is_empty() => Err(shown()),
        Cut(_) => {
            let heads = bytes.windows(4).filter(|window| *window == b"\r\n\r\n").count();
            let text = String::from_utf8_lossy(&bytes);
            // It may not have come at all: the body can be refused before the head is sent.
            let clean = heads <= 1 && !text.contains("/smuggled") && !text.contains("\r\n0\r\n");
            if clean { Ok(()) } else { Err(shown()) }
        }
        Seen(expected) => {
            let seen = read_all_requests(bytes.clone());
            let same = seen.len() == expected.len()
                && seen
                    .iter()
                    .zip(*expected)
                    .all(|(seen, (line, body))| seen.line == *line && seen.body == *body);
            let clean = seen.iter().all(|request| {
                let absent =
                    ["upgrade", "http2-settings", "connection", "transfer_encoding", "content_length"];
                let host = request.values("host");
                absent.iter().all(|name| request.values(name).is_empty())
                    && host == ["shop.example"]
                    && request.values("x-forwarded-for") == ["127.0.0.1"]
            });
            if same && clean { Ok(()) } else { Err(shown()) }
        }
        Refused(_) => Ok(()),
    }
}

#[test]
fn no_request_is_smuggled_past() {
    let app = Recorder::start(|_| ok());
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    let cases = [two_lengths(), hidden_codings(), bodies(), lines_and_hosts()];
    let mut failures = Vec::new();
    for case in cases.iter().flatten() {
        if let Err(why) = judge(&balancer, &app, case) {
            failures.push(format!("{}: {}: {why}", case.class, case.what));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    until("nothing is left of them", || balancer.upstream("a").active_requests == 0);
}

/// An app that answers as soon as the head is there, without waiting for a body.
fn hasty(answer: &'static [u8]) -> (SocketAddr, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("an address");
    let address = listener.local_addr().expect("its address");
    let got: Arc<Mutex<Vec<u8>>> = Arc::default();
    let all = got.clone();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let all = all.clone();
            std::thread::spawn(move || {
                let (mut buffer, mut answered) = ([0; 4096], false);
                while let Ok(count @ 1..) = stream.read(&mut buffer) {
                    all.lock().expect("unpoisoned").extend_from_slice(&buffer[..count]);
                    if !std::mem::replace(&mut answered, true) {
                        let _ = stream.write_all(answer);
                    }
                }
            });
        }
    });
    (address, got)
}

#[test]
fn a_body_that_comes_after_an_early_answer_is_no_request() {
    for expect in ["", "Expect: 100-continue\r\n", "Expect: y 100-continue\r\n"] {
        let (address, got) = hasty(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
        let balancer = Balancer::start(&[]);
        balancer.route("shop.example", &[("a", address, "up")]);
        let mut client = Client::connect(balancer.http);
        client.send(post(&format!("{expect}Content-Length: 46\r\n"), ""));
        assert_eq!(client.read().status, 200);
        // What was announced as a body stays one, and then there is nobody to talk to.
        let _ = client.try_send(SMUGGLED);
        let _ = client.try_send(SMUGGLED);
        assert!(client.is_closed());
        let mut other = Client::connect(balancer.http);
        assert_eq!(other.get("shop.example", "/next").status, 200);
        let got = String::from_utf8(got.lock().expect("unpoisoned").clone()).expect("text");
        // The next request came over a connection of its own, and nothing became one by itself.
        assert!(!got.contains("/smuggled HTTP/1.1\r\nHost: shop.example\r\nX-Forwarded-For"), "{got}");
        assert_eq!(got.matches("X-Forwarded-For").count(), 2, "{got}");
        assert_eq!(balancer.upstream("a").connections_total, 2);
    }
}

#[test]
fn a_refused_upgrade_leaves_the_connection_in_http() {
    let app = Recorder::start(|line| match line {
        "GET /ws HTTP/1.1" => b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 0\r\n\r\n".to_vec(),
        _ => ok(),
    });
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    let mut client = Client::connect(balancer.http);
    let ask =
        format!("GET /ws HTTP/1.1\r\n{HOST}Connection: upgrade\r\nUpgrade: websocket\r\n\r\n{SMUGGLED}");
    client.send(ask);
    assert_eq!((client.read().status, client.read().status), (426, 200));
    let seen = read_all_requests(app.bytes());
    // The second was judged: it has its own fields.
    assert_eq!(seen.len(), 2);
    assert_eq!(seen[1].values("x-forwarded-for"), ["127.0.0.1"]);
}

#[test]
fn responses_out_of_step_reach_nobody_else() {
    // A body after HEAD, a body after 304 and 204, and one response too many.
    for (line, answer) in [
        (
            "HEAD",
            &b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
                [..],
        ),
        ("GET", b"HTTP/1.1 304 Not Modified\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"),
        (
            "GET",
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",
        ),
    ] {
        let app = Recorder::start(move |asked| if asked.contains("/odd") { answer.to_vec() } else { ok() });
        let balancer = Balancer::start(&[]);
        balancer.route("shop.example", &[("a", app.address, "up")]);
        let mut client = Client::connect(balancer.http);
        client.send(format!("{line} /odd HTTP/1.1\r\n{HOST}\r\n"));
        client.try_read(line == "HEAD").expect("a response");
        for _ in 0..3 {
            let mut next = Client::connect(balancer.http);
            next.stream.get_ref().set_read_timeout(Some(PATIENCE)).expect("a timeout");
            assert_eq!(
                next.get("shop.example", "/").text(),
                "ok",
                "after {:?}",
                String::from_utf8_lossy(answer)
            );
        }
        assert_eq!(balancer.upstream("a").connections_total, 2, "the odd connection is used again");
    }
}
