//! The journal's entry for a request.

use super::format::request_line;
use crate::core::access::Access;
use crate::journal::Entry;
use crate::remark::Severity;

pub fn entry(access: &Access) -> Entry {
    let status = access.status.map_or_else(|| "-".to_owned(), |status| status.to_string());
    let failed = access.status.is_some_and(|status| status >= 500) || access.outcome == "cut";
    let severity = if failed { Severity::Warning } else { Severity::Info };
    let message = format!("{} {status} {}", request_line(access), access.outcome);
    let mut entry = Entry::new(message, severity.number());
    let texts = [
        ("request_id", &access.request_id),
        ("method", &access.method),
        ("target", &access.target),
        ("host", &access.host),
    ];
    for (name, text) in texts.into_iter().filter(|(_, text)| !text.is_empty()) {
        entry.fact(name, text);
    }
    entry.known("client", access.client.as_ref());
    entry.known("route", access.route.as_ref());
    entry.known("upstream", access.upstream.as_ref());
    entry.known("status", access.status.as_ref());
    entry.fact("outcome", access.outcome);
    entry.fact("bytes_in", access.bytes_in);
    entry.fact("bytes_out", access.bytes_out);
    entry.fact("duration_us", access.duration_us);
    entry.known("ttfb_us", access.ttfb_us.as_ref());
    entry.known("held_us", access.held_us.as_ref());
    entry.known("sample", access.sample.as_ref());
    entry
}
