//! Finding an upstream for a client that waits: a kept-alive connection, a new one, or the hold queue.
//!
//! Nothing of a request is sent before its connection stands, so a connect that fails costs the client
//! nothing but time: the request goes to another upstream, or is held until one can be reached. At most
//! [`Config::CONNECT_TRIES_MAX`] connects are tried for it in a row; what was sent is never sent again, but
//! for the one case in `upstream_side`.

use std::net::IpAddr;

use super::choose::{Ask, Choice};
use super::config::Config;
use super::engine::Core;
use super::flow::Outcome;
use super::http::answer::Answer;
use super::io::{Errno, Op, SockId};
use super::listen::Mode;
use super::random;
use super::refusal::Refusal;
use super::session::{Phase, Role, Sock, UpPhase, UpstreamConn, Wait};
use super::slab::{RouteKey, UpstreamKey};
use crate::remark::Remark;
use crate::table::{Address, AllDown, HashBy};

impl Core {
    /// Gives a waiting client to an upstream of its route, or holds it.
    pub(super) fn dispatch(&mut self, client: SockId) {
        let Some(route) = self.route_of(client) else { return self.reroute(client) };
        if let Some(reply) = self.routes.get(route).and_then(|route| route.reply.clone()) {
            return self.act(client, reply);
        }
        match self.choose(route, client) {
            Choice::Give(upstream) => self.give(client, upstream),
            Choice::Busy => {
                self.counters.upstream_full += 1;
                self.hold(client, route);
            }
            none => self.without_upstream(client, route, none),
        }
    }

    /// Nobody can take it: the route's policy says what becomes of it.
    fn without_upstream(&mut self, client: SockId, key: RouteKey, none: Choice) {
        match self.answers_at_once(key) {
            true => self.give_up(client, no_upstream(none)),
            false => self.hold(client, key),
        }
    }

