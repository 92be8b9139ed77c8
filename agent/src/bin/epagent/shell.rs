//! What shells and manuals are told about the command: completions, names of apps included, and manual pages.
//!
//! A shell's completion script calls `epagent` itself back (`COMPLETE=bash epagent -- ...`), so it always knows the
//! command that is installed and the apps that exist now.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Command, CommandFactory};
use clap_complete::engine::{ArgValueCandidates, CompletionCandidate};
use clap_complete::env::{CompleteEnv, Shells};

use crate::args::{Arguments, SOCKET_DEFAULT};
use crate::failure::{Failure, status};

/// The variable by which a shell asks for completions.
const ASKED: &str = "COMPLETE";
/// Somebody waits at a prompt: an agent that does not answer at once is not waited for.
const ANSWER_MAX: Duration = Duration::from_millis(300);
/// Most bytes read of an answer.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// Answers a shell that asks for completions, and ends; else does nothing.
pub fn complete() {
    CompleteEnv::with_factory(|| with_names(Arguments::command())).var(ASKED).complete();
}

/// The script a shell reads once.
pub fn completions(shell: &str) -> Result<(), Failure> {
    let shells = Shells::builtins();
    let Some(completer) = shells.completer(shell) else {
        let known: Vec<&str> = shells.names().collect();
        return Err(Failure::usage(
            format!("the shell {shell:?} is not known"),
            format!("one of: {}", known.join(", ")),
        ));
    };
    let mut script = Vec::new();
    completer
        .write_registration(ASKED, "epagent", "epagent", "epagent", &mut script)
        .and_then(|()| io::stdout().write_all(&script))
        .map_err(|error| failed("writing the completions", &error))
}

/// A page for the command and one for each verb, below `folder/man1`; those of the daemons are written by hand.
pub fn manual(folder: &Path) -> Result<(), Failure> {
    let pages = folder.join("man1");
    std::fs::create_dir_all(&pages).map_err(|error| failed("making a folder for the pages", &error))?;
    let mut command = Arguments::command();
    command.build();
    clap_mangen::generate_to(command, &pages).map_err(|error| failed("writing the pages", &error))
}

/// Every argument that is an app knows the names there are.
fn with_names(command: Command) -> Command {
    let command = command.mut_args(|arg| match arg.get_id().as_str() {
        "app" => arg.add(ArgValueCandidates::new(apps)),
        _ => arg,
    });
    let verbs: Vec<String> = command.get_subcommands().map(|verb| verb.get_name().to_owned()).collect();
    verbs.into_iter().fold(command, |command, verb| command.mut_subcommand(verb, with_names))
}

/// The names of the apps; none when the agent can't be asked.
fn apps() -> Vec<CompletionCandidate> {
    let socket = std::env::var_os("EPAGENT_SOCKET").unwrap_or_else(|| OsString::from(SOCKET_DEFAULT));
    let names = ask(&PathBuf::from(socket)).unwrap_or_default();
    names.into_iter().map(CompletionCandidate::new).collect()
}

fn ask(socket: &Path) -> Option<Vec<String>> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(ANSWER_MAX)).ok()?;
    stream.set_write_timeout(Some(ANSWER_MAX)).ok()?;
    // HTTP/1.0: the answer comes as it is, and ends with the connection.
    stream.write_all(b"GET /v1/apps HTTP/1.0\r\nHost: localhost\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer).ok()?;
    let body = answer.split_once("\r\n\r\n")?.1;
    let apps: Vec<serde_json::Value> = serde_json::from_str(body).ok()?;
    Some(apps.iter().filter_map(|app| app["app"].as_str().map(str::to_owned)).collect())
}

fn failed(what: &str, error: &io::Error) -> Failure {
    Failure::new(status::FAILED, "system_error", format!("{what}: {error}"), "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verb_has_a_page() {
        let folder = tempfile::tempdir().unwrap();
        manual(folder.path()).unwrap();
        for page in ["epagent.1", "epagent-deploy.1", "epagent-init.1", "epagent-doctor.1"] {
            assert!(folder.path().join("man1").join(page).is_file(), "{page}");
        }
    }

    #[test]
    fn an_agent_that_is_away_completes_nothing() {
        assert!(ask(Path::new("/no/such/socket")).is_none());
        assert!(completions("tcsh").is_err());
    }
}
