//! What the monitor decides, without doing any of it.
//!
//! ```text
//!            Started                    AppEnded, InitEnded, kill, deadline, out of memory
//! Starting ──────────▶ Running ────────────────────────────▶ Dying ── nobody left ──▶ Exited ── Release ──▶ end
//!     │                   │ Stop                               ▲
//!     │                   └──▶ Stopping ── grace passed ───────┤
//!     └── StartFailed, kill, deadline ─────────────────────────┘
//! ```
//!
//! [`Core::handle`] takes one input and the time, and returns actions in the order in which they are to be done. The
//! time is in milliseconds of a clock that does not jump; [`Core::deadline_ms`] says when to call with
//! [`Input::Tick`] at the latest.

use std::collections::BTreeMap;

use super::channel::{FromInit, ToInit};
use crate::monitor::protocol::{Answer, Call, Event, ExecOutcome, State, Status, VERSION_MAX, VERSION_MIN};
use crate::monitor::record::{ExitReason, ExitRecord, StopCause};

/// A connection to the monitor's socket. Never used twice.
pub(super) type ClientId = u64;

/// Longest grace a `stop` can ask for.
const GRACE_MS_MAX: u64 = 24 * 3600 * 1000;
/// Longest error text in a record, so that record and event fit one packet.
const ERROR_BYTES_MAX: usize = 2000;

/// Something happened.
#[derive(Debug)]
pub(super) enum Input {
    /// Init exists.
    InitCloned {
        pid: i32,
    },
    FromInit(FromInit),
    /// Setting up failed on the monitor's side.
    StartFailed {
        step: String,
        error: String,
    },
    /// Init is a zombie no more.
    InitEnded,
    /// Nobody is left in the instance and its output is read. What it used.
    Emptied {
        usage: LastUsage,
    },
    /// The memory limit was hit where the kernel does not kill the group.
    OutOfMemory,
    LogDropped {
        total_bytes: u64,
    },
    /// `fds`: how many descriptors came with it.
    Call {
        client: ClientId,
        seq: u64,
        call: Call,
        fds: usize,
    },
    /// A request this build cannot read, and its name.
    UnknownCall {
        client: ClientId,
        seq: u64,
        request: String,
    },
    ClientGone {
        client: ClientId,
    },
    Tick,
}

/// Counters read when the instance was over.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LastUsage {
    pub memory_peak_bytes: Option<u64>,
    pub cpu_us: Option<u64>,
    pub oom_killed: bool,
    pub now_us: u64,
}

/// Something to be done.
#[derive(Debug, PartialEq)]
pub(super) enum Action {
    /// With the descriptors that came with the current input, if `with_fds`.
    ToInit {
        message: ToInit,
        with_fds: bool,
    },
    /// With the descriptors that came with the current input, if `with_fds`.
    Answer {
        client: ClientId,
        seq: u64,
        answer: Answer,
        with_fds: bool,
    },
    Event {
        client: ClientId,
        event: Event,
    },
    /// Everything in the instance, init included.
    KillInstance,
    WriteRecord(ExitRecord),
    /// The monitor's own end.
    End,
}

#[derive(Debug, Clone, PartialEq)]
enum Phase {
    Starting,
    Running,
    Stopping { kill_at_ms: u64 },
    Dying { init_ended: bool },
    Exited(ExitRecord),
}

#[derive(Debug, Default)]
struct Client {
    version: Option<u32>,
    subscribed: bool,
}

#[derive(Debug)]
struct Session {
    client: ClientId,
    /// The call to be answered when it has started.
    seq: Option<u64>,
}

#[derive(Debug)]
pub(super) struct Core {
    id: String,
    phase: Phase,
    init_pid: Option<i32>,
    started_at_us: u64,
    /// Milliseconds on the caller's clock.
    job_deadline_ms: Option<u64>,
    reason: Option<ExitReason>,
    cause: Option<StopCause>,
    out_of_memory: bool,
    notes: Vec<String>,
    log_dropped_bytes: u64,
    clients: BTreeMap<ClientId, Client>,
    sessions: BTreeMap<u32, Session>,
    last_session: u32,
}

impl Core {
    pub(super) fn new(id: String, job_deadline_ms: Option<u64>) -> Core {
        Core {
            id,
            phase: Phase::Starting,
            init_pid: None,
            started_at_us: 0,
            job_deadline_ms,
            reason: None,
            cause: None,
            out_of_memory: false,
            notes: Vec::new(),
            log_dropped_bytes: 0,
            clients: BTreeMap::new(),
            sessions: BTreeMap::new(),
            last_session: 0,
        }
    }

