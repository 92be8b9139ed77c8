//! A blocking client of the control socket, for the command line and for tests.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::audit::{Audit, AuditQuery};
use super::certificates::{Certificates, ReloadCertificatesQuery};
use super::connections::{Connections, ConnectionsQuery};
use super::protocol::{
    Ack, ControlError, METRICS_LINE_BYTES_MAX, MetricsQuery, ReloadQuery, Reloaded, Request, Response,
    Status, StatusQuery, WaitQuery, Waited,
};
use crate::table::Table;

/// A connection to a balancer's control socket.
pub struct Client {
    stream: BufReader<UnixStream>,
}

/// Why a request over the control socket had no result.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("cannot connect to the control socket {path}")]
    Connect {
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot speak to the balancer")]
    Io(#[source] std::io::Error),
    #[error("the balancer closed the control connection without an answer")]
    Closed,
    #[error("the balancer's answer is not understood")]
    Garbled(#[source] serde_json::Error),
    #[error("the balancer refused ({:?}): {}", .0.code, .0.message)]
    Refused(ControlError),
    #[error("the balancer answered another question")]
    Mismatch,
}

impl Client {
    /// Connects; each later request waits at most `timeout` for its answer.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, ClientError> {
        let shown = || path.display().to_string();
        let stream =
            UnixStream::connect(path).map_err(|source| ClientError::Connect { path: shown(), source })?;
        stream.set_read_timeout(Some(timeout)).map_err(ClientError::Io)?;
        stream.set_write_timeout(Some(timeout)).map_err(ClientError::Io)?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Replaces the routing table.
    pub fn set_table(&mut self, table: &Table) -> Result<Ack, ClientError> {
        match self.request(&Request::SetTable(table.clone()))? {
            Response::Ack(ack) => Ok(ack),
            Response::Error(error) => Err(ClientError::Refused(error)),
            _ => Err(ClientError::Mismatch),
        }
    }

    /// Asks for the state of things.
    pub fn status(&mut self) -> Result<Status, ClientError> {
        self.status_with(StatusQuery::default())
    }

    /// Asks for the state of things, and how long they took.
    pub fn status_with(&mut self, query: StatusQuery) -> Result<Status, ClientError> {
        match self.request(&Request::Status(query))? {
            Response::Status(status) => Ok(*status),
            Response::Error(error) => Err(ClientError::Refused(error)),
            _ => Err(ClientError::Mismatch),
        }
    }

    /// Asks for the metrics, in Prometheus' text format.
    pub fn metrics(&mut self) -> Result<String, ClientError> {
        match self.request(&Request::Metrics(MetricsQuery {}))? {
            Response::Metrics(metrics) => Ok(metrics.text),
            Response::Error(error) => Err(ClientError::Refused(error)),
            _ => Err(ClientError::Mismatch),
        }
    }

    /// Asks for one page of open client connections.
    pub fn connections(&mut self, query: ConnectionsQuery) -> Result<Connections, ClientError> {
        match self.request(&Request::Connections(query))? {
            Response::Connections(page) => Ok(page),
            Response::Error(error) => Err(ClientError::Refused(error)),
            _ => Err(ClientError::Mismatch),
        }
    }

    /// Asks for the last changes.
    pub fn audit(&mut self) -> Result<Audit, ClientError> {
        match self.request(&Request::Audit(AuditQuery {}))? {
            Response::Audit(audit) => Ok(audit),
            Response::Error(error) => Err(ClientError::Refused(error)),
            _ => Err(ClientError::Mismatch),
        }
    }

    /// Waits until a route without upstreams begins to hold something. The connection's own timeout must be
    /// longer than the query's.
    pub fn wait(&mut self, query: WaitQuery) -> Result<Waited, ClientError> {
        match self.request(&Request::Wait(query))? {
            Response::Waited(waited) => Ok(waited),
            Response::Error(error) => Err(ClientError::Refused(error)),
            _ => Err(ClientError::Mismatch),
        }
    }

    /// Has the balancer hand over to a new process of the program on disk, and waits until that is in charge.
    /// The connection's own timeout must be longer than that may take.
    pub fn reload(&mut self) -> Result<Reloaded, ClientError> {
        match self.request(&Request::Reload(ReloadQuery {}))? {
            Response::Reloaded(reloaded) => Ok(reloaded),
            Response::Error(error) => Err(ClientError::Refused(error)),
            _ => Err(ClientError::Mismatch),
        }
    }

    /// Has the folder of certificates read again.
    pub fn reload_certificates(&mut self) -> Result<Certificates, ClientError> {
        match self.request(&Request::ReloadCertificates(ReloadCertificatesQuery {}))? {
            Response::Certificates(certificates) => Ok(certificates),
            Response::Error(error) => Err(ClientError::Refused(error)),
            _ => Err(ClientError::Mismatch),
        }
    }

    fn request(&mut self, request: &Request) -> Result<Response, ClientError> {
        let line = serde_json::to_string(request).map_err(ClientError::Garbled)?;
        self.raw(&line)
    }

    /// Sends one line as it is and returns the answer.
    pub fn raw(&mut self, line: &str) -> Result<Response, ClientError> {
        let stream = self.stream.get_mut();
        let sent = stream.write_all(line.as_bytes()).and_then(|()| stream.write_all(b"\n"));
        // One that closed on us may have said why.
        match sent {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                return Err(ClientError::Io(error));
            }
            _ => {}
        }
        let mut answer = Vec::new();
        let mut bounded = (&mut self.stream).take(METRICS_LINE_BYTES_MAX as u64);
        if bounded.read_until(b'\n', &mut answer).map_err(ClientError::Io)? == 0 {
            return Err(ClientError::Closed);
        }
        serde_json::from_slice(&answer).map_err(ClientError::Garbled)
    }
}
