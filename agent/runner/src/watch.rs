//! Following the monitors: connections, what they tell, and what is done when one is gone.
//!
//! Nobody is asked how an instance is; each monitor says so by itself, and says again what is already true to
//! every new connection. So the tables are right after a restart as soon as the connections are there. A monitor that does
//! not take connections any more has died, and what it watched with it; the rest is killed and the jail is told as lost.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use epagent_isolation::launch::Launched;
use epagent_isolation::monitor::client::REQUEST_TIMEOUT;
use epagent_isolation::monitor::protocol::{Event as MonitorEvent, ExecOutcome};
use epagent_isolation::monitor::record::{ExitReason, ExitRecord, StopCause};
use epagent_isolation::monitor::{Client, ClientError};
use epagent_wire::name::JailId;
use epagent_wire::runner::{Event, Exit, Refusal, RefusalCode};
use nix::libc::SIGKILL;
use nix::sys::wait::{Id, WaitPidFlag, waitid};

use crate::launch::control_socket;
use crate::requests::keys::{Hold, Key, Keys};
use crate::server::{Server, Task, Token};
use crate::tables::{Jail, JailRecord, Phase};
use crate::work::{Work, chain};

/// Events taken from one monitor before others have their turn.
const EVENTS_PER_TURN: usize = 256;

/// A connection to one monitor.
#[derive(Debug)]
pub struct Monitor {
    client: Client,
    serial: u64,
}

impl Server {
    /// A monitor that this process started is its child, and reaped when it ends.
    pub fn adopt(&mut self, launched: Launched) {
        let serial = self.next_serial();
        if self.watch(&launched.monitor, Token::Process(serial)).is_ok() {
            self.processes.insert(serial, launched.monitor);
        }
    }

