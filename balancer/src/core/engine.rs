//! The core's loop: completions in, operations out.
//!
//! Calling contract, once per batch: [`Core::handle`] for each completion, then [`Core::finish_batch`], then
//! take [`Core::ops`] and give them to the door; wait no longer than [`Core::next_deadline`]. Between two
//! batches, [`Core::set_table`], [`Core::add_listener`] and the like may be called.
//!
//! Handlers change state and put the sockets they changed on a list; `settle` then brings each
//! socket's sends, receive, timer and end into line with its state. So no handler needs to think of all
//! that follows from it, and what follows is decided in one place.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::rc::Rc;

use super::accept::Listener;
use super::access::Access;
use super::acme::Challenge;
use super::checks::Checks;
use super::chunk::Chunk;
use super::config::Config;
use super::histogram::Micros;
use super::http::request_id::RequestIds;
use super::io::{AfterSend, Completion, ListenerId, Millis, Op, RecvEnd, SockId};
use super::limits::Sources;
use super::memory::Budget;
use super::random::Random;
use super::remarks::Remarks;
use super::routes::{Route, Routes};
use super::session::{Finish, Phase, Recv, Role, Sock};
use super::slab::{RouteKey, Slab};
use super::timers::Timers;
use super::upstreams::Upstreams;
use crate::control::protocol::{Counters, MemoryStatus, RouteStatus, UpstreamStatus};
use crate::remark::Remark;
use crate::table::Table;
use crate::table::actions::Page;

/// One thread's data path, without its I/O.
#[derive(Debug, Default)]
pub struct Core {
    pub(super) config: Config,
    pub(super) now: Millis,
    /// As [`Core::tick`] set it.
    pub(super) now_us: Micros,
    pub(super) socks: Slab<SockId, Sock>,
    pub(super) routes: Routes,
    pub(super) upstreams: Upstreams,
    pub(super) timers: Timers,
    pub(super) touched: Vec<SockId>,
    pub(super) memory: Rc<Budget>,
    /// Much of it is in use.
    pub(super) pressed: bool,
    /// Sockets to which shared buffers are, or were a moment ago, lent.
    pub(super) lenders: Vec<SockId>,
    pub(super) lent_tick_at: Option<Millis>,
    /// Sockets whose receive found no buffer, first come first served.
    thirsty: VecDeque<SockId>,
    /// Until when nobody takes more than a buffer at a time.
    pub(super) thirst_until: Millis,
    /// Clients with bytes left over that may now be used.
    pub(super) runnable: VecDeque<SockId>,
    /// Something has become possible for held requests.
    pub(super) release_wanted: bool,
    pub(super) hold_tick_at: Option<Millis>,
    pub(super) random: Random,
    pub(super) checks: Checks,
    /// A route has begun to starve.
    pub(super) starved: bool,
    /// Nothing more is accepted, and every response is a client's last.
    pub(super) stopping: bool,
    /// Stopping, and in a hurry: idle clients are given little time.
    pub(super) hurried: bool,
    pub(super) counters: Counters,
    pub(super) out: Vec<Op>,
    pub(super) access: Vec<Access>,
    pub(super) challenges: Vec<Challenge>,
    /// Whose turn it is to be logged, when what went well is sampled.
    pub(super) access_turn: u32,
    /// What is said in place of our own answers, by their codes.
    pub(super) pages: HashMap<String, Rc<Page>>,
    pub(super) remarks: Remarks,
    pub(super) request_ids: RequestIds,
    pub(super) sources: Sources,
    pub(super) listeners: BTreeMap<ListenerId, Listener>,
    /// Nothing is accepted for now: somebody else is about to.
    pub(super) yields: bool,
    pub(super) accept_after: Option<Millis>,
    /// Since when there has been no room for another client.
    pub(super) full_since: Option<Millis>,
}

/// What status shows of one core.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    pub routes: Vec<RouteStatus>,
    pub upstreams: Vec<UpstreamStatus>,
    pub counters: Counters,
    pub memory: MemoryStatus,
}

