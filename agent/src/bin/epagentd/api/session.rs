//! One interactive command: frames on the upgraded connection, pipes or a terminal on the other side.
//!
//! ```text
//!  client ◀─ frames ─▶ here ─ pipes or terminal master ─▶ the command in its jail
//!                        ◀─ ExecExited ─ runner
//! ```
//!
//! The last frame is the exit, sent when the command ended *and* its output is read to the end, so that no output
//! is lost. When the client goes away, the command is hung up.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::time::Duration;

use epagent_core::exit::Exit;
use epagent_core::name::JailId;
use epagent_wire::api::{ExecExit, FRAME_BYTES_MAX, frame};
use epagent_wire::runner::{Event, Reply, Request, TerminalSize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::{broadcast, mpsc};

use crate::runner::{CallError, Runner};

/// Frames that wait for a slow client; past it the command's own writes wait.
const FRAMES_QUEUED_MAX: usize = 16;
/// How long output may lag behind the command's end: something it left running may hold the pipe open.
const OUTPUT_AFTER_EXIT: Duration = Duration::from_millis(500);

/// A command that was started, with our ends of its input and output.
pub struct Session {
    runner: Runner,
    jail: JailId,
    exec: u32,
    events: broadcast::Receiver<Event>,
    ends: Ends,
}

enum Ends {
    /// The master, once for each way. Its end, when the last slave is closed, is the error EIO.
    Terminal {
        stdin: pipe::Sender,
        stdout: pipe::Receiver,
    },
    Pipes {
        stdin: pipe::Sender,
        stdout: pipe::Receiver,
        stderr: pipe::Receiver,
    },
}

impl Session {
    /// Starts `argv` in the jail.
    pub async fn start(
        runner: &Runner,
        jail: &JailId,
        argv: Vec<String>,
        env: std::collections::BTreeMap<String, String>,
        terminal: Option<TerminalSize>,
    ) -> Result<Self, CallError> {
        // Listening before asking, so that a command that ends at once is not missed.
        let events = runner.events();
        let request = Request::Exec { jail: jail.clone(), argv, env, terminal };
        let (answer, pipes) = match terminal {
            Some(_) => (runner.call_with(request, Vec::new()).await?, None),
            None => {
                let (pipes, theirs) = pipes().map_err(|_| CallError::Unexpected)?;
                (runner.call_with(request, theirs).await?, Some(pipes))
            }
        };
        let Reply::Exec { exec } = answer.reply else { return Err(CallError::Unexpected) };
        let ends = match pipes {
            Some(ends) => ends,
            None => {
                let master = answer.fds.into_iter().next().ok_or(CallError::Unexpected)?;
                terminal_ends(master).map_err(|_| CallError::Unexpected)?
            }
        };
        Ok(Self { runner: runner.clone(), jail: jail.clone(), exec, events, ends })
    }

    /// Carries frames until the command has ended or the client has gone.
    pub async fn carry(self, client: impl AsyncRead + AsyncWrite + Send + 'static) {
        let Session { runner, jail, exec, mut events, ends } = self;
        let (from_client, mut to_client) = tokio::io::split(client);
        let (frames, mut queue) = mpsc::channel::<(u8, Vec<u8>)>(FRAMES_QUEUED_MAX);
        let writing = tokio::spawn(async move {
            while let Some((kind, payload)) = queue.recv().await {
                if write_frame(&mut to_client, kind, &payload).await.is_err() {
                    return;
                }
            }
            let _ = to_client.shutdown().await;
        });
        let (stdin, mut outputs): (Box<dyn AsyncWrite + Send + Unpin>, _) = match ends {
            Ends::Terminal { stdin, stdout } => {
                (Box::new(stdin), vec![tokio::spawn(copy_out(stdout, frame::STDOUT, frames.clone()))])
            }
            Ends::Pipes { stdin, stdout, stderr } => {
                let copies = vec![
                    tokio::spawn(copy_out(stdout, frame::STDOUT, frames.clone())),
                    tokio::spawn(copy_out(stderr, frame::STDERR, frames.clone())),
                ];
                (Box::new(stdin), copies)
            }
        };
        let input = copy_in(from_client, stdin, runner.clone(), jail.clone(), exec);
        let ended = tokio::select! {
            ended = wait_for_exit(&mut events, &jail, exec) => ended,
            // A runner that ends takes its commands with it and tells nobody.
            () = runner.lost() => None,
            () = input => {
                // The client has gone: what it started goes too.
                let _ = runner.call(Request::ExecKill { jail, exec }).await;
                writing.abort();
                outputs.iter().for_each(|output| output.abort());
                return;
            }
        };
        for output in &mut outputs {
            // Not while the client is what is slow: then the queue is full.
            while tokio::time::timeout(OUTPUT_AFTER_EXIT, &mut *output).await.is_err() {
                if frames.capacity() > 0 || frames.is_closed() {
                    output.abort();
                    break;
                }
            }
        }
        let exit = match ended {
            Some(exit) => ExecExit { code: exit.code, signal: exit.signal, error: exit.start_error },
            None => ExecExit {
                code: None,
                signal: None,
                error: Some("the runner lost sight of the command".into()),
            },
        };
        let payload = serde_json::to_vec(&exit).unwrap_or_default();
        let _ = frames.send((frame::EXIT, payload)).await;
        drop(frames);
        let _ = writing.await;
    }
}

/// Our ends, and stdin, stdout and stderr for the command.
fn pipes() -> std::io::Result<(Ends, Vec<OwnedFd>)> {
    let make = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
    let ((in_read, in_write), (out_read, out_write), (err_read, err_write)) = (make()?, make()?, make()?);
    let ends = Ends::Pipes {
        stdin: pipe::Sender::from_owned_fd(in_write)?,
        stdout: pipe::Receiver::from_owned_fd(out_read)?,
        stderr: pipe::Receiver::from_owned_fd(err_read)?,
    };
    Ok((ends, vec![in_read, out_write, err_write]))
}

fn terminal_ends(master: OwnedFd) -> std::io::Result<Ends> {
    rustix::io::ioctl_fionbio(&master, true)?;
    // Unchecked: a terminal is no pipe, and is read, written and waited for like one.
    Ok(Ends::Terminal {
        stdin: pipe::Sender::from_owned_fd_unchecked(master.try_clone()?)?,
        stdout: pipe::Receiver::from_owned_fd_unchecked(master)?,
    })
}

/// None when so much happened meanwhile that its end may have been missed.
async fn wait_for_exit(events: &mut broadcast::Receiver<Event>, jail: &JailId, number: u32) -> Option<Exit> {
    loop {
        match events.recv().await {
            Ok(Event::ExecExited { jail: of, exec, exit }) if of == *jail && exec == number => {
                return Some(exit);
            }
            Ok(Event::Exited { jail: of, exit }) if of == *jail => return Some(exit),
            Ok(_) => {}
            Err(_) => return None,
        }
    }
}

async fn copy_out(mut from: impl AsyncRead + Unpin, kind: u8, frames: mpsc::Sender<(u8, Vec<u8>)>) {
    let mut buffer = vec![0; FRAME_BYTES_MAX];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        if frames.send((kind, buffer[..length].to_vec())).await.is_err() {
            return;
        }
    }
}

