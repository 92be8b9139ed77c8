//! `epagent exec` and `epagent run`: a command inside, with its input, output and status here.
//!
//! ```text
//!   stdin ──thread──▶ frames ─▶ agent        agent ─▶ frames ─▶ stdout, stderr
//!   SIGWINCH ───────▶ RESIZE ─▶              EXIT, the last one ─▶ our own exit status
//! ```
//!
//! With a terminal at both ends the command gets one of its own, and ours is raw for as long. Ctrl-C is then a
//! byte for the command; without a terminal it ends us, and the agent hangs up the command.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use epagent_core::name::AppName;
use epagent_wire::api::{Exec, ExecExit, FRAME_BYTES_MAX, Instance, frame};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::Outcome;
use super::apps::app_path;
use crate::args::{CommandArgs, ExecArgs, RunArgs};
use crate::client::Client;
use crate::failure::{Failure, status};
use crate::screen::Screen;
use crate::terminal::{self, Raw};

/// Pieces of input that wait for a slow command.
const INPUT_QUEUED_MAX: usize = 4;
/// A status beyond the signal's number, as shells write it.
const KILLED: u8 = 128;
/// The status of a command that was not found, and of one that could not be run (POSIX sh).
const NOT_FOUND: u8 = 127;

pub async fn exec(client: &Client, args: ExecArgs) -> Outcome {
    let instance = match args.instance {
        Some(name) => Some(find_instance(client, &args.app, name).await?),
        None => None,
    };
    let process = args.process.map(Into::into);
    carry(client, &format!("{}/exec", app_path(&args.app)), args.command, instance, process).await
}

pub async fn run(client: &Client, args: RunArgs) -> Outcome {
    carry(client, &format!("{}/run", app_path(&args.app)), args.command, None, None).await
}

/// `web.0` becomes the id of that instance; what is none of those is taken for an id.
async fn find_instance(client: &Client, app: &AppName, name: String) -> Result<String, Failure> {
    let Some((process, index)) = name.split_once('.') else {
        return Ok(name);
    };
    let list: Vec<Instance> = client.get(&format!("/v1/instances?app={app}")).await?;
    let is_it = |instance: &&Instance| instance.process == process && instance.index.to_string() == index;
    match list.iter().find(is_it) {
        Some(instance) => Ok(instance.id.clone()),
        None => {
            let message = format!("{app} has no instance {name}");
            Err(Failure::new(status::NOT_FOUND, "not_found", message, "`epagent ps` lists them"))
        }
    }
}

async fn carry(
    client: &Client,
    path: &str,
    command: CommandArgs,
    instance: Option<String>,
    process: Option<String>,
) -> Outcome {
    let with_terminal = command.terminal || (!command.no_terminal && terminal::is_interactive());
    let mut env = BTreeMap::new();
    if let (true, Ok(term)) = (with_terminal, std::env::var("TERM")) {
        env.insert("TERM".to_owned(), term);
    }
    let size = with_terminal.then(terminal::size);
    let query = Exec { argv: command.argv, instance, process, terminal: size, env };
    let connection = client.upgrade(path, &query).await?;
    // Nothing is raw before the command runs, so that an error is readable; `--terminal` may have no terminal here.
    let raw = if with_terminal { Raw::enter().ok() } else { None };
    let (from_agent, to_agent) = tokio::io::split(connection);
    let sending = tokio::spawn(send(to_agent, read_stdin(), with_terminal));
    let ended = receive(from_agent).await;
    sending.abort();
    drop(raw);
    outcome(ended, &query.argv)
}

fn outcome(ended: io::Result<Ended>, argv: &[String]) -> Outcome {
    match ended {
        Ok(Ended::Exit(exit)) => exit_status(&exit, argv),
        Ok(Ended::Output) => Ok(KILLED + nix::libc::SIGPIPE as u8),
        Err(error) => {
            let message = format!("the connection to the command was lost: {error}");
            let hint = "the agent hung it up, or was restarted";
            Err(Failure::new(status::UNREACHABLE, "agent_unreachable", message, hint))
        }
    }
}

fn exit_status(exit: &ExecExit, argv: &[String]) -> Outcome {
    let own = match (exit.code, exit.signal) {
        (Some(code), _) => u8::try_from(code & 0xff).unwrap_or(status::FAILED),
        (None, Some(signal)) => KILLED | u8::try_from(signal & 0x7f).unwrap_or(0),
        (None, None) => status::FAILED,
    };
    match &exit.error {
        None => Ok(own),
        Some(error) => {
            let code = if own == NOT_FOUND { "command_not_found" } else { "start_failed" };
            let command = argv.first().map(String::as_str).unwrap_or_default();
            let message = match error.contains(command) {
                true => error.clone(),
                false => format!("{command}: {error}"),
            };
            let hint = "the image has to have the program; `epagent exec APP -- /bin/sh` looks around";
            Err(Failure::new(own, code, Screen::stderr().foreign(&message), hint))
        }
    }
}