impl Core {
    pub fn new(config: Config) -> Self {
        Self {
            random: Random::new(config.seed),
            request_ids: RequestIds::new(config.request_id_seed),
            memory: Budget::new(config.memory),
            config,
            ..Self::default()
        }
    }

    /// Takes in one completion.
    pub fn handle(&mut self, now: Millis, completion: Completion) {
        self.now = now;
        match completion {
            Completion::Accepted { listener, raw, peer } => self.accepted(listener, raw, peer),
            Completion::AcceptEnded { listener, error } => self.accept_ended(listener, error),
            Completion::Connected { sock } => self.connected(sock),
            Completion::ConnectFailed { sock, error } => self.connect_failed(sock, error),
            Completion::Received { sock, chunk } => self.received(sock, chunk),
            Completion::RecvEnded { sock, why } => self.recv_ended(sock, why),
            Completion::Sent { sock, bytes } => self.sent(sock, bytes),
            Completion::SendFailed { sock, .. } => self.send_failed(sock),
            Completion::Secured { sock, secured } => self.secured(sock, secured),
            Completion::SecureFailed { sock, fault, last_words } => {
                self.secure_failed(sock, fault, last_words);
            }
            Completion::TlsEnded { sock } => self.tls_ended(sock),
        }
    }

    /// Ends a batch: deadlines, held requests, leftovers, and then everything that changed.
    pub fn finish_batch(&mut self, now: Millis) {
        self.now = now;
        self.expire_due();
        self.hold_tick();
        self.start_checks();
        // Whoever had no buffer last time is armed before those who had some.
        while let Some(sock) = self.thirsty.pop_front() {
            self.settle(sock);
        }
        loop {
            if let Some(client) = self.runnable.pop_front() {
                self.client_input(client, None);
            } else if std::mem::take(&mut self.release_wanted) {
                self.release_all();
            } else if let Some(sock) = self.touched.pop() {
                self.settle(sock);
            } else {
                self.throttle();
                if self.touched.is_empty() {
                    break;
                }
            }
        }
        self.lent_tick();
        self.settle_accepting();
    }

    /// The operations decided on, in order; the caller empties it.
    pub fn ops(&mut self) -> &mut Vec<Op> {
        &mut self.out
    }

