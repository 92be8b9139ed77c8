//! The client's side of HTTP: reading requests, passing bodies on, answering for the balancer.

use super::chunk::Chunk;
use super::config::Config;
use super::engine::Core;
use super::flow::{Flow, Outcome};
use super::http::answer::Answer;
use super::http::forwarded::Caller;
use super::http::head::{self, Scan, Version};
use super::http::request;
use super::io::{Op, SockId};
use super::session::{Finish, HttpClient, Phase, Request, Role, Sock, Wait};

/// What looking at a client's bytes led to.
pub(super) enum Step {
    /// This many were used; look at the rest.
    Used(usize),
    /// The rest has to wait.
    Keep,
    /// Nothing more of this client is wanted.
    Over,
}

impl Core {
    /// Uses what a client sent: `fresh` bytes, after any kept from before.
    pub(super) fn client_input(&mut self, id: SockId, fresh: Option<Chunk>) {
        let Some(http) = self.socks.get_mut(id).and_then(Sock::http) else { return };
        let mut chunk = join(&mut http.inbuf, fresh);
        while !chunk.is_empty() {
            let Some(sock) = self.socks.get_mut(id) else { return };
            let full = sock.out.bytes() >= Config::BACKLOG_HIGH_BYTES;
            let Some(http) = sock.http() else { return };
            let step = match http.phase {
                // One that asks on and on without reading waits until it has read.
                Phase::Head if full => Step::Keep,
                Phase::Head => self.read_head(id, &chunk),
                Phase::Exchange if !http.body_done() => self.pass_body(id, &chunk),
                Phase::Dropping if !http.body_done() => self.drop_body(id, &chunk),
                Phase::Waiting | Phase::Exchange | Phase::Dropping => Step::Keep,
                Phase::Done => Step::Over,
            };
            match step {
                Step::Used(count) => chunk.advance(count),
                Step::Keep => break,
                Step::Over => return,
            }
        }
        if let Some(http) = self.socks.get_mut(id).and_then(Sock::http) {
            http.inbuf = chunk.into_vec();
        }
        self.touch(id);
    }

    /// Answers in the balancer's own name. The client must have no upstream. It goes on to its next request
    /// if this one was taken in whole.
    pub(super) fn answer(&mut self, id: SockId, answer: Answer) {
        *answer.counter(&mut self.counters) += 1;
        let page = self.pages.get(answer.code()).cloned();
        self.respond(id, Outcome::Own(answer), answer.status(), |request, keep_alive| {
            let is_head = request.is_some_and(|request| request.is_head);
            (answer.write(is_head, keep_alive, page.as_deref()), Chunk::owned(Vec::new()))
        });
    }

    /// Ends a client's request with a response that no upstream gave.
    pub(super) fn respond(
        &mut self,
        id: SockId,
        outcome: Outcome,
        status: u16,
        write: impl FnOnce(Option<&Request>, bool) -> (Vec<u8>, Chunk),
    ) {
        self.leave_route(id);
        let (now, now_us, stopping) = (self.now, self.now_us(), self.stopping);
        let Some(sock) = self.socks.get_mut(id) else { return };
        let Some(http) = sock.http() else { return };
        let request = http.request.take();
        let address = http.address;
        let keep_alive = !stopping
            && request.as_ref().is_some_and(|request| {
                request.keep_alive && request.body.is_done() && request.version == Version::Http11
            });
        http.head_since = None;
        if keep_alive {
            (http.phase, http.idle_since) = (Phase::Head, now);
        } else {
            http.phase = Phase::Done;
            http.inbuf = Vec::new();
            sock.finish = Finish::Linger { until: None };
        }
        let (mut head, body) = write(request.as_ref(), keep_alive);
        if let Some(request) = &request {
            name_request(&mut head, request.id());
        }
        let mut flow = match &request {
            Some(request) => request.flow.clone(),
            None => Flow::new(address, now_us),
        };
        flow.status = Some(status);
        flow.bytes_out += (head.len() + body.len()) as u64;
        sock.push(now, Chunk::owned(head));
        sock.push(now, body);
        self.end_flow(flow, request.as_ref(), outcome);
        self.touch(id);
        self.runnable.push_back(id);
    }

