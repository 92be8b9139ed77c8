//! The agent's end of the balancer's control socket: one table out, its status in.
//!
//! A connection serves one exchange. The balancer answers `set_table` only when every thread of it routes by the
//! table and the table is saved, so an acknowledged version is in force and stays so without us.

use std::path::{Path, PathBuf};
use std::time::Duration;

use epagent_wire::said::Said;
use epagent_wire::table::{
    Ack, Connections, ConnectionsQuery, LINE_BYTES_MAX, Reloaded, Request, Response, Status, Table, Waited,
};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

/// How long the balancer may take for one exchange.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How long a new process of it may take to come up.
const RELOAD_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Clone)]
pub struct Balancer {
    path: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum BalancerError {
    #[error("the balancer can't be reached at {path}")]
    Connect {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the connection to the balancer broke")]
    Io(#[from] std::io::Error),
    #[error("the balancer did not answer in {} s", after.as_secs())]
    TimedOut { after: Duration },
    #[error("the balancer's answer is not understood")]
    Garbled(#[from] serde_json::Error),
    #[error("the balancer refused: {code}: {message}")]
    Refused { code: String, message: String },
}

impl Balancer {
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    pub async fn set_table(&self, table: Table) -> Result<Ack, BalancerError> {
        match self.exchange(&Request::SetTable(table), TIMEOUT).await? {
            Response::Ack(ack) => Ok(ack),
            other => Err(unexpected(other)),
        }
    }

    pub async fn status(&self) -> Result<Status, BalancerError> {
        self.status_with(false).await
    }

    /// With `latency`, also how long everything took.
    pub async fn status_with(&self, latency: bool) -> Result<Status, BalancerError> {
        match self.exchange(&Request::Status { latency }, TIMEOUT).await? {
            Response::Status(status) => Ok(*status),
            other => Err(unexpected(other)),
        }
    }

    /// One page of open client connections.
    pub async fn connections(&self, query: ConnectionsQuery) -> Result<Connections, BalancerError> {
        match self.exchange(&Request::Connections(query), TIMEOUT).await? {
            Response::Connections(page) => Ok(page),
            other => Err(unexpected(other)),
        }
    }

    /// What it logged after line `after` of its run `run`.
    pub async fn said(&self, run: u64, after: u64) -> Result<Said, BalancerError> {
        match self.exchange(&Request::Said { run, after }, TIMEOUT).await? {
            Response::Said(said) => Ok(said),
            other => Err(unexpected(other)),
        }
    }

    /// Has the balancer hand over to a new process of the program on disk.
    pub async fn reload(&self) -> Result<Reloaded, BalancerError> {
        match self.exchange(&Request::Reload {}, RELOAD_TIMEOUT).await? {
            Response::Reloaded(reloaded) => Ok(reloaded),
            other => Err(unexpected(other)),
        }
    }

    /// Waits until a route with nobody to answer begins to hold something, for so long at most.
    pub async fn wait(&self, since: u64, patience: Duration) -> Result<Waited, BalancerError> {
        let timeout_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        match self.exchange(&Request::Wait { since, timeout_ms }, patience + TIMEOUT).await? {
            Response::Waited(waited) => Ok(waited),
            other => Err(unexpected(other)),
        }
    }

    async fn exchange(&self, request: &Request, patience: Duration) -> Result<Response, BalancerError> {
        tokio::time::timeout(patience, self.exchange_now(request))
            .await
            .map_err(|_| BalancerError::TimedOut { after: patience })?
    }

    async fn exchange_now(&self, request: &Request) -> Result<Response, BalancerError> {
        let connected = UnixStream::connect(&self.path).await;
        let stream =
            connected.map_err(|source| BalancerError::Connect { path: self.path.clone(), source })?;
        let mut stream = BufReader::new(stream);
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream.write_all(&line).await?;
        let mut answer = Vec::new();
        stream.take(LINE_BYTES_MAX as u64).read_until(b'\n', &mut answer).await?;
        Ok(serde_json::from_slice(&answer)?)
    }
}

fn unexpected(response: Response) -> BalancerError {
    match response {
        Response::Error(refused) => BalancerError::Refused { code: refused.code, message: refused.message },
        _ => BalancerError::Refused { code: "unexpected".to_owned(), message: "another answer".to_owned() },
    }
}
