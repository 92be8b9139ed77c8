//! ACME's http-01 challenges (RFC 8555 §8.3), as far as they are decided here.
//!
//! ```text
//! GET /.well-known/acme-challenge/TOKEN ──▶ Waiting ── its file was read ──▶ answered
//!    over plain HTTP                           │
//!                                              └── there is none ──▶ its route, as any other request
//! ```
//!
//! Files are read outside, by a thread that may wait for a disk ([`crate::tls::acme`]). A challenge that an
//! app answers itself still reaches it.

use std::io::Write;

use super::chunk::Chunk;
use super::engine::Core;
use super::flow::Outcome;
use super::io::{Millis, SockId};
use super::session::{Phase, Request, Sock};

const PATH: &[u8] = b"/.well-known/acme-challenge/";
/// Longest token that is looked for. They have 128 bits at least, in base64url: 43 characters are usual.
const TOKEN_BYTES_MAX: usize = 128;

/// A file that is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Challenge {
    pub sock: SockId,
    /// Of letters, digits, `-` and `_`.
    pub token: String,
}

impl Core {
    /// Whether the client's request is for a challenge, which it then waits for.
    pub(super) fn is_challenge(&mut self, id: SockId) -> bool {
        if !self.config.acme {
            return false;
        }
        let http = self.socks.get_mut(id).and_then(Sock::http).filter(|http| http.secured.is_none());
        let Some(request) = http.and_then(|http| http.request.as_mut()) else { return false };
        let Some(token) = request.token().map(str::to_owned) else { return false };
        request.awaits_challenge = true;
        self.challenges.push(Challenge { sock: id, token });
        true
    }

    /// Files that have become wanted since the last call. Each is answered by [`Core::challenge_read`].
    pub fn take_challenges(&mut self) -> Vec<Challenge> {
        std::mem::take(&mut self.challenges)
    }

    /// What the file of a challenge says, if there is one.
    pub fn challenge_read(&mut self, now: Millis, id: SockId, contents: Option<Vec<u8>>) {
        self.now = now;
        let Some(http) = self.socks.get_mut(id).and_then(Sock::http) else { return };
        let waits = http.phase == Phase::Waiting;
        let Some(request) = http.request.as_mut().filter(|_| waits) else { return };
        if !std::mem::take(&mut request.awaits_challenge) {
            return;
        }
        let Some(contents) = contents else { return self.find_route(id) };
        self.counters.acme_challenges += 1;
        self.respond(id, Outcome::Page("acme_challenge"), 200, |request, keep_alive| {
            let mut head = Vec::with_capacity(192);
            // Writing to a vector cannot fail.
            let _ = write!(
                head,
                "HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: {}\r\n\
                 Cache-Control: no-store\r\n{}\r\n",
                contents.len(),
                if keep_alive { "" } else { "Connection: close\r\n" },
            );
            let is_head = request.is_some_and(|request| request.is_head);
            (head, Chunk::owned(if is_head { Vec::new() } else { contents }))
        });
    }
}

impl Request {
    /// The token that a request for a challenge names.
    fn token(&self) -> Option<&str> {
        let reads = self.is_head || self.forward.starts_with(b"GET ");
        let token = self.target().strip_prefix(PATH).filter(|_| reads && self.body.is_done())?;
        let is_token = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
        let whole = (1..=TOKEN_BYTES_MAX).contains(&token.len()) && token.iter().all(is_token);
        std::str::from_utf8(token).ok().filter(|_| whole)
    }
}
