//! Clients and apps: small state machines over byte queues, with their own (independent, lenient enough)
//! reading of HTTP.

use std::collections::VecDeque;

/// splitmix64: small, seedable, good enough.
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            items.swap(at, self.below(at as u64 + 1) as usize);
        }
    }
}

/// The bytes of request or response body `id`: any byte tells which one it belongs to, and where.
pub fn pattern(id: u64, len: usize) -> Vec<u8> {
    let period: Vec<u8> =
        (0..251).map(|at| (id.wrapping_mul(131).wrapping_add(at * 7) % 251) as u8).collect();
    let mut bytes = period.repeat(len.div_ceil(period.len()));
    bytes.truncate(len);
    bytes
}

/// Takes up to `count` bytes off the front.
pub fn take_front(bytes: &mut Vec<u8>, count: usize) -> Vec<u8> {
    let rest = bytes.split_off(count.min(bytes.len()));
    std::mem::replace(bytes, rest)
}

fn body_size(rng: &mut Rng) -> usize {
    match rng.below(6) {
        0 => 0,
        1..=3 => rng.below(200) as usize,
        4 => rng.below(20_000) as usize,
        _ if rng.one_in(3) => rng.below(300_000) as usize,
        _ => rng.below(50_000) as usize,
    }
}

fn chunked(rng: &mut Rng, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = body;
    while !rest.is_empty() {
        let (part, more) = rest.split_at(1 + rng.below(rest.len() as u64) as usize);
        out.extend_from_slice(format!("{:x}\r\n", part.len()).as_bytes());
        out.extend_from_slice(part);
        out.extend_from_slice(b"\r\n");
        rest = more;
    }
    out.extend_from_slice(b"0\r\n\r\n");
    out
}

/// One HTTP message taken off a byte queue.
#[derive(Debug, Clone)]
pub struct Message {
    pub head: String,
    pub body: Vec<u8>,
}

impl Message {
    pub fn field(&self, name: &str) -> Option<&str> {
        let named = |line: &&str| line.split_once(':').is_some_and(|(n, _)| n.eq_ignore_ascii_case(name));
        let mut lines = self.head.split("\r\n").filter(named);
        let value = lines.next()?.split_once(':')?.1.trim();
        assert!(lines.next().is_none(), "{name} is repeated in {:?}", self.head);
        Some(value)
    }

    pub fn id(&self) -> Option<u64> {
        self.field("x-id")?.parse().ok()
    }

    pub fn status(&self) -> u16 {
        self.head[9..12].parse().expect("a status")
    }
}

/// Takes one complete message off the queue. `bodiless`: a response that has no body whatever it says.
pub fn take_message(bytes: &mut Vec<u8>, closed: bool, bodiless: bool) -> Option<Message> {
    let end = head_end(bytes)?;
    let head = String::from_utf8(bytes[..end - 4].to_vec()).expect("an ASCII head");
    let mut message = Message { head, body: Vec::new() };
    let is_response = message.head.starts_with("HTTP/");
    let no_body = bodiless || (is_response && matches!(message.status(), 100..=199 | 204 | 304));
    let used = if no_body {
        end
    } else if message.field("transfer-encoding").is_some() {
        let (body, used) = unchunk(&bytes[end..])?;
        message.body = body;
        end + used
    } else if let Some(length) = message.field("content-length") {
        let length: usize = length.parse().expect("a length");
        message.body = bytes.get(end..end + length)?.to_vec();
        end + length
    } else if is_response {
        if !closed {
            return None;
        }
        message.body = bytes[end..].to_vec();
        bytes.len()
    } else {
        end
    };
    take_front(bytes, used);
    Some(message)
}

/// Where the empty line ends.
fn head_end(bytes: &[u8]) -> Option<usize> {
    let mut from = 0;
    loop {
        let cr = from + bytes[from..].iter().position(|b| *b == b'\r')?;
        match bytes.get(cr..cr + 4)? {
            b"\r\n\r\n" => return Some(cr + 4),
            _ => from = cr + 1,
        }
    }
}

fn unchunk(bytes: &[u8]) -> Option<(Vec<u8>, usize)> {
    let (mut body, mut at) = (Vec::new(), 0);
    loop {
        let line = at + bytes[at..].windows(2).position(|w| w == b"\r\n")?;
        let size =
            usize::from_str_radix(std::str::from_utf8(&bytes[at..line]).ok()?, 16).expect("a chunk size");
        at = line + 2;
        body.extend_from_slice(bytes.get(at..at + size)?);
        at += size + 2;
        if bytes.len() < at {
            return None;
        }
        if size == 0 {
            return Some((body, at));
        }
    }
}

