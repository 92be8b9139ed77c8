//! Active health checks: when which upstream is asked how it is, and what follows from the answer.
//!
//! ```text
//!            due, and fewer than CHECKS_MAX at work             connected
//!  waiting ─────────────────────────────────────▶ Connecting ───────────▶ Asking (HTTP)
//!     ▲                                                │ connected (TCP)     │ judged, late
//!     │      the verdict takes it in, interval ± 1/10  ▼                     │
//!     └───────────────────────────────────────────── over ◀──────────────────┘
//! ```
//!
//! A check is a socket like any other: the same operations, the same deadlines, a role of its own. Only
//! upstreams that the table says are up are checked. One that comes (or comes up again) is unproven and gets
//! nothing until it has passed; one that was up before it was ever checked keeps what it has until it fails.
//!
//! A process that drains after a handover goes on checking: what it holds is for upstreams that may be new.
//!
//! Each thread checks for itself, so `threads` checks reach an upstream in each interval. To have one thread
//! check for all was rejected: its verdicts would have to travel, and a thread that is stuck would go on
//! sending traffic by old ones.

mod reading;
mod verdict;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::rc::Rc;

use self::reading::Reading;
use self::verdict::Change;
pub use self::verdict::Verdict;
use super::chunk::Chunk;
use super::config::Config;
use super::engine::Core;
use super::io::{Errno, Millis, Op, SockId};
use super::preface::proxy;
use super::random::Random;
use super::session::{Role, Sock};
use super::slab::UpstreamKey;
use crate::control::protocol::{Counters, HealthStatus, ShownHealth, ShownState};
use crate::remark::Remark;
use crate::table::{Action, Active, Check, HttpCheck, Table};

/// Which upstreams are due to be checked, and how many are being.
#[derive(Debug, Default)]
pub struct Checks {
    /// An entry stands only while its upstream is to be checked at just that time.
    due: BinaryHeap<Reverse<(Millis, UpstreamKey)>>,
    running: usize,
}

/// An upstream's checks, and what they have come to.
#[derive(Debug)]
pub struct Checked {
    wanted: Rc<Active>,
    pub verdict: Verdict,
    /// When the next one begins, unless one is at work.
    next_at: Millis,
    running: Option<SockId>,
    /// How the last one ended, in words.
    last: Option<String>,
    passed_total: u64,
    failed_total: u64,
}

/// A check at work.
#[derive(Debug)]
pub struct CheckConn {
    upstream: UpstreamKey,
    wanted: Rc<Active>,
    /// When it is too late.
    pub until: Millis,
    /// The answer, once it is connected.
    reading: Option<Reading>,
}

impl CheckConn {
    /// Whether it has asked, and waits for the answer.
    pub fn is_asking(&self) -> bool {
        self.reading.is_some()
    }
}

impl Checked {
    fn new(wanted: Rc<Active>, verdict: Verdict, now: Millis) -> Self {
        let (passed_total, failed_total) = (0, 0);
        Self { wanted, verdict, next_at: now, running: None, last: None, passed_total, failed_total }
    }

    /// From the end of one check to the next. One that seems to be coming up is not made to wait for long.
    fn pause_ms(&self, random: &mut Random) -> Millis {
        let interval_ms = self.wanted.interval_ms;
        let jittered = interval_ms - interval_ms / 10 + random.below(interval_ms / 5 + 1);
        if self.verdict.is_rising() { jittered.min(Config::RISING_CHECK_MS) } else { jittered }
    }

    fn take(&mut self, outcome: Result<(), String>, counters: &mut Counters) -> Change {
        let passed = outcome.is_ok();
        let (total, counter) = match passed {
            true => (&mut self.passed_total, &mut counters.checks_passed),
            false => (&mut self.failed_total, &mut counters.checks_failed),
        };
        (*total, *counter) = (*total + 1, *counter + 1);
        self.last = Some(outcome.err().unwrap_or_else(|| "passed".to_owned()));
        self.verdict.take(passed, self.wanted.rise, self.wanted.fall)
    }

