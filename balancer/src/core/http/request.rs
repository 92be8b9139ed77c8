//! Judging a request: is it unambiguous, whom is it for, how long is its body, and what is passed on.

use std::ops::Range;

use super::body::Body;
use super::forwarded::{self, Caller, same_variable};
use super::head::{Field, HeadError, RequestHead, Version};
use crate::table::normal_host;

/// Everything the balancer needs to know of a request, and the head it sends upstream.
#[derive(Debug)]
pub struct RequestPlan {
    /// The host it is for, in the form routes are matched by; empty for an HTTP/1.0 request without one.
    pub host: String,
    pub body: Body,
    pub version: Version,
    pub is_head: bool,
    /// Whether it may be sent a second time when a reused connection turns out dead: the method is
    /// idempotent (RFC 9110 §9.2.2) and there is no body to have been read already.
    pub repeatable: bool,
    /// Whether the client wants to go on after this one (RFC 9112 §9.3).
    pub keep_alive: bool,
    /// Whether the client asks to switch protocols.
    pub upgrade: bool,
    /// Whether the client waits for `100 Continue`, or for a final answer, before it sends the body.
    pub expects: bool,
    /// The head to send upstream, always HTTP/1.1.
    pub forward: Vec<u8>,
    /// Where in it the request's name is.
    pub id: Range<usize>,
}

/// Fields that concern one connection only, besides those that Connection names (RFC 9110 §7.6.1). The
/// framing ones are decided here and written anew.
const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authorization",
    "proxy-authenticate",
    "te",
    "upgrade",
    "http2-settings",
    "transfer-encoding",
];

/// Fields a client cannot have removed by naming them in Connection.
const NEVER_NOMINATED: [&str; 4] = ["host", "content-length", "expect", "cookie"];

/// What the fields of a request say about the request itself.
#[derive(Default)]
struct Facts<'a> {
    host: Option<&'a [u8]>,
    length: Option<u64>,
    chunked: bool,
    close: bool,
    keep_alive: bool,
    connection_upgrade: bool,
    upgrade: Option<&'a [u8]>,
    expects: bool,
    nominated: Vec<&'a [u8]>,
}

/// Judges a request head that came from this caller.
pub fn plan(head: &RequestHead<'_>, caller: &Caller) -> Result<RequestPlan, HeadError> {
    // A tunnel is for forward proxies; what TRACE echoes is what proxies add, for whoever can make a browser ask.
    if head.method == b"CONNECT" || head.method == b"TRACE" {
        return Err(HeadError::Method);
    }
    let facts = gather(head)?;
    let (authority, target) = split_target(head)?;
    let host_value = authority.or(facts.host).unwrap_or_default();
    let host = match (host_value, head.version) {
        (b"", Version::Http10) => String::new(),
        _ => normal_host(host_value).ok_or(HeadError::Host)?,
    };
    let body = match (facts.chunked, facts.length) {
        (true, Some(_)) => return Err(HeadError::BodyLength),
        // RFC 9112 §6.1: an HTTP/1.0 message with a transfer coding has faulty framing.
        (true, None) if head.version == Version::Http10 => return Err(HeadError::BodyLength),
        (true, None) => Body::chunked(),
        (false, Some(length)) => Body::Length(length),
        (false, None) => Body::NONE,
    };
    let upgrade = facts.upgrade.filter(|protocol| {
        let prior_knowledge = protocol.len() >= 2 && protocol[..2].eq_ignore_ascii_case(b"h2");
        facts.connection_upgrade && head.version == Version::Http11 && !prior_knowledge
    });
    let (forward, id) = write_forward(head, target, host_value, &facts, upgrade, caller);
    Ok(RequestPlan {
        host,
        version: head.version,
        is_head: head.method == b"HEAD",
        repeatable: body.is_done() && is_idempotent(head.method),
        keep_alive: match head.version {
            Version::Http11 => !facts.close,
            Version::Http10 => facts.keep_alive && !facts.close,
        },
        upgrade: upgrade.is_some(),
        expects: facts.expects && head.version == Version::Http11,
        forward,
        id,
        body,
    })
}

fn gather<'a>(head: &RequestHead<'a>) -> Result<Facts<'a>, HeadError> {
    let mut facts = Facts::default();
    let mut upgrades = 0;
    for field in &head.fields {
        if field.is("host") {
            if facts.host.replace(field.value).is_some() {
                return Err(HeadError::Host);
            }
        } else if field.is("content-length") {
            let length = parse_length(field.value).ok_or(HeadError::BodyLength)?;
            if facts.length.replace(length).is_some() {
                return Err(HeadError::BodyLength);
            }
        } else if field.is("transfer-encoding") {
            if facts.chunked || !field.value.eq_ignore_ascii_case(b"chunked") {
                return Err(coding_error(field));
            }
            facts.chunked = true;
        } else if field.is("connection") {
            for option in field.value.split(|b| *b == b',').map(<[u8]>::trim_ascii) {
                match option {
                    _ if option.eq_ignore_ascii_case(b"close") => facts.close = true,
                    _ if option.eq_ignore_ascii_case(b"keep-alive") => facts.keep_alive = true,
                    _ if option.eq_ignore_ascii_case(b"upgrade") => facts.connection_upgrade = true,
                    _ => facts.nominated.push(option),
                }
            }
        } else if field.is("expect") {
            facts.expects = true;
        } else if field.is("upgrade") {
            upgrades += 1;
            facts.upgrade = Some(field.value);
        }
    }
    if upgrades > 1 {
        facts.upgrade = None;
    }
    // RFC 9112 §3.2: an HTTP/1.1 request has exactly one Host.
    if head.version == Version::Http11 && facts.host.is_none() {
        return Err(HeadError::Host);
    }
    if let Some(host) = facts.host.filter(|host| !host.is_empty()) {
        normal_host(host).ok_or(HeadError::Host)?;
    }
    Ok(facts)
}