    /// A client is gone without a goodbye.
    pub(super) fn client_gone(&mut self, id: SockId) {
        let Some(http) = self.socks.get_mut(id).and_then(Sock::http) else {
            return self.close_client(id, true);
        };
        if matches!(http.phase, Phase::Waiting | Phase::Exchange | Phase::Dropping) {
            self.counters.client_aborted += 1;
        }
        self.end_client(id, true, Outcome::Aborted);
    }

    /// Closes a client, and whatever an upstream was doing for it.
    pub(super) fn close_client(&mut self, id: SockId, reset: bool) {
        self.end_client(id, reset, if reset { Outcome::Aborted } else { Outcome::Closed });
    }

    /// Closes a client; what it was being served, if anything, ended like this.
    pub(super) fn end_client(&mut self, id: SockId, reset: bool, outcome: Outcome) {
        self.unhold(id);
        self.leave_route(id);
        let Some(sock) = self.socks.remove(id) else { return };
        self.out.push(Op::Close { sock: id, reset });
        self.counters.connections_open -= 1;
        self.leave_listener(sock.listener);
        self.give_back(sock.source);
        match sock.role {
            Role::Http(http) => {
                if let Some(request) = http.request {
                    self.end_flow(request.flow.clone(), Some(&request), outcome);
                }
            }
            Role::Tcp(tcp) => {
                let flow = Flow { host: tcp.server_name, ..tcp.flow };
                self.end_flow(flow, None, outcome);
            }
            Role::Tunnel { flow: Some(flow), .. } => {
                let done = flow.upgraded && outcome == Outcome::Closed;
                self.end_flow(*flow, None, if done { Outcome::Upgraded } else { outcome });
            }
            Role::Tunnel { flow: None, .. } | Role::Preface(_) | Role::Upstream(_) | Role::Check(_) => {}
        }
        if let Some(upstream) = sock.peer {
            self.discard_upstream(upstream, true);
        }
    }

    fn read_head(&mut self, id: SockId, chunk: &Chunk) -> Step {
        let limit_bytes = self.config.head_bytes_max;
        let Some(http) = self.socks.get_mut(id).and_then(Sock::http) else { return Step::Over };
        let (start, end) = match head::find_end(chunk, http.scanned) {
            Scan::Complete { start, end } if end - start <= limit_bytes => (start, end),
            Scan::Partial { from } if chunk.len() <= limit_bytes => {
                http.scanned = from;
                http.head_since.get_or_insert(self.now);
                return Step::Keep;
            }
            Scan::Complete { .. } | Scan::Partial { .. } => return self.refuse(id, Answer::LargeHead),
            Scan::Malformed(error) => return self.refuse(id, Answer::Refused(error)),
        };
        http.scanned = 0;
        http.head_since = None;
        let caller = Caller {
            address: http.address.map(|address| address.ip().to_canonical()),
            secure: http.secured.is_some(),
            trusted: http.listen.trusted,
            id: self.request_ids.make(),
        };
        let judged = head::parse_request(&chunk[start..end]).and_then(|head| request::plan(&head, &caller));
        match judged {
            Ok(plan) => self.begin(id, plan, end - start),
            Err(error) => return self.refuse(id, Answer::Refused(error)),
        }
        Step::Used(end)
    }

    fn refuse(&mut self, id: SockId, answer: Answer) -> Step {
        self.answer(id, answer);
        Step::Over
    }

    /// A request was understood: find its route and an upstream.
    fn begin(&mut self, id: SockId, plan: request::RequestPlan, head_bytes: usize) {
        self.counters.requests += 1;
        let now_us = self.now_us();
        let Some(http) = self.socks.get_mut(id).and_then(Sock::http) else { return };
        http.requests += 1;
        http.phase = Phase::Waiting;
        // A key that no route has stands for none until the answer below is given.
        let wait = Wait::at(super::slab::RouteKey::NONE);
        let flow = Flow { bytes_in: head_bytes as u64, ..Flow::new(http.address, now_us) };
        http.request = Some(Request {
            flow,
            wait,
            host: plan.host,
            forward: Chunk::owned(plan.forward),
            id: plan.id,
            body: plan.body,
            version: plan.version,
            is_head: plan.is_head,
            repeatable: plan.repeatable,
            keep_alive: plan.keep_alive,
            upgrade: plan.upgrade,
            fresh_only: false,
            expects: plan.expects,
            awaits_challenge: false,
            reply: None,
        });
        if http.is_misdirected() {
            self.answer(id, Answer::Misdirected);
        } else if !self.is_challenge(id) {
            self.find_route(id);
        }
    }

