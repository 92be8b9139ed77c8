//! What a failed deploy tells the operator: the phase, the cause in one sentence, what to do, the last log lines.
//!
//! There is one place that words a failure, and it is fed with facts only: how the process ended, what it printed,
//! what it listened on. The API, the event log and the command all repeat this verdict.

use serde::{Deserialize, Serialize};

use crate::exit::Exit;
use crate::name::ProcessName;
use crate::phase::Phase;
use crate::spec::{APP_PORT, Check};

/// Why a deploy failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The phase in which it failed.
    pub phase: Phase,
    /// A stable code of [`CODES`], for `epagent explain`.
    pub code: String,
    /// One sentence: what was attempted, on what, why it failed.
    pub message: String,
    /// What to do next.
    pub hint: String,
    /// The last lines the failed part printed; at most [`LOG_LINES_MAX`].
    pub log: Vec<String>,
}

pub const LOG_LINES_MAX: usize = 20;

/// Every code a verdict may have.
pub const CODES: [&str; 12] = [
    "archive_refused",
    "build_failed",
    "release_failed",
    "command_not_found",
    "exited",
    "out_of_memory",
    "past_deadline",
    "wrong_port",
    "not_started",
    "unhealthy",
    "refused",
    "canceled",
];

/// What went wrong, as the state machine saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// The archive could not be unpacked.
    Unpack {
        exit: Exit,
    },
    BuildCommand {
        command: String,
        exit: Exit,
    },
    ReleaseCommand {
        command: String,
        exit: Exit,
    },
    /// An instance ended before it was healthy.
    InstanceExited {
        process: ProcessName,
        index: u32,
        exit: Exit,
    },
    /// An instance's jail was asked for and did not come to run in time.
    NotStarted {
        process: ProcessName,
        index: u32,
        after_ms: u64,
    },
    /// An instance runs and did not become healthy in time.
    Unhealthy {
        process: ProcessName,
        index: u32,
        check: Check,
        after_ms: u64,
        last_error: Option<String>,
    },
    /// The runner would not do it: no such image, the pool is full.
    Refused {
        attempted: String,
        reason: String,
    },
    /// The operator canceled it, a newer deploy took its place, or the app was removed; which of them is said.
    Canceled {
        why: String,
    },
}

/// What was found where the failure happened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Findings {
    pub log: Vec<String>,
    /// Addresses the instance listened on, as the kernel lists them.
    pub listening: Vec<String>,
}

impl Cause {
    pub fn verdict(self, phase: Phase, findings: Findings) -> Verdict {
        let Findings { mut log, listening } = findings;
        log.drain(..log.len().saturating_sub(LOG_LINES_MAX));
        let (code, message, hint) = match self {
            Cause::Unpack { exit } => {
                // The unpacker's last line names the entry it refused; without one, the exit says what there is to say.
                let said = log.last().filter(|_| exit.start_error.is_none()).cloned();
                let why = said.unwrap_or_else(|| format!("the unpacker {exit}"));
                (
                    "archive_refused",
                    format!("unpacking the archive: {why}"),
                    "deploy an archive without that entry".to_owned(),
                )
            }
            Cause::BuildCommand { command, exit } => of_command("build_failed", "build", &command, &exit),
            Cause::ReleaseCommand { command, exit } => {
                of_command("release_failed", "release", &command, &exit)
            }
            Cause::InstanceExited { process, index, exit } => {
                of_instance(&format!("{process}.{index}"), &exit)
            }
            Cause::NotStarted { process, index, after_ms } => (
                "not_started",
                format!("{process}.{index} did not come to run in {} s", after_ms.div_ceil(1000)),
                "see `epagent doctor` and the runner's log: its disk or the machine may be stalled"
                    .to_owned(),
            ),
            Cause::Unhealthy { process, index, check, after_ms, last_error } => {
                let who = format!("{process}.{index}");
                of_unhealthy(&who, &check, after_ms, last_error.as_deref(), &listening)
            }
            Cause::Refused { attempted, reason } => (
                "refused",
                format!("{attempted}: {reason}"),
                "mend what it names and deploy again".to_owned(),
            ),
            Cause::Canceled { why } => (
                "canceled",
                format!("the deploy was canceled: {why}"),
                "deploy again when it is wanted".to_owned(),
            ),
        };
        Verdict { phase, code: code.to_owned(), message, hint, log }
    }
}