/// Standard input, read on a thread of its own: a read of a terminal can't be taken back.
fn read_stdin() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(INPUT_QUEUED_MAX);
    std::thread::spawn(move || {
        let mut buffer = vec![0; FRAME_BYTES_MAX];
        loop {
            match io::stdin().read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => {
                    if sender.blocking_send(buffer[..length].to_vec()).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
    });
    receiver
}

/// Passes input on until it ends, and the terminal's size whenever it changes.
async fn send(mut agent: impl AsyncWrite + Unpin, mut input: mpsc::Receiver<Vec<u8>>, resizes: bool) {
    let mut resized = if resizes { signal(SignalKind::window_change()).ok() } else { None };
    let mut is_open = true;
    loop {
        let sent = tokio::select! {
            bytes = input.recv(), if is_open => match bytes {
                Some(bytes) => write_frame(&mut agent, frame::STDIN, &bytes).await,
                None => {
                    is_open = false;
                    write_frame(&mut agent, frame::STDIN, &[]).await
                }
            },
            () = next(&mut resized) => {
                let (rows, columns) = terminal::size();
                let [a, b] = rows.to_be_bytes();
                let [c, d] = columns.to_be_bytes();
                write_frame(&mut agent, frame::RESIZE, &[a, b, c, d]).await
            }
        };
        // The other side tells why, in its last frame.
        if sent.is_err() {
            return;
        }
    }
}

async fn next(resized: &mut Option<tokio::signal::unix::Signal>) {
    match resized {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

enum Ended {
    Exit(ExecExit),
    /// Nobody reads our own output any more.
    Output,
}

async fn receive(mut agent: impl AsyncRead + Unpin) -> io::Result<Ended> {
    loop {
        let (kind, payload) = read_frame(&mut agent).await?;
        let written = match kind {
            frame::STDOUT => io::stdout().write_all(&payload).and_then(|()| io::stdout().flush()),
            frame::STDERR => io::stderr().write_all(&payload),
            frame::EXIT => return Ok(Ended::Exit(serde_json::from_slice(&payload)?)),
            // Of a newer agent's.
            _ => Ok(()),
        };
        if written.is_err() {
            return Ok(Ended::Output);
        }
    }
}

async fn read_frame(from: &mut (impl AsyncRead + Unpin)) -> io::Result<(u8, Vec<u8>)> {
    let kind = from.read_u8().await?;
    let length = from.read_u32().await? as usize;
    if length > FRAME_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {length} bytes")));
    }
    let mut payload = vec![0; length];
    from.read_exact(&mut payload).await?;
    Ok((kind, payload))
}

async fn write_frame(to: &mut (impl AsyncWrite + Unpin), kind: u8, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(5 + payload.len());
    bytes.push(kind);
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(payload);
    to.write_all(&bytes).await?;
    to.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(code: Option<i32>, signal: Option<i32>, error: Option<&str>) -> ExecExit {
        ExecExit { code, signal, error: error.map(str::to_owned) }
    }

    #[test]
    fn the_commands_status_is_ours() {
        let argv = ["nope".to_owned()];
        assert_eq!(exit_status(&exit(Some(7), None, None), &argv), Ok(7));
        assert_eq!(exit_status(&exit(None, Some(15), None), &argv), Ok(143));
        let failure = exit_status(&exit(Some(127), None, Some("no such file")), &argv).unwrap_err();
        assert_eq!((failure.status, failure.message.as_str()), (127, "nope: no such file"));
        assert_eq!(exit_status(&exit(None, None, Some("lost")), &argv).unwrap_err().status, status::FAILED);
    }

    #[tokio::test]
    async fn output_and_exit_come_through_frames() {
        let (mut agent, ours) = tokio::io::duplex(1024);
        write_frame(&mut agent, 9, b"of a newer agent").await.unwrap();
        write_frame(&mut agent, frame::EXIT, br#"{"code":3,"signal":null,"error":null}"#).await.unwrap();
        assert!(matches!(receive(ours).await, Ok(Ended::Exit(ExecExit { code: Some(3), .. }))));
    }

    #[tokio::test]
    async fn a_cut_connection_and_a_frame_too_long_are_errors() {
        let (agent, ours) = tokio::io::duplex(1024);
        drop(agent);
        assert!(receive(ours).await.is_err());
        let (mut agent, ours) = tokio::io::duplex(1024);
        agent.write_all(&[frame::STDOUT, 0xff, 0, 0, 0]).await.unwrap();
        assert!(receive(ours).await.is_err());
    }

    #[tokio::test]
    async fn the_end_of_input_is_an_empty_frame() {
        let (ours, mut agent) = tokio::io::duplex(1024);
        let (sender, receiver) = mpsc::channel(1);
        let sending = tokio::spawn(send(ours, receiver, false));
        sender.send(b"abc".to_vec()).await.unwrap();
        drop(sender);
        assert_eq!(read_frame(&mut agent).await.unwrap(), (frame::STDIN, b"abc".to_vec()));
        assert_eq!(read_frame(&mut agent).await.unwrap(), (frame::STDIN, Vec::new()));
        sending.abort();
    }
}
