//! An app that keeps every byte it gets, and reads requests as strictly as the RFC allows: it panics at what a
//! balancer must never send.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// An app that keeps what it gets, and answers each complete request as `answer` says.
pub struct Recorder {
    pub address: SocketAddr,
    /// Of each connection, everything.
    got: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Recorder {
    pub fn start(answer: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("an address");
        let address = listener.local_addr().expect("its address");
        let got: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
        let (all, answer) = (got.clone(), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let index = {
                    let mut all = all.lock().expect("unpoisoned");
                    all.push(Vec::new());
                    all.len() - 1
                };
                let (all, answer) = (all.clone(), answer.clone());
                std::thread::spawn(move || record(stream, index, &all, &*answer));
            }
        });
        Self { address, got }
    }

    pub fn forget(&self) {
        // Connections that are still open go on in place.
        self.got.lock().expect("unpoisoned").iter_mut().for_each(Vec::clear);
    }

    /// Everything that has come since, over all connections.
    pub fn bytes(&self) -> Vec<u8> {
        self.got.lock().expect("unpoisoned").concat()
    }
}

fn record(mut stream: TcpStream, index: usize, all: &Mutex<Vec<Vec<u8>>>, answer: &dyn Fn(&str) -> Vec<u8>) {
    let mut buffer = [0; 4096];
    let mut pending = Vec::new();
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        pending.extend_from_slice(&buffer[..count]);
        all.lock().expect("unpoisoned")[index].extend_from_slice(&buffer[..count]);
        while let Some((request, rest)) = cut_request(&pending) {
            pending = rest;
            if stream.write_all(&answer(&request.line)).is_err() {
                return;
            }
        }
    }
}

/// A request as a strict app reads it.
#[derive(Debug, PartialEq)]
pub struct Request {
    pub line: String,
    pub fields: Vec<(String, String)>,
    pub body: String,
}

impl Request {
    pub fn values(&self, name: &str) -> Vec<&str> {
        let named = self.fields.iter().filter(|(known, _)| known.eq_ignore_ascii_case(name));
        named.map(|(_, value)| value.as_str()).collect()
    }
}

/// The first complete request, and what follows it.
fn cut_request(bytes: &[u8]) -> Option<(Request, Vec<u8>)> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    let head = std::str::from_utf8(&bytes[..end - 4]).expect("a head in ASCII");
    let mut lines = head.split("\r\n");
    let line = lines.next().expect("a line").to_owned();
    let field = |line: &str| {
        let (name, value) = line.split_once(": ").unwrap_or_else(|| panic!("not a field: {line:?}"));
        (name.to_owned(), value.to_owned())
    };
    let mut request = Request { line, fields: lines.map(field).collect(), body: String::new() };
    let (lengths, codings) = (request.values("content-length"), request.values("transfer-encoding"));
    let (body, used) = match (lengths.as_slice(), codings.as_slice()) {
        ([], []) => (Vec::new(), end),
        ([length], []) => {
            let length: usize = length.parse().expect("a length");
            (bytes.get(end..end + length)?.to_vec(), end + length)
        }
        ([], ["chunked"]) => cut_chunks(bytes, end)?,
        both => panic!("the framing is ambiguous: {both:?} in {head:?}"),
    };
    assert_eq!(request.values("host").len(), 1, "{head:?}");
    request.body = String::from_utf8(body).expect("text");
    Some((request, bytes[used..].to_vec()))
}

fn cut_chunks(bytes: &[u8], mut at: usize) -> Option<(Vec<u8>, usize)> {
    let mut body = Vec::new();
    loop {
        let line = at + bytes.get(at..)?.windows(2).position(|window| window == b"\r\n")?;
        let size = std::str::from_utf8(&bytes[at..line]).expect("a size");
        let size = usize::from_str_radix(size, 16).expect("a size");
        at = line + 2;
        body.extend_from_slice(bytes.get(at..at + size)?);
        assert_eq!(bytes.get(at + size..at + size + 2)?, b"\r\n");
        at += size + 2;
        if size == 0 {
            return Some((body, at));
        }
    }
}

/// All requests in these bytes, which must be nothing but whole ones.
pub fn read_all_requests(bytes: Vec<u8>) -> Vec<Request> {
    let (mut requests, mut rest) = (Vec::new(), bytes);
    while let Some((request, after)) = cut_request(&rest) {
        requests.push(request);
        rest = after;
    }
    assert!(rest.is_empty(), "half a request: {:?}", String::from_utf8_lossy(&rest));
    requests
}