/// RFC 9112 §6.3: a request whose last coding is not chunked has no knowable end; others we do not know.
fn coding_error(field: &Field<'_>) -> HeadError {
    let elements: Vec<&[u8]> = field.list().collect();
    let is_chunked = |coding: &&[u8]| coding.eq_ignore_ascii_case(b"chunked");
    let once_at_end = elements.iter().position(is_chunked) == Some(elements.len().wrapping_sub(1));
    if elements.len() > 1 && once_at_end { HeadError::TransferCoding } else { HeadError::BodyLength }
}

/// Digits and nothing else (RFC 9110 §8.6).
pub(super) fn parse_length(value: &[u8]) -> Option<u64> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// The authority of an absolute-form target, which overrides Host (RFC 9112 §3.2.2), and the target in the
/// form an origin server wants.
fn split_target<'a>(head: &RequestHead<'a>) -> Result<(Option<&'a [u8]>, Target<'a>), HeadError> {
    let target = head.target;
    if target.starts_with(b"/") {
        return Ok((None, Target { slash: false, rest: target }));
    }
    if target == b"*" && head.method == b"OPTIONS" {
        return Ok((None, Target { slash: false, rest: target }));
    }
    let scheme_end = target.windows(3).position(|w| w == b"://").ok_or(HeadError::Target)?;
    let scheme = &target[..scheme_end];
    if !scheme.eq_ignore_ascii_case(b"http") && !scheme.eq_ignore_ascii_case(b"https") {
        return Err(HeadError::Target);
    }
    let after = &target[scheme_end + 3..];
    let end = after.iter().position(|b| matches!(b, b'/' | b'?')).unwrap_or(after.len());
    let (authority, rest) = after.split_at(end);
    if authority.is_empty() {
        return Err(HeadError::Host);
    }
    Ok((Some(authority), Target { slash: !rest.starts_with(b"/"), rest }))
}

/// A target to write: perhaps a slash, then the bytes.
struct Target<'a> {
    slash: bool,
    rest: &'a [u8],
}

/// RFC 9110 §9.2.2; TRACE does not get here.
fn is_idempotent(method: &[u8]) -> bool {
    [&b"GET"[..], b"HEAD", b"OPTIONS", b"PUT", b"DELETE"].contains(&method)
}

fn write_forward(
    head: &RequestHead<'_>,
    target: Target<'_>,
    host: &[u8],
    facts: &Facts<'_>,
    upgrade: Option<&[u8]>,
    caller: &Caller,
) -> (Vec<u8>, Range<usize>) {
    let size: usize = head.fields.iter().map(|field| field.name.len() + field.value.len() + 4).sum();
    let mut out = Vec::with_capacity(size + head.method.len() + target.rest.len() + 3 * host.len() + 320);
    out.extend_from_slice(head.method);
    out.extend_from_slice(if target.slash { b" /" } else { b" " });
    out.extend_from_slice(target.rest);
    out.extend_from_slice(b" HTTP/1.1\r\n");
    write_field(&mut out, b"Host", host);
    for field in &head.fields {
        if passes_on(field, facts, head.version) && forwarded::passes(field, caller) {
            write_field(&mut out, field.name, field.value);
        }
    }
    if facts.chunked {
        write_field(&mut out, b"Transfer-Encoding", b"chunked");
    }
    if let Some(protocol) = upgrade {
        write_field(&mut out, b"Connection", b"upgrade");
        write_field(&mut out, b"Upgrade", protocol);
    }
    let id = forwarded::write(&mut out, &head.fields, caller, host);
    out.extend_from_slice(b"\r\n");
    (out, id)
}

fn passes_on(field: &Field<'_>, facts: &Facts<'_>, version: Version) -> bool {
    if field.is("host") || HOP_BY_HOP.iter().any(|name| field.is(name)) {
        return false;
    }
    if is_disguised(field.name) {
        return false;
    }
    // RFC 9110 §10.1.1: an expectation in an HTTP/1.0 request is ignored.
    if version == Version::Http10 && field.is("expect") {
        return false;
    }
    let nominated = facts.nominated.iter().any(|name| field.name.eq_ignore_ascii_case(name));
    !nominated || NEVER_NOMINATED.iter().any(|name| field.is(name))
}

/// Whether it is a framing or routing field spelled with underscores.
fn is_disguised(name: &[u8]) -> bool {
    name.contains(&b'_') && ["content-length", "transfer-encoding"].iter().any(|own| same_variable(name, own))
}

pub(super) fn write_field(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}
