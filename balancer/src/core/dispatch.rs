//! Finding an upstream for a client that waits: a kept-alive connection, a new one, or the hold queue.
//!
//! Nothing of a request is sent before its connection stands, so a connect that fails costs the client
//! nothing but time: the request goes to another upstream, or is held until one can be reached.

use super::config::Config;
use super::engine::Core;
use super::http::answer::Answer;
use super::io::{Errno, Op, SockId};
use super::listen::Mode;
use super::routes::Route;
use super::session::{Finish, Phase, Role, Sock, UpPhase, UpstreamConn, Wait};
use super::slab::{RouteKey, UpstreamKey};
use crate::control::protocol::ShownState;

impl Core {
    /// Gives a waiting client to an upstream of its route, or holds it.
    pub(super) fn dispatch(&mut self, client: SockId) {
        let Some(route) = self.route_of(client) else { return self.reroute(client) };
        if let Some(reply) = self.routes.get(route).and_then(|route| route.reply.clone()) {
            return self.act(client, reply);
        }
        match self.choose(route) {
            Some(upstream) => self.give(client, upstream),
            None => self.hold(client, route),
        }
    }

    /// Finds a route anew for a client whose route is gone.
    pub(super) fn reroute(&mut self, client: SockId) {
        let Some(sock) = self.socks.get(client) else { return };
        let (route, is_tcp) = match &sock.role {
            Role::Http(http) => match &http.request {
                Some(request) => (self.routes.by_host(&request.host), false),
                None => return,
            },
            Role::Tcp(tcp) => match (&tcp.server_name, tcp.origin.listen.mode) {
                (Some(name), _) => (self.routes.by_server_name(name), true),
                (None, Mode::Tcp { port }) => (self.routes.by_port(port), true),
                (None, _) => (None, true),
            },
            _ => return,
        };
        match route {
            Some(route) => {
                if let Some(wait) = self.wait_mut(client) {
                    (wait.route, wait.queued) = (route, false);
                }
                self.enter_route(client);
                self.dispatch(client);
            }
            None if is_tcp => {
                self.counters.tcp_unrouted += 1;
                self.close_client(client, true);
            }
            None if self.routes.has_hosts() => self.answer(client, Answer::UnknownHost),
            None => self.answer(client, Answer::NoRoutes),
        }
    }

    /// Lets held clients go, as far as upstreams can take them.
    pub(super) fn release_all(&mut self) {
        for route in self.routes.holding() {
            while let Some((client, reply)) = self.routes.get_mut(route).and_then(Route::pop_answered) {
                if let Some(wait) = self.wait_mut(client) {
                    wait.queued = false;
                    self.act(client, reply);
                }
            }
            while let Some(upstream) = self.choose_for_held(route) {
                let Some((client, _)) = self.routes.get_mut(route).and_then(|route| route.held.pop_front())
                else {
                    break;
                };
                if let Some(wait) = self.wait_mut(client) {
                    wait.queued = false;
                    self.give(client, upstream);
                }
            }
        }
    }

    /// Every 50 ms while something is held: age out, and try again what could not be reached.
    pub(super) fn hold_tick(&mut self) {
        if self.hold_tick_at.is_none_or(|at| at > self.now) {
            return;
        }
        let holding = self.routes.holding();
        for key in &holding {
            while let Some(client) = self.pop_expired(*key) {
                if let Some(wait) = self.wait_mut(client) {
                    wait.queued = false;
                }
                self.give_up(client, Answer::HoldExpired);
            }
        }
        self.release_wanted = true;
        self.hold_tick_at = if holding.is_empty() { None } else { Some(self.now + Config::HOLD_TICK_MS) };
    }

