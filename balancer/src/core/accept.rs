//! Accepting: when, and whom not.
//!
//! ```text
//!             room             full              still full after OVERLOAD_GRACE_MS
//!   Accepting ◀────▶ Paused ◀────────── Paused ──────────────────────────────────▶ Shedding
//!       ▲           clients wait in the kernel's queue                            accepted and reset
//!       └───────────────────────────────── room ───────────────────────────────────┘
//! ```
//!
//! A burst waits for a moment and is served. When the pool stays full, waiting would only turn into timeouts that
//! nobody sees here: so whoever comes is told at once, by a reset, and counted. A listener that has as many as
//! its own limit allows resets at once; there is no other way to leave room for the others.

use std::net::SocketAddr;

use super::config::Config;
use super::engine::Core;
use super::io::{Errno, ListenerId, Millis, Op, RawSocket};
use super::limits::Door;
use super::listen::Listen;
use super::preface::Origin;
use super::session::{Recv, Sock};
use crate::remark::Remark;
use crate::table::limits::ListenerLimits;

/// A listener, and what is open of it.
#[derive(Debug)]
pub struct Listener {
    listen: Listen,
    /// Where it listens.
    local: Option<SocketAddr>,
    pub door: Door,
    /// Connections accepted on it that are open.
    pub open: u64,
    pub recv: Recv,
    pub removed: bool,
}

impl Core {
    /// Starts accepting on a listener, whose address is `local`, within the limits all listeners have.
    pub fn add_listener(&mut self, id: ListenerId, listen: Listen, local: Option<SocketAddr>) {
        let door = Door::new(self.config.listener_limits, self.config.threads.max(1));
        self.listeners.insert(id, Listener { listen, local, door, open: 0, recv: Recv::Off, removed: false });
    }

    /// Gives a listener limits of its own.
    pub fn limit_listener(&mut self, id: ListenerId, limits: ListenerLimits) {
        if let Some(listener) = self.listeners.get_mut(&id) {
            listener.door = Door::new(limits, self.config.threads.max(1));
        }
    }

    /// When those who wait will be waiting no longer.
    pub(super) fn shed_at(&self) -> Option<Millis> {
        let at = self.full_since?.saturating_add(self.config.overload_grace_ms);
        Some(at).filter(|at| *at > self.now)
    }

    fn is_shedding(&self) -> bool {
        let grace_ms = self.config.overload_grace_ms;
        self.full_since.is_some_and(|since| self.now >= since.saturating_add(grace_ms))
    }

    pub(super) fn accepted(&mut self, id: ListenerId, raw: RawSocket, peer: Option<SocketAddr>) {
        let Some(listener) = self.listeners.get(&id) else { return self.out.push(Op::Refuse { raw }) };
        let slack = if self.is_shedding() { 0 } else { Config::SLACK };
        let room = self.counters.connections_open < self.config.connections_max + slack;
        if !room || !listener.door.has_room(listener.open) {
            self.counters.shed_connections += 1;
            self.turn_away(peer, "shed_connections");
            return self.out.push(Op::Refuse { raw });
        }
        let origin = Origin { listen: listener.listen, source: peer, destination: listener.local };
        let Some(role) = self.first_role(origin) else {
            self.counters.tcp_unrouted += 1;
            self.turn_away(peer, "unrouted");
            return self.out.push(Op::Refuse { raw });
        };
        let (listen, listener) = (Some(origin.listen), Some(id));
        let sock = self.socks.insert(Sock { listen, listener, ..Sock::new(role, None, self.now) });
        if let Some(listener) = self.listeners.get_mut(&id) {
            listener.open += 1;
        }
        self.counters.connections_accepted += 1;
        self.counters.connections_open += 1;
        self.out.push(Op::Adopt { raw, sock });
        self.touch(sock);
        if !origin.listen.proxy_protocol {
            self.begin_client(sock, origin.listen, Vec::new());
        }
    }

    pub(super) fn accept_ended(&mut self, id: ListenerId, error: Option<Errno>) {
        let Some(listener) = self.listeners.get_mut(&id) else { return };
        listener.recv = Recv::Off;
        if let Some(error) = error {
            // Out of descriptors, most likely: pausing lets some be closed, and never spins.
            self.counters.accept_backoff += 1;
            self.remarks.add(self.now, || {
                Remark::warning(format!("cannot accept connections for a moment: {}", error.advice()))
            });
            self.accept_after = Some(self.now + Config::ACCEPT_BACKOFF_MS);
        }
    }

    /// A client of a listener is gone.
    pub(super) fn leave_listener(&mut self, id: Option<ListenerId>) {
        if let Some(listener) = id.and_then(|id| self.listeners.get_mut(&id)) {
            listener.open -= 1;
        }
    }

    /// Arms and stops accepting as the number of connections, shortages and stopping ask for.
    pub(super) fn settle_accepting(&mut self) {
        if self.accept_after.is_some_and(|at| at <= self.now) {
            self.accept_after = None;
        }
        let full = self.counters.connections_open >= self.config.connections_max;
        self.full_since = if full { self.full_since.or(Some(self.now)) } else { None };
        let room = !full || self.is_shedding();
        let may = room && !self.stopping && !self.yields && self.accept_after.is_none();
        let mut paused = false;
        for (id, listener) in &mut self.listeners {
            match (may && !listener.removed, listener.recv) {
                (true, Recv::Off) => {
                    listener.recv = Recv::Armed;
                    self.out.push(Op::Accept(*id));
                }
                (false, Recv::Armed) => {
                    listener.recv = Recv::Stopping;
                    paused = full;
                    self.out.push(Op::StopAccept(*id));
                }
                _ => {}
            }
        }
        self.counters.accept_paused_full += u64::from(paused);
        self.listeners.retain(|_, listener| !(listener.removed && listener.recv == Recv::Off));
    }
}
