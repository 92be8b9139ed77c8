//! The connections to upstreams: kept for a next request, taken up again, closed.

use super::config::Config;
use super::engine::Core;
use super::io::{Op, SockId};
use super::session::{Finish, Role, UpPhase};
use super::slab::UpstreamKey;
use crate::control::protocol::ShownState;

impl Core {
    /// A kept-alive connection for a request, if there is one that will do.
    pub(super) fn take_idle(
        &mut self,
        key: UpstreamKey,
        repeatable: bool,
        fresh_only: bool,
    ) -> Option<SockId> {
        let upstream = self.upstreams.get_mut(key).filter(|_| !fresh_only)?;
        let newest = *upstream.idle.last()?;
        let Role::Upstream(conn) = &mut self.socks.get_mut(newest)?.role else { return None };
        let UpPhase::Idle { since } = conn.phase else { return None };
        let age_max =
            if repeatable { Config::UPSTREAM_IDLE_MS } else { Config::UPSTREAM_IDLE_UNREPEATABLE_MS };
        if self.now - since > age_max {
            return None;
        }
        upstream.idle.pop();
        conn.reused = true;
        Some(newest)
    }

    /// Returns an upstream connection to the pool, or closes it.
    pub(super) fn park_upstream(&mut self, id: SockId, reusable: bool) {
        let stopping = self.stopping;
        let Some(sock) = self.socks.get_mut(id) else { return };
        sock.peer = None;
        sock.cautious = false;
        let Role::Upstream(conn) = &mut sock.role else { return };
        let Some(upstream) = self.upstreams.get_mut(conn.upstream) else { return };
        let room = upstream.state == ShownState::Up && upstream.idle.len() < Config::IDLE_PER_UPSTREAM;
        let healthy = !sock.read_closed && !sock.out_dead && sock.out.is_empty() && sock.finish == Finish::No;
        conn.phase = UpPhase::Idle { since: self.now };
        if reusable && room && healthy && !stopping {
            upstream.idle.push(id);
            self.touch(id);
        } else {
            self.discard_upstream(id, false);
        }
    }

    /// Closes an upstream connection, whatever it was doing, and puts the upstream's counts right. Its
    /// client, if any, is left to the caller.
    pub(super) fn discard_upstream(&mut self, id: SockId, reset: bool) {
        let Some(sock) = self.socks.remove(id) else { return };
        self.out.push(Op::Close { sock: id, reset });
        self.counters.upstream_connections_open -= 1;
        let (key, phase) = match sock.role {
            Role::Upstream(conn) => (conn.upstream, Some(conn.phase)),
            Role::Tunnel { upstream: Some(key), .. } => (key, None),
            _ => return,
        };
        let Some(upstream) = self.upstreams.get_mut(key) else { return };
        match phase {
            Some(UpPhase::Connecting { .. }) => upstream.connect_abandoned(),
            Some(UpPhase::Idle { .. }) => upstream.idle.retain(|idle| *idle != id),
            Some(UpPhase::Exchange(_)) => upstream.active_requests -= 1,
            None => upstream.active_connections -= 1,
        }
        if upstream.state == ShownState::Removed {
            self.upstreams.sweep();
        }
    }
}
