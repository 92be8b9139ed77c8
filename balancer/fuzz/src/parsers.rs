//! The parsers: a byte more or less at a time must not change what is found, what is let through must be found
//! again as it was meant, and nothing may be let through that could be read in two ways.

use std::net::{IpAddr, Ipv4Addr};

use epagent_balancer::core::http::body::Body;
use epagent_balancer::core::http::forwarded::Caller;
use epagent_balancer::core::http::head::{self, RequestHead, Scan, Version};
use epagent_balancer::core::http::request::{self, RequestPlan};
use epagent_balancer::core::http::request_id::{RequestIds, is_valid};
use epagent_balancer::core::http::response::{self, Asked, ResponsePlan};
use epagent_balancer::core::preface::{client_hello, proxy};

/// Heads of requests and responses, and the bodies after them.
pub fn http_head(bytes: &[u8]) {
    let scanned = head::find_end(bytes, 0);
    let mut from = 0;
    let mut piecewise = Scan::Partial { from: 0 };
    for end in cuts(bytes) {
        piecewise = head::find_end(&bytes[..end], from);
        match piecewise {
            Scan::Partial { from: next } => from = next,
            _ => break,
        }
    }
    assert_eq!(piecewise, scanned, "pieces find something else than the whole");
    let Scan::Complete { start, end } = scanned else { return };
    try_request(&bytes[start..end], &bytes[end..]);
    if start == 0 {
        try_response(&bytes[..end]);
    }
}

fn try_request(bytes: &[u8], after: &[u8]) {
    let Ok(parsed) = head::parse_request(bytes) else { return };
    for trusted in [false, true] {
        let address = Some(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)));
        let caller = Caller { address, secure: false, trusted, id: RequestIds::new([1, 2]).make() };
        let Ok(plan) = request::plan(&parsed, &caller) else { return };
        check_forward(&plan, &parsed, trusted);
        if !trusted {
            try_body(plan.body, after);
        }
    }
}

/// What goes upstream is one head, and means what the client's did.
fn check_forward(plan: &RequestPlan, parsed: &RequestHead<'_>, trusted: bool) {
    let forward = &plan.forward;
    let whole = Scan::Complete { start: 0, end: forward.len() };
    assert_eq!(head::find_end(forward, 0), whole, "not one head goes upstream");
    let sent = head::parse_request(forward).expect("a head of ours parses");
    assert_eq!((sent.method, sent.version), (parsed.method, Version::Http11));
    let count = |name: &str| sent.fields.iter().filter(|field| field.is(name)).count();
    let framing = (count("content-length"), count("transfer-encoding"));
    let meant = match plan.body {
        Body::Chunked(_) => framing == (0, 1),
        Body::Length(_) => framing.0 <= 1 && framing.1 == 0,
        Body::UntilClose => false,
    };
    assert!(meant, "the framing is ambiguous upstream: {framing:?}");
    assert_eq!((count("host"), count("x-request-id")), (1, 1));
    assert!(is_valid(&forward[plan.id.clone()]));
    let own = if trusted { 0..=1 } else { 1..=1 };
    for name in ["x-forwarded-for", "x-forwarded-proto", "forwarded"] {
        assert!(own.contains(&count(name)), "{name} {} times", count(name));
    }
    let caller = Caller { address: None, secure: false, trusted, id: RequestIds::default().make() };
    // HTTP/1.0 may have no host, and goes on as HTTP/1.1, which must; the app may refuse that.
    if !plan.host.is_empty() {
        let again = request::plan(&sent, &caller).expect("a head of ours is judged well");
        assert_eq!((&again.host, &again.body), (&plan.host, &plan.body), "upstream it means something else");
    }
}

/// A body ends at the same byte however it is cut.
fn try_body(body: Body, bytes: &[u8]) {
    let (mut whole, mut pieces) = (body.clone(), body);
    let mut data = Vec::new();
    let taken = whole.feed(bytes, Some(&mut data));
    let mut at = 0;
    for end in cuts(bytes) {
        match pieces.feed(&bytes[at..end], None) {
            Ok(taken) => at += taken,
            Err(error) => return assert_eq!(taken, Err(error), "pieces break where the whole does not"),
        }
    }
    assert_eq!((taken, whole.is_done()), (Ok(at), pieces.is_done()), "pieces end elsewhere than the whole");
    assert!(data.iter().all(|range| range.end <= at));
}

fn try_response(bytes: &[u8]) {
    let Ok(parsed) = head::parse_response(bytes) else { return };
    for (is_head, upgrade, version) in [(false, true, Version::Http11), (true, false, Version::Http10)] {
        let asked = Asked { is_head, upgrade, version, keep_alive: true };
        let Ok(plan) = response::plan(&parsed, asked) else { continue };
        let forward = match plan {
            ResponsePlan::Interim { forward } | ResponsePlan::Switch { forward } => forward,
            ResponsePlan::Final(plan) => plan.forward,
        };
        // An HTTP/1.0 client gets nothing of an interim response.
        if forward.is_empty() {
            continue;
        }
        assert_eq!(head::find_end(&forward, 0), Scan::Complete { start: 0, end: forward.len() });
        let sent = head::parse_response(&forward).expect("a head of ours parses");
        assert_eq!(sent.status, parsed.status);
        let count = |name: &str| sent.fields.iter().filter(|field| field.is(name)).count();
        assert!(count("content-length") + count("transfer-encoding") <= 1, "two framings");
    }
}

/// The first message of a TLS client.
pub fn client_hello(bytes: &[u8]) {
    let whole = client_hello::scan(bytes);
    if let client_hello::Scan::Complete { server_name: Some(name) } = &whole {
        let normal = client_hello::normal_name(name.as_bytes());
        assert_eq!(normal.as_deref(), Some(name.as_str()), "a name that is none");
    }
    for end in cuts(bytes) {
        match client_hello::scan(&bytes[..end]) {
            client_hello::Scan::Partial { wants_bytes } => {
                assert!(wants_bytes > end && wants_bytes <= client_hello::HELLO_BYTES_MAX);
            }
            // What is decided stays decided, whatever follows.
            decided => return assert_eq!(decided, whole, "decided otherwise with {end} bytes"),
        }
    }
}

/// The header a proxy in front begins with.
pub fn proxy_header(bytes: &[u8]) {
    let whole = proxy::scan(bytes);
    for end in cuts(bytes) {
        match proxy::scan(&bytes[..end]) {
            proxy::Scan::Partial => assert!(end < proxy::HEADER_BYTES_MAX, "it waits for ever"),
            decided => {
                assert_eq!(decided, whole, "decided otherwise with {end} bytes");
                break;
            }
        }
    }
    let proxy::Scan::Complete { bytes: length, said } = whole else { return };
    assert!(length <= bytes.len());
    if let proxy::Said::Ends(ends) = said {
        let ours = proxy::write_v2(Some(ends));
        let proxy::Scan::Complete { bytes, said: proxy::Said::Ends(told) } = proxy::scan(&ours) else {
            panic!("a header of ours is not read");
        };
        let canonical = |ends: proxy::Ends| {
            [ends.source, ends.destination].map(|end| (end.ip().to_canonical(), end.port()))
        };
        assert_eq!((bytes, canonical(told)), (ours.len(), canonical(ends)));
    }
}

/// Ends of pieces: every byte of short inputs and of the first bytes of long ones, then uneven steps.
fn cuts(bytes: &[u8]) -> impl Iterator<Item = usize> {
    let len = bytes.len();
    let fine = len.min(600);
    (0..=fine).chain((fine..len).step_by(97)).chain([len])
}
