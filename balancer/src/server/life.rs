//! The process's life, and its end.
//!
//! ```text
//!            handed over                    empty
//!  Serving ──────────────▶ Draining ─────────────────────────▶ ended
//!     │                     │     │ its cap                      ▲
//!     │ told to stop        │     └──────────▶ Aborting ─────────┤
//!     └────────▶ Stopping ◀─┘ told to stop,        ▲  all reset  │
//!                   │         or to end            │             │
//!                   ├──────────────────────────────┘ its cap     │
//!                   └───────────────── empty ────────────────────┘
//! ```
//!
//! Draining is for a process that has a successor: it takes its time. Stopping is for one that was told to end:
//! seconds, then whoever is left is reset, so that nobody takes a cut response for a whole one.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::{Server, ServerError, chain, log};
use crate::control::protocol::StatusQuery;
use crate::handover::channel::Channel;
use crate::remark::Remark;
use crate::worker::{Command, Worker};

/// How often an ending process looks whether its threads have ended; each of them wakes it too.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How soon to look whether a thread has ended that has said it will.
const LOOK_AGAIN: Duration = Duration::from_millis(1);
/// How often a draining process says how far it is.
const TELL_EVERY: Duration = Duration::from_secs(10);
/// How long the resets may take to go out.
const ABORT_TIMEOUT: Duration = Duration::from_millis(500);

/// Where in its life the process is.
#[derive(Debug)]
pub enum Life {
    Serving,
    Draining(Drain),
    Stopping { until: Instant },
    Aborting { until: Instant },
}

/// A process with a successor.
#[derive(Debug)]
pub struct Drain {
    /// The way to the successor; none once that is gone.
    pub successor: Option<Channel>,
    pub since: Instant,
    until: Instant,
    tell_at: Instant,
}

impl Life {
    pub fn successor(&self) -> Option<&Channel> {
        match self {
            Life::Draining(drain) => drain.successor.as_ref(),
            _ => None,
        }
    }

    /// When to look again, at the latest.
    pub fn look_at(&self) -> Option<Instant> {
        match self {
            Life::Serving => None,
            Life::Draining(drain) => Some(drain.until.min(drain.tell_at)),
            Life::Stopping { .. } | Life::Aborting { .. } => Some(Instant::now() + LOOK_EVERY),
        }
    }
}

impl Server {
    /// A thread says that it ends a moment before it has ended: soon, until that is so.
    pub(super) fn look_for_ended_at(&self) -> Option<Instant> {
        let ended = self.workers.iter().filter(|worker| worker.has_ended()).count() as u64;
        (self.ending > ended).then(|| Instant::now() + LOOK_AGAIN)
    }

    /// Does what signals ask for. True when the process is to end at once.
    pub(super) fn obey_signals(&mut self) -> bool {
        while let Ok(Some(info)) = self.signals.read_signal() {
            match Signal::try_from(info.ssi_signo as i32) {
                Ok(Signal::SIGUSR2) => self.reload(),
                Ok(Signal::SIGHUP) if matches!(self.life, Life::Serving) => {
                    self.reread();
                    self.reload_certificates_quietly();
                }
                Ok(Signal::SIGHUP) => {}
                _ if matches!(self.life, Life::Stopping { .. } | Life::Aborting { .. }) => {
                    log("told to stop again: ending at once");
                    return true;
                }
                _ => self.stop(),
            }
        }
        false
    }

    /// Begins to end.
    pub(super) fn stop(&mut self) {
        log("stopping: finishing what is under way");
        if matches!(self.life, Life::Serving) {
            self.notifier.say("STOPPING=1");
        }
        self.say_farewell();
        if self.giving.take().is_some() {
            log(Remark::warning("the handover is given up"));
        }
        self.life = Life::Stopping { until: Instant::now() + self.stop_timeout };
        self.tell_all(|| Command::Stop);
    }

    /// Begins to drain: the successor accepts.
    pub(super) fn drain(&mut self, successor: Channel) {
        let now = Instant::now();
        self.tell_all(|| Command::Drain);
        // What the threads have of them goes when their accepts have ended.
        self.listeners.clear();
        self.watchdog = None;
        let until = now + self.drain_timeout;
        let tell_at = now + TELL_EVERY;
        self.life = Life::Draining(Drain { successor: Some(successor), since: now, until, tell_at });
    }

    /// Goes on with the end, if it has begun. True when there is nothing more to do.
    pub(super) fn live_on(&mut self) -> Result<bool, ServerError> {
        // Read, so that the end of one thread does not keep waking us while others go on.
        self.ending += self.worker_ended.read().unwrap_or(0);
        let now = Instant::now();
        let all_ended = self.workers.iter().all(Worker::has_ended);
        match &mut self.life {
            Life::Serving => match self.workers.iter().position(Worker::has_ended) {
                Some(index) => Err(self.why_ended(index)),
                None => Ok(false),
            },
            Life::Draining(drain) if all_ended => {
                log(format!("drained in {} s", drain.since.elapsed().as_secs()));
                self.say_farewell();
                Ok(true)
            }
            Life::Draining(drain) if now >= drain.until => {
                self.say_what_is_left("has drained for as long as it may: resetting");
                self.abort();
                Ok(false)
            }
            Life::Draining(drain) => {
                if now >= drain.tell_at {
                    drain.tell_at = now + TELL_EVERY;
                    self.say_what_is_left("draining:");
                }
                Ok(false)
            }
            Life::Stopping { .. } | Life::Aborting { .. } if all_ended => {
                log("stopped");
                Ok(true)
            }
            Life::Stopping { until } if now >= *until => {
                self.say_what_is_left("has been stopping for as long as it may: resetting");
                self.abort();
                Ok(false)
            }
            Life::Aborting { until } if now >= *until => {
                log(Remark::warning("stopped; some clients could not even be reset"));
                Ok(true)
            }
            Life::Stopping { .. } | Life::Aborting { .. } => Ok(false),
        }
    }

    fn abort(&mut self) {
        self.say_farewell();
        self.life = Life::Aborting { until: Instant::now() + ABORT_TIMEOUT };
        self.tell_all(|| Command::Abort);
    }

    fn say_what_is_left(&self, doing: &str) {
        let left = self.own_status(&StatusQuery::default()).map_or_else(
            || "clients of threads that do not answer".to_owned(),
            |status| format!("{} connections", status.counters.connections_open),
        );
        log(format!("{doing} {left}"));
    }

    fn why_ended(&mut self, index: usize) -> ServerError {
        let why = self.workers.swap_remove(index).join().err();
        ServerError::WorkerEnded { index, why: why.unwrap_or_else(|| "without a reason".to_owned()) }
    }

    /// The last report, which the successor counts on with.
    fn say_farewell(&self) {
        let Some((successor, status)) = self.life.successor().zip(self.own_status(&StatusQuery::default()))
        else {
            return;
        };
        if let Err(error) = self.report(successor, 0, &status) {
            log(Remark::warning(format!(
                "the successor does not learn what was counted here: {}",
                chain(&error)
            )));
        }
    }
}
