//! What an operator says about a host or a port, which goes before what the apps ask for.
//!
//! An app's manifest leads a host or port to one of its processes. An operator's [`Word`] about it is put over that
//! until it is taken back: the app's own route is then still there, and not in force.
//!
//! ```text
//!   manifest ─▶ app's route ─┐
//!                            ├─▶ in force: the word where there is one, else the app's route
//!   operator ─▶ word ────────┘
//! ```

// The types alone: this part of the library opens nothing.
use core::net::SocketAddr;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::spec::RouteMatch;

/// RFC 1035 §2.3.4.
const HOST_BYTES_MAX: usize = 253;
const LABEL_BYTES_MAX: usize = 63;
/// The longest a held request may wait.
pub const HOLD_MS_MAX: u64 = 3_600_000;
/// How long a request waits when the operator does not say.
pub const HOLD_MS_DEFAULT: u64 = 30_000;
/// The largest static page, in bytes: the balancer keeps it in memory, once per thread.
pub const PAGE_BYTES_MAX: usize = 64 << 10;
/// The longest place a redirect may lead to, in bytes.
pub const LOCATION_BYTES_MAX: usize = 2_000;
/// The most backends of one route of the operator's.
pub const BACKENDS_MAX: usize = 64;
/// The most bytes of a content type.
const CONTENT_TYPE_BYTES_MAX: usize = 100;
/// The statuses that lead elsewhere, RFC 9110 §15.4.
pub const REDIRECTS: [u16; 5] = [301, 302, 303, 307, 308];

/// What is to be done with the traffic of a host or port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Word {
    /// Requests wait until they are released, each for so long at most.
    Hold { max_age_ms: u64 },
    /// Every request gets this page.
    Static { status: u16, content_type: String, body: String },
    /// Every request is sent elsewhere, with the path it asked for behind it or without.
    Redirect { to: String, status: u16, keep_path: bool },
    /// To backends that epagent does not run.
    Proxy { backends: Vec<SocketAddr> },
}

/// Why a word about a target can't be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadWord {
    #[error("{target:?} is no port and no host name: {why}")]
    Target { target: String, why: &'static str },
    #[error("only requests by host can be answered with {what}; port {port} carries plain TCP")]
    NeedsHttp { what: &'static str, port: u16 },
    #[error("a hold of {ms} ms is not between 1 ms and {HOLD_MS_MAX} ms")]
    HoldAge { ms: u64 },
    #[error("the page has {bytes} bytes; the most is {PAGE_BYTES_MAX}")]
    PageTooLarge { bytes: usize },
    #[error(
        "a page can't be answered with the status {status}; it may be 200 to 599, but not 204, 205 or 304"
    )]
    PageStatus { status: u16 },
    #[error("{content_type:?} is not a content type")]
    ContentType { content_type: String },
    #[error("a redirect can't have the status {status}; it may be 301, 302, 303, 307 or 308")]
    RedirectStatus { status: u16 },
    #[error("{to:?} is no place to redirect to: {why}")]
    Location { to: String, why: &'static str },
    #[error("{count} backends; there may be 1 to {BACKENDS_MAX}")]
    Backends { count: usize },
    #[error("the backend {address} is named twice")]
    SameBackend { address: SocketAddr },
    #[error("the backend {address} has no address or port that can be connected to")]
    NoBackend { address: SocketAddr },
}

