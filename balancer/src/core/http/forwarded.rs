//! Telling an app who asked: X-Forwarded-For, -Proto and -Host, Forwarded (RFC 7239), and X-Request-Id.
//!
//! | | from anybody | from a trusted listener |
//! |---|---|---|
//! | X-Forwarded-For, Forwarded | the client's are dropped, ours written | extended by the client's address |
//! | X-Forwarded-Proto, -Host | ours | kept, if they have one meaning; else ours |
//! | X-Request-Id | made | kept, if it is a plain word; else made |
//! | X-Real-Ip, X-Forwarded-Port, -Server, -Prefix, -Ssl | dropped | passed on |
//!
//! A trusted proxy that speaks only one of the two dialects is continued in that one alone: begun here, the
//! other would name the proxy as the client. There is no X-Forwarded-Port: the port is in -Host, where it is
//! not the usual one.

use std::io::Write;
use std::net::IpAddr;
use std::ops::Range;

use super::head::{Field, is_text_byte, is_token_byte};
use super::request::write_field;
use super::request_id::{RequestId, is_valid};
use crate::table::normal_host;

/// Fields that are the balancer's to write.
const WRITTEN: [&str; 5] =
    ["x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "forwarded", "x-request-id"];

/// Fields that only a trusted client's word counts for.
const TRUSTED: [&str; 6] = [
    "x-forwarded-port",
    "x-forwarded-server",
    "x-forwarded-prefix",
    "x-forwarded-ssl",
    "x-forwarded-scheme",
    "x-real-ip",
];

/// Who asks, as the connection shows it.
#[derive(Debug, Clone, Copy)]
pub struct Caller {
    pub address: Option<IpAddr>,
    /// It speaks TLS.
    pub secure: bool,
    /// It came in on a trusted listener.
    pub trusted: bool,
    /// What the request is called, unless a trusted client has named it.
    pub id: RequestId,
}

/// What a trusted client said of those before it.
#[derive(Default)]
struct Said<'a> {
    addresses: Vec<&'a [u8]>,
    proto: Option<&'a [u8]>,
    host: Option<&'a [u8]>,
    forwarded: Vec<&'a [u8]>,
    id: Option<&'a [u8]>,
}

/// Whether a field is passed on as the client sent it.
pub fn passes(field: &Field<'_>, caller: &Caller) -> bool {
    // CGI-style servers read both spellings as one variable, so one with underscores is never passed on.
    let is = |name: &&str| same_variable(field.name, name);
    if !matches!(field.name.first(), Some(b'x' | b'X' | b'f' | b'F')) {
        return true;
    }
    if WRITTEN.iter().any(&is) {
        return false;
    }
    match TRUSTED.iter().find(|name| is(name)) {
        Some(name) => caller.trusted && field.is(name),
        None => true,
    }
}

/// Whether a CGI-style server reads both names as one variable.
pub fn same_variable(given: &[u8], name: &str) -> bool {
    let fold = |b: &u8| if *b == b'_' { b'-' } else { b.to_ascii_lowercase() };
    given.len() == name.len() && given.iter().map(fold).eq(name.bytes())
}

