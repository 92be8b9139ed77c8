//! What the balancer says of itself: the sum of what its threads say.

use std::sync::mpsc;

use super::{Server, THREAD_TIMEOUT};
use crate::control::protocol::{ErrorCode, Response, Status, StatusQuery, UpstreamStatus};
use crate::control::server::refusal;
use crate::core::engine::Snapshot;
use crate::worker::{Command, Worker};

impl Server {
    pub(super) fn status(&self, query: &StatusQuery) -> Response {
        let (reply, replies) = mpsc::channel();
        let sent =
            |worker: &&Worker| worker.send(Command::Status { latency: query.latency, reply: reply.clone() });
        let count = self.workers.iter().filter(sent).count();
        let mut status = Status {
            table_version: self.table.version,
            threads: self.workers.len() as u32,
            io: self.io,
            listeners: self.listeners.status(),
            ..Status::default()
        };
        for _ in 0..count {
            let Ok(snapshot) = replies.recv_timeout(THREAD_TIMEOUT) else {
                return refusal(ErrorCode::Busy, "a data-path thread did not answer in time".to_owned());
            };
            add_snapshot(&mut status, snapshot);
        }
        status.routes.sort_by(|a, b| a.id.cmp(&b.id));
        status.upstreams.sort_by(|a, b| (&a.id, &a.address).cmp(&(&b.id, &b.address)));
        Response::Status(Box::new(status))
    }
}

/// Sums what the threads say.
fn add_snapshot(status: &mut Status, snapshot: Snapshot) {
    status.counters.add(&snapshot.counters);
    for route in snapshot.routes {
        match status.routes.iter_mut().find(|known| known.id == route.id) {
            Some(known) => known.add(&route),
            None => status.routes.push(route),
        }
    }
    for upstream in snapshot.upstreams {
        let same = |known: &&mut UpstreamStatus| known.id == upstream.id && known.address == upstream.address;
        match status.upstreams.iter_mut().find(same) {
            Some(known) => known.add(&upstream),
            None => status.upstreams.push(upstream),
        }
    }
}
