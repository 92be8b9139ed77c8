//! The upstream's side of HTTP: reading responses, passing them on, and what its end means.

use super::chunk::Chunk;
use super::client::join;
use super::config::Config;
use super::engine::Core;
use super::flow::Outcome;
use super::http::answer::Answer;
use super::http::body::Body;
use super::http::head::{self, Scan};
use super::http::response::{self, Asked, FinalPlan, ResponsePlan};
use super::io::SockId;
use super::session::{Exchange, Finish, Phase, Role, Sock, Stage, UpPhase};

/// What looking at an upstream's bytes led to.
enum Step {
    /// This many were used; look at the rest.
    Used(usize),
    /// A head is not complete.
    Keep,
    /// This connection is no longer in an exchange, or no longer there.
    Over,
}

impl Core {
    /// Uses what an upstream sent.
    pub(super) fn upstream_input(&mut self, id: SockId, fresh: Chunk) {
        let Some(exchange) = self.socks.get_mut(id).and_then(Sock::exchange) else {
            // Nobody asked it anything: whatever it says, it cannot be trusted with a request.
            return self.discard_upstream(id, true);
        };
        let mut chunk = join(&mut exchange.head, Some(fresh));
        while !chunk.is_empty() {
            let Some(exchange) = self.socks.get_mut(id).and_then(Sock::exchange) else { return };
            let step = match exchange.stage {
                Stage::Head => self.response_head(id, &chunk),
                Stage::Body { .. } => self.response_body(id, &chunk),
            };
            match step {
                Step::Used(count) => chunk.advance(count),
                Step::Keep => break,
                Step::Over => return,
            }
        }
        if let Some(exchange) = self.socks.get_mut(id).and_then(Sock::exchange) {
            exchange.head = chunk.into_vec();
        }
    }

    /// The upstream's stream ended, or broke.
    pub(super) fn upstream_closed(&mut self, id: SockId, broken: bool) {
        let Some(sock) = self.socks.get_mut(id) else { return };
        let client = sock.peer;
        let Role::Upstream(conn) = &mut sock.role else { return };
        let reused = conn.reused;
        let UpPhase::Exchange(exchange) = &mut conn.phase else {
            return self.discard_upstream(id, false);
        };
        if let Stage::Body { body: Body::UntilClose, .. } = exchange.stage
            && !broken
        {
            return self.finish_exchange(id, true);
        }
        let unanswered = exchange.is_unanswered();
        let Some(client) = client else { return self.discard_upstream(id, true) };
        if unanswered && reused && self.repeat_elsewhere(client) {
            self.discard_upstream(id, true);
            return self.dispatch(client);
        }
        self.fail_exchange(id, Answer::UpstreamDied);
    }

    /// The upstream failed its request: the client gets `answer`, or a reset when it is too late for one.
    pub(super) fn fail_exchange(&mut self, id: SockId, answer: Answer) {
        let Some(sock) = self.socks.get_mut(id) else { return };
        let client = sock.peer.take();
        let in_head = sock.exchange().is_none_or(|exchange| exchange.is_head());
        let key = match &sock.role {
            Role::Upstream(conn) => Some(conn.upstream),
            _ => None,
        };
        if let Some(upstream) = key.and_then(|key| self.upstreams.get_mut(key)) {
            upstream.request_errors_total += 1;
        }
        self.discard_upstream(id, true);
        let Some(client) = client else { return };
        if let Some(key) = key {
            self.report(client, key, false);
        }
        if let Some(sock) = self.socks.get_mut(client) {
            sock.peer = None;
        }
        if in_head {
            self.answer(client, answer);
        } else {
            self.counters.upstream_died_midway += 1;
            self.end_client(client, true, Outcome::Cut);
        }
    }

    /// Readies a client for a second try, if its request may have one.
    fn repeat_elsewhere(&mut self, client: SockId) -> bool {
        let Some(sock) = self.socks.get_mut(client) else { return false };
        let Some(http) = sock.http() else { return false };
        let Some(request) = http.request.as_mut().filter(|request| request.repeatable) else { return false };
        request.fresh_only = true;
        http.phase = Phase::Waiting;
        sock.peer = None;
        self.counters.retried_stale += 1;
        self.touch(client);
        true
    }

    fn response_head(&mut self, id: SockId, chunk: &Chunk) -> Step {
        let Some(sock) = self.socks.get_mut(id) else { return Step::Over };
        let Some(client) = sock.peer else { return Step::Over };
        let Some(exchange) = sock.exchange() else { return Step::Over };
        let end = match head::find_end(chunk, exchange.scanned) {
            Scan::Complete { start: 0, end } if end <= Config::RESPONSE_HEAD_BYTES_MAX => end,
            Scan::Partial { from } if chunk.len() <= Config::RESPONSE_HEAD_BYTES_MAX => {
                exchange.scanned = from;
                return Step::Keep;
            }
            _ => return self.bad_response(id),
        };
        exchange.scanned = 0;
        exchange.answered = true;
        let Some(asked) = self.asked(client) else { return Step::Over };
        let understood = head::parse_response(&chunk[..end]).and_then(|head| response::plan(&head, asked));
        match understood {
            Err(_) => self.bad_response(id),
            Ok(ResponsePlan::Interim { forward }) => {
                self.push_to(client, Chunk::owned(forward));
                Step::Used(end)
            }
            Ok(ResponsePlan::Switch { forward }) => match self.may_switch(client) {
                true => {
                    self.push_to(client, Chunk::owned(forward));
                    self.switch_to_tunnel(id, client, chunk.slice(end..chunk.len()));
                    Step::Over
                }
                false => self.bad_response(id),
            },
            Ok(ResponsePlan::Final(plan)) => self.response_begins(id, client, plan, end, chunk.len()),
        }
    }

