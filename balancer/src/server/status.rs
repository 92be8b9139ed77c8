//! What the balancer says of itself: the sum of what its threads say, and of what the processes before it that
//! still drain say of theirs.

use std::time::Instant;

use super::{Server, THREAD_TIMEOUT};
use crate::access_log::RunningLog;
use crate::control::protocol::{
    ErrorCode, Metrics, Response, ShownState, Status, StatusQuery, UpstreamStatus,
};
use crate::control::server::refusal;
use crate::core::engine::Snapshot;
use crate::metrics::families;

impl Server {
    pub(super) fn status(&mut self, query: &StatusQuery) -> Response {
        let Some(mut status) = self.own_status(query) else {
            return busy();
        };
        let past = self.predecessors.past().clone();
        let (draining, reports) = self.predecessors.reports(query);
        for report in reports {
            add_report(&mut status, report);
        }
        status.counters.add(&past);
        status.draining = draining;
        status.upstreams.sort_by(|a, b| (&a.id, &a.address).cmp(&(&b.id, &b.address)));
        Response::Status(Box::new(status))
    }

    /// The same in Prometheus' format.
    fn metrics_text(&mut self) -> Option<String> {
        match self.status(&StatusQuery { latency: true }) {
            Response::Status(status) => Some(families::render(&status)),
            _ => None,
        }
    }

    pub(super) fn metrics_response(&mut self) -> Response {
        match self.metrics_text() {
            Some(text) => Response::Metrics(Metrics { text }),
            None => busy(),
        }
    }

    pub(super) fn serve_metrics(&mut self) {
        let Some(mut metrics) = self.metrics.take() else { return };
        metrics.serve(Instant::now(), || self.metrics_text());
        self.metrics = Some(metrics);
    }

    /// Of this process alone.
    pub(super) fn own_status(&self, query: &StatusQuery) -> Option<Status> {
        let mut status = Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_ms: self.started.elapsed().as_millis() as u64,
            table_version: self.table.version,
            threads: self.workers.len() as u32,
            io: self.io,
            tenant_sockets: self.unix.tenants(),
            listeners: self.listeners.status(),
            certificates: self.certificates.report(),
            ..Status::default()
        };
        status.counters.access_log_dropped = self.log.as_ref().map_or(0, RunningLog::dropped);
        for worker in &self.workers {
            add_snapshot(&mut status, worker.snapshot(query.latency, THREAD_TIMEOUT)?);
        }
        status.memory.bound = self.memory_bound();
        status.routes.sort_by(|a, b| a.id.cmp(&b.id));
        status.upstreams.sort_by(|a, b| (&a.id, &a.address).cmp(&(&b.id, &b.address)));
        Some(status)
    }
}

/// Adds what a process that drains has: an upstream that only it still uses is shown as removed.
fn add_report(status: &mut Status, report: &Status) {
    status.counters.add(&report.counters);
    for route in &report.routes {
        if let Some(known) = status.routes.iter_mut().find(|known| known.id == route.id) {
            known.add(route);
        }
    }
    for upstream in &report.upstreams {
        let same = |known: &&mut UpstreamStatus| known.id == upstream.id && known.address == upstream.address;
        match status.upstreams.iter_mut().find(same) {
            Some(known) => known.add(upstream),
            None if upstream.active_requests + upstream.active_connections > 0 => {
                status.upstreams.push(UpstreamStatus { state: ShownState::Removed, ..upstream.clone() });
            }
            None => {}
        }
    }
}

fn busy() -> Response {
    refusal(ErrorCode::Busy, "a data-path thread did not answer in time".to_owned())
}

/// Sums what the threads say.
fn add_snapshot(status: &mut Status, snapshot: Snapshot) {
    status.counters.add(&snapshot.counters);
    status.memory.add(&snapshot.memory);
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
