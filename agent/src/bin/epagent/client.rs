//! The agent's API, called over its unix socket: one connection per request.
//!
//! What matters to callers is who failed: [`CallError::Refused`] is the agent's own answer and final, everything
//! else is about reaching it, and may be over in a moment, when its supervisor has started it again.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use epagent_wire::api::{ApiError, EXEC_PROTOCOL};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::failure::{Failure, status};

/// How long the agent may take to begin its answer. Its own longest wait, for the jail of a `run`, is 30 s.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(60);
/// The longest answer that is read whole.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// The longest line of an answer that comes in lines.
const LINE_BYTES_MAX: usize = 4 << 20;
/// A read is asked again this often when the agent went away in the middle of it.
const READ_TRIES: u32 = 3;
/// Between two tries.
pub const RETRY_WAIT: Duration = Duration::from_millis(200);

/// The body of a request.
pub type Body = BoxBody<Bytes, io::Error>;

#[derive(Debug, thiserror::Error)]
pub enum CallError {
    #[error("nothing answers at {}", socket.display())]
    Connect { socket: PathBuf, source: io::Error },
    #[error("the agent went away during {request}")]
    Lost { request: String, source: hyper::Error },
    #[error("the agent did not answer {request} within {} s", ANSWER_WAIT_MAX.as_secs())]
    Silent { request: String },
    #[error("the agent's answer to {request} is not what this command understands: {why}")]
    Garbled { request: String, why: String },
    #[error("{}", .0.message)]
    Refused(Failure),
}

impl CallError {
    /// Whether it is about reaching the agent, and may be different in a moment.
    pub fn may_pass(&self) -> bool {
        match self {
            CallError::Connect { source, .. } => {
                matches!(source.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound)
            }
            CallError::Lost { .. } | CallError::Silent { .. } => true,
            CallError::Garbled { .. } => false,
            // Its runner is being restarted.
            CallError::Refused(failure) => failure.code == "runner_away",
        }
    }

    pub fn is_not_found(&self) -> bool {
        matches!(self, CallError::Refused(failure) if failure.status == status::NOT_FOUND)
    }
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Failure {
        let message = match std::error::Error::source(&error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        };
        let (code, hint) = match error {
            CallError::Refused(failure) => return failure,
            CallError::Connect { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                ("forbidden", "this socket is for root and the group epagent")
            }
            CallError::Connect { .. } => (
                "agent_unreachable",
                "start an agent (`epagent dev --state DIR`), or name its socket by --socket PATH or EPAGENT_SOCKET;\n\
                 `epagent doctor` looks for the cause",
            ),
            CallError::Lost { .. } | CallError::Silent { .. } => {
                ("agent_unreachable", "its supervisor restarts it; try again, then look at its log")
            }
            CallError::Garbled { .. } => {
                ("garbled", "`epagent version` shows whether the command and the agent are of one version")
            }
        };
        Failure::new(status::UNREACHABLE, code, message, hint)
    }
}

/// Where the agent is reached.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Reads; asked again when the agent went away in the middle.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CallError> {
        let bytes = self.get_bytes(path).await?;
        understood(&bytes, &format!("GET {path}"))
    }

    /// The answer as it came, for `--json`.
    pub async fn get_bytes(&self, path: &str) -> Result<Bytes, CallError> {
        let mut tries = 1;
        loop {
            match self.whole(Method::GET, path, None).await {
                Err(error) if matches!(error, CallError::Lost { .. }) && tries < READ_TRIES => {
                    tries += 1;
                    tokio::time::sleep(RETRY_WAIT).await;
                }
                done => return done,
            }
        }
    }

    /// Changes something: asked once.
    pub async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, CallError> {
        let request = format!("{method} {path}");
        let body = match body.map(serde_json::to_vec).transpose() {
            Ok(body) => body,
            Err(error) => return Err(CallError::Garbled { request, why: error.to_string() }),
        };
        understood(&self.whole(method, path, body).await?, &request)
    }

    /// Asks for something that has no body.
    pub async fn order<T: DeserializeOwned>(&self, method: Method, path: &str) -> Result<T, CallError> {
        self.send(method, path, None::<&()>).await
    }

    /// Sends a stream and waits for the answer for as long as it takes.
    pub async fn upload<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Body,
    ) -> Result<T, CallError> {
        let name = format!("{method} {path}");
        let request = Request::builder().method(method).uri(path).header(HOST, "epagent").body(body);
        let response = self.call(&name, request, None).await?;
        let bytes = collect(response.into_body(), &name).await?;
        understood(&bytes, &name)
    }

    /// An answer that comes in lines of JSON, for as long as it takes.
    pub async fn lines(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Lines, CallError> {
        let name = format!("{method} {path}");
        let body = match body.map(serde_json::to_vec).transpose() {
            Ok(body) => body,
            Err(error) => return Err(CallError::Garbled { request: name, why: error.to_string() }),
        };
        let response = self.call(&name, json_request(method, path, body), Some(ANSWER_WAIT_MAX)).await?;
        Ok(Lines { body: response.into_body(), read: BytesMut::new(), name })
    }

    /// Turns the connection into one of the exec protocol.
    pub async fn upgrade(&self, path: &str, body: &impl Serialize) -> Result<TokioIo<Upgraded>, CallError> {
        let name = format!("POST {path}");
        let body = match serde_json::to_vec(body) {
            Ok(body) => body,
            Err(error) => return Err(CallError::Garbled { request: name, why: error.to_string() }),
        };
        let request = Request::post(path)
            .header(HOST, "epagent")
            .header(CONTENT_TYPE, "application/json")
            .header(CONNECTION, "upgrade")
            .header(UPGRADE, EXEC_PROTOCOL)
            .body(full(body));
        let response = self.call(&name, request, Some(ANSWER_WAIT_MAX)).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            let why = format!("it answered {} in place of changing to {EXEC_PROTOCOL}", response.status());
            return Err(CallError::Garbled { request: name, why });
        }
        match hyper::upgrade::on(response).await {
            Ok(upgraded) => Ok(TokioIo::new(upgraded)),
            Err(source) => Err(CallError::Lost { request: name, source }),
        }
    }

    async fn whole(&self, method: Method, path: &str, body: Option<Vec<u8>>) -> Result<Bytes, CallError> {
        let name = format!("{method} {path}");
        let response = self.call(&name, json_request(method, path, body), Some(ANSWER_WAIT_MAX)).await?;
        collect(response.into_body(), &name).await
    }

    /// One connection, one request. The answer is a success, or 101.
    async fn call(
        &self,
        name: &str,
        request: hyper::http::Result<Request<Body>>,
        patience: Option<Duration>,
    ) -> Result<Response<Incoming>, CallError> {
        let lost = |source| CallError::Lost { request: name.to_owned(), source };
        let request = request
            .map_err(|error| CallError::Garbled { request: name.to_owned(), why: error.to_string() })?;
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| CallError::Connect { socket: self.socket.clone(), source })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(lost)?;
        tokio::spawn(connection.with_upgrades());
        let answer = sender.send_request(request);
        let response = match patience {
            None => answer.await,
            Some(patience) => match tokio::time::timeout(patience, answer).await {
                Ok(response) => response,
                Err(_) => return Err(CallError::Silent { request: name.to_owned() }),
            },
        };
        let response = response.map_err(lost)?;
        if response.status().is_success() || response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        let code = response.status();
        let bytes = collect(response.into_body(), name).await?;
        Err(refusal(code, &bytes))
    }
}