/// A request a client has sent or will send.
#[derive(Debug, Clone)]
pub struct Asked {
    pub id: u64,
    pub host: String,
    pub method: &'static str,
    pub wire: Vec<u8>,
}

/// The page of routes that have one.
pub const PAGE: &str = "a page that is longer than nothing";

impl Asked {
    /// Checks an answer that a route gives by itself. Such routes have statuses no app uses.
    fn check_action(&self, message: &Message) {
        let hosts: &[&str] = match message.status() {
            299 => &["page.example", "a.example", "other.example"],
            307 => &["moved.example"],
            410 => &["empty.example"],
            _ => {
                let own = ["page.example", "moved.example", "empty.example"].contains(&self.host.as_str());
                return assert!(!own || message.status() >= 500, "{} got {:?}", self.host, message.head);
            }
        };
        assert!(hosts.contains(&self.host.as_str()), "{} got {:?}", self.host, message.head);
        let location = (message.status() == 307).then(|| format!("https://new.example/{}", self.id));
        assert_eq!(message.field("location"), location.as_deref());
        let body = if message.status() == 299 { PAGE } else { "" };
        assert_eq!(message.field("content-length"), Some(body.len().to_string().as_str()));
        assert!(self.method == "HEAD" || message.body == body.as_bytes(), "another page");
    }
}

/// A client's script and what became of it.
pub struct Client {
    pub todo: VecDeque<Asked>,
    pub waiting: VecDeque<Asked>,
    pub outgoing: Vec<u8>,
    pub incoming: Vec<u8>,
    pub pipelines: bool,
    pub half_closes: bool,
    pub answered: Vec<(u64, u16)>,
    /// The last answer said that there will be no other on this connection.
    pub told_to_close: bool,
    /// Gone for good.
    pub vanished: bool,
}

impl Client {
    pub fn new(rng: &mut Rng, first_id: u64, hosts: &[&str]) -> Self {
        let count = 1 + rng.below(6);
        let todo = (0..count).map(|n| Self::request(rng, first_id + n, hosts)).collect();
        Self {
            todo,
            waiting: VecDeque::new(),
            outgoing: Vec::new(),
            incoming: Vec::new(),
            pipelines: rng.one_in(3),
            half_closes: rng.one_in(4),
            answered: Vec::new(),
            told_to_close: false,
            vanished: false,
        }
    }

    fn request(rng: &mut Rng, id: u64, hosts: &[&str]) -> Asked {
        let host = hosts[rng.below(hosts.len() as u64) as usize];
        let method = ["GET", "GET", "HEAD", "POST", "POST", "PUT"][rng.below(6) as usize];
        let mut wire = format!("{method} /{id} HTTP/1.1\r\nHost: {host}\r\nX-Id: {id}\r\n").into_bytes();
        if rng.one_in(5) {
            wire.extend_from_slice(
                format!("X-Pad: {}\r\n", "p".repeat(rng.below(6_000) as usize)).as_bytes(),
            );
        }
        let body = if matches!(method, "POST" | "PUT") { pattern(id, body_size(rng)) } else { Vec::new() };
        match method {
            "POST" | "PUT" if rng.one_in(2) => {
                wire.extend_from_slice(b"Transfer-Encoding: chunked\r\n\r\n");
                wire.extend_from_slice(&chunked(rng, &body));
            }
            "POST" | "PUT" => {
                wire.extend_from_slice(format!("Content-Length: {}\r\n\r\n", body.len()).as_bytes());
                wire.extend_from_slice(&body);
            }
            _ => wire.extend_from_slice(b"\r\n"),
        }
        Asked { id, host: host.to_owned(), method, wire }
    }

    /// Puts the next request on the wire when it is time for it.
    pub fn go_on(&mut self) {
        while (self.waiting.is_empty() || self.pipelines) && !self.todo.is_empty() {
            let Some(asked) = self.todo.pop_front() else { return };
            self.outgoing.extend_from_slice(&asked.wire);
            self.waiting.push_back(asked);
        }
    }

