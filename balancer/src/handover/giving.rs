//! The old process's side of a handover, until the new one is in charge.
//!
//! ```text
//!  begin ──▶ waiting ──Ready──▶ go ──▶ (draining)
//!               │
//!               └── Failed, channel closed, READY_TIMEOUT ──▶ dropped: the new process is killed
//! ```

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use super::channel::{Channel, ChannelError, DESCRIPTORS_MAX, Elder, Message, Parcel};
use super::launch::{Launched, Program, launch};
use super::{HandoverError, Lifeline, PROTOCOL, READY_TIMEOUT};
use crate::control::protocol::Counters;
use crate::table::Table;

/// A handover under way. Dropping it gives it up.
#[derive(Debug)]
pub struct Giving {
    process: Launched,
    channel: Channel,
    deadline: Instant,
    /// A table did not reach it.
    outdated: Option<ChannelError>,
}

/// What the new process is in charge of besides sockets and table.
pub struct Legacy<'a> {
    /// Control connections.
    pub peers: Vec<BorrowedFd<'a>>,
    /// Those that still drain, and the channels to them.
    pub draining: Vec<(Elder, BorrowedFd<'a>)>,
    /// Counts of those that have drained.
    pub past: Counters,
}

impl Giving {
    /// Executes the program and gives it what it needs to get ready.
    pub fn begin(
        program: &Program,
        table: &Table,
        sockets: &[(String, BorrowedFd<'_>)],
    ) -> Result<Self, HandoverError> {
        let deadline = Instant::now() + READY_TIMEOUT;
        let (process, channel) = launch(program)?;
        let giving = Self { process, channel, deadline, outdated: None };
        giving.give(program, table, sockets).map_err(|error| giving.explain(error))?;
        Ok(giving)
    }

    pub fn pid(&self) -> u32 {
        self.process.pid
    }

    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Whether the new process is ready; an error when it never will be.
    pub fn is_ready(&mut self, now: Instant) -> Result<bool, HandoverError> {
        if let Some(error) = self.outdated.take() {
            return Err(self.explain(error.into()));
        }
        match self.channel.receive() {
            Ok(Some(parcel)) => match parcel.message {
                Message::Ready { protocol: PROTOCOL } => Ok(true),
                Message::Ready { protocol } => Err(HandoverError::Protocol { theirs: protocol }),
                Message::Failed { why } => Err(HandoverError::Failed { why }),
                _ => Err(HandoverError::Missing { what: "word of readiness" }),
            },
            Ok(None) if now >= self.deadline => Err(HandoverError::Late),
            Ok(None) => Ok(false),
            Err(ChannelError::Closed) => Err(HandoverError::Ended),
            Err(error) => Err(error.into()),
        }
    }

    /// Passes on a table that came meanwhile, and the sockets that were bound for it.
    pub fn tell_table(&mut self, table: &Table, sockets: &[(String, BorrowedFd<'_>)]) {
        let told = self
            .give_sockets(sockets)
            .and_then(|()| self.channel.send_with(&Message::Table { version: table.version }, table));
        self.outdated = self.outdated.take().or(told.err());
    }

    /// The new process is in charge from here on. Returns the channel to it.
    pub fn go(self, legacy: Legacy<'_>) -> Result<Channel, HandoverError> {
        let Legacy { peers, draining, past } = legacy;
        let (elders, channels): (Vec<Elder>, Vec<BorrowedFd<'_>>) = draining.into_iter().unzip();
        let by = std::process::id();
        let message = Message::Go { by, peers: peers.len(), draining: elders, past: Box::new(past) };
        let descriptors = [peers, channels].concat();
        if let Err(error) = self.channel.send(&message, &descriptors) {
            return Err(self.explain(error.into()));
        }
        self.process.let_live();
        Ok(self.channel)
    }

    fn give(
        &self,
        program: &Program,
        table: &Table,
        sockets: &[(String, BorrowedFd<'_>)],
    ) -> Result<(), HandoverError> {
        let hello = Message::Hello {
            protocol: PROTOCOL,
            program: program.path().to_owned(),
            lifeline: Lifeline::of_this_process(),
        };
        self.channel.send_with(&hello, table)?;
        self.give_sockets(sockets)?;
        Ok(self.channel.send(&Message::Given {}, &[])?)
    }

    fn give_sockets(&self, sockets: &[(String, BorrowedFd<'_>)]) -> Result<(), ChannelError> {
        sockets.chunks(DESCRIPTORS_MAX).try_for_each(|part| {
            let (names, descriptors): (Vec<String>, Vec<BorrowedFd<'_>>) = part.iter().cloned().unzip();
            self.channel.send(&Message::Sockets { names }, &descriptors)
        })
    }

    /// A closed channel has a reason, which the other side may have told before.
    fn explain(&self, error: HandoverError) -> HandoverError {
        let HandoverError::Channel(ChannelError::Closed) = error else { return error };
        match self.channel.receive() {
            Ok(Some(Parcel { message: Message::Failed { why }, .. })) => HandoverError::Failed { why },
            Err(error @ ChannelError::Garbled(_)) => error.into(),
            _ => HandoverError::Ended,
        }
    }
}

impl AsFd for Giving {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}
