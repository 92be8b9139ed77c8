//! Putting a table into effect: listeners bound, saved, in force on every thread, then acknowledged.

use std::os::fd::AsFd;
use std::sync::{Arc, mpsc};

use super::say::chain;
use super::{Server, THREAD_TIMEOUT};
use crate::control::protocol::{Ack, ErrorCode, Problem, Response};
use crate::control::server::refusal;
use crate::core::io::ListenerId;
use crate::table::Table;
use crate::worker::{Command, Opened, Worker};

impl Server {
    /// Replaces the table: checked, saved, in force on every thread, then acknowledged.
    pub(super) fn set_table(&mut self, table: Table) -> Response {
        if let Err(error) = table.validate() {
            return refusal(ErrorCode::BadTable, error.to_string());
        }
        let running = self.table.version;
        // The first table may have any version; saying the same thing twice is no conflict.
        if table.version < running || (table.version == running && table != *self.table && running != 0) {
            let message = format!("version {} is refused: version {running} is in force", table.version);
            return refusal(ErrorCode::StaleVersion, message);
        }
        let table = Arc::new(table);
        let (added, mut problems) = self.listeners.bind_for(&table);
        self.store(&added);
        problems.extend(self.unix.problems(&table));
        if let Some(saved) = &self.saved
            && let Err(error) = saved.save(&table)
        {
            problems.push(Problem { route: None, message: chain(&error) });
        }
        if !self.spread(&table) {
            return refusal(ErrorCode::Busy, "a data-path thread did not take the table in time".to_owned());
        }
        self.table = table.clone();
        // Whoever starts an app that was wanted says so with a table.
        self.elders_starve.clear();
        self.open(&added);
        for (gone, name) in self.listeners.unbind_for(&table) {
            self.tell_all(|| Command::RemoveListener(gone));
            self.notifier.forget(&name);
        }
        self.pass_on(&table, &added);
        Response::Ack(Ack { version: table.version, problems })
    }

    /// Gives every thread the table and waits until all route by it.
    pub(super) fn spread(&self, table: &Arc<Table>) -> bool {
        let (done, all_done) = mpsc::channel();
        let sent = |worker: &&Worker| worker.send(Command::SetTable(table.clone(), done.clone()));
        let count = self.workers.iter().filter(sent).count();
        let taken = (0..count).take_while(|_| all_done.recv_timeout(THREAD_TIMEOUT).is_ok()).count();
        taken == self.workers.len()
    }

    pub(super) fn open(&self, ids: &[ListenerId]) {
        let listeners = self.listeners.iter().filter(|(id, _)| ids.contains(id));
        let listeners: Vec<_> = listeners
            .map(|(id, listener)| Opened {
                id,
                listen: listener.listen,
                local: listener.local(),
                limits: listener.limits,
                socket: listener.socket.clone(),
            })
            .collect();
        self.tell_all(|| Command::AddListeners(listeners.clone()));
    }

    /// Has the service manager keep those of these sockets that are nobody else's.
    pub(super) fn store(&self, ids: &[ListenerId]) {
        for (_, listener) in self.listeners.own().filter(|(id, _)| ids.contains(id)) {
            self.notifier.store(&listener.name(), listener.socket.as_fd());
        }
    }
}
