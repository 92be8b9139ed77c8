//! Bringing a socket's operations into line with its state, and what happens when its time is up.
//!
//! After a batch each changed socket is settled once: send what is queued, do what was to follow the last
//! byte, arm or stop its receive, and set its timer. These four decisions are functions of the socket's
//! state (and its peer's backlog), nothing else.

use super::config::Config;
use super::engine::Core;
use super::flow::Outcome;
use super::http::answer::Answer;
use super::io::{Errno, Millis, Op, RecvMode, SockId};
use super::secure::Tls;
use super::session::{Finish, Phase, Recv, Role, Sock, UpPhase};

impl Core {
    pub(super) fn settle(&mut self, id: SockId) {
        let Some(sock) = self.socks.get_mut(id) else { return };
        sock.touched = false;
        if let Some((chunks, wait)) = sock.out.next_send() {
            self.out.push(Op::Send { sock: id, chunks, wait });
        }
        if self.settle_end(id) {
            return;
        }
        self.settle_recv(id);
        self.settle_timer(id);
    }

    /// Everything is sent: FIN, linger or close, as decided before. True when the socket is gone.
    fn settle_end(&mut self, id: SockId) -> bool {
        let Some(sock) = self.socks.get_mut(id) else { return true };
        let full = sock.out.bytes() >= Config::BACKLOG_HIGH_BYTES;
        if let Some(http) = sock.http() {
            let between = http.phase == Phase::Head && (http.inbuf.is_empty() || !full);
            let unfinished = !http.body_done() && http.inbuf.is_empty();
            let exchanging = matches!(http.phase, Phase::Exchange | Phase::Dropping);
            if sock.read_closed && between {
                sock.finish = Finish::Close;
            } else if sock.read_closed && exchanging && unfinished {
                self.client_gone(id);
                return true;
            }
        }
        let Some(sock) = self.socks.get_mut(id) else { return true };
        if !sock.out.is_empty() {
            return false;
        }
        if sock.finish == Finish::No || !self.settle_goodbye(id) {
            return false;
        }
        let Some(sock) = self.socks.get_mut(id) else { return true };
        match sock.finish {
            Finish::Close => {
                self.close_client(id, false);
                return true;
            }
            Finish::Linger { until } => {
                if sock.read_closed || sock.out_dead {
                    self.close_client(id, false);
                    return true;
                }
                sock.finish = Finish::Linger { until: Some(until.unwrap_or(self.now + Config::LINGER_MS)) };
            }
            Finish::No | Finish::Fin => {}
        }
        if !std::mem::replace(&mut sock.fin_sent, true) {
            self.out.push(Op::ShutdownWrite { sock: id });
        }
        let over =
            self.socks.get(id).is_none_or(|sock| sock.finish == Finish::Fin && self.tunnel_is_over(sock));
        if over {
            self.close_tunnel(id, false, Outcome::Closed);
        }
        over
    }

    fn settle_recv(&mut self, id: SockId) {
        let Some(sock) = self.socks.get(id) else { return };
        let (wanted, cautious) = self.wants_recv(sock);
        let now = self.now;
        let Some(sock) = self.socks.get_mut(id) else { return };
        sock.cautious |= cautious;
        match (wanted, sock.recv) {
            (true, Recv::Off) => {
                sock.recv = Recv::Armed;
                // It could not send while we did not take: its time begins now.
                sock.moved_at = now;
                let mode = if sock.cautious || sock.is_waiting() { RecvMode::Once } else { RecvMode::Many };
                self.out.push(Op::Recv { sock: id, mode });
            }
            (false, Recv::Armed) => {
                sock.recv = Recv::Stopping;
                self.out.push(Op::StopRecv { sock: id });
            }
            _ => {}
        }
    }

    /// Whether more is wanted from a socket now, and whether its other side turned out slow.
    fn wants_recv(&self, sock: &Sock) -> (bool, bool) {
        if sock.read_closed || matches!(sock.tls, Tls::Handshake { .. }) {
            return (false, false);
        }
        match (&sock.finish, &sock.role) {
            (Finish::Linger { .. }, _) => (true, false),
            (Finish::Close, _) => (false, false),
            (_, Role::Http(http)) => match http.phase {
                Phase::Head => (sock.out.bytes() < Config::BACKLOG_HIGH_BYTES, false),
                Phase::Exchange if !http.body_done() => self.peer_takes(sock),
                Phase::Waiting | Phase::Exchange | Phase::Dropping => {
                    (http.inbuf.len() < Config::AHEAD_BYTES, false)
                }
                Phase::Done => (false, false),
            },
            // What is complete is no preface any more, so this is what it lacks.
            (_, Role::Preface(_)) => (true, false),
            (_, Role::Tcp(tcp)) => (tcp.inbuf.len() < Config::AHEAD_BYTES, false),
            (_, Role::Upstream(conn)) => match conn.phase {
                UpPhase::Connecting { .. } => (false, false),
                UpPhase::Idle { .. } => (true, false),
                UpPhase::Exchange(_) => self.peer_takes(sock),
            },
            (_, Role::Check(check)) => (check.is_asking(), false),
            (_, Role::Tunnel { .. }) => self.peer_takes(sock),
        }
    }

    /// Whether the peer's backlog leaves room; a receive that was stopped waits for the low mark.
    fn peer_takes(&self, sock: &Sock) -> (bool, bool) {
        let Some(peer) = sock.peer.and_then(|peer| self.socks.get(peer)) else { return (true, false) };
        let backlog_bytes = peer.out.bytes();
        let running = sock.recv == Recv::Armed;
        let limit_bytes = if running { Config::BACKLOG_HIGH_BYTES } else { Config::BACKLOG_LOW_BYTES };
        (backlog_bytes < limit_bytes, backlog_bytes >= Config::BACKLOG_HIGH_BYTES)
    }

