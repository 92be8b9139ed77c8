//! Handing over, as the server does it; see [`crate::handover`] for the whole.

use std::os::fd::AsFd;
use std::sync::{Arc, mpsc};
use std::time::Instant;

use super::life::Life;
use super::{Server, ServerError, THREAD_TIMEOUT, chain, log};
use crate::control::protocol::{ErrorCode, Reloaded, Response, Status};
use crate::control::server::refusal;
use crate::core::io::ListenerId;
use crate::handover::HandoverError;
use crate::handover::channel::{Channel, ChannelError, Elder, Message, Parcel, read_body};
use crate::handover::giving::{Giving, Legacy};
use crate::handover::predecessors::Predecessors;
use crate::handover::taking::{Estate, Taking, Turn};
use crate::remark::Remark;
use crate::table::Table;
use crate::worker::Command;

impl Server {
    /// Begins to hand over. What goes wrong is logged, and told to those who asked.
    pub(super) fn reload(&mut self) {
        match self.begin_handover() {
            Ok(()) => {}
            Err(error @ (HandoverError::Busy | HandoverError::Draining)) => {
                log(Remark::error(format!("asked to hand over: {}", chain(&error))));
            }
            Err(error) => self.handover_failed(&error),
        }
    }

    /// The same for peers of the control socket, once they have been heard; they are answered when it is
    /// decided.
    pub(super) fn reload_for_peers(&mut self) {
        if std::mem::take(&mut self.reload_wanted) {
            self.reload();
        }
    }

    /// Whether the successor is ready.
    pub(super) fn look_after_handover(&mut self) {
        let Some(giving) = &mut self.giving else { return };
        let handed_over = match giving.is_ready(Instant::now()) {
            Ok(false) => return,
            Ok(true) => self.hand_over(),
            Err(error) => Err(error),
        };
        if let Err(error) = handed_over {
            self.giving = None;
            self.handover_failed(&error);
        }
    }

    /// Does what the successor asks of a process that drains.
    pub(super) fn look_after_successor(&mut self) {
        loop {
            let Some(successor) = self.life.successor() else { return };
            let answered = match successor.receive() {
                Ok(None) => break,
                Ok(Some(parcel)) => self.answer_successor(parcel),
                Err(error) => Err(error),
            };
            if let Err(error) = answered {
                log(Remark::warning(format!("the successor is gone, finishing alone: {}", chain(&error))));
                if let Life::Draining(drain) = &mut self.life {
                    drain.successor = None;
                }
            }
        }
        if let Some(successor) = self.life.successor()
            && self.starved.read().is_ok()
        {
            // A successor that does not hear it is gone, which the next look finds out.
            let _ = successor.send(&Message::Starving { routes: self.waited().routes }, &[]);
        }
    }

    /// Passes a table on to every other process that serves by it, and to a successor also the sockets that
    /// were bound for it.
    pub(super) fn pass_on(&mut self, table: &Table, added: &[ListenerId]) {
        self.predecessors.tell_table(table);
        if let Some(giving) = &mut self.giving {
            let bound = self.listeners.own().filter(|(id, _)| added.contains(id));
            let bound: Vec<_> =
                bound.map(|(_, listener)| (listener.name(), listener.socket.as_fd())).collect();
            giving.tell_table(table, &bound);
        }
    }

    /// Says that we are ready, and waits for the old process's word.
    pub(super) fn await_turn(&mut self, taking: Taking) -> Result<(), ServerError> {
        taking.ready()?;
        let estate = loop {
            match taking.turn()? {
                Turn::Sockets(sockets) => {
                    for socket in sockets {
                        self.listeners.inherit(socket)?;
                    }
                }
                Turn::Table(table) => {
                    let table = Arc::new(table);
                    self.listeners.bind_for(&table);
                    self.listeners.unbind_for(&table);
                    self.spread(&table);
                    self.table = table;
                }
                Turn::Go(estate) => break estate,
            }
        };
        let Estate { peers, by, draining, past } = *estate;
        if let Some(control) = &mut self.control {
            control.adopt(peers);
        }
        self.predecessors = Predecessors::new(past);
        for (elder, channel) in draining {
            self.predecessors.add(elder, channel);
        }
        if let Some(pid) = by {
            self.predecessors.add(Elder { pid, drains_for_ms: 0 }, taking.into_channel());
        }
        Ok(())
    }

