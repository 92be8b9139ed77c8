//! Routes that answer by themselves: static pages, redirects, bare statuses, and the balancer's own answers
//! on purpose.
//!
//! ```text
//! request ──▶ its route has a Reply ──no body, or one too large to wait for──▶ answered
//!                     │                                                            ▲
//!                     └── Dropping: its body is read and dropped ── done ──────────┘
//! ```
//!
//! The answer to a request with a small body waits until the body is there, so that the connection can go
//! on and the client is told truly whether it does. A body that is announced as large, turns out so, or for
//! which the client wants to be asked first (`Expect`), is not worth waiting for: the answer goes out at
//! once, says `Connection: close`, and the rest is dropped for a second (see `Config::LINGER_MS`).

use std::io::Write;
use std::rc::Rc;

use super::chunk::Chunk;
use super::client::Step;
use super::config::Config;
use super::engine::Core;
use super::flow::Outcome;
use super::http::answer::Answer;
use super::http::body::Body;
use super::io::SockId;
use super::session::{Phase, Request, Sock};
use crate::table::Action;
use crate::table::actions::{Redirect, StaticPage, is_bodiless, is_uri_byte};

/// A response that is all in the table.
#[derive(Debug)]
pub enum Reply {
    Page {
        status: u16,
        content_type: String,
        body: Chunk,
    },
    Redirect {
        status: u16,
        to: String,
        keep_path: bool,
    },
    Empty {
        status: u16,
    },
    /// One of the balancer's own.
    Own(Answer),
}

impl Reply {
    /// What a route with this action answers; none when it has upstreams, or is another route's name.
    pub fn of(action: &Action) -> Option<Rc<Self>> {
        let reply = match action {
            Action::Proxy(_) | Action::Hold(_) | Action::Alias(_) => return None,
            Action::Static(StaticPage { status, content_type, body }) => Reply::Page {
                status: *status,
                content_type: content_type.clone(),
                body: Chunk::owned(body.clone().into_bytes()),
            },
            Action::Redirect(Redirect { to, status, keep_path }) => {
                Reply::Redirect { status: *status, to: to.clone(), keep_path: *keep_path }
            }
            Action::Empty(empty) => Reply::Empty { status: empty.status },
            Action::UnknownHost(_) => Reply::Own(Answer::UnknownHost),
            Action::NoHosts(_) => Reply::Own(Answer::NoRoutes),
        };
        Some(Rc::new(reply))
    }

    /// What the log calls it.
    fn outcome(&self) -> Outcome {
        match self {
            Reply::Page { .. } => Outcome::Page("static"),
            Reply::Redirect { .. } => Outcome::Page("redirect"),
            Reply::Empty { .. } => Outcome::Page("empty"),
            Reply::Own(answer) => Outcome::Own(*answer),
        }
    }

    fn status(&self) -> u16 {
        match self {
            Reply::Page { status, .. } | Reply::Redirect { status, .. } | Reply::Empty { status } => *status,
            Reply::Own(answer) => answer.status(),
        }
    }

    /// Head and body. HEAD gets the head alone, with the length that GET would see (RFC 9110 §9.3.2).
    fn write(&self, request: &Request, keep_alive: bool) -> (Vec<u8>, Chunk) {
        let status = self.status();
        let body = match self {
            Reply::Page { body, .. } => body.clone(),
            _ => Chunk::owned(Vec::new()),
        };
        let mut head = Vec::with_capacity(256);
        // Writing to a vector cannot fail.
        let _ = write!(head, "HTTP/1.1 {status} {}\r\n", reason(status));
        match self {
            Reply::Page { content_type, .. } => {
                let _ = write!(head, "Content-Type: {content_type}\r\n");
            }
            Reply::Redirect { to, keep_path, .. } => {
                head.extend_from_slice(b"Location: ");
                head.extend_from_slice(&location(to, keep_path.then(|| request.target())));
                head.extend_from_slice(b"\r\n");
            }
            Reply::Empty { .. } | Reply::Own(_) => {}
        }
        if !is_bodiless(status) {
            let _ = write!(head, "Content-Length: {}\r\n", body.len());
        }
        head.extend_from_slice(if keep_alive { b"\r\n" } else { b"Connection: close\r\n\r\n" });
        let body = if request.is_head { Chunk::owned(Vec::new()) } else { body };
        (head, body)
    }
}

