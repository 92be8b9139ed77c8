//! Showing client connections one by one, in the order of their slots, so that a page can begin where the
//! last one ended however many came and went.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use super::engine::Core;
use super::io::Millis;
use super::listen::Listen;
use super::secure::Tls;
use super::session::{Finish, Phase, Role, Sock};
use crate::control::connections::{Connection, ConnectionState};

impl Core {
    /// Up to `limit` client connections from slot `from` on, and where to go on if there may be more. With
    /// `routes`, only those being served by one of them.
    pub fn connections(
        &self,
        now: Millis,
        from: u32,
        limit: usize,
        routes: &BTreeSet<String>,
    ) -> (Vec<Connection>, Option<u32>) {
        let mut rows = Vec::new();
        let is_wanted = |sock: &Sock| {
            sock.is_client()
                && (routes.is_empty() || self.route_id(sock).is_some_and(|id| routes.contains(id)))
        };
        for (id, sock) in self.socks.iter_from(from).filter(|(_, sock)| is_wanted(sock)) {
            if rows.len() == limit {
                return (rows, Some(id.index));
            }
            rows.push(self.connection(now, sock));
        }
        (rows, None)
    }

    /// The route that serves it now.
    fn route_id(&self, sock: &Sock) -> Option<&str> {
        sock.on_route.and_then(|key| self.routes.get(key)).map(|route| route.id.as_str())
    }

    fn connection(&self, now: Millis, sock: &Sock) -> Connection {
        let flow = sock.flow();
        let source = match &sock.role {
            Role::Http(http) => http.address,
            Role::Preface(preface) => preface.origin.source,
            _ => flow.and_then(|flow| flow.address),
        };
        let state = state_of(sock);
        // One that waits has none, whatever it had before.
        let upstream = flow
            .and_then(|flow| flow.upstream)
            .filter(|_| matches!(state, ConnectionState::Exchange | ConnectionState::Tunnel));
        Connection {
            client: source.map(|at| SocketAddr::new(at.ip().to_canonical(), at.port()).to_string()),
            listener: sock.listen.as_ref().map(Listen::to_string).unwrap_or_default(),
            state,
            route: self.route_id(sock).map(str::to_owned),
            upstream: upstream.and_then(|key| self.upstreams.get(key)).map(|upstream| upstream.id.clone()),
            age_ms: now.saturating_sub(sock.made_at),
            idle_ms: now.saturating_sub(self.moved_at(sock)),
            requests: match &sock.role {
                Role::Http(http) => http.requests,
                _ => 0,
            },
            bytes_in: flow.map_or(0, |flow| flow.bytes_in),
            bytes_out: flow.map_or(0, |flow| flow.bytes_out),
        }
    }
}

fn state_of(sock: &Sock) -> ConnectionState {
    if let Tls::Handshake { .. } = sock.tls {
        return ConnectionState::Handshake;
    }
    match &sock.role {
        Role::Tunnel { .. } => ConnectionState::Tunnel,
        _ if sock.finish != Finish::No => ConnectionState::Closing,
        Role::Preface(_) => ConnectionState::Preface,
        Role::Tcp(tcp) if tcp.wait.queued => ConnectionState::Held,
        // Only clients are shown; the last two are none.
        Role::Tcp(_) | Role::Upstream(_) | Role::Check(_) => ConnectionState::Connecting,
        Role::Http(http) => match http.phase {
            Phase::Head if http.is_between() => ConnectionState::Idle,
            Phase::Head => ConnectionState::Head,
            Phase::Waiting if http.request.as_ref().is_some_and(|request| request.wait.queued) => {
                ConnectionState::Held
            }
            Phase::Waiting => ConnectionState::Connecting,
            Phase::Exchange => ConnectionState::Exchange,
            Phase::Dropping => ConnectionState::Dropping,
            Phase::Done => ConnectionState::Closing,
        },
    }
}