    pub fn status(&self) -> HealthStatus {
        HealthStatus {
            state: match self.verdict {
                Verdict::Unproven { .. } => ShownHealth::Unproven,
                Verdict::Passing { .. } => ShownHealth::Passing,
                Verdict::Failing { .. } => ShownHealth::Failing,
            },
            last: self.last.clone().unwrap_or_else(|| "not checked yet".to_owned()),
            passed_total: self.passed_total,
            failed_total: self.failed_total,
        }
    }
}

impl Core {
    /// Takes over what a table says of checks. Comes after its upstreams have been taken over.
    pub(super) fn plan_checks(&mut self, table: &Table) {
        let mut wanted: HashMap<UpstreamKey, Rc<Active>> = HashMap::new();
        for route in &table.routes {
            let Action::Proxy(proxy) = &route.action else { continue };
            let Some(active) = proxy.health.active.clone().map(Rc::new) else { continue };
            let keys = proxy.upstreams.iter().filter_map(|up| self.upstreams.key(&up.id, &up.address));
            wanted.extend(keys.map(|key| (key, active.clone())));
        }
        for key in self.upstreams.keys() {
            self.plan_check(key, wanted.remove(&key));
        }
        // Entries of upstreams that are checked no more go when they come up; too many go at once.
        if self.checks.due.len() > 2 * self.upstreams.len() + 64 {
            self.checks.due.clear();
            let waiting = self.upstreams.iter().filter_map(|(key, up)| Some((key, up.check.as_ref()?)));
            let waiting = waiting.filter(|(_, checked)| checked.running.is_none());
            self.checks.due.extend(waiting.map(|(key, checked)| Reverse((checked.next_at, key))));
        }
    }

    fn plan_check(&mut self, key: UpstreamKey, wanted: Option<Rc<Active>>) {
        let now = self.now;
        let Some(upstream) = self.upstreams.get_mut(key) else { return };
        let wanted = wanted.filter(|_| upstream.state == ShownState::Up);
        let verdict = match (&wanted, &upstream.check) {
            (None, None) => return,
            (Some(wanted), Some(known)) if *wanted == known.wanted => return,
            (_, Some(known)) => known.verdict,
            (_, None) if upstream.was == ShownState::Up => Verdict::Passing { failures: 0 },
            (_, None) => Verdict::Unproven { passes: 0 },
        };
        let before = upstream.check.take();
        upstream.check = wanted.map(|wanted| Checked::new(wanted, verdict, now));
        if upstream.check.is_some() {
            self.checks.due.push(Reverse((now, key)));
        }
        if let Some(running) = before.and_then(|before| before.running) {
            self.close_check(running);
        }
    }

    /// Begins the checks that are due, as many as may be at work.
    pub(super) fn start_checks(&mut self) {
        while self.checks.running < Config::CHECKS_MAX && !self.hurried {
            let Some(Reverse((at, key))) = self.checks.due.peek().copied().filter(|due| due.0.0 <= self.now)
            else {
                return;
            };
            self.checks.due.pop();
            self.start_check(key, at);
        }
    }

    /// When the next check is due, if one may begin.
    pub(super) fn next_check_at(&self) -> Option<Millis> {
        let may = self.checks.running < Config::CHECKS_MAX && !self.hurried;
        self.checks.due.peek().filter(|_| may).map(|Reverse((at, _))| *at)
    }

    fn start_check(&mut self, key: UpstreamKey, at: Millis) {
        let now = self.now;
        let Some(upstream) = self.upstreams.get_mut(key) else { return };
        let address = upstream.address.clone();
        let Some(checked) = upstream.check.as_mut() else { return };
        if checked.next_at != at || checked.running.is_some() {
            return;
        }
        let wanted = checked.wanted.clone();
        let conn = CheckConn { upstream: key, until: now + wanted.timeout_ms, wanted, reading: None };
        let id = self.socks.insert(Sock::new(Role::Check(Box::new(conn)), None, now));
        checked.running = Some(id);
        self.checks.running += 1;
        self.out.push(Op::Connect { sock: id, address });
        self.touch(id);
    }