    /// A connect is done.
    pub(super) fn connected(&mut self, id: SockId) {
        let Some(sock) = self.socks.get_mut(id) else { return };
        let Role::Upstream(conn) = &mut sock.role else { return };
        let (key, client) = (conn.upstream, sock.peer);
        if let Some(upstream) = self.upstreams.get_mut(key) {
            upstream.connect_worked();
        }
        self.release_wanted |= self.hold_tick_at.is_some();
        self.touch(id);
        match client.and_then(|client| self.socks.get(client)).map(|sock| &sock.role) {
            Some(Role::Http(_)) => self.start_exchange(id),
            Some(Role::Tcp(_)) => self.start_tunnel(id, key),
            _ => self.discard_upstream(id, true),
        }
    }

    /// A connect failed, or took too long. Nothing was sent: the client is served elsewhere, or held.
    pub(super) fn connect_failed(&mut self, id: SockId, error: Errno) {
        let Some(sock) = self.socks.remove(id) else { return };
        self.out.push(Op::Close { sock: id, reset: true });
        self.counters.upstream_connections_open -= 1;
        let Role::Upstream(conn) = sock.role else { return };
        if let Some(upstream) = self.upstreams.get_mut(conn.upstream) {
            if error.is_shortage() { upstream.connect_abandoned() } else { upstream.connect_failed(self.now) }
        }
        let Some(client) = sock.peer else { return };
        let Some(client_sock) = self.socks.get_mut(client) else { return };
        client_sock.peer = None;
        self.touch(client);
        if error.is_shortage() {
            // Trying again at once would fail again at once.
            self.counters.accept_backoff += 1;
            return match self.route_of(client) {
                Some(route) => self.hold(client, route),
                None => self.reroute(client),
            };
        }
        self.counters.retried_connect += 1;
        self.dispatch(client);
    }

    /// Counts a request or connection on its route.
    pub(super) fn count_request(&mut self, client: SockId) {
        self.enter_route(client);
        let route = self.wait_mut(client).map(|wait| wait.route);
        if let Some(route) = route.and_then(|route| self.routes.get_mut(route)) {
            route.requests_total += 1;
        }
    }

    /// Takes a client out of its hold queue, if it is in one.
    pub(super) fn unhold(&mut self, client: SockId) {
        let Some(wait) = self.wait_mut(client).filter(|wait| wait.queued) else { return };
        wait.queued = false;
        let key = wait.route;
        if let Some(route) = self.routes.get_mut(key) {
            route.held.retain(|(held, _)| *held != client);
        }
    }

    fn wait_mut(&mut self, client: SockId) -> Option<&mut Wait> {
        self.socks.get_mut(client)?.wait()
    }

    /// The client's route, while the table has it.
    fn route_of(&mut self, client: SockId) -> Option<RouteKey> {
        let key = self.wait_mut(client)?.route;
        self.routes.get(key).filter(|route| !route.is_alias).map(|_| key)
    }

    fn choose(&mut self, route: RouteKey) -> Option<UpstreamKey> {
        let route = self.routes.get_mut(route)?;
        self.upstreams.choose(&route.up, &mut route.turn, self.now)
    }

    fn choose_for_held(&mut self, route: RouteKey) -> Option<UpstreamKey> {
        self.routes.get(route).filter(|route| !route.held.is_empty())?;
        self.choose(route)
    }

    /// Serves a client from this upstream: by a kept-alive connection where one will do, else a new one.
    fn give(&mut self, client: SockId, key: UpstreamKey) {
        let Some(sock) = self.socks.get_mut(client) else { return };
        if let Some(request) = sock.http().and_then(|http| http.request.as_ref()) {
            let (repeatable, fresh_only) = (request.repeatable, request.fresh_only);
            if let Some(idle) = self.take_idle(key, repeatable, fresh_only) {
                self.link(client, idle);
                return self.start_exchange(idle);
            }
        }
        let Some(upstream) = self.upstreams.get_mut(key) else { return };
        let probing = upstream.is_lost();
        let timeout_ms = if probing { Config::PROBE_TIMEOUT_MS } else { self.config.connect_timeout_ms };
        upstream.connect_begins();
        let address = upstream.address.clone();
        let phase = UpPhase::Connecting { since: self.now, timeout_ms };
        let role = Role::Upstream(UpstreamConn { upstream: key, phase, reused: false });
        let id = self.socks.insert(Sock::new(role, None, self.now));
        self.counters.upstream_connections_open += 1;
        self.link(client, id);
        self.out.push(Op::Connect { sock: id, address });
    }