/// Writes the fields; `host` is the request's, perhaps empty. Returns where in `out` the request's name is.
pub fn write(out: &mut Vec<u8>, fields: &[Field<'_>], caller: &Caller, host: &[u8]) -> Range<usize> {
    let said = if caller.trusted { gather(fields) } else { Said::default() };
    let in_x = !said.addresses.is_empty() || said.proto.is_some() || said.host.is_some();
    let in_forwarded = !said.forwarded.is_empty();
    if in_x || !in_forwarded {
        write_x(out, &said, caller, host);
    }
    if in_forwarded || !in_x {
        write_forwarded(out, &said, caller, host);
    }
    out.extend_from_slice(b"X-Request-Id: ");
    let start = out.len();
    match said.id {
        Some(id) => out.extend_from_slice(id),
        None => out.extend_from_slice(&caller.id.digits()),
    }
    let id = start..out.len();
    out.extend_from_slice(b"\r\n");
    id
}

fn gather<'a>(fields: &[Field<'a>]) -> Said<'a> {
    let (mut said, mut protos, mut hosts, mut ids) = (Said::default(), 0, 0, 0);
    for field in fields {
        if field.is("x-forwarded-for") && !field.value.is_empty() {
            said.addresses.push(field.value);
        } else if field.is("x-forwarded-proto") {
            protos += 1;
            said.proto = Some(field.value).filter(|proto| is_proto(proto));
        } else if field.is("x-forwarded-host") {
            hosts += 1;
            said.host = Some(field.value).filter(|host| normal_host(host).is_some());
        } else if field.is("forwarded") && is_forwarded(field.value) {
            said.forwarded.push(field.value);
        } else if field.is("x-request-id") {
            ids += 1;
            said.id = Some(field.value).filter(|id| is_valid(id));
        }
    }
    // Said twice has no one meaning.
    said.proto = said.proto.filter(|_| protos == 1);
    said.host = said.host.filter(|_| hosts == 1);
    said.id = said.id.filter(|_| ids == 1);
    said
}

fn write_x(out: &mut Vec<u8>, said: &Said<'_>, caller: &Caller, host: &[u8]) {
    if !said.addresses.is_empty() || caller.address.is_some() {
        out.extend_from_slice(b"X-Forwarded-For: ");
        for (index, list) in said.addresses.iter().enumerate() {
            out.extend_from_slice(if index > 0 { b", " } else { b"" });
            out.extend_from_slice(list);
        }
        if let Some(address) = caller.address {
            let comma = if said.addresses.is_empty() { "" } else { ", " };
            // Writing to a vector cannot fail.
            let _ = write!(out, "{comma}{address}");
        }
        out.extend_from_slice(b"\r\n");
    }
    write_field(out, b"X-Forwarded-Proto", said.proto.unwrap_or(caller.proto()));
    let host = said.host.unwrap_or(host);
    if !host.is_empty() {
        write_field(out, b"X-Forwarded-Host", host);
    }
}

fn write_forwarded(out: &mut Vec<u8>, said: &Said<'_>, caller: &Caller, host: &[u8]) {
    out.extend_from_slice(b"Forwarded: ");
    for element in &said.forwarded {
        out.extend_from_slice(element);
        out.extend_from_slice(b", ");
    }
    // Writing to a vector cannot fail.
    let _ = match caller.address {
        Some(IpAddr::V4(v4)) => write!(out, "for={v4}"),
        // RFC 7239 §6: bracketed, and so quoted.
        Some(IpAddr::V6(v6)) => write!(out, "for=\"[{v6}]\""),
        None => write!(out, "for=unknown"),
    };
    if !host.is_empty() {
        let quote = if host.iter().all(|b| is_token_byte(*b)) { &b""[..] } else { b"\"" };
        // A host that has passed as one has nothing that would need escaping.
        for part in [b";host=", quote, host, quote] {
            out.extend_from_slice(part);
        }
    }
    out.extend_from_slice(b";proto=");
    out.extend_from_slice(caller.proto());
    out.extend_from_slice(b"\r\n");
}

impl Caller {
    fn proto(&self) -> &'static [u8] {
        if self.secure { b"https" } else { b"http" }
    }
}

fn is_proto(given: &[u8]) -> bool {
    [&b"http"[..], b"https", b"ws", b"wss"].iter().any(|known| given.eq_ignore_ascii_case(known))
}

/// RFC 7239 §4: elements separated by commas, each of pairs separated by semicolons. What is not of that form
/// would swallow what we add to it.
fn is_forwarded(value: &[u8]) -> bool {
    let mut rest = value;
    loop {
        let Some(after) = skip_pair(rest) else { return false };
        rest = after.trim_ascii_start();
        match rest {
            [] => return true,
            [b';', ..] => rest = &rest[1..],
            [b',', ..] => rest = rest[1..].trim_ascii_start(),
            _ => return false,
        }
    }
}

