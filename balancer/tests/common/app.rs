//! Little apps: an HTTP server whose answers a closure writes, one thread per connection.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// A request as the app got it, its body unframed.
pub struct Request {
    pub line: String,
    pub fields: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields
            .iter()
            .find(|(known, _)| known.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }

    pub fn method(&self) -> &str {
        self.line.split(' ').next().unwrap_or_default()
    }

    pub fn path(&self) -> &str {
        self.line.split(' ').nth(1).unwrap_or_default()
    }
}

/// An app that listens until dropped.
pub struct App {
    pub address: SocketAddr,
    pub requests: Arc<AtomicU64>,
    pub connections: Arc<AtomicU64>,
    /// By their numbers; one that is served no longer is not kept open either.
    open: Arc<Mutex<BTreeMap<u64, TcpStream>>>,
    stopping: Arc<AtomicBool>,
}

impl App {
    /// `answer` writes the whole response; false closes the connection.
    pub fn start(answer: impl Fn(&Request, &mut TcpStream) -> bool + Send + Sync + 'static) -> Self {
        Self::start_on(SocketAddr::from(([127, 0, 0, 1], 0)), answer)
    }

    pub fn start_on(
        address: SocketAddr,
        answer: impl Fn(&Request, &mut TcpStream) -> bool + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(address).expect("the app can listen");
        let app = Self {
            address: listener.local_addr().expect("its address"),
            requests: Arc::default(),
            connections: Arc::default(),
            open: Arc::default(),
            stopping: Arc::default(),
        };
        let (requests, connections, open) = (app.requests.clone(), app.connections.clone(), app.open.clone());
        let (answer, stopping) = (Arc::new(answer), app.stopping.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopping.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let _ = stream.set_nodelay(true);
                let number = connections.fetch_add(1, Ordering::SeqCst);
                let twin = stream.try_clone().map(|twin| (number, twin));
                open.lock().expect("unpoisoned").extend(twin);
                let (answer, requests, open) = (answer.clone(), requests.clone(), open.clone());
                std::thread::spawn(move || {
                    serve(stream, &*answer, &requests);
                    open.lock().expect("unpoisoned").remove(&number);
                });
            }
        });
        app
    }

    /// Answers `name` to everything, keeping connections alive.
    pub fn named(name: &'static str) -> Self {
        Self::start(move |_, stream| respond(stream, name.as_bytes()))
    }

    /// Answers with the request's body, framed the same way.
    pub fn echo() -> Self {
        Self::start(|request, stream| match request.field("transfer-encoding") {
            Some(_) => respond_chunked(stream, &request.body),
            None => respond(stream, &request.body),
        })
    }

    pub fn request_count(&self) -> u64 {
        self.requests.load(Ordering::SeqCst)
    }

    pub fn connection_count(&self) -> u64 {
        self.connections.load(Ordering::SeqCst)
    }

    /// Closes every connection it has, as a crash would.
    pub fn hang_up(&self) {
        for stream in std::mem::take(&mut *self.open.lock().expect("unpoisoned")).into_values() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Drop for App {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        // Wakes the accepting thread, which then closes the listener.
        let _ = TcpStream::connect(self.address);
        self.hang_up();
    }
}

fn serve(stream: TcpStream, answer: &dyn Fn(&Request, &mut TcpStream) -> bool, requests: &AtomicU64) {
    let mut reader = BufReader::new(stream);
    while let Some(request) = read_request(&mut reader) {
        requests.fetch_add(1, Ordering::SeqCst);
        if !answer(&request, reader.get_mut()) {
            break;
        }
    }
    let _ = reader.get_mut().shutdown(std::net::Shutdown::Both);
}

fn read_request(reader: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut request = Request { line: line(reader)?, fields: Vec::new(), body: Vec::new() };
    loop {
        let text = line(reader)?;
        if text.is_empty() {
            break;
        }
        let (name, value) = text.split_once(':')?;
        request.fields.push((name.to_owned(), value.trim().to_owned()));
    }
    if request.field("expect").is_some() {
        reader.get_mut().write_all(b"HTTP/1.1 100 Continue\r\n\r\n").ok()?;
    }
    if request.field("transfer-encoding").is_some() {
        loop {
            let size = usize::from_str_radix(&line(reader)?, 16).ok()?;
            let start = request.body.len();
            request.body.resize(start + size, 0);
            reader.read_exact(&mut request.body[start..]).ok()?;
            line(reader)?;
            if size == 0 {
                break;
            }
        }
    } else if let Some(length) = request.field("content-length") {
        request.body = vec![0; length.parse().ok()?];
        reader.read_exact(&mut request.body).ok()?;
    }
    Some(request)
}

fn line(reader: &mut BufReader<TcpStream>) -> Option<String> {
    let mut line = String::new();
    (reader.read_line(&mut line).ok()? > 0).then_some(())?;
    line.strip_suffix("\r\n").map(str::to_owned)
}

/// A response with Content-Length.
pub fn respond(stream: &mut TcpStream, body: &[u8]) -> bool {
    let mut wire = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()).into_bytes();
    wire.extend_from_slice(body);
    stream.write_all(&wire).is_ok()
}

/// A chunked response, in chunks of uneven sizes.
pub fn respond_chunked(stream: &mut TcpStream, body: &[u8]) -> bool {
    let mut wire = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
    for part in body.chunks(40_009) {
        wire.extend_from_slice(format!("{:x}\r\n", part.len()).as_bytes());
        wire.extend_from_slice(part);
        wire.extend_from_slice(b"\r\n");
    }
    wire.extend_from_slice(b"0\r\n\r\n");
    stream.write_all(&wire).is_ok()
}