    /// When the next batch must happen even if nothing completes.
    pub fn next_deadline(&self) -> Option<Millis> {
        let (hold, lent) = (self.hold_tick_at, self.lent_tick_at);
        [self.timers.next_at(), hold, lent, self.accept_after, self.shed_at(), self.next_check_at()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Stops accepting on a listener, and forgets it.
    pub fn remove_listener(&mut self, id: ListenerId) {
        if let Some(listener) = self.listeners.get_mut(&id) {
            listener.removed = true;
        }
    }

    /// Accepts nothing while `yields`. Whoever is to accept in our place begins when [`Core::accepts`] says no.
    /// The kernel wakes one of those that wait on a listening socket: were it one whose accept is being called
    /// off, nobody would look at the client until the next one comes.
    pub fn yield_accepting(&mut self, yields: bool) {
        self.yields = yields;
    }

    /// Whether an accept is armed, or has not yet ended.
    pub fn accepts(&self) -> bool {
        self.listeners.values().any(|listener| listener.recv != Recv::Off)
    }

    /// As [`Core::remove_listener`] for all of them; returns their ids.
    pub fn remove_listeners(&mut self) -> Vec<ListenerId> {
        self.listeners.values_mut().for_each(|listener| listener.removed = true);
        self.listeners.keys().copied().collect()
    }

    /// Routes by another table from now on.
    pub fn set_table(&mut self, now: Millis, table: &Table) {
        self.now = now;
        for idle in self.upstreams.apply(table) {
            self.discard_upstream(idle, false);
        }
        self.plan_checks(table);
        let applied = self.routes.apply(now, table, &self.upstreams, self.config.threads.max(1));
        self.starved |= applied.starved;
        for client in applied.orphans {
            self.reroute(client);
        }
        self.upstreams.sweep();
        self.pages = table.pages.iter().map(|(code, page)| (code.clone(), Rc::new(page.clone()))).collect();
        self.release_wanted = true;
    }

    /// Accepts nothing more, and lets clients go with their next response. An idle one has its ordinary time
    /// for another request, since a close could cross with it on the way; whoever is in a hurry calls
    /// [`Core::stop`].
    pub fn drain(&mut self, now: Millis) {
        self.now = now;
        self.stopping = true;
        self.touch_all();
    }

    /// Accepts nothing more, and lets clients go as they finish what they are doing; idle ones soon.
    pub fn stop(&mut self, now: Millis) {
        self.hurried = true;
        self.drain(now);
    }

    /// Resets every client that is left.
    pub fn abort(&mut self, now: Millis) {
        self.now = now;
        let clients: Vec<SockId> =
            self.socks.iter().filter(|(_, sock)| sock.is_client()).map(|(id, _)| id).collect();
        for client in clients {
            self.client_gone(client);
        }
    }

    fn touch_all(&mut self) {
        let all: Vec<SockId> = self.socks.iter().map(|(id, _)| id).collect();
        for sock in all {
            self.touch(sock);
        }
    }

    /// Whether a stopping core has no client left, and none can come: what was accepted before an accept
    /// could be called off is served too.
    pub fn is_finished(&self) -> bool {
        self.stopping && !self.accepts() && self.counters.connections_open == 0
    }

    /// What an operator should see in the log, since the last call.
    pub fn take_remarks(&mut self) -> Vec<Remark> {
        self.remarks.take()
    }

    /// What waits in memory now, and may.
    pub fn memory(&self) -> &Budget {
        &self.memory
    }

    /// Entries of timers, for tests that look for leaks.
    pub fn timer_count(&self) -> usize {
        self.timers.len()
    }

    /// Open sockets, for tests that look for leaks.
    pub fn socket_count(&self) -> usize {
        self.socks.len()
    }

    /// What has been counted, and with `latency` how long it took.
    pub fn snapshot(&self, now: Millis, latency: bool) -> Snapshot {
        let mut under_way: HashMap<RouteKey, (u64, u64)> = HashMap::new();
        for flow in self.socks.iter().filter_map(|(_, sock)| sock.flow()) {
            let bytes = under_way.entry(flow.route).or_default();
            *bytes = (bytes.0 + flow.bytes_in, bytes.1 + flow.bytes_out);
        }
        let route = |(key, route): (RouteKey, &Route)| {
            let mut status = route.status(now, &self.upstreams, latency);
            let (bytes_in, bytes_out) = under_way.get(&key).copied().unwrap_or_default();
            status.bytes_in_total += bytes_in;
            status.bytes_out_total += bytes_out;
            status
        };
        Snapshot {
            routes: self.routes.entries().map(route).collect(),
            upstreams: self.upstreams.iter().map(|(_, upstream)| upstream.status(latency)).collect(),
            counters: self.counters.clone(),
            memory: self.memory.status(),
        }
    }

    /// Puts a socket on the list of those to settle.
    pub(super) fn touch(&mut self, id: SockId) {
        if let Some(sock) = self.socks.get_mut(id)
            && !std::mem::replace(&mut sock.touched, true)
        {
            self.touched.push(id);
        }
    }

    fn received(&mut self, id: SockId, chunk: Chunk) {
        let now = self.now;
        let Some(sock) = self.socks.get_mut(id) else { return };
        sock.moved_at = now;
        sock.taken_bytes = sock.taken_bytes.saturating_add(chunk.len() as u32);
        let bytes = chunk.len() as u64;
        match sock.is_client() {
            true => self.counters.bytes_from_clients += bytes,
            false => self.counters.bytes_from_upstreams += bytes,
        }
        match &mut sock.role {
            _ if matches!(sock.finish, Finish::Linger { .. } | Finish::Close) => {}
            Role::Http(_) => self.client_input(id, Some(chunk)),
            Role::Tcp(tcp) => {
                tcp.flow.bytes_in += bytes;
                tcp.inbuf.extend_from_slice(&chunk);
            }
            Role::Preface(preface) => preface.inbuf.extend_from_slice(&chunk),
            Role::Upstream(_) => self.upstream_input(id, chunk),
            Role::Check(_) => self.check_received(id, &chunk),
            Role::Tunnel { .. } => self.tunnel_input(id, chunk),
        }
        self.touch(id);
    }

    fn recv_ended(&mut self, id: SockId, why: RecvEnd) {
        let Some(sock) = self.socks.get_mut(id) else { return };
        sock.recv = Recv::Off;
        self.touch(id);
        self.read_preface(id);
        match why {
            RecvEnd::Ended => {}
            RecvEnd::NoBuffers => {
                self.counters.no_buffers += 1;
                self.thirst_until = self.now + Config::THIRST_MS;
                self.thirsty.push_back(id);
            }
            RecvEnd::Eof => self.read_closed(id),
            RecvEnd::Cut => self.cut(id),
            RecvEnd::Failed(error) => {
                self.counters.tls_broken += u64::from(error.0 == libc::EPROTO);
                self.broken(id);
            }
        }
    }

    /// The peer sent FIN.
    pub(super) fn read_closed(&mut self, id: SockId) {
        let Some(sock) = self.socks.get_mut(id) else { return };
        sock.read_closed = true;
        match &sock.role {
            Role::Upstream(_) => self.upstream_closed(id, false),
            Role::Check(_) => self.check_closed(id, false),
            Role::Tunnel { .. } => self.tunnel_closed(id),
            // A client that half-closes still gets its answers; settling closes it when there are none.
            Role::Http(_) | Role::Tcp(_) => {}
            Role::Preface(_) => self.preface_ends(id),
        }
    }

    /// The connection is gone: reset, timed out by the kernel, or the like.
    pub(super) fn broken(&mut self, id: SockId) {
        let Some(sock) = self.socks.get(id) else { return };
        match &sock.role {
            Role::Upstream(_) => self.upstream_closed(id, true),
            Role::Check(_) => self.check_closed(id, true),
            Role::Tunnel { .. } => self.tunnel_broken(id),
            Role::Http(_) | Role::Tcp(_) | Role::Preface(_) => self.client_gone(id),
        }
    }

    fn sent(&mut self, id: SockId, bytes: usize) {
        let now = self.now;
        let Some(sock) = self.socks.get_mut(id) else { return };
        // What does not wait moved when it was queued, however late its end is told.
        let waited = !sock.out.is_trying();
        sock.out.sent(now, bytes);
        if bytes > 0 && waited {
            sock.moved_at = now;
        }
        if self.passes_on(id) {
            return;
        }
        let Some(sock) = self.socks.get_mut(id) else { return };
        let (peer, room) = (sock.peer, sock.out.bytes() < Config::BACKLOG_HIGH_BYTES);
        if room && sock.http().is_some_and(|http| http.phase == Phase::Head && !http.inbuf.is_empty()) {
            self.runnable.push_back(id);
        }
        self.touch(id);
        if let Some(peer) = peer {
            self.touch(peer);
        }
    }

    /// Whether all of a tunnel's bytes are sent here and nothing follows from that.
    fn passes_on(&self, id: SockId) -> bool {
        let all_sent = self.socks.get(id).is_some_and(|sock| sock.out.is_empty());
        all_sent && self.after_passing(id) == AfterSend::Nothing
    }

    /// What follows from all bytes being sent here: nothing in a tunnel whose other side goes on receiving, and
    /// that is what nearly every message comes to.
    pub(super) fn after_passing(&self, id: SockId) -> AfterSend {
        let Some(sock) = self.socks.get(id) else { return AfterSend::GoOn };
        let receiving =
            || sock.peer.and_then(|peer| self.socks.get(peer)).is_some_and(|peer| peer.recv == Recv::Armed);
        match sock.role {
            Role::Tunnel { .. } if sock.finish == Finish::No && receiving() => AfterSend::Nothing,
            _ => AfterSend::GoOn,
        }
    }

    fn send_failed(&mut self, id: SockId) {
        let Some(sock) = self.socks.get_mut(id) else { return };
        sock.out_dead = true;
        sock.out = Default::default();
        // An upstream that stopped reading may have answered first; its last words decide.
        let decides = matches!(sock.role, Role::Upstream(_) | Role::Check(_));
        self.touch(id);
        if !decides {
            self.broken(id);
        }
    }
}
