//! TLS as the core sees it: when it begins, what it proved, why it failed, and its goodbye. No ciphertext
//! comes here; a door does the rest ([`crate::tls`]).
//!
//! ```text
//!                  Secured                  all is sent, FIN is due        TlsEnded
//!   Handshake ────────────────▶ On ────────────────────────▶ Ending ──────────────▶ Off
//!       │  StartTls                         EndTls                                   ▲
//!       └── SecureFailed: plain from here on; the last words go out, then it closes ─┘
//! ```
//!
//! The goodbye (`close_notify`) is a step of its own because a peer cannot tell an end without it from a
//! cut: FIN follows only once the goodbye has been taken.
//!
//! A request's host is bound to what the handshake proved: it is the server name the client asked for, or
//! a name of the certificate it was shown (browsers reuse a connection for every name of its certificate).
//! Anything else gets 421. A client that named nobody (it used an address) is not bound.

use std::sync::Arc;

use super::chunk::Chunk;
use super::engine::Core;
use super::flow::{Flow, Outcome};
use super::http::answer::Answer;
use super::io::{Millis, Op, SockId};
use super::session::{Finish, Phase, Role};
use crate::control::protocol::Counters;

/// How far TLS has come on a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tls {
    /// There is none, or no longer any.
    Off,
    Handshake {
        since: Millis,
    },
    On,
    /// The goodbye is being said.
    Ending,
}

/// What a handshake proved.
#[derive(Debug)]
pub struct Secured {
    /// The server name the client asked for, in lower case.
    pub server_name: Option<String>,
    /// The names of the certificate it was shown.
    pub names: Arc<Names>,
    /// That certificate is not for the name asked for: there is none, so it was shown another.
    pub by_default: bool,
    /// It continued an earlier session, which costs no signature.
    pub resumed: bool,
}

impl Secured {
    /// Whether a request for this host may come over the connection. One for no host (HTTP/1.0) may.
    pub fn is_for(&self, host: &str) -> bool {
        let bound = self.server_name.as_deref().filter(|_| !host.is_empty());
        bound.is_none_or(|name| name == host || self.names.cover(host))
    }
}

/// The names a certificate is for, in lower case; `*.example.com` stands for one more label.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names(pub Vec<String>);

impl Names {
    pub fn cover(&self, host: &str) -> bool {
        let parent = host.split_once('.').map(|(_, parent)| parent);
        self.0.iter().any(|name| name == host || (parent.is_some() && name.strip_prefix("*.") == parent))
    }
}

/// Why a handshake failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsFault {
    /// The client spoke HTTP without TLS.
    PlainHttp,
    /// What it said is not TLS.
    NotTls,
    /// It offers no version that is served.
    NoSharedVersion,
    /// It offers no cipher, group, signature or application protocol that is served.
    NothingShared,
    /// It asked for a name no certificate is for, and those are refused.
    UnknownName,
    /// There is no certificate at all.
    NoCertificate,
    /// It did not accept what it was shown.
    Rejected,
    /// It went away in the middle.
    Gone,
    /// It broke the protocol, or the bounds set on it.
    Broken,
}

impl TlsFault {
    /// What the log calls it.
    pub fn code(self) -> &'static str {
        match self {
            TlsFault::PlainHttp => "tls_plain_http",
            TlsFault::NotTls => "tls_not_tls",
            TlsFault::NoSharedVersion => "tls_no_shared_version",
            TlsFault::NothingShared => "tls_nothing_shared",
            TlsFault::UnknownName => "tls_unknown_name",
            TlsFault::NoCertificate => "tls_no_certificate",
            TlsFault::Rejected => "tls_rejected",
            TlsFault::Gone => "tls_handshake_gone",
            TlsFault::Broken => "tls_handshake_broken",
        }
    }

    fn counter(self, counters: &mut Counters) -> &mut u64 {
        match self {
            TlsFault::PlainHttp => &mut counters.tls_plain_http,
            TlsFault::NotTls => &mut counters.tls_not_tls,
            TlsFault::NoSharedVersion => &mut counters.tls_no_shared_version,
            TlsFault::NothingShared => &mut counters.tls_nothing_shared,
            TlsFault::UnknownName => &mut counters.tls_unknown_name,
            TlsFault::NoCertificate => &mut counters.tls_no_certificate,
            TlsFault::Rejected => &mut counters.tls_rejected,
            TlsFault::Gone => &mut counters.tls_handshake_gone,
            TlsFault::Broken => &mut counters.tls_handshake_broken,
        }
    }
}

impl Core {
    /// Begins TLS on a client's socket; `said` is what has been read of it already. What the client is
    /// there for waits until [`Core::secured`].
    pub(super) fn start_tls(&mut self, id: SockId, said: Chunk) {
        let now = self.now;
        let Some(sock) = self.socks.get_mut(id) else { return };
        sock.tls = Tls::Handshake { since: now };
        let http = matches!(sock.role, Role::Http(_));
        self.out.push(Op::StartTls { sock: id, http, said });
        self.touch(id);
    }

