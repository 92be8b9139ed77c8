//! The connection to a server.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::{Server, Trust, sys, trust};

/// How long a connection may take, its handshake included.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);
/// How long a batch may take to arrive. A server that has not read for so long is taken for gone.
const PATIENCE: Duration = Duration::from_secs(15);
/// How often the kernel is asked what has arrived.
const LOOK_EVERY: Duration = Duration::from_millis(5);

#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("connect to {server}")]
    Connect {
        server: Server,
        #[source]
        source: io::Error,
    },
    #[error("read the authorities in {path}: {why}")]
    Trust { path: PathBuf, why: String },
    #[error("{server} did not answer within {} s", CONNECT_PATIENCE.as_secs())]
    NoAnswer { server: Server },
    #[error("send to {server}")]
    Send {
        server: Server,
        #[source]
        source: io::Error,
    },
    #[error("{server} closed the connection")]
    Closed { server: Server },
    #[error("{server} took nothing for {} s", PATIENCE.as_secs())]
    Stalled { server: Server },
}

/// A server, and the connection to it while there is one.
#[derive(Debug)]
pub struct Link {
    server: Server,
    trust: Trust,
    stream: Option<Stream>,
}

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Link {
    pub fn new(server: Server, trust: Trust) -> Link {
        Link { server, trust, stream: None }
    }

    pub fn server(&self) -> &Server {
        &self.server
    }

    /// Sends whole frames, over a new connection when there is none. When it fails, none or all of them or anything
    /// between may have arrived, the connection is given up, and the caller sends them again.
    pub async fn send(&mut self, frames: &[u8]) -> Result<(), LinkError> {
        let server = self.server.clone();
        // A server that went away while there was nothing to say is no failure yet: it may be back already.
        let mut held = self.stream.take();
        if let Some(stream) = &mut held
            && stream.is_closed().await
        {
            held = None;
        }
        let mut stream = match held {
            Some(stream) => stream,
            None => self.connect().await?,
        };
        let sent = timeout(PATIENCE, stream.deliver(frames)).await;
        match sent {
            Ok(Ok(())) => {
                self.stream = Some(stream);
                Ok(())
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(LinkError::Closed { server })
            }
            Ok(Err(source)) => Err(LinkError::Send { server, source }),
            Err(_) => Err(LinkError::Stalled { server }),
        }
    }

    async fn connect(&self) -> Result<Stream, LinkError> {
        let server = &self.server;
        let failed = |source| LinkError::Connect { server: server.clone(), source };
        let tls = match server.tls {
            true => Some(trust::client_config(&self.trust)?),
            false => None,
        };
        let connecting = async {
            let tcp = TcpStream::connect((server.host.as_str(), server.port)).await?;
            tcp.set_nodelay(true)?;
            let Some(config) = tls else { return Ok(Stream::Tcp(tcp)) };
            let name = ServerName::try_from(server.host.clone()).map_err(io::Error::other)?;
            let tls = TlsConnector::from(config).connect(name, tcp).await?;
            Ok(Stream::Tls(Box::new(tls)))
        };
        match timeout(CONNECT_PATIENCE, connecting).await {
            Ok(connected) => connected.map_err(failed),
            Err(_) => Err(LinkError::NoAnswer { server: server.clone() }),
        }
    }
}

impl Stream {
    /// Returns when the peer's kernel has everything and the connection still stands.
    async fn deliver(&mut self, frames: &[u8]) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => write(stream, frames).await?,
            Stream::Tls(stream) => write(stream, frames).await?,
        }
        while sys::unacknowledged(self.socket())? > 0 {
            if self.is_closed().await {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            sleep(LOOK_EVERY).await;
        }
        match self.is_closed().await {
            true => Err(io::ErrorKind::UnexpectedEof.into()),
            false => Ok(()),
        }
    }

    /// Whether the peer has ended the connection. Nothing is ever awaited from it, so what it says is thrown away.
    async fn is_closed(&mut self) -> bool {
        let mut said = [0; 256];
        loop {
            let read = async {
                match &mut *self {
                    Stream::Tcp(stream) => stream.read(&mut said).await,
                    Stream::Tls(stream) => stream.read(&mut said).await,
                }
            };
            // Asked once, not waited for.
            match timeout(Duration::ZERO, read).await {
                Err(_) => return false,
                Ok(Ok(0) | Err(_)) => return true,
                Ok(Ok(_)) => {}
            }
        }
    }

    fn socket(&self) -> &TcpStream {
        match self {
            Stream::Tcp(stream) => stream,
            Stream::Tls(stream) => stream.get_ref().0,
        }
    }
}

async fn write(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), frames: &[u8]) -> io::Result<()> {
    stream.write_all(frames).await?;
    stream.flush().await
}
