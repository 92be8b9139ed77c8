//! Whether the API answers, asked without ever waiting for it.
//!
//! ```text
//!   resting ──due──▶ asking ──answer──▶ done
//!      ▲                │
//!      └─ no answer in 2 s, connection cut, runner not there yet
//! ```

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use epagent_wire::api::Version;

/// Between two questions.
const REST: Duration = Duration::from_millis(50);
/// How long one answer may take.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(2);
/// The longest answer.
const ANSWER_BYTES_MAX: usize = 64 << 10;

#[derive(Debug)]
pub struct Probe {
    socket: PathBuf,
    state: State,
}

#[derive(Debug)]
enum State {
    Resting { until: Instant },
    Asking { stream: UnixStream, answer: Vec<u8>, deadline: Instant },
    Done,
}

impl Probe {
    pub fn new(socket: &Path, now: Instant) -> Self {
        Self { socket: socket.to_owned(), state: State::Resting { until: now } }
    }

    /// What to wait for: readable, or this moment.
    pub fn waits_for(&self) -> (Option<BorrowedFd<'_>>, Option<Instant>) {
        match &self.state {
            State::Resting { until } => (None, Some(*until)),
            State::Asking { stream, deadline, .. } => (Some(stream.as_fd()), Some(*deadline)),
            State::Done => (None, None),
        }
    }

    /// Goes on as far as it can without waiting. Some, once: the agent and its runner are there.
    pub fn advance(&mut self, now: Instant) -> Option<Version> {
        match &mut self.state {
            State::Resting { until } if now < *until => {}
            State::Resting { .. } => match ask(&self.socket) {
                Ok(stream) => {
                    let deadline = now + ANSWER_WAIT_MAX;
                    self.state = State::Asking { stream, answer: Vec::new(), deadline };
                }
                Err(_) => self.rest(now),
            },
            State::Asking { stream, answer, deadline } => match read_on(stream, answer) {
                Ok(false) if now < *deadline => {}
                Ok(false) | Err(_) => self.rest(now),
                Ok(true) => match version_in(answer) {
                    Some(version) if version.runner.is_some() => {
                        self.state = State::Done;
                        return Some(version);
                    }
                    _ => self.rest(now),
                },
            },
            State::Done => {}
        }
        None
    }

    fn rest(&mut self, now: Instant) {
        self.state = State::Resting { until: now + REST };
    }
}

/// The listener is our own, so connecting never waits.
fn ask(socket: &Path) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_nonblocking(true)?;
    stream.write_all(b"GET /v1/version HTTP/1.1\r\nHost: epagent\r\nConnection: close\r\n\r\n")?;
    Ok(stream)
}

/// Whether the answer is complete.
fn read_on(stream: &mut UnixStream, answer: &mut Vec<u8>) -> io::Result<bool> {
    let mut piece = [0; 4096];
    loop {
        match stream.read(&mut piece) {
            Ok(0) => return Ok(true),
            Ok(n) if answer.len() + n <= ANSWER_BYTES_MAX => answer.extend_from_slice(&piece[..n]),
            Ok(_) => return Err(io::ErrorKind::InvalidData.into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn version_in(answer: &[u8]) -> Option<Version> {
    let text = std::str::from_utf8(answer).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    if !head.starts_with("HTTP/1.1 200") {
        return None;
    }
    serde_json::from_str(body).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_complete_answer_counts() {
        let body = r#"{"version":"0.1.0","node":3,"runner":"0.1.0","http_address":"x:1"}"#;
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        assert_eq!(version_in(answer.as_bytes()).unwrap().node, 3);
        for cut in ["", "HTTP/1.1 200 OK\r\n", "HTTP/1.1 503 X\r\n\r\n{}", &answer[..answer.len() - 1]] {
            assert!(version_in(cut.as_bytes()).is_none(), "{cut:?}");
        }
    }
}
