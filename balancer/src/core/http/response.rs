//! Understanding a response: how long its body is (RFC 9112 §6.3) and what the client is sent.

use std::io::Write;

use super::body::Body;
use super::head::{Field, HeadError, ResponseHead, Version};
use super::request::{parse_length, write_field};

/// What of the request decides how its response is read and passed on.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    pub is_head: bool,
    pub upgrade: bool,
    pub version: Version,
    /// The client wants to go on, and the balancer does too.
    pub keep_alive: bool,
}

/// What follows a response head.
#[derive(Debug)]
pub enum ResponsePlan {
    /// 1xx: pass `forward` on (empty: not to this client) and read the next head.
    Interim { forward: Vec<u8> },
    /// 101: pass `forward` on, and from then on bytes both ways.
    Switch { forward: Vec<u8> },
    /// The response proper.
    Final(FinalPlan),
}

/// A final response.
#[derive(Debug)]
pub struct FinalPlan {
    pub status: u16,
    pub body: Body,
    /// The body's framing is taken off: the client does not know the chunked coding.
    pub unchunk: bool,
    /// The upstream connection can carry another request.
    pub upstream_keep_alive: bool,
    /// The client connection can.
    pub client_keep_alive: bool,
    /// The head to send to the client.
    pub forward: Vec<u8>,
}

const HOP_BY_HOP: [&str; 8] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "upgrade",
    "transfer-encoding",
];

#[derive(Default)]
struct Facts<'a> {
    length: Option<u64>,
    chunked: bool,
    close: bool,
    keep_alive: bool,
    upgrade: Option<&'a [u8]>,
    nominated: Vec<&'a [u8]>,
}

/// Understands a response head.
pub fn plan(head: &ResponseHead<'_>, asked: Asked) -> Result<ResponsePlan, HeadError> {
    let facts = gather(head)?;
    if head.status == 101 {
        if !asked.upgrade || facts.upgrade.is_none() {
            return Err(HeadError::StatusLine);
        }
        return Ok(ResponsePlan::Switch {
            forward: write_forward(head, &facts, asked, Kept::Upgrade, false),
        });
    }
    if head.status < 200 {
        let wanted = asked.version == Version::Http11;
        let forward =
            if wanted { write_forward(head, &facts, asked, Kept::Silent, false) } else { Vec::new() };
        return Ok(ResponsePlan::Interim { forward });
    }
    let bodiless = asked.is_head || matches!(head.status, 204 | 304);
    let body = match (facts.chunked, facts.length) {
        _ if bodiless => Body::NONE,
        (true, None) => Body::chunked(),
        (false, Some(length)) => Body::Length(length),
        (false, None) => Body::UntilClose,
        (true, Some(_)) => return Err(HeadError::BodyLength),
    };
    let unchunk = facts.chunked && asked.version == Version::Http10;
    // A HEAD response that announces no length comes from a server that would end the body by closing, and
    // may close now.
    let unannounced = !facts.chunked && facts.length.is_none();
    let lengthless_head = asked.is_head && unannounced && !matches!(head.status, 204 | 304);
    let upstream_keep_alive = body != Body::UntilClose
        && !lengthless_head
        && match head.version {
            Version::Http11 => !facts.close,
            Version::Http10 => facts.keep_alive && !facts.close,
        };
    let framed = body != Body::UntilClose && (bodiless || !unchunk);
    let client_keep_alive = asked.keep_alive && framed;
    let kept = match (client_keep_alive, asked.version) {
        (false, _) => Kept::Close,
        (true, Version::Http10) => Kept::KeepAlive,
        (true, Version::Http11) => Kept::Silent,
    };
    Ok(ResponsePlan::Final(FinalPlan {
        status: head.status,
        forward: write_forward(head, &facts, asked, kept, facts.chunked && !unchunk),
        body,
        unchunk,
        upstream_keep_alive,
        client_keep_alive,
    }))
}

