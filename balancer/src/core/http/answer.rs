//! The balancer's own answers: each fault has its own status, words and counter, and a header that tells
//! them from an app's (`X-Epagent-Error: unknown_host`). The words may be replaced by a page of the table's.

use std::borrow::Cow;
use std::io::Write;

use super::head::HeadError;
use crate::control::protocol::Counters;
use crate::core::io::Millis;
use crate::table::actions::Page;

/// Everything the balancer says in its own name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Refused(HeadError),
    BadChunk,
    SlowHead,
    SlowBody,
    LargeHead,
    UnknownHost,
    /// The host is not one the TLS connection was made for.
    Misdirected,
    /// Plain HTTP on a TLS port.
    PlainHttp,
    NoRoutes,
    HoldShed,
    HoldExpired,
    /// No memory is left for what a peer does not take, or for what is not complete.
    NoMemory,
    NoUpstreams,
    AllDown,
    RouteFull,
    SourceFull,
    RateLimited {
        /// Whole seconds until it is worth another try.
        retry_after_s: u32,
    },
    UpstreamDied,
    UpstreamBadResponse,
    UpstreamTimeout,
}

/// The words of one answer.
struct Words {
    status: &'static str,
    code: &'static str,
    text: String,
    extra: Cow<'static, str>,
}

impl Answer {
    /// What is too fast is told how long to wait, in whole seconds.
    pub fn rate_limited(wait_ms: Millis) -> Self {
        Answer::RateLimited {
            retry_after_s: u32::try_from(wait_ms.div_ceil(1_000)).unwrap_or(u32::MAX).max(1),
        }
    }

    /// The counter this answer has of its own.
    pub fn counter(self, counters: &mut Counters) -> &mut u64 {
        match self {
            Answer::Refused(HeadError::Method) => &mut counters.refused_method,
            Answer::Refused(HeadError::Version) => &mut counters.refused_version,
            Answer::Refused(HeadError::TooManyFields) | Answer::LargeHead => &mut counters.refused_large_head,
            Answer::Refused(_) | Answer::BadChunk => &mut counters.refused_bad_request,
            Answer::SlowHead => &mut counters.refused_slow_head,
            Answer::SlowBody => &mut counters.refused_slow_body,
            Answer::UnknownHost => &mut counters.unknown_host,
            Answer::Misdirected => &mut counters.misdirected,
            Answer::PlainHttp => &mut counters.tls_plain_http,
            Answer::NoRoutes => &mut counters.no_routes,
            Answer::HoldShed => &mut counters.hold_shed,
            Answer::HoldExpired => &mut counters.hold_expired,
            Answer::NoMemory => &mut counters.shed_memory,
            Answer::NoUpstreams => &mut counters.no_upstreams,
            Answer::AllDown => &mut counters.all_down,
            Answer::RouteFull => &mut counters.route_full,
            Answer::SourceFull => &mut counters.source_full,
            Answer::RateLimited { .. } => &mut counters.rate_limited,
            Answer::UpstreamDied => &mut counters.upstream_died,
            Answer::UpstreamBadResponse => &mut counters.upstream_bad_response,
            Answer::UpstreamTimeout => &mut counters.upstream_timeout,
        }
    }

    /// Every code there is: what a table's pages may be for.
    pub const CODES: &[&str] = &[
        "all_down",
        "bad_chunk",
        "bad_request",
        "head_too_large",
        "hold_expired",
        "hold_shed",
        "http_version",
        "method_not_allowed",
        "misdirected",
        "no_memory",
        "no_routes",
        "no_upstreams",
        "plain_http",
        "rate_limited",
        "route_full",
        "slow_body",
        "slow_head",
        "source_full",
        "transfer_coding",
        "unknown_host",
        "upstream_bad_response",
        "upstream_died",
        "upstream_timeout",
    ];

    /// The whole response, with the words of `page` if there is one. A response to HEAD has no body (RFC
    /// 9110 §9.3.2).
    pub fn write(self, is_head: bool, keep_alive: bool, page: Option<&Page>) -> Vec<u8> {
        let words = self.words();
        let (content_type, text) = match page {
            Some(page) => (page.content_type.as_str(), &page.body),
            None => ("text/plain; charset=utf-8", &words.text),
        };
        let mut out = Vec::with_capacity(384 + text.len());
        let connection = if keep_alive { "" } else { "Connection: close\r\n" };
        // Writing to a vector cannot fail.
        let _ = write!(
            out,
            "HTTP/1.1 {}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n\
             Cache-Control: no-store\r\nX-Epagent-Error: {}\r\n{}{connection}\r\n",
            words.status,
            text.len(),
            words.code,
            words.extra,
        );
        if !is_head {
            out.extend_from_slice(text.as_bytes());
        }
        out
    }

