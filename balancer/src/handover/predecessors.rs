//! The processes that drain, as the one in charge knows them: each is passed every table, asked what it still
//! has, and at last told to end.
//!
//! Passing on a table and asking for a report wait for the answers, at most [`ANSWER_TIMEOUT`] for all of them
//! together: what the control socket says of an upstream holds for every process. One that does not answer in
//! time is left to itself: its clients live on, and its cap ends it.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use super::channel::{Channel, ChannelError, Elder, Message, Parcel, read_body};
use super::{ANSWER_TIMEOUT, DRAINING_MAX};
use crate::control::protocol::{Counters, DrainingStatus, Status, StatusQuery};
use crate::remark::Remark;
use crate::server::{chain, log};
use crate::table::Table;

/// Those that drain, the oldest first.
#[derive(Debug, Default)]
pub struct Predecessors {
    all: Vec<Predecessor>,
    /// Counts of those that have ended.
    past: Counters,
    question: u64,
    /// Routes that have begun to starve in one of them and have not been asked about yet.
    starving: Vec<String>,
}

#[derive(Debug)]
struct Predecessor {
    pid: u32,
    since: Instant,
    channel: Channel,
    /// Its last report.
    last: Option<Box<Status>>,
    told_to_end: bool,
    gone: bool,
}

impl Predecessors {
    pub fn new(past: Counters) -> Self {
        Self { past, ..Self::default() }
    }

    pub fn add(&mut self, elder: Elder, channel: Channel) {
        let now = Instant::now();
        let since = now.checked_sub(Duration::from_millis(elder.drains_for_ms)).unwrap_or(now);
        let Elder { pid, .. } = elder;
        self.all.push(Predecessor { pid, since, channel, last: None, told_to_end: false, gone: false });
    }

    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.all.iter().map(|one| one.channel.as_fd())
    }

    /// For the next one in charge.
    pub fn hand_on(&self) -> Vec<(Elder, BorrowedFd<'_>)> {
        let elder = |one: &Predecessor| Elder {
            pid: one.pid,
            drains_for_ms: u64::try_from(one.since.elapsed().as_millis()).unwrap_or(u64::MAX),
        };
        self.all.iter().map(|one| (elder(one), one.channel.as_fd())).collect()
    }

    /// Counts of processes that have ended.
    pub fn past(&self) -> &Counters {
        &self.past
    }

    /// Takes in what they say unasked, and tells the oldest to end when there are too many.
    pub fn look(&mut self) {
        for one in &mut self.all {
            while let Some(parcel) = one.receive() {
                one.note(parcel, &mut self.starving);
            }
        }
        self.bury();
        let over = self.all.len().saturating_sub(DRAINING_MAX);
        for one in self.all[..over].iter_mut().filter(|one| !one.told_to_end) {
            log(Remark::warning(format!(
                "process {} drains and is told to end: {DRAINING_MAX} others do",
                one.pid
            )));
            one.told_to_end = true;
            one.send(&Message::End {}, None);
        }
    }

    /// Passes a table on, and waits until it is in force there.
    pub fn tell_table(&mut self, table: &Table) {
        let message = Message::Table { version: table.version };
        self.all.iter_mut().for_each(|one| one.send(&message, Some(table)));
        let answers = |parcel: &Parcel| parcel.message == Message::Taken { version: table.version };
        self.wait_for(answers);
    }

    /// What they still have, each by its latest word.
    pub fn reports(&mut self, query: &StatusQuery) -> (Vec<DrainingStatus>, Vec<&Status>) {
        self.question += 1;
        let question = self.question;
        let asked = Message::Status { question, query: query.clone() };
        self.all.iter_mut().for_each(|one| one.send(&asked, None));
        self.wait_for(|parcel| parcel.message == Message::Report { question });
        let shown = |one: &Predecessor| DrainingStatus {
            pid: one.pid,
            drains_for_ms: u64::try_from(one.since.elapsed().as_millis()).unwrap_or(u64::MAX),
            connections: one.last.as_ref().map_or(0, |last| last.counters.connections_open),
        };
        (
            self.all.iter().map(shown).collect(),
            self.all.iter().filter_map(|one| one.last.as_deref()).collect(),
        )
    }

    /// Routes that have begun to starve there since this was asked last.
    pub fn take_starving(&mut self) -> Vec<String> {
        std::mem::take(&mut self.starving)
    }

    /// Waits for one such answer of each.
    fn wait_for(&mut self, is_answer: impl Fn(&Parcel) -> bool) {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        for one in &mut self.all {
            while !one.gone {
                match one.channel.wait(deadline) {
                    Ok(parcel) => {
                        let answered = is_answer(&parcel);
                        one.note(parcel, &mut self.starving);
                        if answered {
                            break;
                        }
                    }
                    Err(error) => one.lose(&error),
                }
            }
        }
        self.bury();
    }

    /// Forgets those that have ended, but not what they counted.
    fn bury(&mut self) {
        let past = &mut self.past;
        self.all.retain(|one| {
            if let Some(last) = one.last.as_ref().filter(|_| one.gone) {
                past.add(&last.counters.without_gauges());
            }
            !one.gone
        });
    }
}

impl Predecessor {
    fn send(&mut self, message: &Message, table: Option<&Table>) {
        let sent = match table {
            Some(table) => self.channel.send_with(message, table),
            None => self.channel.send(message, &[]),
        };
        if let Err(error) = sent {
            // One that has just ended has left its last word, which is what its counts go on from.
            while let Ok(Some(parcel)) = self.channel.receive() {
                self.note(parcel, &mut Vec::new());
            }
            self.lose(&error);
        }
    }

    fn receive(&mut self) -> Option<Parcel> {
        match self.channel.receive() {
            Ok(parcel) => parcel,
            Err(error) => {
                self.lose(&error);
                None
            }
        }
    }

    fn note(&mut self, parcel: Parcel, starving: &mut Vec<String>) {
        let Parcel { message, mut descriptors } = parcel;
        match message {
            Message::Report { .. } => {
                if let Some(Ok(status)) = descriptors.pop().map(read_body) {
                    self.last = Some(status);
                }
            }
            Message::Starving { routes } => starving.extend(routes),
            _ => {}
        }
    }

    fn lose(&mut self, error: &ChannelError) {
        self.gone = true;
        match error {
            ChannelError::Closed => log(format!("process {} has drained", self.pid)),
            error => log(Remark::warning(format!(
                "process {} drains and is left to itself: {}",
                self.pid,
                chain(error)
            ))),
        }
    }
}