    fn link(&mut self, client: SockId, upstream: SockId) {
        if let Some(sock) = self.socks.get_mut(client) {
            sock.peer = Some(upstream);
        }
        if let Some(sock) = self.socks.get_mut(upstream) {
            sock.peer = Some(client);
        }
        self.touch(client);
        self.touch(upstream);
    }

    fn take_idle(&mut self, key: UpstreamKey, repeatable: bool, fresh_only: bool) -> Option<SockId> {
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

    /// The client's upstream stands: the head goes out, and what is buffered of the body after it.
    fn start_exchange(&mut self, id: SockId) {
        let Some(client) = self.socks.get(id).and_then(|sock| sock.peer) else { return };
        let Some(http) = self.socks.get_mut(client).and_then(Sock::http) else { return };
        let Some(request) = &http.request else { return };
        let head = request.forward.clone();
        http.phase = Phase::Exchange;
        let Some(sock) = self.socks.get_mut(id) else { return };
        let Role::Upstream(conn) = &mut sock.role else { return };
        conn.phase = UpPhase::Exchange(Box::default());
        let key = conn.upstream;
        sock.moved_at = self.now;
        sock.push(self.now, head);
        if let Some(upstream) = self.upstreams.get_mut(key) {
            upstream.active_requests += 1;
            upstream.requests_total += 1;
        }
        self.touch(id);
        self.runnable.push_back(client);
    }

    /// Puts a client into its route's queue; a full queue sheds its oldest.
    fn hold(&mut self, client: SockId, key: RouteKey) {
        let now = self.now;
        let Some(wait) = self.wait_mut(client) else { return };
        let since = wait.since;
        (wait.queued, wait.since) = (true, Some(since.unwrap_or(now)));
        let Some(route) = self.routes.get_mut(key) else { return };
        match since {
            // It has waited before, so it is older than whoever came meanwhile.
            Some(since) => route.held.push_front((client, since)),
            None => {
                route.held_total += 1;
                route.held.push_back((client, now));
            }
        }
        // The first of them is an event; those that follow find it told already.
        self.starved |= route.is_starving() && route.held.len() == 1;
        let over = route.held.len() > route.limits.max_requests as usize;
        let shed = if over { route.held.pop_front() } else { None };
        if let Some((oldest, _)) = shed {
            route.shed_total += 1;
            if let Some(wait) = self.wait_mut(oldest) {
                wait.queued = false;
            }
            self.give_up(oldest, Answer::HoldShed);
        }
        self.hold_tick_at.get_or_insert(now + Config::HOLD_TICK_MS);
        self.touch(client);
    }

    fn pop_expired(&mut self, key: RouteKey) -> Option<SockId> {
        let now = self.now;
        let route = self.routes.get_mut(key)?;
        let max_age_ms = route.limits.max_age_ms;
        let (client, _) = route.held.pop_front_if(|(_, since)| now >= *since + max_age_ms)?;
        route.expired_total += 1;
        Some(client)
    }

    /// Ends a client's wait without an upstream: an answer in HTTP, a reset in plain TCP.
    fn give_up(&mut self, client: SockId, answer: Answer) {
        match self.socks.get(client).map(|sock| &sock.role) {
            Some(Role::Http(_)) => self.answer(client, answer),
            Some(_) => {
                *answer.counter(&mut self.counters) += 1;
                self.close_client(client, true);
            }
            None => {}
        }
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
            Role::Tunnel { upstream: Some(key) } => (key, None),
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
