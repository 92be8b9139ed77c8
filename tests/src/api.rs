//! The agent's HTTP API as `curl --unix-socket` would use it, for what the command does not show and for requests
//! the command would never make.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use epagent_wire::api::Deploy;
use serde_json::Value;

use crate::http::{Connection, Response};

/// Longest wait for an answer: longer than a restart of the agent.
const PATIENCE: Duration = Duration::from_secs(30);

/// One of the agent's sockets.
#[derive(Debug, Clone)]
pub struct Api {
    socket: PathBuf,
}

impl Api {
    pub fn at(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    pub fn connect(&self) -> io::Result<Connection<UnixStream>> {
        let stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Connection::over(stream))
    }

    pub fn request(&self, method: &str, path: &str, body: &str) -> io::Result<Response> {
        let mut connection = self.connect()?;
        let headers = [("Content-Type", "application/json"), ("Connection", "close")];
        connection.send(method, "epagent", path, &headers, body.as_bytes())?;
        connection.response(false)
    }

    /// The JSON that a GET answers with, or why there is none.
    pub fn try_get(&self, path: &str) -> io::Result<Value> {
        let response = self.request("GET", path, "")?;
        if response.status != 200 {
            return Err(io::Error::other(format!("GET {path}: {} {}", response.status, response.text())));
        }
        serde_json::from_slice(&response.body).map_err(io::Error::other)
    }

    #[track_caller]
    pub fn get(&self, path: &str) -> Value {
        self.try_get(path).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Deploys of an app, newest first. Empty while the agent is being restarted.
    pub fn deploys(&self, app: &str) -> Vec<Deploy> {
        self.try_get(&format!("/v1/deploys?app={app}"))
            .ok()
            .and_then(|value| serde_json::from_value(value).ok())
            .unwrap_or_default()
    }
}