/// Where a redirect leads. A kept target has passed the head's parser, so it has no blank and no control;
/// what else an address has not is escaped. It always begins with a slash, so it cannot change the host.
fn location(to: &str, target: Option<&[u8]>) -> Vec<u8> {
    let Some(target) = target else { return to.as_bytes().to_vec() };
    let target = if target.starts_with(b"/") { target } else { b"/" };
    let mut location = Vec::with_capacity(to.len() + target.len());
    location.extend_from_slice(to.strip_suffix('/').unwrap_or(to).as_bytes());
    for b in target {
        match is_uri_byte(*b) {
            true => location.push(*b),
            // Writing to a vector cannot fail.
            false => drop(write!(location, "%{b:02X}")),
        }
    }
    location
}

/// The usual words for a status (RFC 9110 §15); clients ignore them.
fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        202 => "Accepted",
        204 => "No Content",
        301 => "Moved Permanently",
        302 => "Found",
        303 => "See Other",
        304 => "Not Modified",
        307 => "Temporary Redirect",
        308 => "Permanent Redirect",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        410 => "Gone",
        429 => "Too Many Requests",
        451 => "Unavailable For Legal Reasons",
        500 => "Internal Server Error",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        _ => "",
    }
}

impl Core {
    /// A waiting client's route answers by itself.
    pub(super) fn act(&mut self, id: SockId, reply: Rc<Reply>) {
        let Some(request) = self.socks.get_mut(id).and_then(Sock::http).and_then(|http| {
            http.phase = Phase::Dropping;
            http.request.as_mut()
        }) else {
            // Plain TCP, held for a route that has become one for HTTP.
            self.counters.tcp_unrouted += 1;
            return self.end_client(id, true, Outcome::Refused("unrouted"));
        };
        let now_or_never = match request.body {
            _ if request.expects => true,
            Body::Length(length) => length == 0 || length > Config::DROPPED_BYTES_MAX,
            Body::Chunked(_) | Body::UntilClose => false,
        };
        request.reply = Some(reply);
        if now_or_never {
            return self.give_reply(id);
        }
        // What is there of the body is looked at once the batch has been taken in.
        self.runnable.push_back(id);
        self.touch(id);
    }

    /// Reads and drops a body that nobody wants, as far as that is bearable.
    pub(super) fn drop_body(&mut self, id: SockId, chunk: &Chunk) -> Step {
        let Some(http) = self.socks.get_mut(id).and_then(Sock::http) else { return Step::Over };
        let Some(request) = http.request.as_mut() else { return Step::Over };
        let Ok(used) = request.body.feed(chunk, None) else {
            self.answer(id, Answer::BadChunk);
            return Step::Over;
        };
        request.flow.bytes_in += used as u64;
        let done = request.body.is_done();
        // An announced length has been judged already.
        let bearable =
            matches!(request.body, Body::Length(_)) || request.flow.bytes_in <= Config::DROPPED_BYTES_MAX;
        if !done && bearable {
            return Step::Used(used);
        }
        self.give_reply(id);
        if done { Step::Used(used) } else { Step::Over }
    }

    fn give_reply(&mut self, id: SockId) {
        let Some(http) = self.socks.get_mut(id).and_then(Sock::http) else { return };
        let Some(reply) = http.request.as_mut().and_then(|request| request.reply.take()) else { return };
        if let Reply::Own(answer) = *reply {
            return self.answer(id, answer);
        }
        self.counters.answered_by_action += 1;
        self.respond(id, reply.outcome(), reply.status(), |request, keep_alive| match request {
            Some(request) => reply.write(request, keep_alive),
            None => (Vec::new(), Chunk::owned(Vec::new())),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_path_stays_on_the_host_and_on_the_line() {
        for (to, target, expected) in [
            ("https://shop.example", "/a?b=c", "https://shop.example/a?b=c"),
            ("https://shop.example/", "/", "https://shop.example/"),
            ("https://shop.example/new", "/a", "https://shop.example/new/a"),
            ("https://shop.example", "//evil.example/x", "https://shop.example//evil.example/x"),
            ("https://shop.example", "*", "https://shop.example/"),
            ("https://shop.example", "/<script>\"", "https://shop.example/%3Cscript%3E%22"),
            ("https://shop.example", "/%0d%0aX:y", "https://shop.example/%0d%0aX:y"),
        ] {
            assert_eq!(location(to, Some(target.as_bytes())), expected.as_bytes());
        }
        assert_eq!(location("https://shop.example/?q", None), b"https://shop.example/?q");
    }
}
