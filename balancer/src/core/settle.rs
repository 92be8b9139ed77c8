//! Bringing a socket's operations into line with its state, and what happens when its time is up.
//!
//! After a batch each changed socket is settled once: send what is queued, do what was to follow the last
//! byte, arm or stop its receive, and set its timer. These four decisions are functions of the socket's
//! state (and its peer's backlog), nothing else.

use super::config::Config;
use super::engine::Core;
use super::flow::Outcome;
use super::http::answer::Answer;
use super::io::{AfterSend, Errno, Millis, Op, RecvMode, SockId};
use super::secure::Tls;
use super::session::{Finish, Phase, Recv, Role, Sock, UpPhase};
use crate::table::Address;

/// What is to be received from a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Nothing,
    /// Nothing more than what a receive that ends by itself may still bring.
    Pause,
    Take(RecvMode),
}

impl Core {
    pub(super) fn settle(&mut self, id: SockId) {
        let Some(sock) = self.socks.get_mut(id) else { return };
        sock.touched = false;
        let kept_bytes = sock.count_kept(&self.memory);
        if self.memory.is_too_much_kept(kept_bytes) {
            return self.shed_kept(id);
        }
        if let Some(send) = sock.out.next_send(self.now, &self.memory) {
            // Not before a plain close: were something unread by then, it would be a reset, and what the kernel
            // had held back would never be sent.
            let fin_follows = matches!(sock.finish, Finish::Fin | Finish::Linger { .. });
            let after = match (fin_follows, sock.tls) {
                _ if !send.whole => AfterSend::GoOn,
                (true, Tls::Off) => AfterSend::Fin,
                (true, _) => AfterSend::GoOn,
                (false, _) => self.after_passing(id),
            };
            self.out.push(Op::Send { sock: id, chunks: send.chunks, mode: send.mode, after });
        }
        let Some(sock) = self.socks.get_mut(id) else { return };
        let (lending, spilling) = (sock.out.is_lending(), sock.out.is_spilling());
        if lending && !std::mem::replace(&mut sock.lending, true) {
            self.lenders.push(id);
        }
        if lending {
            let tick_at = self.next_lent_tick();
            self.lent_tick_at = Some(self.lent_tick_at.map_or(tick_at, |at| at.min(tick_at)));
        }
        if spilling && self.memory.is_exceeded() {
            return self.shed(id);
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
        let first = !std::mem::replace(&mut sock.fin_sent, true);
        let over =
            self.socks.get(id).is_none_or(|sock| sock.finish == Finish::Fin && self.tunnel_is_over(sock));
        if over {
            // Closing sends the last FIN.
            self.close_tunnel(id, false, Outcome::Closed);
        } else if first {
            self.out.push(Op::ShutdownWrite { sock: id });
        }
        over
    }

    fn settle_recv(&mut self, id: SockId) {
        let Some(sock) = self.socks.get(id) else { return };
        let wanted = self.wants_recv(sock);
        let now = self.now;
        let Some(sock) = self.socks.get_mut(id) else { return };
        match (wanted, sock.recv) {
            (Wanted::Take(mode), Recv::Off) => {
                // Also for a moment within a batch.
                self.pressed &= self.memory.is_pressed();
                sock.recv = Recv::Armed;
                sock.bounded = mode != RecvMode::Many;
                sock.cautious =
                    matches!(mode, RecvMode::Once { limit_bytes } if limit_bytes >= Config::BULK_BYTES_MIN);
                sock.taken_bytes = 0;
                // It could not send while we did not take: its time begins now.
                sock.moved_at = now;
                self.out.push(Op::Recv { sock: id, mode });
            }
            // What may bring much is called back when memory runs short, and armed anew for little.
            (Wanted::Take(RecvMode::Once { .. }), Recv::Armed) if !sock.bounded && self.pressed => {
                sock.recv = Recv::Stopping;
                self.out.push(Op::StopRecv { sock: id });
            }
            // A bounded one ends by itself, and cannot bring much.
            (Wanted::Pause, Recv::Armed) if sock.bounded => {}
            (Wanted::Pause | Wanted::Nothing, Recv::Armed) => {
                sock.cautious |= wanted == Wanted::Pause;
                sock.recv = Recv::Stopping;
                self.out.push(Op::StopRecv { sock: id });
            }
            _ => {}
        }
    }

    /// What is to be received from a socket now.
    fn wants_recv(&self, sock: &Sock) -> Wanted {
        let ahead = |kept: &[u8], mode| match kept.len() {
            ..Config::AHEAD_BYTES => Wanted::Take(mode),
            _ => Wanted::Pause,
        };
        let once = RecvMode::Once { limit_bytes: Config::AHEAD_BYTES as u32 };
        if sock.read_closed || matches!(sock.tls, Tls::Handshake { .. }) {
            return Wanted::Nothing;
        }
        match (&sock.finish, &sock.role) {
            (Finish::Linger { .. }, _) => Wanted::Take(RecvMode::Many),
            (Finish::Close, _) => Wanted::Nothing,
            (_, Role::Http(http)) => match http.phase {
                Phase::Head if sock.out.bytes() < Config::BACKLOG_HIGH_BYTES => Wanted::Take(RecvMode::Many),
                Phase::Head => Wanted::Pause,
                Phase::Exchange if !http.body_done() => self.peer_takes(sock),
                Phase::Waiting => ahead(&http.inbuf, once),
                Phase::Exchange | Phase::Dropping => ahead(&http.inbuf, RecvMode::Many),
                Phase::Done => Wanted::Nothing,
            },
            // What is complete is no preface any more, so this is what it lacks.
            (_, Role::Preface(_)) => Wanted::Take(once),
            // What it says then goes straight on.
            (_, Role::Tcp(_)) if self.connects_at_once(sock) => Wanted::Pause,
            (_, Role::Tcp(tcp)) => ahead(&tcp.inbuf, once),
            (_, Role::Upstream(conn)) => match conn.phase {
                UpPhase::Connecting { .. } => Wanted::Nothing,
                UpPhase::Idle { .. } => Wanted::Take(RecvMode::Many),
                UpPhase::Exchange(_) => self.peer_takes(sock),
            },
            (_, Role::Check(check)) if check.is_asking() => Wanted::Take(RecvMode::Many),
            (_, Role::Check(_)) => Wanted::Nothing,
            (_, Role::Tunnel { .. }) => self.peer_takes(sock),
        }
    }

    /// Whether the other side is a connect that is over within the batch, one to a unix socket. During any other the
    /// client is listened to, lest it goes away unnoticed.
    fn connects_at_once(&self, sock: &Sock) -> bool {
        let Some(Role::Upstream(conn)) =
            sock.peer.and_then(|peer| self.socks.get(peer)).map(|peer| &peer.role)
        else {
            return false;
        };
        self.upstreams.get(conn.upstream).is_some_and(|upstream| matches!(upstream.address, Address::Unix(_)))
    }

    /// As the peer's backlog leaves room. What was stopped waits for the low mark, and for a slow peer until
    /// it has taken all it had.
    fn peer_takes(&self, sock: &Sock) -> Wanted {
        let Some(peer) = sock.peer.and_then(|peer| self.socks.get(peer)) else {
            return Wanted::Take(RecvMode::Many);
        };
        let (slow, pressed) = (peer.out.is_slow(), self.memory.is_pressed());
        let limit_bytes = match sock.recv {
            Recv::Armed if pressed => Config::PRESSED_BYTES as usize,
            Recv::Armed if peer.out.is_spilling() => Config::SPILL_HIGH_BYTES,
            Recv::Armed => Config::BACKLOG_HIGH_BYTES,
            _ if slow || pressed => 1,
            _ if peer.out.is_spilling() => Config::SPILL_LOW_BYTES,
            _ => Config::BACKLOG_LOW_BYTES,
        };
        let brought = if sock.cautious { sock.taken_bytes } else { 0 };
        let bulk = peer.out.bytes().max(brought as usize) >= Config::QUIET_BYTES;
        if peer.out.bytes() >= limit_bytes {
            return Wanted::Pause;
        }
        Wanted::Take(match () {
            () if pressed => RecvMode::Once { limit_bytes: Config::PRESSED_BYTES },
            () if self.thirst_until > self.now => {
                RecvMode::Once { limit_bytes: self.memory.limits().buffer_bytes.min(Config::SLOW_BYTES) }
            }
            () if slow => RecvMode::Once { limit_bytes: Config::SLOW_BYTES },
            () if bulk => RecvMode::Once { limit_bytes: self.bulk_bytes() },
            () => RecvMode::Many,
        })
    }

    /// Much waits in memory, as of now: whoever is armed to receive without bound is looked at. Each of them could
    /// bring as much as a burst may before it is asked, and together more than there is.
    pub(super) fn throttle(&mut self) {
        let before = std::mem::replace(&mut self.pressed, self.memory.is_pressed());
        if before || !self.pressed {
            return;
        }
        let is_unbounded = |sock: &Sock| sock.recv == Recv::Armed && !sock.bounded && sock.peer.is_some();
        let unbounded: Vec<SockId> =
            self.socks.iter().filter(|(_, sock)| is_unbounded(sock)).map(|(id, _)| id).collect();
        unbounded.into_iter().for_each(|id| self.touch(id));
    }

    /// A share of the buffers that are left to lend, within bounds: few flows are cheapest in large strokes, and
    /// many must not use up the buffers.
    fn bulk_bytes(&self) -> u32 {
        let share = self.memory.lent_left() / 8 * self.memory.limits().buffer_bytes as usize;
        (share as u32).clamp(Config::BULK_BYTES_MIN, Config::BULK_BYTES_MAX)
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
        if self.timers.len() > 2 * self.socks.len() + Config::TIMERS_SLACK {
            let socks = &self.socks;
            self.timers.retain(|at, id| socks.get(id).is_some_and(|sock| sock.timer_at == Some(at)));
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

    fn next_lent_tick(&self) -> Millis {
        let scarce = self.memory.is_lending_scarce();
        self.now + if scarce { Config::LENT_TICK_MS } else { Config::LENT_SWEEP_MS }
    }

    /// While few buffers are left to lend, stops sends that have waited on lent ones for too long; their rest
    /// is copied when they end.
    pub(super) fn lent_tick(&mut self) {
        if self.lent_tick_at.is_none_or(|at| at > self.now) {
            return;
        }
        let (now, scarce) = (self.now, self.memory.is_lending_scarce());
        let Self { lenders, socks, out, .. } = self;
        lenders.retain(|id| {
            let Some(sock) = socks.get_mut(*id) else { return false };
            if scarce && sock.out.has_lent_too_long(now) {
                out.push(Op::StopSend { sock: *id });
            }
            sock.lending = sock.out.is_lending();
            sock.lending
        });
        self.lent_tick_at = if self.lenders.is_empty() { None } else { Some(self.next_lent_tick()) };
    }

    /// There is no memory left for what a socket keeps.
    fn shed_kept(&mut self, id: SockId) {
        match self.socks.get(id).map(|sock| &sock.role) {
            Some(Role::Http(_)) => {
                self.unhold(id);
                self.abandon_exchange(id, Answer::NoMemory);
            }
            _ => self.shed(id),
        }
    }

    /// There is no memory left for what a socket's peer does not take.
    fn shed(&mut self, id: SockId) {
        let Some(sock) = self.socks.get(id) else { return };
        match (&sock.role, sock.peer) {
            (Role::Upstream(_), Some(client)) => self.abandon_exchange(client, Answer::NoMemory),
            (Role::Upstream(_), None) => self.discard_upstream(id, true),
            (Role::Check(_), _) => self.check_late(id),
            (Role::Tunnel { .. }, _) => {
                self.counters.shed_memory += 1;
                self.close_tunnel(id, true, Outcome::Own(Answer::NoMemory));
            }
            (Role::Http(_) | Role::Tcp(_) | Role::Preface(_), _) => {
                self.counters.shed_memory += 1;
                self.end_client(id, true, Outcome::Own(Answer::NoMemory));
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