    /// Gives a request to the route of its host.
    pub(super) fn find_route(&mut self, id: SockId) {
        let has_hosts = self.routes.has_hosts();
        let Some(http) = self.socks.get_mut(id).and_then(Sock::http) else { return };
        let Some(request) = &mut http.request else { return };
        let route = self.routes.by_host(&request.host);
        request.wait = Wait::at(route.unwrap_or(super::slab::RouteKey::NONE));
        match route {
            Some(_) => self.admit(id),
            None if has_hosts => self.answer(id, Answer::UnknownHost),
            None => self.answer(id, Answer::NoRoutes),
        }
    }

    /// Passes what belongs to the body on to the upstream.
    fn pass_body(&mut self, id: SockId, chunk: &Chunk) -> Step {
        let Some(sock) = self.socks.get_mut(id) else { return Step::Over };
        let Some(upstream) = sock.peer else { return Step::Keep };
        let Some(request) = sock.http().and_then(|http| http.request.as_mut()) else { return Step::Over };
        match request.body.feed(chunk, None) {
            Ok(used) => {
                request.flow.bytes_in += used as u64;
                let now = self.now;
                if let Some(upstream) = self.socks.get_mut(upstream) {
                    upstream.push(now, chunk.slice(0..used));
                }
                self.touch(upstream);
                Step::Used(used)
            }
            Err(_) => {
                self.abandon_exchange(id, Answer::BadChunk);
                Step::Over
            }
        }
    }

    /// The client broke off or broke the rules in the middle of its request: its upstream connection is
    /// cut, and it gets this answer if it can still be given one.
    pub(super) fn abandon_exchange(&mut self, client: SockId, answer: Answer) {
        let Some(sock) = self.socks.get_mut(client) else { return };
        let upstream = sock.peer.take();
        let unanswered = match upstream.and_then(|upstream| self.socks.get_mut(upstream)) {
            Some(upstream) => upstream.exchange().is_none_or(|exchange| exchange.is_head()),
            None => true,
        };
        if let Some(upstream) = upstream {
            self.discard_upstream(upstream, true);
        }
        if unanswered {
            self.answer(client, answer);
        } else {
            *answer.counter(&mut self.counters) += 1;
            self.end_client(client, true, Outcome::Own(answer));
        }
    }
}

impl HttpClient {
    /// Whether the current request is for a host that the client's TLS connection is not for.
    fn is_misdirected(&self) -> bool {
        let Some((secured, request)) = self.secured.as_ref().zip(self.request.as_ref()) else { return false };
        !secured.is_for(&request.host)
    }

    /// Whether the client is between two requests.
    pub(super) fn is_between(&self) -> bool {
        self.phase == Phase::Head && self.head_since.is_none()
    }
}

/// Tells a client what its request is called, as the first field of a response of our own.
fn name_request(head: &mut Vec<u8>, id: &[u8]) {
    if let Some(line_end) = head.windows(2).position(|pair| pair == b"\r\n") {
        let field = [&b"\r\nX-Request-Id: "[..], id].concat();
        head.splice(line_end..line_end, field);
    }
}

/// Bytes kept from before, and then fresh ones, as one chunk.
pub(super) fn join(kept: &mut Vec<u8>, fresh: Option<Chunk>) -> Chunk {
    let mut bytes = std::mem::take(kept);
    match fresh {
        Some(fresh) if bytes.is_empty() => fresh,
        Some(fresh) => {
            bytes.extend_from_slice(&fresh);
            Chunk::owned(bytes)
        }
        None => Chunk::owned(bytes),
    }
}