type Words = (&'static str, String, String);

fn of_command(code: &'static str, which: &str, command: &str, exit: &Exit) -> Words {
    let message = format!("the {which} command `{command}` {exit}");
    let hint = match exit {
        Exit { monitor_lost: true, .. } => "the agent was stopped meanwhile; deploy again".to_owned(),
        Exit { out_of_memory: true, .. } => format!("raise the memory of {which} jobs, or have it use less"),
        Exit { code: Some(127), .. } => {
            "a command in it is not in the image; install it or correct its name".to_owned()
        }
        _ => "read what it printed, mend it and deploy again".to_owned(),
    };
    (code, message, hint)
}

fn of_instance(who: &str, exit: &Exit) -> Words {
    let message = format!("{who} {exit} before it was healthy");
    match exit {
        Exit { out_of_memory: true, .. } => {
            ("out_of_memory", message, "raise `memory` in its [process.NAME.limits]".to_owned())
        }
        Exit { code: Some(127 | 126), .. } => (
            "command_not_found",
            message,
            "the command must exist in the image or the app; paths are relative to /app".to_owned(),
        ),
        Exit { past_deadline: true, .. } => ("past_deadline", message, "have it start faster".to_owned()),
        _ => ("exited", message, "read what it printed, mend it and deploy again".to_owned()),
    }
}

fn of_unhealthy(
    who: &str,
    check: &Check,
    after_ms: u64,
    last_error: Option<&str>,
    listening: &[String],
) -> Words {
    let seconds = after_ms.div_ceil(1000);
    let serves_port = matches!(check, Check::Http(_) | Check::Tcp);
    let expected = format!("0.0.0.0:{APP_PORT}");
    if serves_port && !listening.iter().any(|address| reaches_port(address)) {
        let found = if listening.is_empty() { "nothing".to_owned() } else { listening.join(", ") };
        return (
            "wrong_port",
            format!("{who} did not become healthy in {seconds} s: listening on {found}, expected {expected}"),
            "have the app listen on 0.0.0.0 (or [::]) and the port in $PORT".to_owned(),
        );
    }
    let what = match check {
        Check::Http(path) => format!("GET {path}"),
        Check::Tcp => "a TCP connection".to_owned(),
        Check::Exec(command) => format!("`{command}`"),
        Check::Running => "running".to_owned(),
    };
    let why = last_error.map_or_else(|| "no answer".to_owned(), str::to_owned);
    (
        "unhealthy",
        format!("{who} did not become healthy in {seconds} s: {what}: {why}"),
        "see that its health check passes when the app is ready, or raise `deadline` in [process.NAME.health]".to_owned(),
    )
}

/// Whether a listening address can be reached from outside of the instance on the port the app was told.
fn reaches_port(address: &str) -> bool {
    match address.rsplit_once(':') {
        Some((host, port)) => port.parse() == Ok(APP_PORT) && !host.starts_with("127.") && host != "[::1]",
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process() -> ProcessName {
        "web".parse().unwrap()
    }

    fn unhealthy(listening: &[&str]) -> Verdict {
        let cause = Cause::Unhealthy {
            process: process(),
            index: 0,
            check: Check::Tcp,
            after_ms: 5_000,
            last_error: None,
        };
        let listening = listening.iter().map(|&text| text.to_owned()).collect();
        cause.verdict(Phase::Checking, Findings { log: Vec::new(), listening })
    }

    #[test]
    fn a_wrong_port_is_told_apart_from_a_failing_check() {
        let verdict = unhealthy(&["0.0.0.0:3000"]);
        assert_eq!(verdict.code, "wrong_port");
        assert!(verdict.message.contains("listening on 0.0.0.0:3000, expected 0.0.0.0:8000"), "{verdict:?}");
        assert_eq!(unhealthy(&["127.0.0.1:8000"]).code, "wrong_port");
        assert_eq!(unhealthy(&[]).code, "wrong_port");
        assert_eq!(unhealthy(&["[::]:8000"]).code, "unhealthy");
    }

    #[test]
    fn out_of_memory_is_named_before_the_signal() {
        let exit = Exit { signal: Some(9), out_of_memory: true, ..Exit::default() };
        let verdict = Cause::InstanceExited { process: process(), index: 1, exit }
            .verdict(Phase::Checking, Findings::default());
        assert_eq!(verdict.code, "out_of_memory");
        assert!(verdict.message.starts_with("web.1 ran out of memory"), "{verdict:?}");
    }

    #[test]
    fn a_verdict_keeps_the_last_lines_only() {
        let log = (0..100).map(|n| n.to_string()).collect();
        let verdict = Cause::Canceled { why: String::new() }
            .verdict(Phase::Building, Findings { log, listening: Vec::new() });
        assert_eq!(verdict.log.len(), LOG_LINES_MAX);
        assert_eq!(verdict.log.last().unwrap(), "99");
    }
}