    fn response_begins(
        &mut self,
        id: SockId,
        client: SockId,
        plan: FinalPlan,
        end: usize,
        len: usize,
    ) -> Step {
        if let Some(flow) = self.socks.get_mut(client).and_then(Sock::flow_mut) {
            flow.status = Some(plan.status);
        }
        self.push_to(client, Chunk::owned(plan.forward));
        let bodiless = plan.body.is_done();
        if let Some(exchange) = self.socks.get_mut(id).and_then(Sock::exchange) {
            exchange.stage = Stage::Body {
                body: plan.body,
                unchunk: plan.unchunk,
                upstream_keep_alive: plan.upstream_keep_alive,
                client_keep_alive: plan.client_keep_alive,
            };
        }
        if bodiless {
            self.finish_exchange(id, end == len);
            return Step::Over;
        }
        Step::Used(end)
    }

    fn response_body(&mut self, id: SockId, chunk: &Chunk) -> Step {
        let Some(sock) = self.socks.get_mut(id) else { return Step::Over };
        let Some(client) = sock.peer else { return Step::Over };
        let Some(Exchange { stage: Stage::Body { body, unchunk, .. }, .. }) = sock.exchange() else {
            return Step::Over;
        };
        let mut data = Vec::new();
        let unchunk = *unchunk;
        let Ok(used) = body.feed(chunk, unchunk.then_some(&mut data)) else {
            self.fail_exchange(id, Answer::UpstreamBadResponse);
            return Step::Over;
        };
        let done = body.is_done();
        if unchunk {
            for range in data {
                self.push_to(client, chunk.slice(range));
            }
        } else {
            self.push_to(client, chunk.slice(0..used));
        }
        if done {
            self.finish_exchange(id, used == chunk.len());
            return Step::Over;
        }
        Step::Used(used)
    }

    /// The response is complete. `clean` unless the upstream said more than it announced.
    fn finish_exchange(&mut self, id: SockId, clean: bool) {
        let now = self.now;
        let Some(sock) = self.socks.get_mut(id) else { return };
        let client = sock.peer.take();
        let Role::Upstream(conn) = &mut sock.role else { return };
        let UpPhase::Exchange(exchange) = &conn.phase else { return };
        let Stage::Body { upstream_keep_alive, client_keep_alive, .. } = exchange.stage else {
            return;
        };
        let key = conn.upstream;
        if let Some(upstream) = self.upstreams.get_mut(key) {
            upstream.active_requests -= 1;
        }
        conn.phase = UpPhase::Idle { since: now };
        self.counters.responses += 1;
        let mut body_done = false;
        let mut ended = None;
        if let Some(sock) = client.and_then(|client| self.socks.get_mut(client)) {
            sock.peer = None;
            sock.cautious = false;
            let hurried = self.hurried;
            if let Some(http) = sock.http() {
                body_done = http.body_done();
                let request = http.request.take();
                let asked_to_close = request.as_ref().is_some_and(|request| !request.keep_alive);
                ended = request;
                http.idle_since = now;
                // A client that was promised another turn has it, also of a balancer that drains.
                if body_done && client_keep_alive && !hurried {
                    http.phase = Phase::Head;
                } else {
                    // One that did not expect the end may have said more, and closing on unread bytes is a
                    // reset, which can destroy the response on its way.
                    let silent = body_done && asked_to_close && http.inbuf.is_empty();
                    http.phase = Phase::Done;
                    sock.finish = if silent { Finish::Close } else { Finish::Linger { until: None } };
                }
            }
        }
        let good = ended.as_ref().is_none_or(|request| request.flow.status.is_none_or(|status| status < 500));
        if let Some(request) = ended {
            self.end_flow(request.flow.clone(), Some(&request), Outcome::Answered);
        }
        if let Some(client) = client {
            self.report(client, key, good);
            self.leave_route(client);
            self.runnable.push_back(client);
            self.touch(client);
        }
        self.park_upstream(id, clean && body_done && upstream_keep_alive);
    }

    fn bad_response(&mut self, id: SockId) -> Step {
        self.fail_exchange(id, Answer::UpstreamBadResponse);
        Step::Over
    }

    fn asked(&mut self, client: SockId) -> Option<Asked> {
        let stopping = self.stopping;
        let request = self.socks.get_mut(client)?.http()?.request.as_ref()?;
        Some(Asked {
            is_head: request.is_head,
            upgrade: request.upgrade,
            version: request.version,
            keep_alive: request.keep_alive && !stopping && request.body.is_done(),
        })
    }

    /// A protocol switch is allowed once the request has been passed on whole.
    fn may_switch(&mut self, client: SockId) -> bool {
        self.socks.get_mut(client).and_then(Sock::http).is_some_and(|http| http.body_done())
    }

    pub(super) fn push_to(&mut self, id: SockId, chunk: Chunk) {
        let (now, now_us) = (self.now, self.now_us());
        if let Some(sock) = self.socks.get_mut(id) {
            // Only a client has a flow: what is pushed to an upstream was counted as it came in.
            if let Some(flow) = sock.flow_mut().filter(|_| !chunk.is_empty()) {
                flow.passed_on(now_us, chunk.len());
            }
            sock.push(now, chunk);
        }
        self.touch(id);
    }
}

impl Exchange {
    /// Nothing of the final response has been passed on.
    pub(super) fn is_head(&self) -> bool {
        matches!(self.stage, Stage::Head)
    }

    /// The upstream has not said a thing.
    pub(super) fn is_unanswered(&self) -> bool {
        !self.answered && self.head.is_empty()
    }
}