    /// What tells it from the others, in a header and in the log.
    pub fn code(self) -> &'static str {
        let code = self.words().code;
        debug_assert!(Self::CODES.contains(&code), "{code} is missing in the list of codes");
        code
    }

    pub fn status(self) -> u16 {
        // The status lines below all begin with three digits.
        self.words().status[..3].parse().unwrap_or_default()
    }

    fn words(self) -> Words {
        let (status, code, text, extra) = match self {
            Answer::Refused(HeadError::Method) => {
                let allow = "Allow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS\r\n";
                return Words {
                    status: "405 Method Not Allowed",
                    code: "method_not_allowed",
                    text: "CONNECT and TRACE are not supported here.
"
                    .to_owned(),
                    extra: Cow::Borrowed(allow),
                };
            }
            Answer::Refused(error) => {
                let (status, code) = match error {
                    HeadError::Version => ("505 HTTP Version Not Supported", "http_version"),
                    HeadError::TooManyFields => ("431 Request Header Fields Too Large", "head_too_large"),
                    HeadError::TransferCoding => ("501 Not Implemented", "transfer_coding"),
                    _ => ("400 Bad Request", "bad_request"),
                };
                return Words {
                    status,
                    code,
                    text: format!("The request was refused: {error}.\n"),
                    extra: Cow::Borrowed(""),
                };
            }
            Answer::BadChunk => (
                "400 Bad Request",
                "bad_chunk",
                "The request was refused: its chunked body is malformed.\n",
                "",
            ),
            Answer::SlowHead => {
                ("408 Request Timeout", "slow_head", "The request's header did not arrive in time.\n", "")
            }
            Answer::SlowBody => {
                ("408 Request Timeout", "slow_body", "The request's body did not arrive in time.\n", "")
            }
            Answer::LargeHead => (
                "431 Request Header Fields Too Large",
                "head_too_large",
                "The request's header is larger than 32 KiB.\n",
                "",
            ),
            Answer::NoMemory => (
                "503 Service Unavailable",
                "no_memory",
                "Too much waits in memory: requests that are not complete, or peers that do not keep up.\n",
                "Retry-After: 5\r\n",
            ),
            Answer::Misdirected => (
                "421 Misdirected Request",
                "misdirected",
                "This host is not one the connection was made for. Connect anew with its name.\n",
                "",
            ),
            Answer::PlainHttp => (
                "400 Bad Request",
                "plain_http",
                "This port speaks HTTPS, and the request came in plain HTTP.\n",
                "",
            ),
            Answer::UnknownHost => ("404 Not Found", "unknown_host", "No app here has this host name.\n", ""),
            Answer::NoRoutes => (
                "503 Service Unavailable",
                "no_routes",
                "No app is deployed here yet.\n",
                "Retry-After: 5\r\n",
            ),
            Answer::HoldShed => (
                "503 Service Unavailable",
                "hold_shed",
                "The app is busy and too many requests wait for it already. Retry in 5 seconds.\n",
                "Retry-After: 5\r\n",
            ),
            Answer::HoldExpired => (
                "503 Service Unavailable",
                "hold_expired",
                "The app is busy and did not become ready in time. Retry in 5 seconds.\n",
                "Retry-After: 5\r\n",
            ),
            Answer::NoUpstreams => (
                "503 Service Unavailable",
                "no_upstreams",
                "The app has no instance. Retry in 5 seconds.\n",
                "Retry-After: 5\r\n",
            ),
            Answer::AllDown => (
                "503 Service Unavailable",
                "all_down",
                "No instance of the app can be reached or is healthy. Retry in 5 seconds.\n",
                "Retry-After: 5\r\n",
            ),
            Answer::RouteFull => (
                "503 Service Unavailable",
                "route_full",
                "The app has as many requests as it takes at a time. Retry in 1 second.\n",
                "Retry-After: 1\r\n",
            ),
            Answer::SourceFull => (
                "429 Too Many Requests",
                "source_full",
                "Your network has as many requests at work here as it may. Retry in 1 second.\n",
                "Retry-After: 1\r\n",
            ),
            Answer::RateLimited { retry_after_s } => {
                return Words {
                    status: "429 Too Many Requests",
                    code: "rate_limited",
                    text: format!("There are too many requests. Retry in {retry_after_s} s.\n"),
                    extra: Cow::Owned(format!("Retry-After: {retry_after_s}\r\n")),
                };
            }
            Answer::UpstreamDied => (
                "502 Bad Gateway",
                "upstream_died",
                "The app closed the connection before it answered. The request may have been carried out.\n",
                "",
            ),
            Answer::UpstreamBadResponse => {
                ("502 Bad Gateway", "upstream_bad_response", "The app's answer is not valid HTTP/1.1.\n", "")
            }
            Answer::UpstreamTimeout => {
                ("504 Gateway Timeout", "upstream_timeout", "The app did not answer in time.\n", "")
            }
        };
        Words { status, code, text: text.to_owned(), extra: Cow::Borrowed(extra) }
    }
}