impl Word {
    /// Its kind, as events and `epagent route ls` name it.
    pub fn kind(&self) -> &'static str {
        match self {
            Word::Hold { .. } => "hold",
            Word::Static { .. } => "static",
            Word::Redirect { .. } => "redirect",
            Word::Proxy { .. } => "proxy",
        }
    }

    /// Whether the balancer will take it for this target, by its rules.
    pub fn check(&self, target: &RouteMatch) -> Result<(), BadWord> {
        if let (Word::Static { .. } | Word::Redirect { .. }, RouteMatch::Port(port)) = (self, target) {
            return Err(BadWord::NeedsHttp { what: self.kind(), port: *port });
        }
        match self {
            Word::Hold { max_age_ms: 1..=HOLD_MS_MAX } => Ok(()),
            Word::Hold { max_age_ms } => Err(BadWord::HoldAge { ms: *max_age_ms }),
            Word::Static { status, content_type, body } => check_page(*status, content_type, body),
            Word::Redirect { status, .. } if !REDIRECTS.contains(status) => {
                Err(BadWord::RedirectStatus { status: *status })
            }
            Word::Redirect { to, keep_path, .. } => {
                check_location(to, *keep_path).map_err(|why| BadWord::Location { to: to.clone(), why })
            }
            Word::Proxy { backends } => check_backends(backends),
        }
    }
}

/// What the word does, in a few words that follow a host's name.
impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Word::Hold { max_age_ms } => {
                write!(f, "holds requests, each for {} s at most", max_age_ms.div_ceil(1000))
            }
            Word::Static { status, body, .. } => {
                write!(f, "answers {status} with a page of {} bytes", body.len())
            }
            Word::Redirect { to, status, keep_path } => {
                let path = if *keep_path { ", with the path" } else { "" };
                write!(f, "redirects to {to} ({status}{path})")
            }
            Word::Proxy { backends } => {
                f.write_str("leads to")?;
                backends.iter().try_for_each(|address| write!(f, " {address}"))
            }
        }
    }
}

fn check_page(status: u16, content_type: &str, body: &str) -> Result<(), BadWord> {
    // These have no body, RFC 9110 §15.3.5, §15.3.6, §15.4.5.
    if !(200..=599).contains(&status) || matches!(status, 204 | 205 | 304) {
        return Err(BadWord::PageStatus { status });
    }
    let printable = content_type.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    if !printable || !content_type.contains('/') || content_type.len() > CONTENT_TYPE_BYTES_MAX {
        return Err(BadWord::ContentType { content_type: content_type.to_owned() });
    }
    match body.len() {
        bytes if bytes > PAGE_BYTES_MAX => Err(BadWord::PageTooLarge { bytes }),
        _ => Ok(()),
    }
}

fn check_location(to: &str, keep_path: bool) -> Result<(), &'static str> {
    let Some(rest) = to.strip_prefix("https://").or_else(|| to.strip_prefix("http://")) else {
        return Err("it must begin with https:// or http://");
    };
    if rest.is_empty() || rest.starts_with('/') {
        return Err("it names no host");
    }
    if !to.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("blanks and letters past ASCII are written as %XX");
    }
    if to.contains('#') {
        return Err("it has a fragment, which is the client's own affair");
    }
    if keep_path && to.contains('?') {
        return Err("it has a query, and the path that is kept brings its own");
    }
    if to.len() > LOCATION_BYTES_MAX {
        return Err("it is too long");
    }
    Ok(())
}

fn check_backends(backends: &[SocketAddr]) -> Result<(), BadWord> {
    if backends.is_empty() || backends.len() > BACKENDS_MAX {
        return Err(BadWord::Backends { count: backends.len() });
    }
    for (place, address) in backends.iter().enumerate() {
        if address.port() == 0 || address.ip().is_unspecified() || address.ip().is_multicast() {
            return Err(BadWord::NoBackend { address: *address });
        }
        if backends[..place].contains(address) {
            return Err(BadWord::SameBackend { address: *address });
        }
    }
    Ok(())
}

/// The host as routes have it: in lower case; `*.` and a host stands for every name below it.
pub fn normal_host(host: &str) -> Result<String, &'static str> {
    let name = host.strip_prefix("*.").unwrap_or(host);
    if name.is_empty() {
        Err("it is empty")
    } else if host.len() > HOST_BYTES_MAX {
        Err("it is too long")
    } else if name.contains('*') {
        Err("a star may only stand for its whole first label, as in `*.example.org`")
    } else if name.split('.').any(str::is_empty) {
        Err("it has an empty label")
    } else if name.split('.').any(|label| label.len() > LABEL_BYTES_MAX) {
        Err("a label is longer than 63 letters")
    } else if !name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_')) {
        Err("only letters, digits, hyphens and dots are allowed")
    } else if name.split('.').any(|label| label.starts_with('-') || label.ends_with('-')) {
        Err("a label begins or ends with a hyphen")
    } else {
        Ok(host.to_ascii_lowercase())
    }
}