    /// When [`Input::Tick`] is due.
    pub(super) fn deadline_ms(&self) -> Option<u64> {
        let kill_at = match self.phase {
            Phase::Stopping { kill_at_ms } => Some(kill_at_ms),
            _ => None,
        };
        let job = self.job_deadline_ms.filter(|_| self.alive());
        kill_at.into_iter().chain(job).min()
    }

    /// Whether the caller has to look for the instance being empty.
    pub(super) fn waits_for_empty(&self) -> bool {
        self.phase == Phase::Dying { init_ended: true }
    }

    pub(super) fn handle(&mut self, input: Input, now_ms: u64, now_us: u64) -> Vec<Action> {
        match input {
            Input::InitCloned { pid } => {
                self.init_pid = Some(pid);
                Vec::new()
            }
            Input::FromInit(message) => self.told_by_init(message, now_us),
            Input::StartFailed { step, error } => {
                self.fail_start(step, error, 125);
                // Without an init there is nobody whose end could be waited for.
                let init_ended = self.init_pid.is_none();
                self.die(init_ended)
            }
            Input::InitEnded => {
                self.init_pid = None;
                self.die(true)
            }
            Input::Emptied { usage } => self.exited(usage),
            Input::OutOfMemory => {
                self.out_of_memory = true;
                self.die(false)
            }
            Input::LogDropped { total_bytes } => {
                self.log_dropped_bytes = total_bytes;
                self.broadcast(2, &Event::LogDropped { total_bytes })
            }
            Input::Call { client, seq, call, fds } => self.call(client, seq, call, fds, now_ms),
            Input::UnknownCall { client, seq, request } => {
                vec![answer(client, seq, Answer::Unsupported { request })]
            }
            Input::ClientGone { client } => self.client_gone(client),
            Input::Tick => self.tick(now_ms),
        }
    }

    fn told_by_init(&mut self, message: FromInit, now_us: u64) -> Vec<Action> {
        match message {
            FromInit::Alive => vec![to_init(ToInit::Go)],
            FromInit::Started { notes } => {
                self.notes = notes;
                self.started_at_us = now_us;
                if self.phase == Phase::Starting {
                    self.phase = Phase::Running;
                }
                self.started_event().map_or_else(Vec::new, |event| self.broadcast(1, &event))
            }
            FromInit::StartFailed { step, error, code } => {
                self.fail_start(step, error, code);
                self.die(false)
            }
            FromInit::AppExited { code } => self.app_ended(ExitReason::Exited { code }),
            FromInit::AppSignaled { signal, core_dumped } => {
                self.app_ended(ExitReason::Signaled { signal, core_dumped })
            }
            FromInit::ExecStarted { session, pid } => {
                let waiting = self.sessions.get_mut(&session).and_then(|s| Some((s.client, s.seq.take()?)));
                let Some((client, seq)) = waiting else {
                    return vec![to_init(ToInit::ExecHangUp { session })];
                };
                vec![Action::Answer { client, seq, answer: Answer::Exec { session, pid }, with_fds: true }]
            }
            FromInit::ExecRefused { session, error } => {
                let refused = self.sessions.remove(&session).and_then(|s| Some((s.client, s.seq?)));
                refused.map_or_else(Vec::new, |(client, seq)| {
                    vec![answer(client, seq, Answer::Refused { error })]
                })
            }
            FromInit::ExecEnded { session, outcome } => self.session_ended(session, outcome),
        }
    }

    fn app_ended(&mut self, reason: ExitReason) -> Vec<Action> {
        self.reason.get_or_insert(reason);
        self.die(false)
    }

    fn fail_start(&mut self, step: String, mut error: String, code: i32) {
        let cut = (0..=ERROR_BYTES_MAX.min(error.len())).rev().find(|at| error.is_char_boundary(*at));
        error.truncate(cut.unwrap_or(0));
        self.reason.get_or_insert(ExitReason::StartFailed { step, error, code });
    }

    fn session_ended(&mut self, session: u32, outcome: ExecOutcome) -> Vec<Action> {
        let Some(Session { client, .. }) = self.sessions.remove(&session) else { return Vec::new() };
        vec![Action::Event { client, event: Event::ExecExited { session, outcome } }]
    }

