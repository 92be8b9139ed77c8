//! `epagent doctor`: what the agent says of itself, and, when it can't be asked, what can be seen from here.

use std::io;
use std::path::Path;

use epagent_wire::api::Check;

use super::{Outcome, written};
use crate::args::Json;
use crate::client::{CallError, Client};
use crate::dev;
use crate::failure::{Failure, status};
use crate::screen::{Screen, Tone, state_cell};

pub async fn doctor(client: &Client, json: &Json) -> Outcome {
    let (checks, reached) = checks(client).await;
    print(&checks, json)?;
    match (reached, checks.iter().any(|check| check.state == "fail")) {
        (false, _) => Ok(status::UNREACHABLE),
        (true, true) => Ok(status::FAILED),
        (true, false) => Ok(status::OK),
    }
}

/// What is found, and whether it is the agent that found it.
pub async fn checks(client: &Client) -> (Vec<Check>, bool) {
    match client.get::<Vec<Check>>("/v1/doctor").await {
        Ok(checks) => (checks, true),
        Err(error) => (from_here(client.socket(), error), false),
    }
}

/// What can be known without the agent: its socket, and whether this host could run one.
fn from_here(socket: &Path, error: CallError) -> Vec<Check> {
    let mut checks = vec![socket_check(socket)];
    let failure = Failure::from(error);
    checks.push(check("agent", "fail", failure.message, failure.hint));
    for (name, found) in dev::host_checks() {
        checks.push(match found {
            Ok(message) => check(name, "ok", message, String::new()),
            Err(failure) => check(name, "fail", failure.message, failure.hint),
        });
    }
    checks
}

fn socket_check(socket: &Path) -> Check {
    let (state, message) = match socket.symlink_metadata() {
        Ok(meta) if std::os::unix::fs::FileTypeExt::is_socket(&meta.file_type()) => {
            ("ok", "it is there".to_owned())
        }
        Ok(_) => ("fail", "there is something else of that name".to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => ("fail", "it does not exist".to_owned()),
        Err(error) => ("fail", error.to_string()),
    };
    let hint = match state {
        "ok" => "",
        _ => "start an agent, or name its socket by --socket PATH or EPAGENT_SOCKET",
    };
    check("socket", state, format!("{}: {message}", socket.display()), hint.to_owned())
}

fn check(name: &str, state: &str, message: String, hint: String) -> Check {
    Check { name: name.to_owned(), state: state.to_owned(), message, hint }
}

fn print(checks: &[Check], json: &Json) -> Outcome {
    let screen = Screen::stdout();
    if json.json {
        let text = serde_json::to_string(checks);
        return written(text.map_err(io::Error::from).and_then(|text| screen.line(&text)));
    }
    let width = checks.iter().map(|check| check.name.chars().count()).max().unwrap_or(0);
    written(checks.iter().try_for_each(|check| {
        let (state, tone) = state_cell(&check.state);
        let state = format!("{state:<4}");
        screen.line(&format!("{} {:<width$}  {}", screen.paint(tone, &state), check.name, check.message))?;
        match check.hint.is_empty() {
            true => Ok(()),
            false => {
                let hint = check.hint.replace('\n', " ");
                screen.line(&screen.paint(Tone::Dim, &format!("     {:<width$}  = help: {hint}", "")))
            }
        }
    }))
}