    pub(super) fn report(
        &self,
        successor: &Channel,
        question: u64,
        status: &Status,
    ) -> Result<(), ChannelError> {
        successor.send_with(&Message::Report { question }, status)
    }

    fn begin_handover(&mut self) -> Result<(), HandoverError> {
        if self.giving.is_some() {
            return Err(HandoverError::Busy);
        }
        if !matches!(self.life, Life::Serving) {
            return Err(HandoverError::Draining);
        }
        log(format!("handing over to a new process of {}", self.program.path().display()));
        self.notifier.reloading();
        let mut sockets = self.listeners.named();
        let control = self.control.as_ref().map(|control| ("control".to_owned(), control.listener()));
        let folder = self.program.folder().map(|folder| ("program".to_owned(), folder));
        let metrics = self.metrics.as_ref().map(|metrics| ("metrics".to_owned(), metrics.listener()));
        sockets.extend(control.into_iter().chain(folder).chain(metrics));
        self.giving = Some(Giving::begin(&self.program, &self.table, &sockets)?);
        Ok(())
    }

    /// The successor is ready: it is in charge from here on.
    fn hand_over(&mut self) -> Result<(), HandoverError> {
        let Some(giving) = self.giving.take() else { return Ok(()) };
        self.yield_accepting().inspect_err(|_| self.tell_all(|| Command::ResumeAccepting))?;
        let mut control = self.control.take();
        let metrics = self.metrics.take();
        if let Some(control) = &mut control {
            // What they wait for is the successor's to say; it answers their next question at once.
            control.tell_waiting(&self.waited());
        }
        let pid = giving.pid();
        let draining = self.predecessors.hand_on();
        let peers = control.as_mut().map(|control| control.hand_on()).unwrap_or_default();
        let went = giving.go(Legacy { peers, draining, past: self.predecessors.past().clone() });
        let channel = match went {
            Ok(channel) => channel,
            Err(error) => {
                (self.control, self.metrics) = (control, metrics);
                self.tell_all(|| Command::ResumeAccepting);
                return Err(error);
            }
        };
        self.drain(channel);
        self.predecessors = Predecessors::default();
        log(format!("process {pid} is in charge; draining for at most {} s", self.drain_timeout.as_secs()));
        // In one datagram: the next one is not ours to send.
        self.notifier.say(&format!("MAINPID={pid}\nREADY=1\nSTATUS=handed over"));
        if let Some(mut control) = control {
            control.tell_handover(&Response::Reloaded(Reloaded { pid }));
        }
        Ok(())
    }

    /// Calls off every accept, and waits until none is left: see `Core::yield_accepting`.
    fn yield_accepting(&self) -> Result<(), HandoverError> {
        let (done, all_done) = mpsc::channel();
        self.tell_all(|| Command::YieldAccepting(done.clone()));
        drop(done);
        for _ in &self.workers {
            all_done.recv_timeout(THREAD_TIMEOUT).map_err(|_| HandoverError::Accepting)?;
        }
        Ok(())
    }

    fn handover_failed(&mut self, error: &HandoverError) {
        let why = chain(error);
        log(Remark::error(format!("the handover failed, going on: {why}")));
        if matches!(self.life, Life::Serving) {
            self.notifier.say(&format!("READY=1\nSTATUS=a handover failed: {why}"));
        }
        if let Some(control) = &mut self.control {
            control.tell_handover(&refusal(ErrorCode::HandoverFailed, why));
        }
    }

    fn answer_successor(&mut self, parcel: Parcel) -> Result<(), ChannelError> {
        let Parcel { message, mut descriptors } = parcel;
        match message {
            Message::Table { version } => {
                if let Some(table) = descriptors.pop() {
                    let table = Arc::new(read_body(table)?);
                    // Threads that have drained already take none.
                    self.spread(&table);
                    self.table = table;
                }
                self.tell_successor(&Message::Taken { version })
            }
            Message::Status { question, query } => match (self.own_status(&query), self.life.successor()) {
                (Some(status), Some(successor)) => self.report(successor, question, &status),
                _ => Ok(()),
            },
            Message::End {} => {
                log("told to end by the successor");
                self.stop();
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn tell_successor(&self, message: &Message) -> Result<(), ChannelError> {
        self.life.successor().map_or(Ok(()), |successor| successor.send(message, &[]))
    }
}