/// Takes the client's frames until it goes away; an unknown or oversize frame counts as that.
async fn copy_in(
    mut from: impl AsyncRead + Unpin,
    stdin: Box<dyn AsyncWrite + Send + Unpin>,
    runner: Runner,
    jail: JailId,
    exec: u32,
) {
    let mut stdin = Some(stdin);
    while let Ok((kind, payload)) = read_frame(&mut from).await {
        match (kind, payload.as_slice()) {
            (frame::STDIN, []) => stdin = None,
            (frame::STDIN, bytes) => {
                // A command that closed its input is no reason to hang it up.
                if let Some(open) = &mut stdin
                    && open.write_all(bytes).await.is_err()
                {
                    stdin = None;
                }
            }
            (frame::RESIZE, &[rows_high, rows_low, columns_high, columns_low]) => {
                let size = TerminalSize {
                    rows: u16::from_be_bytes([rows_high, rows_low]),
                    columns: u16::from_be_bytes([columns_high, columns_low]),
                };
                let _ = runner.call(Request::ExecResize { jail: jail.clone(), exec, size }).await;
            }
            _ => return,
        }
    }
}

async fn read_frame(from: &mut (impl AsyncRead + Unpin)) -> std::io::Result<(u8, Vec<u8>)> {
    let kind = from.read_u8().await?;
    let length = from.read_u32().await? as usize;
    if length > FRAME_BYTES_MAX {
        return Err(ErrorKind::InvalidData.into());
    }
    let mut payload = vec![0; length];
    from.read_exact(&mut payload).await?;
    Ok((kind, payload))
}

async fn write_frame(to: &mut (impl AsyncWrite + Unpin), kind: u8, payload: &[u8]) -> std::io::Result<()> {
    let mut bytes = Vec::with_capacity(5 + payload.len());
    bytes.push(kind);
    bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    bytes.extend_from_slice(payload);
    to.write_all(&bytes).await?;
    to.flush().await
}