/// What follows a pair, `token=token` or `token="quoted"`.
fn skip_pair(bytes: &[u8]) -> Option<&[u8]> {
    let name = bytes.iter().position(|b| !is_token_byte(*b)).filter(|length| *length > 0)?;
    let value = bytes[name..].strip_prefix(b"=")?;
    let Some(quoted) = value.strip_prefix(b"\"") else {
        let end = value.iter().position(|b| !is_token_byte(*b)).unwrap_or(value.len());
        return (end > 0).then_some(&value[end..]);
    };
    let mut rest = quoted;
    loop {
        match rest {
            [b'"', after @ ..] => return Some(after),
            [b'\\', escaped, after @ ..] if is_text_byte(*escaped) => rest = after,
            [b'\\', ..] | [] => return None,
            [_, after @ ..] => rest = after,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::request_id::RequestIds;
    use super::*;

    fn caller(address: &str, trusted: bool) -> Caller {
        let id = RequestIds::default().make();
        Caller { address: address.parse().ok(), secure: false, trusted, id }
    }

    /// What is written for these fields, and the request's name.
    fn write_for(fields: &[(&str, &str)], caller: &Caller, host: &str) -> (Vec<String>, String) {
        let field = |(name, value)| Field { name: str::as_bytes(name), value: str::as_bytes(value) };
        let fields: Vec<Field<'_>> = fields.iter().copied().map(field).collect();
        let mut out = Vec::new();
        let id = write(&mut out, &fields, caller, host.as_bytes());
        let id = String::from_utf8(out[id].to_vec()).unwrap();
        let mut lines: Vec<String> = String::from_utf8(out).unwrap().lines().map(str::to_owned).collect();
        assert_eq!(lines.pop(), Some(format!("X-Request-Id: {id}")));
        (lines, id)
    }

    fn check(fields: &[(&str, &str)], caller: &Caller, host: &str, expected: &[&str]) {
        assert_eq!(write_for(fields, caller, host).0, expected, "{fields:?} of {caller:?}");
    }

    const LIES: [(&str, &str); 5] = [
        ("X-Forwarded-For", "1.1.1.1"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Host", "evil.example"),
        ("Forwarded", "for=1.1.1.1"),
        ("X-Request-Id", "mine"),
    ];

    #[test]
    fn anybody_is_told_of_as_the_connection_shows_them() {
        let plain =
            ["X-Forwarded-For: 192.0.2.1", "X-Forwarded-Proto: http", "X-Forwarded-Host: shop.example"];
        let forwarded = "Forwarded: for=192.0.2.1;host=shop.example;proto=http";
        check(&LIES, &caller("192.0.2.1", false), "shop.example", &[&plain[..], &[forwarded]].concat());
        assert_ne!(write_for(&LIES, &caller("192.0.2.1", false), "").1, "mine");
        let secure = Caller { secure: true, ..caller("2001:db8::1", false) };
        check(
            &[],
            &secure,
            "[::1]:8443",
            &[
                "X-Forwarded-For: 2001:db8::1",
                "X-Forwarded-Proto: https",
                "X-Forwarded-Host: [::1]:8443",
                "Forwarded: for=\"[2001:db8::1]\";host=\"[::1]:8443\";proto=https",
            ],
        );
        check(
            &[],
            &caller("nobody", false),
            "",
            &["X-Forwarded-Proto: http", "Forwarded: for=unknown;proto=http"],
        );
    }

    #[test]
    fn a_trusted_chain_is_extended() {
        let proxy = caller("10.0.0.1", true);
        let told = [
            ("X-Forwarded-For", "192.0.2.1, 10.0.0.9"),
            ("x-forwarded-for", ""),
            ("X-FORWARDED-FOR", "10.0.0.8"),
            ("X-Forwarded-Proto", "https"),
            ("X-Forwarded-Host", "Shop.Example:8443"),
            ("Forwarded", "for=192.0.2.1;proto=https, for=\"[::1]:80\";by=\"_a,b\\\"\""),
            ("X-Request-Id", "outer-1"),
        ];
        check(
            &told,
            &proxy,
            "inner.example",
            &[
                "X-Forwarded-For: 192.0.2.1, 10.0.0.9, 10.0.0.8, 10.0.0.1",
                "X-Forwarded-Proto: https",
                "X-Forwarded-Host: Shop.Example:8443",
                "Forwarded: for=192.0.2.1;proto=https, for=\"[::1]:80\";by=\"_a,b\\\"\", \
             for=10.0.0.1;host=inner.example;proto=http",
            ],
        );
        assert_eq!(write_for(&told, &proxy, "").1, "outer-1");
        // One dialect is continued in that one alone.
        check(
            &told[..1],
            &proxy,
            "a",
            &[
                "X-Forwarded-For: 192.0.2.1, 10.0.0.9, 10.0.0.1",
                "X-Forwarded-Proto: http",
                "X-Forwarded-Host: a",
            ],
        );
        check(
            &[("Forwarded", "for=_x")],
            &proxy,
            "a",
            &["Forwarded: for=_x, for=10.0.0.1;host=a;proto=http"],
        );
        // A unix socket's client has no address to add.
        check(
            &told[..1],
            &caller("-", true),
            "",
            &["X-Forwarded-For: 192.0.2.1, 10.0.0.9", "X-Forwarded-Proto: http"],
        );
    }

    #[test]
    fn what_a_trusted_client_says_unclearly_is_said_by_us() {
        let proxy = caller("10.0.0.1", true);
        let ours = [
            "X-Forwarded-For: 10.0.0.1",
            "X-Forwarded-Proto: http",
            "X-Forwarded-Host: a",
            "Forwarded: for=10.0.0.1;host=a;proto=http",
        ];
        for unclear in [
            [("X-Forwarded-Proto", "https"), ("X-Forwarded-Proto", "https")],
            [("X-Forwarded-Proto", "https, http"), ("X-Forwarded-Host", "a, b")],
            [("X-Forwarded-Host", "a"), ("X-Forwarded-Host", "b")],
            [("X-Forwarded-Host", "a b"), ("Forwarded", "for=\"open")],
            [("Forwarded", "for"), ("Forwarded", "for=a;;for=b")],
            [("Forwarded", ""), ("Forwarded", "for=\"a\"b")],
            [("Forwarded", "for=a,"), ("Forwarded", "for=a b")],
        ] {
            check(&unclear, &proxy, "a", &ours);
        }
        for id in ["a b", "", "x\""] {
            assert_eq!(write_for(&[("X-Request-Id", id)], &proxy, "").1.len(), 32);
        }
        let twice = [("X-Request-Id", "a"), ("X-Request-Id", "a")];
        assert_eq!(write_for(&twice, &proxy, "").1.len(), 32);
    }

    #[test]
    fn other_claims_pass_from_trusted_clients_alone_and_in_one_spelling() {
        for (name, anybody, trusted) in [
            ("X-Real-IP", false, true),
            ("X_Real_IP", false, false),
            ("X-Forwarded-Port", false, true),
            ("X-Forwarded-For", false, false),
            ("x_forwarded_for", false, false),
            ("Forwarded", false, false),
            ("X-Request_Id", false, false),
            ("X-Forwarded-Forest", true, true),
            ("From", true, true),
            ("Accept", true, true),
        ] {
            let field = Field { name: name.as_bytes(), value: b"x" };
            let passes = |trusted| passes(&field, &caller("192.0.2.1", trusted));
            assert_eq!((passes(false), passes(true)), (anybody, trusted), "{name}");
        }
    }
}