    /// Whether the route answers rather than holds when none of its upstreams can take anything. Of one that has
    /// not been checked yet nobody knows that: until its first verdict, after a start or a handover in
    /// milliseconds, whoever comes is held.
    pub(super) fn answers_at_once(&self, key: RouteKey) -> bool {
        self.routes.get(key).is_some_and(|route| {
            route.chooser.all_down == AllDown::Answer && !route.chooser.awaits_verdict(&self.upstreams)
        })
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
                self.end_client(client, true, Outcome::Refused("unrouted"));
            }
            None if self.routes.has_hosts() => self.answer(client, Answer::UnknownHost),
            None => self.answer(client, Answer::NoRoutes),
        }
    }

    /// A connect is done.
    pub(super) fn connected(&mut self, id: SockId) {
        let Some(sock) = self.socks.get_mut(id) else { return };
        if let Role::Check(_) = sock.role {
            return self.check_connected(id);
        }
        let Role::Upstream(conn) = &mut sock.role else { return };
        let (key, client) = (conn.upstream, sock.peer);
        if let Some(upstream) = self.upstreams.get_mut(key) {
            upstream.connect_worked();
        }
        self.release_wanted |= self.hold_tick_at.is_some();
        self.touch(id);
        match client.and_then(|client| self.socks.get(client)).map(|sock| &sock.role) {
            Some(Role::Http(_)) => self.start_exchange(id),
            Some(Role::Tcp(_)) => {
                if let Some(client) = client {
                    self.report(client, key, true);
                }
                self.start_tunnel(id, key);
            }
            _ => self.discard_upstream(id, true),
        }
    }

    /// A connect failed, or took too long. Nothing was sent: the client is served elsewhere, or held.
    pub(super) fn connect_failed(&mut self, id: SockId, error: Errno) {
        if let Some(Role::Check(_)) = self.socks.get(id).map(|sock| &sock.role) {
            return self.check_unreachable(id, error);
        }
        let Some(sock) = self.socks.remove(id) else { return };
        self.out.push(Op::Close { sock: id, reset: true });
        self.counters.upstream_connections_open -= 1;
        let Role::Upstream(conn) = sock.role else { return };
        self.note_failed_connect(conn.upstream, error);
        let Some(client) = sock.peer else { return };
        if !error.is_shortage() {
            self.report(client, conn.upstream, false);
        }
        let Some(client_sock) = self.socks.get_mut(client) else { return };
        client_sock.peer = None;
        self.touch(client);
        if error.is_shortage() {
            // Trying again at once would fail again at once.
            self.counters.accept_backoff += 1;
            self.remarks.add(self.now, || {
                Remark::warning(format!("cannot connect to upstreams for a moment: {}", error.advice()))
            });
            return match self.route_of(client) {
                Some(route) => self.hold(client, route),
                None => self.reroute(client),
            };
        }
        if error.is_full_queue() {
            // It is not asked again for a moment: another is, or the client is held.
            return self.dispatch(client);
        }
        let tries = self.wait_mut(client).map_or(0, |wait| {
            wait.tries += 1;
            wait.tries
        });
        match self.route_of(client) {
            Some(route) if tries >= Config::CONNECT_TRIES_MAX => {
                self.without_upstream(client, route, Choice::AllDown);
            }
            _ => {
                self.counters.retried_connect += 1;
                self.dispatch(client);
            }
        }
    }

    /// What a failed connect says of its upstream.
    fn note_failed_connect(&mut self, key: UpstreamKey, error: Errno) {
        let Some(upstream) = self.upstreams.get_mut(key) else { return };
        if error.is_shortage() {
            upstream.connect_abandoned();
        } else if error.is_full_queue() {
            self.counters.unix_queue_full += 1;
            upstream.connect_put_off(self.now);
        } else {
            if let (Some(refusal), Address::Unix(_)) = (Refusal::of(error), &upstream.address) {
                *refusal.counter(&mut self.counters) += 1;
                self.remarks.add(self.now, || {
                    Remark::warning(format!("upstream {} is not used: {refusal}", upstream.id))
                        .with("upstream", &upstream.id)
                });
            }
            upstream.connect_failed(self.now, error);
        }
    }

    /// A request or connection has its route: it is given to an upstream, unless it is too much.
    pub(super) fn admit(&mut self, client: SockId) {
        self.count_request(client);
        match self.over_limits(client) {
            Some(answer) => self.give_up(client, answer),
            None => self.dispatch(client),
        }
    }

    /// Counts a request or connection on its route.
    fn count_request(&mut self, client: SockId) {
        self.enter_route(client);
        let route = self.wait_mut(client).map(|wait| wait.route);
        if let Some(route) = route.and_then(|route| self.routes.get_mut(route)) {
            route.requests_total += 1;
        }
    }

    pub(super) fn wait_mut(&mut self, client: SockId) -> Option<&mut Wait> {
        self.socks.get_mut(client)?.wait()
    }

    /// The client's route, while the table has it.
    fn route_of(&mut self, client: SockId) -> Option<RouteKey> {
        let key = self.wait_mut(client)?.route;
        self.routes.get(key).filter(|route| !route.is_alias).map(|_| key)
    }

    /// Which upstream of the route the client is to be given to.
    pub(super) fn choose(&mut self, key: RouteKey, client: SockId) -> Choice {
        let hashed = self.hashed(key, client);
        let Some(route) = self.routes.get_mut(key) else { return Choice::NoUpstreams };
        let mut ask = Ask { now: self.now, key: hashed, random: &mut self.random };
        route.chooser.choose(&mut ask, &self.upstreams)
    }

    /// What the route's hash makes of the client's request, if it hashes.
    fn hashed(&self, key: RouteKey, client: SockId) -> Option<u64> {
        let by = self.routes.get(key)?.chooser.hash_by()?;
        let (address, request) = match &self.socks.get(client)?.role {
            Role::Http(http) => (http.address, http.request.as_ref()),
            Role::Tcp(tcp) => (tcp.origin.source, None),
            _ => (None, None),
        };
        if let (HashBy::Header(name), Some(request)) = (by, request)
            && let Some(value) = field(&request.forward, name)
        {
            return Some(random::hash(value));
        }
        Some(match address?.ip().to_canonical() {
            IpAddr::V4(ip) => random::hash(&ip.octets()),
            IpAddr::V6(ip) => random::hash(&ip.octets()),
        })
    }

    /// Serves a client from this upstream: by a kept-alive connection where one will do, else a new one.
    pub(super) fn give(&mut self, client: SockId, key: UpstreamKey) {
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

    /// The client's upstream stands: the head goes out, and what is buffered of the body after it.
    fn start_exchange(&mut self, id: SockId) {
        let now_us = self.now_us();
        let Some(Sock { peer: Some(client), role: Role::Upstream(conn), .. }) = self.socks.get(id) else {
            return;
        };
        let (client, key) = (*client, conn.upstream);
        let Some(http) = self.socks.get_mut(client).and_then(Sock::http) else { return };
        let Some(request) = http.request.as_mut() else { return };
        let head = request.forward.clone();
        http.phase = Phase::Exchange;
        request.flow.given(now_us, key);
        let Some(sock) = self.socks.get_mut(id) else { return };
        let Role::Upstream(conn) = &mut sock.role else { return };
        conn.phase = UpPhase::Exchange(Box::default());
        sock.moved_at = self.now;
        sock.push(self.now, head);
        if let Some(upstream) = self.upstreams.get_mut(key) {
            upstream.active_requests += 1;
            upstream.requests_total += 1;
        }
        self.touch(id);
        self.runnable.push_back(client);
    }

    /// Ends a client's wait without an upstream: an answer in HTTP, a reset in plain TCP.
    pub(super) fn give_up(&mut self, client: SockId, answer: Answer) {
        match self.socks.get(client).map(|sock| &sock.role) {
            Some(Role::Http(_)) => self.answer(client, answer),
            Some(_) => {
                *answer.counter(&mut self.counters) += 1;
                self.end_client(client, true, Outcome::Own(answer));
            }
            None => {}
        }
    }
}

/// The balancer's word for a choice of nobody.
pub(super) fn no_upstream(choice: Choice) -> Answer {
    match choice {
        Choice::NoUpstreams => Answer::NoUpstreams,
        _ => Answer::AllDown,
    }
}

/// The value of a field in a head of our own making, one `Name: value` a line.
pub(super) fn field<'a>(head: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let mut lines = head.split(|b| *b == b'\n').skip(1);
    lines.find_map(|line| {
        let (found, value) = line.split_at_checked(name.len())?;
        let value = value.strip_prefix(b":")?;
        found.eq_ignore_ascii_case(name.as_bytes()).then(|| value.trim_ascii())
    })
}