    /// The handshake is done.
    pub(super) fn secured(&mut self, id: SockId, secured: Box<Secured>) {
        let now = self.now;
        let Some(sock) = self.socks.get_mut(id) else { return };
        (sock.tls, sock.moved_at) = (Tls::On, now);
        self.counters.tls_handshakes += 1;
        self.counters.tls_by_default += u64::from(secured.by_default);
        self.counters.tls_resumed += u64::from(secured.resumed);
        match &mut sock.role {
            Role::Http(http) => (http.idle_since, http.secured) = (now, Some(secured)),
            _ => self.admit(id),
        }
        self.touch(id);
    }

    /// There will be no TLS on this socket. It closes once the last words are sent: an alert, or an answer
    /// to a client that took the port for another.
    pub(super) fn secure_failed(&mut self, id: SockId, fault: TlsFault, last_words: Chunk) {
        let now = self.now;
        *fault.counter(&mut self.counters) += 1;
        let last_words = match fault {
            TlsFault::PlainHttp => {
                let page = self.pages.get(Answer::PlainHttp.code()).map(|page| &**page);
                Chunk::owned(Answer::PlainHttp.write(false, false, page))
            }
            _ => last_words,
        };
        let Some(sock) = self.socks.get_mut(id) else { return };
        sock.tls = Tls::Off;
        self.handshake_failed(id, fault.code());
        let Some(sock) = self.socks.get_mut(id) else { return };
        if last_words.is_empty() {
            self.close_client(id, true);
        } else {
            sock.finish = Finish::Linger { until: None };
            if let Some(http) = sock.http() {
                http.phase = Phase::Done;
            }
            sock.push(now, last_words);
            self.touch(id);
        }
    }

    /// Tells the log: of a client that would have spoken HTTP now, of a plain connection when it closes.
    fn handshake_failed(&mut self, id: SockId, code: &'static str) {
        let now_us = self.now_us();
        match self.socks.get_mut(id).map(|sock| &mut sock.role) {
            Some(Role::Http(http)) => {
                let flow = Flow::new(http.address, now_us);
                self.end_flow(flow, None, Outcome::Refused(code));
            }
            Some(Role::Tcp(tcp)) => tcp.flow.fault = Some(code),
            _ => {}
        }
    }

    /// Whether TLS, where there is any, has said its goodbye, so that FIN may follow. Sees to it.
    pub(super) fn settle_goodbye(&mut self, id: SockId) -> bool {
        let now = self.now;
        let Some(sock) = self.socks.get_mut(id) else { return true };
        match sock.tls {
            Tls::On if !sock.out_dead => {
                (sock.tls, sock.moved_at) = (Tls::Ending, now);
                self.out.push(Op::EndTls { sock: id });
                false
            }
            Tls::Ending => sock.out_dead,
            Tls::Off | Tls::Handshake { .. } | Tls::On => true,
        }
    }

    /// The goodbye was taken.
    pub(super) fn tls_ended(&mut self, id: SockId) {
        if let Some(sock) = self.socks.get_mut(id) {
            sock.tls = Tls::Off;
        }
        self.touch(id);
    }

    /// The peer's stream ended without its goodbye, so perhaps before its end. Requests are framed and say
    /// themselves whether they are whole; a stream of bytes is not, and counts as broken off.
    pub(super) fn cut(&mut self, id: SockId) {
        let Some(sock) = self.socks.get(id) else { return };
        match sock.role {
            Role::Http(_) => self.read_closed(id),
            _ => {
                self.counters.tls_cut += 1;
                self.broken(id);
            }
        }
    }

    /// The handshake takes too long.
    pub(super) fn handshake_expired(&mut self, id: SockId) {
        self.counters.tls_handshake_timeout += 1;
        self.handshake_failed(id, "tls_handshake_timeout");
        self.close_client(id, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wildcard_stands_for_one_label() {
        let names = Names(vec!["shop.example".to_owned(), "*.apps.example".to_owned()]);
        let covered = |host| names.cover(host);
        assert!(covered("shop.example") && covered("a.apps.example"));
        assert!(!covered("apps.example") && !covered("a.b.apps.example") && !covered("www.shop.example"));
        assert!(!covered("example") && !covered(""));
    }

    #[test]
    fn a_host_is_bound_to_the_name_asked_for_or_the_certificate_shown() {
        let names = Arc::new(Names(vec!["*.apps.example".to_owned()]));
        let secured = |name: Option<&str>| Secured {
            server_name: name.map(str::to_owned),
            names: names.clone(),
            by_default: false,
            resumed: false,
        };
        assert!(secured(Some("a.apps.example")).is_for("b.apps.example"));
        assert!(secured(Some("other.example")).is_for("other.example"));
        assert!(!secured(Some("a.apps.example")).is_for("other.example"));
        assert!(secured(None).is_for("other.example"));
    }
}
