//! Telling peers of the control socket, as it happens, that a stopped app is wanted.
//!
//! A thread whose route begins to starve writes to one eventfd that all share; the control thread counts that
//! and asks every thread what starves now. So nothing is queued, and however many routes begin to starve at a
//! time, it costs one round.

use std::collections::BTreeSet;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::poll::PollTimeout;

use super::{Server, THREAD_TIMEOUT};
use crate::control::protocol::{Response, WAIT_MS_MAX, WaitQuery, Waited};
use crate::control::server::{ControlServer, Reply};
use crate::worker::{Command, Worker};

/// From now until then, rounded up, so that poll does not end just before.
pub fn poll_timeout(at: Instant) -> PollTimeout {
    let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
    PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
}

impl Server {
    /// Tells those that wait for it that something has begun to starve, and those whose time is up.
    pub(super) fn tell_waiting(&mut self, control: &mut ControlServer) {
        let elders = self.predecessors.take_starving();
        let begun = self.starved.read().is_ok() || !elders.is_empty();
        self.elders_starve.extend(elders);
        if begun {
            self.sequence += 1;
            control.tell_waiting(&self.waited());
        }
        let now = Instant::now();
        if control.next_deadline().is_some_and(|at| at <= now) {
            control.tell_expired(now, &self.waited());
        }
    }

    /// Answers when something begins to starve; at once when that has happened since the peer last knew.
    pub(super) fn wait_for(&self, query: WaitQuery) -> Reply {
        if query.since != self.sequence {
            return Reply::Now(Response::Waited(self.waited()));
        }
        Reply::Later(Instant::now() + Duration::from_millis(query.timeout_ms.min(WAIT_MS_MAX)))
    }

    /// What starves now, as far as the threads say so in time.
    pub(super) fn waited(&self) -> Waited {
        let (reply, replies) = mpsc::channel();
        let sent = |worker: &&Worker| worker.send(Command::Starving(reply.clone()));
        let count = self.workers.iter().filter(sent).count();
        let answers = (0..count).map_while(|_| replies.recv_timeout(THREAD_TIMEOUT).ok());
        let routes: BTreeSet<String> = answers.flatten().chain(self.elders_starve.iter().cloned()).collect();
        Waited { sequence: self.sequence, routes: routes.into_iter().collect() }
    }
}