    pub fn reap(&mut self, serial: u64) {
        let Some(process): Option<OwnedFd> = self.processes.remove(&serial) else { return };
        self.unwatch(&process);
        let _ = waitid(Id::PIDFd(process.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG);
    }

    /// Connects to a jail's monitor, which has `timeout` for its first word, and takes in what it says at once.
    pub fn connect(&mut self, jail: &JailId, timeout: Duration) -> Result<(), ClientError> {
        let mut client = Client::connect_within(&control_socket(self.sockets.path(), jail), timeout)?;
        client.subscribe()?;
        let serial = self.next_serial();
        self.watch(&client, Token::Monitor(serial)).map_err(|error| ClientError::Receive(error.into()))?;
        self.monitors.insert(jail.clone(), Monitor { client, serial });
        if let Some(known) = self.tables.jails.get_mut(jail)
            && known.phase == Phase::Preparing
        {
            known.phase = Phase::Starting;
        }
        self.take_events(jail);
        Ok(())
    }

    pub fn serve_monitor(&mut self, serial: u64) {
        let jail =
            self.monitors.iter().find(|(_, monitor)| monitor.serial == serial).map(|(jail, _)| jail.clone());
        if let Some(jail) = jail {
            self.take_events(&jail);
        }
    }

    /// Asks the monitor of a jail something. Call [`Server::take_events`] afterwards: events may have come with the answer.
    pub fn with_monitor<T>(
        &mut self,
        jail: &JailId,
        ask: impl FnOnce(&mut Client) -> Result<T, ClientError>,
    ) -> Result<T, Refusal> {
        let Some(monitor) = self.monitors.get_mut(jail) else {
            let message = format!("the monitor of jail {jail} does not answer right now; try again");
            return Err(Refusal { code: RefusalCode::System, message });
        };
        ask(&mut monitor.client).map_err(|error| {
            let code = match error {
                ClientError::Refused { .. } | ClientError::TooOld { .. } => RefusalCode::Conflict,
                _ => RefusalCode::System,
            };
            Refusal { code, message: format!("jail {jail}: {}", chain(&error)) }
        })
    }

    pub fn take_events(&mut self, jail: &JailId) {
        for _ in 0..EVENTS_PER_TURN {
            let Some(monitor) = self.monitors.get_mut(jail) else { return };
            match monitor.client.next_event() {
                Ok(Some(event)) => self.heard(jail, event),
                Ok(None) => return,
                Err(_) => return self.disconnected(jail),
            }
        }
    }

    fn heard(&mut self, jail: &JailId, event: MonitorEvent) {
        let Some(known) = self.tables.jails.get_mut(jail) else { return };
        match event {
            MonitorEvent::Started { pid, started_at_us } => {
                if matches!(known.phase, Phase::Starting) {
                    known.phase = Phase::Running { pid, started_at_ms: started_at_us / 1_000 };
                }
            }
            MonitorEvent::Exited { record } if known.is_active() => self.exited(jail, &record),
            MonitorEvent::ExecExited { session, outcome } => {
                known.execs.remove(&session);
                let exit = exec_exit(outcome, crate::now_ms());
                self.tell(&Event::ExecExited { jail: jail.clone(), exec: session, exit });
            }
            MonitorEvent::Exited { .. } | MonitorEvent::LogDropped { .. } | MonitorEvent::Unknown => {}
        }
    }

    fn exited(&mut self, jail: &JailId, record: &ExitRecord) {
        self.end_execs(jail);
        let Some(known) = self.tables.jails.get_mut(jail) else { return };
        let exit = exit_of(record);
        if let Some(image) = known.record.makes_image().cloned() {
            known.phase = Phase::Concluding(exit.clone());
            let mut job = known.record.clone();
            let publish = exit.success();
            job.concluded = Some(exit);
            let keys = vec![
                (Key::Image(image.clone()), Hold::Exclusive),
                (Key::Jail(jail.clone()), Hold::Exclusive),
            ];
            let in_use = self.tables.images_in_use();
            return self.admit(Task::Own { work: Work::ImageConclude { job, image, publish, in_use }, keys });
        }
        let started_at_ms =
            known.started_at_ms().or((record.started_at_us > 0).then_some(record.started_at_us / 1_000));
        known.phase = Phase::Exited { exit: exit.clone(), started_at_ms };
        self.tell(&Event::Exited { jail: jail.clone(), exit });
    }

    /// Commands beside an app end with it, or with the connection they were started over.
    fn end_execs(&mut self, jail: &JailId) {
        let execs = self.tables.jails.get_mut(jail).map(|known| std::mem::take(&mut known.execs));
        for exec in execs.into_iter().flatten() {
            let exit = Exit { signal: Some(SIGKILL), at_ms: crate::now_ms(), ..Exit::default() };
            self.tell(&Event::ExecExited { jail: jail.clone(), exec, exit });
        }
    }

    /// Says goodbye to the monitor of an ended jail, which then ends too.
    pub fn release_monitor(&mut self, jail: &JailId) {
        if let Some(mut monitor) = self.monitors.remove(jail) {
            // One that can't be asked is killed with what is left of the jail.
            let _ = monitor.client.release();
            self.unwatch(&monitor.client);
        }
    }

    /// The connection has ended, or can't be made sense of. A second one shows whether the monitor lives.
    fn disconnected(&mut self, jail: &JailId) {
        if let Some(monitor) = self.monitors.remove(jail) {
            self.unwatch(&monitor.client);
        }
        self.end_execs(jail);
        self.reconnect(jail);
    }

    pub fn reconnect(&mut self, jail: &JailId) {
        if !self.is_followed(jail) {
            return;
        }
        match self.connect(jail, REQUEST_TIMEOUT) {
            Ok(()) => {}
            Err(error) if nobody_listens(&error) => self.lost(jail),
            // It has its socket and does not answer: stopped, or the machine is busy. Asked again at the next tick.
            Err(error) => {
                let app = jail.app().map(tracing::field::display);
                tracing::warn!(app, instance = %jail, "its monitor does not answer: {}", chain(&error));
            }
        }
    }

    /// Whether the jail ought to have a monitor that talks.
    fn is_followed(&self, jail: &JailId) -> bool {
        let phase = self.tables.jails.get(jail).map(|known| &known.phase);
        matches!(phase, Some(Phase::Starting | Phase::Running { .. })) && !self.reaping.contains(jail)
    }

    fn lost(&mut self, jail: &JailId) {
        let Some(Jail { record, .. }) = self.tables.jails.get(jail) else { return };
        let app = record.app.clone().map(|app| (Key::App(app), Hold::Shared));
        let keys: Keys = [(Key::Jail(jail.clone()), Hold::Exclusive)].into_iter().chain(app).collect();
        self.reaping.insert(jail.clone());
        let concluded = Some(Exit { monitor_lost: true, at_ms: crate::now_ms(), ..Exit::default() });
        let record = JailRecord { concluded, ..record.clone() };
        self.admit(Task::Own { work: Work::Reap(record), keys });
    }

    /// Once a second: monitors that did not answer, one at a time since each may cost a second.
    pub fn look_after_monitors(&mut self) {
        let silent: BTreeSet<JailId> = (self.tables.jails.keys())
            .filter(|jail| !self.monitors.contains_key(*jail) && self.is_followed(jail))
            .cloned()
            .collect();
        for jail in silent.into_iter().take(1) {
            self.reconnect(&jail);
        }
    }
}

/// Only this tells that a monitor is gone. A full queue of connections, for one, does not.
fn nobody_listens(error: &ClientError) -> bool {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    matches!(error, ClientError::Connect { source, .. } if matches!(source.kind(), ConnectionRefused | NotFound))
}

pub fn exit_of(record: &ExitRecord) -> Exit {
    let mut exit = Exit {
        out_of_memory: record.oom_killed,
        past_deadline: record.cause == Some(StopCause::Deadline),
        at_ms: record.exited_at_us / 1_000,
        ..Exit::default()
    };
    match &record.reason {
        ExitReason::Exited { code } => exit.code = Some(*code),
        ExitReason::Signaled { signal, .. } => exit.signal = Some(*signal),
        ExitReason::Killed => exit.signal = Some(SIGKILL),
        ExitReason::StartFailed { step, error, code } => {
            exit.code = Some(*code);
            exit.start_error = Some(format!("{step}: {error}"));
        }
    }
    exit
}

fn exec_exit(outcome: ExecOutcome, now_ms: u64) -> Exit {
    let exit = Exit { at_ms: now_ms, ..Exit::default() };
    match outcome {
        ExecOutcome::Exited { code } => Exit { code: Some(code), ..exit },
        ExecOutcome::Signaled { signal } => Exit { signal: Some(signal), ..exit },
        ExecOutcome::Failed { error, code } => Exit { code: Some(code), start_error: Some(error), ..exit },
    }
}