    fn settle_timer(&mut self, id: SockId) {
        let Some(sock) = self.socks.get(id) else { return };
        let Some(at) = self.deadline(sock) else { return };
        if sock.timer_at.is_some_and(|earlier| earlier <= at) {
            return;
        }
        self.timers.push(at, id);
        if let Some(sock) = self.socks.get_mut(id) {
            sock.timer_at = Some(at);
        }
    }

    /// When bytes last moved between a socket and its peer: a tunnel is idle only when both its sides are.
    pub(super) fn moved_at(&self, sock: &Sock) -> Millis {
        let peer_moved_at = sock.peer.and_then(|peer| self.socks.get(peer)).map_or(0, |peer| peer.moved_at);
        sock.moved_at.max(peer_moved_at)
    }

    /// When a socket has been too long in the state it is in.
    fn deadline(&self, sock: &Sock) -> Option<Millis> {
        let config = &self.config;
        if let Tls::Handshake { since } = sock.tls {
            let most = if self.stopping { Config::STOPPING_IDLE_MS } else { Millis::MAX };
            return Some(since + config.head_timeout_ms.min(most));
        }
        if let Finish::Linger { until: Some(until) } = sock.finish {
            return Some(until);
        }
        if let Role::Check(check) = &sock.role {
            return Some(check.until);
        }
        if let Role::Tunnel { .. } = sock.role {
            return Some(self.moved_at(sock) + config.tunnel_idle_timeout_ms);
        }
        if !sock.out.is_empty() || sock.tls == Tls::Ending {
            return Some(sock.moved_at + config.body_timeout_ms);
        }
        match &sock.role {
            Role::Http(http) => match http.phase {
                Phase::Head => Some(match http.head_since {
                    Some(since) => since + config.head_timeout_ms,
                    None if http.requests == 0 && !self.hurried => http.idle_since + config.head_timeout_ms,
                    // It idles from when it had its last response, which may be long after we had it.
                    None => {
                        let most = if self.hurried { Config::STOPPING_IDLE_MS } else { Millis::MAX };
                        http.idle_since.max(sock.moved_at) + config.client_idle_timeout_ms.min(most)
                    }
                }),
                Phase::Exchange | Phase::Dropping if !http.body_done() && sock.recv == Recv::Armed => {
                    Some(sock.moved_at + config.body_timeout_ms)
                }
                Phase::Waiting | Phase::Exchange | Phase::Dropping | Phase::Done => None,
            },
            Role::Upstream(conn) => match conn.phase {
                UpPhase::Connecting { since, timeout_ms } => Some(since + timeout_ms),
                UpPhase::Idle { since } => Some(since + Config::UPSTREAM_IDLE_MS),
                UpPhase::Exchange(_) if sock.recv == Recv::Armed && self.peer_has_asked(sock) => {
                    Some(sock.moved_at + config.response_timeout_ms)
                }
                UpPhase::Exchange(_) => None,
            },
            Role::Preface(preface) => Some(preface.since + config.head_timeout_ms),
            Role::Tcp(_) | Role::Tunnel { .. } | Role::Check(_) => None,
        }
    }

    /// Whether the client's request has been passed on whole, so that it is the upstream's turn.
    fn peer_has_asked(&self, sock: &Sock) -> bool {
        match sock.peer.and_then(|peer| self.socks.get(peer)).map(|peer| &peer.role) {
            Some(Role::Http(http)) => http.body_done(),
            _ => true,
        }
    }

    /// Looks at the sockets whose timers are due: most have moved on meanwhile.
    pub(super) fn expire_due(&mut self) {
        while let Some((at, id)) = self.timers.pop_due(self.now) {
            let Some(sock) = self.socks.get_mut(id) else { continue };
            if sock.timer_at == Some(at) {
                sock.timer_at = None;
            }
            let Some(sock) = self.socks.get(id) else { continue };
            match self.deadline(sock) {
                Some(deadline) if deadline <= self.now => self.expire(id),
                Some(_) => self.settle_timer(id),
                None => {}
            }
        }
    }

    fn expire(&mut self, id: SockId) {
        let Some(sock) = self.socks.get(id) else { return };
        if let Tls::Handshake { .. } = sock.tls {
            return self.handshake_expired(id);
        }
        if let Finish::Linger { until: Some(_) } = sock.finish {
            return self.close_client(id, false);
        }
        let stalled = !sock.out.is_empty() || sock.tls == Tls::Ending;
        match &sock.role {
            Role::Tunnel { .. } => self.close_tunnel(id, true, Outcome::Idle),
            Role::Check(_) => self.check_late(id),
            Role::Http(_) if stalled => {
                self.counters.client_stalled += 1;
                self.close_client(id, true);
            }
            Role::Http(http) => match http.phase {
                Phase::Head if http.is_between() => self.close_client(id, false),
                Phase::Head => self.answer(id, Answer::SlowHead),
                Phase::Exchange | Phase::Dropping => self.abandon_exchange(id, Answer::SlowBody),
                Phase::Waiting | Phase::Done => {}
            },
            Role::Upstream(conn) => match conn.phase {
                UpPhase::Connecting { .. } => self.connect_failed(id, Errno(libc::ETIMEDOUT)),
                UpPhase::Idle { .. } => self.discard_upstream(id, false),
                UpPhase::Exchange(_) => self.fail_exchange(id, Answer::UpstreamTimeout),
            },
            Role::Preface(_) => self.preface_is_late(id),
            Role::Tcp(_) if stalled => self.close_client(id, true),
            Role::Tcp(_) => {}
        }
    }
}