    fn alive(&self) -> bool {
        matches!(self.phase, Phase::Starting | Phase::Running | Phase::Stopping { .. })
    }

    /// Towards the end: everything is killed, once for each sign of it; killing the dead is harmless.
    fn die(&mut self, init_ended: bool) -> Vec<Action> {
        match &mut self.phase {
            Phase::Exited(_) => return Vec::new(),
            Phase::Dying { init_ended: known } => *known |= init_ended,
            phase => *phase = Phase::Dying { init_ended },
        }
        vec![Action::KillInstance]
    }

    fn exited(&mut self, usage: LastUsage) -> Vec<Action> {
        if !self.waits_for_empty() {
            return Vec::new();
        }
        let record = ExitRecord {
            id: self.id.clone(),
            reason: self.reason.take().unwrap_or(ExitReason::Killed),
            cause: self.cause,
            oom_killed: usage.oom_killed || self.out_of_memory,
            started_at_us: self.started_at_us,
            exited_at_us: usage.now_us,
            memory_peak_bytes: usage.memory_peak_bytes,
            cpu_us: usage.cpu_us,
            log_dropped_bytes: self.log_dropped_bytes,
        };
        self.phase = Phase::Exited(record.clone());
        let mut actions = vec![Action::WriteRecord(record.clone())];
        let sessions: Vec<u32> = self.sessions.keys().copied().collect();
        for session in sessions {
            actions.extend(self.session_ended(session, ExecOutcome::Signaled { signal: libc::SIGKILL }));
        }
        actions.extend(self.broadcast(1, &Event::Exited { record }));
        actions
    }

    fn tick(&mut self, now_ms: u64) -> Vec<Action> {
        if self.alive() && self.job_deadline_ms.is_some_and(|at| at <= now_ms) {
            self.cause = Some(StopCause::Deadline);
            return self.die(false);
        }
        match self.phase {
            Phase::Stopping { kill_at_ms } if kill_at_ms <= now_ms => {
                self.cause = Some(StopCause::StopForced);
                self.die(false)
            }
            _ => Vec::new(),
        }
    }

    fn call(&mut self, client: ClientId, seq: u64, call: Call, fds: usize, now_ms: u64) -> Vec<Action> {
        let version = match (&call, self.clients.entry(client).or_default().version) {
            (Call::Hello { .. }, _) => 0,
            (_, Some(version)) => version,
            (_, None) => {
                return vec![answer(client, seq, Answer::Refused { error: "say hello first".to_owned() })];
            }
        };
        if let (Some(request), true) = (newer_than_1(&call), version < 2) {
            let request = request.to_owned();
            return vec![answer(client, seq, Answer::Unsupported { request })];
        }
        let ok = answer(client, seq, Answer::Ok);
        match call {
            Call::Hello { versions } => vec![self.hello(client, seq, &versions)],
            Call::Status => vec![answer(client, seq, Answer::Status(self.status(version)))],
            Call::Subscribe => self.subscribe(client, ok),
            Call::Kill => {
                if self.alive() {
                    self.cause = Some(StopCause::Kill);
                }
                let mut actions = self.die(false);
                actions.push(ok);
                actions
            }
            Call::Release => match &self.phase {
                Phase::Exited(_) => vec![ok, Action::End],
                _ => vec![answer(
                    client,
                    seq,
                    Answer::Refused { error: "the instance has not ended".to_owned() },
                )],
            },
            _ if self.phase == Phase::Starting => {
                vec![answer(
                    client,
                    seq,
                    Answer::Refused { error: "the instance is still starting".to_owned() },
                )]
            }
            _ if !self.alive() => {
                vec![answer(client, seq, Answer::Refused { error: "the instance has ended".to_owned() })]
            }
            Call::Signal { signal } => vec![to_init(ToInit::Signal { signal }), ok],
            Call::Stop { signal, grace_ms } => {
                let kill_at_ms = now_ms + grace_ms.min(GRACE_MS_MAX);
                // A second stop may shorten the grace, never lengthen it.
                let kill_at_ms = self.deadline_ms().map_or(kill_at_ms, |at| at.min(kill_at_ms));
                self.phase = Phase::Stopping { kill_at_ms };
                self.cause = Some(StopCause::Stop);
                vec![to_init(ToInit::Signal { signal }), ok]
            }
            Call::Exec(call) => {
                if fds != if call.tty.is_some() { 0 } else { 3 } {
                    let error = "wants three descriptors, or none and a terminal".to_owned();
                    return vec![answer(client, seq, Answer::Refused { error })];
                }
                self.last_session += 1;
                let session = self.last_session;
                self.sessions.insert(session, Session { client, seq: Some(seq) });
                vec![Action::ToInit { message: ToInit::Exec { session, call }, with_fds: true }]
            }
            Call::ExecResize { session, size } => {
                self.to_session(client, seq, session, ToInit::ExecResize { session, size })
            }
            Call::ExecSignal { session, signal } => {
                self.to_session(client, seq, session, ToInit::ExecSignal { session, signal })
            }
        }
    }

