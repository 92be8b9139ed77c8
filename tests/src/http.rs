//! A small HTTP/1.1 client: one request at a time, bodies framed by length, chunks or the end of the connection.
//!
//! Written out here so that the suites depend on nobody's idea of when a request may be sent again: this client
//! never retries, so what it reports is what happened on the wire.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Longest body that is read; a longer one is an error.
const BODY_BYTES_MAX: u64 = 64 << 20;
/// Longest head that is read, in lines.
const HEAD_LINES_MAX: usize = 200;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Whether the server ends the connection after this response.
    pub fn closes(&self) -> bool {
        self.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }
}

/// One connection to a server, TCP or any other stream.
pub struct Connection<S: Read + Write> {
    stream: BufReader<S>,
}

impl Connection<TcpStream> {
    /// `patience` bounds the connect and every single read and write.
    pub fn open(address: SocketAddr, patience: Duration) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, patience)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Ok(Self::over(stream))
    }
}

impl<S: Read + Write> Connection<S> {
    pub fn over(stream: S) -> Self {
        Self { stream: BufReader::new(stream) }
    }

    pub fn get(&mut self, host: &str, path: &str, headers: &[(&str, &str)]) -> io::Result<Response> {
        self.send("GET", host, path, headers, b"")?;
        self.response(false)
    }

    /// Sends a request with a body of known length.
    pub fn send(
        &mut self,
        method: &str,
        host: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> io::Result<()> {
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\n");
        for (name, value) in headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        if !body.is_empty() || matches!(method, "POST" | "PUT" | "PATCH") {
            request.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
        request.push_str("\r\n");
        let mut bytes = request.into_bytes();
        bytes.extend_from_slice(body);
        self.stream.get_mut().write_all(&bytes)
    }

    /// Reads one response. `head_only`: the request was a HEAD, so no body follows whatever the head says.
    pub fn response(&mut self, head_only: bool) -> io::Result<Response> {
        let (status, headers) = self.head()?;
        let value = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str());
        let body = if head_only || status == 204 || status == 304 || status < 200 {
            Vec::new()
        } else if value("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
            self.chunks()?
        } else if let Some(length) = value("content-length") {
            let length: u64 = length.parse().map_err(|_| bad(format!("content-length {length:?}")))?;
            self.exactly(length)?
        } else {
            let mut body = Vec::new();
            (&mut self.stream).take(BODY_BYTES_MAX).read_to_end(&mut body)?;
            body
        };
        Ok(Response { status, headers, body })
    }

    fn head(&mut self) -> io::Result<(u16, Vec<(String, String)>)> {
        let line = self.line()?;
        let status = line
            .strip_prefix("HTTP/1.1 ")
            .and_then(|rest| rest.get(..3)?.parse().ok())
            .ok_or_else(|| bad(format!("status line {line:?}")))?;
        let mut headers = Vec::new();
        for _ in 0..HEAD_LINES_MAX {
            let line = self.line()?;
            if line.is_empty() {
                return Ok((status, headers));
            }
            let (name, value) = line.split_once(':').ok_or_else(|| bad(format!("header line {line:?}")))?;
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        Err(bad("a head without an end".to_owned()))
    }

    /// One line without its end. The end of the stream is an error: nothing here may be cut.
    pub fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed where a line was expected"));
        }
        match line.strip_suffix('\n') {
            Some(whole) => Ok(whole.strip_suffix('\r').unwrap_or(whole).to_owned()),
            None => Err(bad(format!("closed in the middle of the line {line:?}"))),
        }
    }

    fn chunks(&mut self) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let line = self.line()?;
            let size = line.split(';').next().unwrap_or("").trim();
            let size = u64::from_str_radix(size, 16).map_err(|_| bad(format!("chunk size {line:?}")))?;
            if body.len() as u64 + size > BODY_BYTES_MAX {
                return Err(bad("body too long".to_owned()));
            }
            if size == 0 {
                while !self.line()?.is_empty() {}
                return Ok(body);
            }
            body.extend(self.exactly(size)?);
            self.line()?;
        }
    }

    fn exactly(&mut self, length: u64) -> io::Result<Vec<u8>> {
        if length > BODY_BYTES_MAX {
            return Err(bad("body too long".to_owned()));
        }
        let mut body = vec![0; length as usize];
        self.stream.read_exact(&mut body)?;
        Ok(body)
    }
}

/// One GET on a connection of its own.
pub fn get(address: SocketAddr, host: &str, path: &str, patience: Duration) -> io::Result<Response> {
    Connection::open(address, patience)?.get(host, path, &[("Connection", "close")])
}

fn bad(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