/// An answer that comes in lines.
pub struct Lines {
    body: Incoming,
    read: BytesMut,
    name: String,
}

impl Lines {
    /// The next line; none at the end.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, CallError> {
        match self.next_line().await? {
            Some(line) => understood(&line, &self.name).map(Some),
            None => Ok(None),
        }
    }

    /// The next line as it came, without its newline.
    pub async fn next_line(&mut self) -> Result<Option<Bytes>, CallError> {
        let mut searched = 0;
        loop {
            if let Some(place) = self.read[searched..].iter().position(|byte| *byte == b'\n') {
                let line = self.read.split_to(searched + place).freeze();
                self.read.advance(1);
                return Ok(Some(line));
            }
            searched = self.read.len();
            if searched > LINE_BYTES_MAX {
                let why = format!("a line is longer than {LINE_BYTES_MAX} bytes");
                return Err(CallError::Garbled { request: self.name.clone(), why });
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(source)) => return Err(CallError::Lost { request: self.name.clone(), source }),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.read.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}

/// A piece of a path or query: everything but letters, digits and `-._~` is written as %XX (RFC 3986).
pub fn encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}

fn full(bytes: Vec<u8>) -> Body {
    Full::new(Bytes::from(bytes)).map_err(|never| match never {}).boxed()
}

fn json_request(method: Method, path: &str, body: Option<Vec<u8>>) -> hyper::http::Result<Request<Body>> {
    let builder = Request::builder().method(method).uri(path).header(HOST, "epagent");
    match body {
        Some(body) => builder.header(CONTENT_TYPE, "application/json").body(full(body)),
        None => builder.body(full(Vec::new())),
    }
}

async fn collect(mut body: Incoming, name: &str) -> Result<Bytes, CallError> {
    let mut bytes = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|source| CallError::Lost { request: name.to_owned(), source })?;
        if let Ok(data) = frame.into_data() {
            bytes.extend_from_slice(&data);
        }
        if bytes.len() > ANSWER_BYTES_MAX {
            let why = format!("it is longer than {ANSWER_BYTES_MAX} bytes");
            return Err(CallError::Garbled { request: name.to_owned(), why });
        }
    }
    Ok(bytes.freeze())
}

fn understood<T: DeserializeOwned>(bytes: &[u8], name: &str) -> Result<T, CallError> {
    serde_json::from_slice(bytes)
        .map_err(|error| CallError::Garbled { request: name.to_owned(), why: error.to_string() })
}

/// The agent's own words, or what a failing middleware answers without any.
fn refusal(code: StatusCode, bytes: &[u8]) -> CallError {
    let error = serde_json::from_slice::<ApiError>(bytes).unwrap_or_else(|_| {
        let text: String = String::from_utf8_lossy(bytes).chars().take(500).collect();
        let message = match text.trim() {
            "" => format!("the agent answered {code}"),
            text => text.to_owned(),
        };
        ApiError { code: "bad_request".to_owned(), message, hint: String::new() }
    });
    let mut failure = Failure::from(error);
    if code == StatusCode::NOT_FOUND {
        failure.status = status::NOT_FOUND;
    }
    CallError::Refused(failure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_never_becomes_part_of_the_path() {
        assert_eq!(encoded("shop-2"), "shop-2");
        assert_eq!(encoded("../a b\n?x"), "..%2Fa%20b%0A%3Fx");
    }

    #[test]
    fn an_answer_without_a_code_is_told_as_it_is() {
        let CallError::Refused(failure) = refusal(StatusCode::NOT_FOUND, b"no such thing") else { panic!() };
        assert_eq!((failure.status, failure.message.as_str()), (status::NOT_FOUND, "no such thing"));
    }
}