    /// The newest version both sides speak.
    fn hello(&mut self, client: ClientId, seq: u64, versions: &[u32]) -> Action {
        let common =
            versions.iter().copied().filter(|version| (VERSION_MIN..=VERSION_MAX).contains(version)).max();
        self.clients.entry(client).or_default().version = common;
        match common {
            Some(version) => answer(client, seq, Answer::Hello { version, id: self.id.clone() }),
            None => {
                let error = format!("this monitor speaks versions {VERSION_MIN} to {VERSION_MAX}");
                answer(client, seq, Answer::Refused { error })
            }
        }
    }

    fn subscribe(&mut self, client: ClientId, ok: Action) -> Vec<Action> {
        self.clients.entry(client).or_default().subscribed = true;
        let exited = match &self.phase {
            Phase::Exited(record) => Some(Event::Exited { record: record.clone() }),
            _ => None,
        };
        let past = self.started_event().into_iter().chain(exited);
        [ok].into_iter().chain(past.map(|event| Action::Event { client, event })).collect()
    }

    fn to_session(&self, client: ClientId, seq: u64, session: u32, message: ToInit) -> Vec<Action> {
        match self.sessions.get(&session) {
            Some(owned) if owned.client == client => vec![to_init(message), answer(client, seq, Answer::Ok)],
            _ => vec![answer(
                client,
                seq,
                Answer::Refused { error: format!("no session {session} of this connection") },
            )],
        }
    }

    fn client_gone(&mut self, client: ClientId) -> Vec<Action> {
        self.clients.remove(&client);
        let theirs = self.sessions.iter().filter(|(_, session)| session.client == client);
        let hang_ups = theirs.map(|(&session, _)| to_init(ToInit::ExecHangUp { session })).collect();
        self.sessions.retain(|_, session| session.client != client);
        hang_ups
    }

    fn status(&self, version: u32) -> Status {
        let (state, record) = match &self.phase {
            Phase::Starting => (State::Starting, None),
            Phase::Running => (State::Running, None),
            Phase::Stopping { .. } | Phase::Dying { .. } => (State::Stopping, None),
            Phase::Exited(record) => (State::Exited, Some(record.clone())),
        };
        Status {
            id: self.id.clone(),
            state,
            pid: self.init_pid,
            started_at_us: self.started_at_us,
            record,
            notes: self.notes.clone(),
            log_dropped_bytes: if version >= 2 { self.log_dropped_bytes } else { 0 },
        }
    }

    /// If the app was ever started.
    fn started_event(&self) -> Option<Event> {
        let pid = self.init_pid.unwrap_or(0);
        (self.started_at_us > 0).then_some(Event::Started { pid, started_at_us: self.started_at_us })
    }

    /// To subscribers that speak `since` or newer.
    fn broadcast(&self, since: u32, event: &Event) -> Vec<Action> {
        let subscribed = self.clients.iter().filter(|(_, c)| c.subscribed && c.version >= Some(since));
        subscribed.map(|(&client, _)| Action::Event { client, event: event.clone() }).collect()
    }
}

/// The name of a request that version 1 does not have.
fn newer_than_1(call: &Call) -> Option<&'static str> {
    match call {
        Call::Exec(_) => Some("exec"),
        Call::ExecResize { .. } => Some("exec-resize"),
        Call::ExecSignal { .. } => Some("exec-signal"),
        _ => None,
    }
}

fn to_init(message: ToInit) -> Action {
    Action::ToInit { message, with_fds: false }
}

fn answer(client: ClientId, seq: u64, answer: Answer) -> Action {
    Action::Answer { client, seq, answer, with_fds: false }
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
