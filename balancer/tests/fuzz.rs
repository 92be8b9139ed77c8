//! The entries of the fuzz targets (`fuzz/`), with seeded bytes: noise, and valid inputs with a few faults.
//!
//! `FUZZ_CASES=N` tries more; a case that fails is shown with its seed.

#[path = "../fuzz/src/door.rs"]
mod door;
#[path = "common/hello.rs"]
mod hello;
#[path = "../fuzz/src/parsers.rs"]
mod parsers;
#[path = "../fuzz/src/tls_records.rs"]
mod tls_records;

use std::panic::RefUnwindSafe;
use std::sync::Mutex;

use epagent_balancer::control::protocol::Counters;
use epagent_balancer::core::io::RecvEnd;
use epagent_balancer::core::secure::TlsFault;
use hello::{client_hello, fatal_alert};

/// Cases of each entry in one test run; some seconds in a debug build.
const CASES: u64 = 4_000;

/// splitmix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn noise(&mut self, most: usize) -> Vec<u8> {
        let len = self.below(most);
        (0..len).map(|_| self.next() as u8).collect()
    }

    /// One of the valid inputs, or two, with up to four faults.
    fn faulty(&mut self, valid: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = valid[self.below(valid.len())].clone();
        if self.below(3) == 0 {
            bytes.extend_from_slice(&valid[self.below(valid.len())]);
        }
        for _ in 0..self.below(5) {
            let at = self.below(bytes.len().max(1)).min(bytes.len());
            match self.below(4) {
                0 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                1 if at < bytes.len() => drop(bytes.remove(at)),
                2 => bytes.truncate(at),
                _ => bytes.insert(at, b"\r\n\0 :,;\t\xff\x0b0aA"[self.below(13)]),
            }
        }
        bytes
    }
}

/// Tries one entry with bytes that `make` makes from a seed.
fn check(entry: impl Fn(&[u8]) + RefUnwindSafe, make: impl Fn(&mut Rng) -> Vec<u8>) {
    let cases = std::env::var("FUZZ_CASES").map_or(CASES, |text| text.parse().expect("a number"));
    for seed in 0..cases {
        let bytes = make(&mut Rng(seed));
        let outcome = std::panic::catch_unwind(|| entry(&bytes));
        if let Err(panic) = outcome {
            eprintln!("seed {seed}: {:?}", String::from_utf8_lossy(&bytes));
            std::panic::resume_unwind(panic);
        }
    }
}

fn texts(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

#[test]
fn heads_are_judged_alike_however_they_come_and_pass_on_unambiguous() {
    let valid = texts(&[
        "GET / HTTP/1.1\r\nHost: a.example\r\n\r\n",
        "POST http://a.example:80/x?y HTTP/1.1\r\nHost: b\r\nContent-Length: 5\r\nX-Forwarded-For: 1.2.3.4\r\n\r\nhello",
        "PUT / HTTP/1.1\r\nHost: [::1]:8080\r\nTransfer-Encoding: chunked\r\nForwarded: for=a;by=\"b\"\r\n\r\n5;x=y\r\nhello\r\n0\r\nA: b\r\n\r\n",
        "GET / HTTP/1.0\r\nConnection: keep-alive, x-y\r\nX-Y: 1\r\nX-Request-Id: abc\r\n\r\n",
        "GET /ws HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\nContent_Length: 3\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\nConnection: close\r\n\r\nhello",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        "HTTP/1.0 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n",
    ]);
    check(parsers::http_head, |rng| rng.faulty(&valid));
    check(parsers::http_head, |rng| rng.noise(200));
}

#[test]
fn hellos_are_judged_alike_however_they_come() {
    let mut valid = [999, 60, 30].map(|size| client_hello(Some("db.example"), size)).to_vec();
    valid.extend([client_hello(None, 9_999), fatal_alert(112)]);
    check(parsers::client_hello, |rng| rng.faulty(&valid));
    check(parsers::client_hello, |rng| [vec![22, 3, 1, 0], rng.noise(300)].concat());
}

#[test]
fn proxy_headers_are_judged_alike_however_they_come() {
    let mut valid = texts(&[
        "PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\nGET",
        "PROXY TCP6 2001:db8::1 ::ffff:192.0.2.1 1 0\r\n",
        "PROXY UNKNOWN\r\n",
    ]);
    valid.push(
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x10\xc0\0\x02\x01\xc6\x33\x64\x01\xdc\x04\x01\xbb\x04\0\x01\0GET"
            .to_vec(),
    );
    valid.push([&b"\r\n\r\n\0\r\nQUIT\n\x21\x21\0\x24"[..], &[0xfd; 36]].concat());
    check(parsers::proxy_header, |rng| rng.faulty(&valid));
    check(parsers::proxy_header, |rng| [b"\r\n\r\n\0\r\nQUIT\n\x21".to_vec(), rng.noise(100)].concat());
}

#[test]
fn a_stranger_is_never_let_in_and_of_a_client_only_what_it_said_comes_out() {
    let all = Mutex::new(Vec::new());
    let entry = |bytes: &[u8]| all.lock().expect("unpoisoned").push(tls_records::tls_records(bytes));
    let hellos = [0, 1].map(tls_records::hello);
    let http = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec();
    // An even first byte is a stranger's, an odd one chooses a client.
    let strangers =
        [hellos.to_vec(), vec![http, fatal_alert(112), client_hello(Some("a.example"), 60)]].concat();
    check(entry, |rng| [vec![rng.next() as u8 & !1], rng.faulty(&strangers)].concat());
    check(entry, |rng| [vec![rng.next() as u8 & !1, 22, 3, 1], rng.noise(300)].concat());
    check(entry, |rng| [vec![rng.next() as u8 | 1], rng.noise(60)].concat());
    // Cases that reach nothing prove nothing.
    let all = all.into_inner().expect("unpoisoned");
    let count = |what: &dyn Fn(&tls_records::Outcome) -> bool| all.iter().filter(|case| what(case)).count();
    for fault in [TlsFault::PlainHttp, TlsFault::NotTls, TlsFault::Gone, TlsFault::Broken] {
        assert!(count(&|case| case.fault == Some(fault)) > 10, "hardly a case had {fault:?}");
    }
    let failed = |case: &tls_records::Outcome| matches!(case.end, Some(RecvEnd::Failed(_)));
    assert!(count(&|case| case.secured && case.received_bytes > 0) > 100, "hardly a client was heard");
    assert!(count(&|case| case.end == Some(RecvEnd::Eof)) > 100, "hardly a client ended in order");
    assert!(count(&failed) > 10, "hardly a record was harmed");
}

#[test]
fn the_core_keeps_to_its_contract_whatever_completes() {
    let all = Mutex::new(Counters::default());
    let entry = |bytes: &[u8]| all.lock().expect("unpoisoned").add(&door::completions(bytes));
    check(entry, |rng| rng.noise(2_000));
    // Cases that reach nothing prove nothing.
    let all = all.into_inner().expect("unpoisoned");
    for (what, count) in [
        ("requests", all.requests),
        ("responses", all.responses),
        ("refused requests", all.refused_bad_request),
        ("held until too old", all.hold_expired),
        ("upgrades", all.upgrades),
        ("retried connects", all.retried_connect),
        ("upstreams that died", all.upstream_died),
        ("faulty PROXY headers", all.proxy_header_refused),
        ("server names", all.sni_unrouted),
        ("handshakes", all.tls_handshakes),
    ] {
        assert!(count > 0, "no case had {what}: {all:?}");
    }
}