fn gather<'a>(head: &ResponseHead<'a>) -> Result<Facts<'a>, HeadError> {
    let mut facts = Facts::default();
    for field in &head.fields {
        if field.is("content-length") {
            // The same length said twice has one meaning (RFC 9110 §8.6); different ones do not.
            for part in field.value.split(|b| *b == b',') {
                let length = parse_length(part.trim_ascii()).ok_or(HeadError::BodyLength)?;
                if facts.length.replace(length).is_some_and(|earlier| earlier != length) {
                    return Err(HeadError::BodyLength);
                }
            }
        } else if field.is("transfer-encoding") {
            let known = field.value.eq_ignore_ascii_case(b"chunked") && !facts.chunked;
            if !known || head.version == Version::Http10 {
                return Err(HeadError::TransferCoding);
            }
            facts.chunked = true;
        } else if field.is("connection") {
            for option in field.value.split(|b| *b == b',').map(<[u8]>::trim_ascii) {
                match option {
                    _ if option.eq_ignore_ascii_case(b"close") => facts.close = true,
                    _ if option.eq_ignore_ascii_case(b"keep-alive") => facts.keep_alive = true,
                    _ => facts.nominated.push(option),
                }
            }
        } else if field.is("upgrade") {
            facts.upgrade = Some(field.value);
        }
    }
    if facts.chunked && facts.length.is_some() {
        return Err(HeadError::BodyLength);
    }
    Ok(facts)
}

/// What the Connection field of the passed-on response says.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kept {
    /// Nothing: HTTP/1.1 goes on by default.
    Silent,
    KeepAlive,
    Close,
    Upgrade,
}

fn write_forward(
    head: &ResponseHead<'_>,
    facts: &Facts<'_>,
    asked: Asked,
    kept: Kept,
    chunked: bool,
) -> Vec<u8> {
    let size: usize = head.fields.iter().map(|field| field.name.len() + field.value.len() + 4).sum();
    let mut out = Vec::with_capacity(size + head.reason.len() + 96);
    // Writing to a vector cannot fail.
    let _ = write!(out, "HTTP/1.1 {} ", head.status);
    out.extend_from_slice(head.reason);
    out.extend_from_slice(b"\r\n");
    let lengthless = head.status < 200 || head.status == 204;
    let mut length_written = false;
    for field in &head.fields {
        if field.is("content-length") {
            if !lengthless && !length_written {
                length_written = true;
                // One length, also when the upstream said it twice.
                let value = field.value.split(|b| *b == b',').next().unwrap_or_default();
                write_field(&mut out, field.name, value.trim_ascii());
            }
        } else if passes_on(field, facts) {
            write_field(&mut out, field.name, field.value);
        }
    }
    if chunked && !lengthless {
        write_field(&mut out, b"Transfer-Encoding", b"chunked");
    }
    match (kept, facts.upgrade) {
        (Kept::Upgrade, Some(protocol)) => {
            write_field(&mut out, b"Connection", b"upgrade");
            write_field(&mut out, b"Upgrade", protocol);
        }
        // RFC 9110 §15.5.22: 426 says which protocol to upgrade to.
        (_, Some(protocol)) if head.status == 426 && asked.version == Version::Http11 => {
            let option: &[u8] = if kept == Kept::Close { b"upgrade, close" } else { b"upgrade" };
            write_field(&mut out, b"Connection", option);
            write_field(&mut out, b"Upgrade", protocol);
        }
        (Kept::Close, _) => write_field(&mut out, b"Connection", b"close"),
        (Kept::KeepAlive, _) => write_field(&mut out, b"Connection", b"keep-alive"),
        (Kept::Silent | Kept::Upgrade, _) => {}
    }
    out.extend_from_slice(b"\r\n");
    out
}

fn passes_on(field: &Field<'_>, facts: &Facts<'_>) -> bool {
    let nominated = facts.nominated.iter().any(|name| field.name.eq_ignore_ascii_case(name));
    !nominated && !HOP_BY_HOP.iter().any(|name| field.is(name))
}
