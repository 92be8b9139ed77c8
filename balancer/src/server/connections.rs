//! Showing open connections: the threads' pages one after the other.

use std::sync::mpsc;

use super::{Server, THREAD_TIMEOUT};
use crate::control::connections::{Connections, ConnectionsQuery, ROWS_MAX};
use crate::control::protocol::{ErrorCode, Response};
use crate::control::server::refusal;
use crate::worker::Command;

impl Server {
    pub(super) fn connections(&self, query: &ConnectionsQuery) -> Response {
        let limit = if query.limit == 0 { ROWS_MAX } else { query.limit.min(ROWS_MAX) };
        let (mut thread, mut slot) = split(query.after.unwrap_or(0));
        let mut page = Connections::default();
        while let Some(worker) = self.workers.get(thread) {
            let (reply, answer) = mpsc::channel();
            let limit = limit - page.rows.len();
            worker.send(Command::Connections { from: slot, limit, routes: query.routes.clone(), reply });
            let Ok((rows, next)) = answer.recv_timeout(THREAD_TIMEOUT) else {
                return refusal(ErrorCode::Busy, "a data-path thread did not answer in time".to_owned());
            };
            page.rows.extend(rows);
            if let Some(next) = next {
                page.next = Some(join(thread, next));
                break;
            }
            (thread, slot) = (thread + 1, 0);
        }
        Response::Connections(page)
    }
}

/// Where a page begins: a thread, and a slot of its core.
fn split(cursor: u64) -> (usize, u32) {
    ((cursor >> 32) as usize, cursor as u32)
}

fn join(thread: usize, slot: u32) -> u64 {
    (thread as u64) << 32 | u64::from(slot)
}