    /// Checks what has come; `closed` when no more will.
    pub fn read(&mut self, closed: bool) {
        while let Some(asked) = self.waiting.front().cloned() {
            let Some(message) = take_message(&mut self.incoming, closed, asked.method == "HEAD") else {
                break;
            };
            if message.status() < 200 {
                continue;
            }
            let status = message.status();
            asked.check_action(&message);
            if status == 200 || status == 204 {
                assert_eq!(message.id(), Some(asked.id), "an answer to another request: {:?}", message.head);
            }
            if status == 200 && asked.method != "HEAD" {
                let expected = pattern(asked.id + 1_000_000, message.body.len());
                assert!(message.body == expected, "request {} got another body", asked.id);
                let promised: usize = message.field("x-len").expect("x-len").parse().expect("a length");
                assert_eq!(message.body.len(), promised, "a cut body passed for a whole one");
            }
            self.answered.push((asked.id, status));
            self.waiting.pop_front();
            if message.field("connection") == Some("close") {
                self.told_to_close = true;
                return;
            }
        }
    }

    /// Starts over on a new connection with what was not answered on the last one.
    pub fn reconnect(&mut self) {
        while let Some(asked) = self.waiting.pop_back() {
            self.todo.push_front(asked);
        }
        self.outgoing.clear();
        self.incoming.clear();
        self.told_to_close = false;
    }

    pub fn is_done(&self) -> bool {
        self.todo.is_empty() && self.waiting.is_empty()
    }
}

/// An app's end of one connection.
#[derive(Default)]
pub struct AppConn {
    pub incoming: Vec<u8>,
    pub outgoing: Vec<u8>,
    pub closes_after_this: bool,
    /// How often its app had come up when it was made.
    pub ups: u32,
}

impl AppConn {
    /// Answers the complete requests that have come; returns their ids, and whether they may be repeated.
    /// Health checks have no id.
    pub fn serve(&mut self, rng: &mut Rng, sick: bool) -> Vec<(Option<u64>, bool)> {
        let mut served = Vec::new();
        while !self.closes_after_this {
            let Some(request) = take_message(&mut self.incoming, false, false) else { break };
            if request.head.starts_with("GET /healthz ") {
                self.check_up(sick);
                served.push((None, true));
                continue;
            }
            let id = request.id().expect("x-id");
            let method = request.head.split(' ').next().expect("a method").to_owned();
            let repeatable = request.body.is_empty() && method != "POST";
            assert!(request.body == pattern(id, request.body.len()), "request {id} came with another body");
            let host = request.field("host").expect("a host");
            assert!(!["page.example", "moved.example", "empty.example"].contains(&host), "{host} has no app");
            assert!(request.field("x-forwarded-for").is_some() && request.field("connection").is_none());
            match sick {
                true => self.outgoing.extend_from_slice(
                    format!("HTTP/1.1 500 Sick\r\nX-Id: {id}\r\nContent-Length: 0\r\n\r\n").as_bytes(),
                ),
                false => self.respond(rng, id, &method),
            }
            served.push((Some(id), repeatable));
        }
        served
    }

    fn check_up(&mut self, sick: bool) {
        let status = if sick { "503 Sick" } else { "200 OK" };
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: 11\r\n\r\nall is well");
        self.outgoing.extend_from_slice(head.as_bytes());
        self.closes_after_this = true;
    }

    fn respond(&mut self, rng: &mut Rng, id: u64, method: &str) {
        if rng.one_in(6) {
            self.outgoing.extend_from_slice(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n");
        }
        if rng.one_in(10) {
            self.outgoing
                .extend_from_slice(format!("HTTP/1.1 204 No Content\r\nX-Id: {id}\r\n\r\n").as_bytes());
            return;
        }
        let body = pattern(id + 1_000_000, body_size(rng));
        let mut head = format!("HTTP/1.1 200 OK\r\nX-Id: {id}\r\nX-Len: {}\r\n", body.len());
        let style = rng.below(5);
        if style == 4 {
            self.closes_after_this = true;
            if rng.one_in(2) {
                head.push_str("Connection: close\r\n");
                head.push_str(&format!("Content-Length: {}\r\n", body.len()));
            }
        }
        let wire = match style {
            0..=1 => {
                head.push_str(&format!("Content-Length: {}\r\n", body.len()));
                body
            }
            2..=3 => {
                head.push_str("Transfer-Encoding: chunked\r\n");
                chunked(rng, &body)
            }
            _ => body,
        };
        self.outgoing.extend_from_slice(format!("{head}\r\n").as_bytes());
        if method != "HEAD" {
            self.outgoing.extend_from_slice(&wire);
        }
    }
}