/// `5432`, `shop.example`, `*.example`, `*`: as a target is written in commands, requests and the store.
impl fmt::Display for RouteMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RouteMatch::Host(host) => f.pad(host),
            RouteMatch::Port(port) => port.fmt(f),
        }
    }
}

impl FromStr for RouteMatch {
    type Err = BadWord;

    fn from_str(text: &str) -> Result<Self, BadWord> {
        let bad = |why| BadWord::Target { target: text.chars().take(100).collect(), why };
        if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
            let port = text.parse().ok().filter(|port| *port > 0);
            return port.map(RouteMatch::Port).ok_or_else(|| bad("a port is 1 to 65535"));
        }
        if text == "*" {
            return Ok(RouteMatch::Host(text.to_owned()));
        }
        normal_host(text).map(RouteMatch::Host).map_err(bad)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> RouteMatch {
        RouteMatch::Host("shop.example".to_owned())
    }

    #[test]
    fn a_target_is_read_as_it_is_written() {
        for text in ["5432", "shop.example", "*.shop.example", "*"] {
            assert_eq!(text.parse::<RouteMatch>().unwrap().to_string(), text);
        }
        assert_eq!("Shop.EXAMPLE".parse(), Ok(host()));
        for text in ["", "0", "65536", "a b", "a..b", "-a", "*.*", "http://shop", "shop:80"] {
            assert!(text.parse::<RouteMatch>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn words_the_balancer_would_refuse_are_refused() {
        let page = |status, content_type: &str, body: String| Word::Static {
            status,
            content_type: content_type.to_owned(),
            body,
        };
        let to = |to: &str, status| Word::Redirect { to: to.to_owned(), status, keep_path: true };
        let backends = |list: &[&str]| Word::Proxy {
            backends: list.iter().map(|address| address.parse().unwrap()).collect(),
        };
        for good in [
            Word::Hold { max_age_ms: 1 },
            page(503, "text/html; charset=utf-8", "x".repeat(PAGE_BYTES_MAX)),
            to("https://shop.example/new", 308),
            backends(&["10.0.0.1:80", "[fd00::1]:80"]),
        ] {
            assert_eq!(good.check(&host()), Ok(()), "{good:?}");
        }
        for bad in [
            Word::Hold { max_age_ms: 0 },
            Word::Hold { max_age_ms: HOLD_MS_MAX + 1 },
            page(503, "text/html", "x".repeat(PAGE_BYTES_MAX + 1)),
            page(204, "text/html", String::new()),
            page(99, "text/html", String::new()),
            page(200, "text/html\r\nx: y", String::new()),
            page(200, "page", String::new()),
            to("shop.example", 302),
            to("https://", 302),
            to("https://shop.example/a b", 302),
            to("https://shop.example", 300),
            to("https://shop.example/#top", 302),
            to("https://shop.example/?a=b", 302),
            backends(&[]),
            backends(&["10.0.0.1:80", "10.0.0.1:80"]),
            backends(&["0.0.0.0:80"]),
            backends(&["10.0.0.1:0"]),
        ] {
            assert!(bad.check(&host()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_is_http_is_not_said_of_a_port() {
        let port = RouteMatch::Port(5432);
        let page = Word::Static { status: 200, content_type: "text/html".to_owned(), body: String::new() };
        assert_eq!(page.check(&port), Err(BadWord::NeedsHttp { what: "static", port: 5432 }));
        assert_eq!(Word::Hold { max_age_ms: 1 }.check(&port), Ok(()));
    }
}