    /// A check's connect is done: a TCP check has passed, an HTTP check asks.
    pub(super) fn check_connected(&mut self, id: SockId) {
        let now = self.now;
        let Some(sock) = self.socks.get_mut(id) else { return };
        let Role::Check(conn) = &mut sock.role else { return };
        let Some(upstream) = self.upstreams.get_mut(conn.upstream) else { return };
        upstream.reached();
        let Check::Http(http) = &conn.wanted.check else { return self.end_check(id, Some(Ok(()))) };
        let mut words = if upstream.proxy_protocol { proxy::write_v2(None) } else { Vec::new() };
        words.extend_from_slice(&reading::request(http));
        conn.reading = Some(Reading::default());
        sock.push(now, Chunk::owned(words));
        self.touch(id);
    }

    /// A check's connect failed.
    pub(super) fn check_unreachable(&mut self, id: SockId, error: Errno) {
        let outcome = match error.0 {
            // It says something of us, and nothing of the upstream.
            _ if error.is_shortage() => None,
            libc::ECONNREFUSED => Some(Err("refused".to_owned())),
            libc::ENOENT => Some(Err("there is no such socket".to_owned())),
            number => Some(Err(std::io::Error::from_raw_os_error(number).to_string())),
        };
        self.end_check(id, outcome);
    }

    pub(super) fn check_received(&mut self, id: SockId, chunk: &Chunk) {
        let Some((reading, http)) = self.socks.get_mut(id).and_then(Sock::asking) else { return };
        if let Some(judged) = reading.take(chunk, http) {
            self.end_check(id, Some(judged));
        }
    }

    /// A check's connection ended before there was a judgement.
    pub(super) fn check_closed(&mut self, id: SockId, broken: bool) {
        let Some((reading, http)) = self.socks.get_mut(id).and_then(Sock::asking) else { return };
        let end = match broken {
            true => Err(format!("GET {} was reset", http.path)),
            false => reading.end(http),
        };
        self.end_check(id, Some(end));
    }

    /// A check's time is up.
    pub(super) fn check_late(&mut self, id: SockId) {
        let Some(Role::Check(conn)) = self.socks.get(id).map(|sock| &sock.role) else { return };
        let what = if conn.is_asking() { "no answer" } else { "not connected" };
        let words = format!("timed out after {} ms: {what}", conn.wanted.timeout_ms);
        self.end_check(id, Some(Err(words)));
    }

    /// Takes in how a check ended; nothing, when that says nothing of the upstream.
    fn end_check(&mut self, id: SockId, outcome: Option<Result<(), String>>) {
        let Some(Role::Check(conn)) = self.socks.get(id).map(|sock| &sock.role) else { return };
        let (key, now) = (conn.upstream, self.now);
        self.close_check(id);
        let Some(upstream) = self.upstreams.get_mut(key) else { return };
        let Some(checked) = upstream.check.as_mut() else { return };
        checked.running = None;
        let change = outcome.map_or(Change::Same, |outcome| checked.take(outcome, &mut self.counters));
        checked.next_at = now + checked.pause_ms(&mut self.random);
        self.checks.due.push(Reverse((checked.next_at, key)));
        let words = checked.last.as_deref().unwrap_or_default();
        match change {
            Change::Same => {}
            Change::Rose => {
                self.release_wanted = true;
                self.remarks.add(now, || {
                    Remark::info(format!("upstream {} passes its checks", upstream.id))
                        .with("upstream", &upstream.id)
                });
            }
            Change::Fell => {
                self.remarks.add(now, || {
                    Remark::warning(format!("upstream {} fails its checks: {words}", upstream.id))
                        .with("upstream", &upstream.id)
                });
                for idle in std::mem::take(&mut upstream.idle) {
                    self.discard_upstream(idle, false);
                }
            }
        }
    }

    fn close_check(&mut self, id: SockId) {
        if self.socks.remove(id).is_some() {
            self.checks.running -= 1;
            self.out.push(Op::Close { sock: id, reset: false });
        }
    }
}

impl Sock {
    /// What a check that has asked is reading, and what it asked.
    fn asking(&mut self) -> Option<(&mut Reading, &HttpCheck)> {
        let Role::Check(conn) = &mut self.role else { return None };
        let CheckConn { wanted, reading, .. } = &mut **conn;
        match &wanted.check {
            Check::Http(http) => Some((reading.as_mut()?, http)),
            Check::Tcp => None,
        }
    }
}
