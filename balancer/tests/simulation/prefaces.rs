//! What connections begin with: PROXY headers in front of clients, hellos of streams that are routed by server
//! name, and the headers by which apps are told of them. One world has some of it, another none.

use epagent_balancer::core::listen::{Listen, Mode as Listening};
use epagent_balancer::core::preface::proxy;

use crate::actors::Rng;
use crate::hello::client_hello;
use crate::world::{HTTP, TCP_PORT};

/// What is so in one world.
pub struct Prefaces {
    /// PROXY headers are required, by listener.
    required: [bool; 2],
    /// Streams find their route by this hello, rather than by the port.
    hello: Option<Vec<u8>>,
    /// Apps get PROXY headers before streams.
    pub told: bool,
}

impl Prefaces {
    pub fn new(rng: &mut Rng) -> Self {
        let by_name = rng.one_in(3);
        let record_bytes = 30 + rng.below(400) as usize;
        Self {
            required: [rng.one_in(3), rng.one_in(3)],
            hello: by_name.then(|| client_hello(Some("Db.Example"), record_bytes)),
            told: rng.one_in(3),
        }
    }

    /// What a listener is.
    pub fn listen(&self, rng: &mut Rng, listener: usize) -> Listen {
        let mode = match &self.hello {
            _ if listener == HTTP => Listening::Http,
            Some(_) => Listening::Sni,
            None => Listening::Tcp { port: TCP_PORT },
        };
        let tls = mode != Listening::Sni && rng.one_in(2);
        Listen { tls, proxy_protocol: self.required[listener], ..Listen::plain(mode) }
    }

    /// What matches streams.
    pub fn stream_match(&self) -> String {
        match self.hello {
            Some(_) => r#"{"sni":"db.example"}"#.to_owned(),
            None => format!(r#"{{"port":{TCP_PORT}}}"#),
        }
    }

    /// What a client says first; now and then, when it may be, something that is no header.
    pub fn first_words(&self, rng: &mut Rng, listener: usize, faulty: bool) -> Vec<u8> {
        let mut words = match self.required[listener] {
            true if faulty && rng.one_in(20) => b"PROXY TCP9".to_vec(),
            true if rng.one_in(3) => b"PROXY TCP4 203.0.113.7 198.51.100.1 1234 80\r\n".to_vec(),
            true if rng.one_in(5) => b"PROXY UNKNOWN\r\n".to_vec(),
            true => proxy::write_v2(None),
            false => Vec::new(),
        };
        if let Some(hello) = self.hello.as_ref().filter(|_| listener != HTTP) {
            words.extend_from_slice(hello);
        }
        words
    }

    /// Takes off what a stream must begin with for an app; false until it is all there.
    pub fn take_off(&self, incoming: &mut Vec<u8>) -> bool {
        let mut bytes = 0;
        if self.told {
            match proxy::scan(incoming) {
                proxy::Scan::Complete { bytes: header_bytes, .. } => bytes = header_bytes,
                proxy::Scan::Partial => return false,
                proxy::Scan::Malformed(error) => panic!("an app got a bad header: {error}"),
            }
        }
        let hello = self.hello.as_deref().unwrap_or_default();
        if incoming.len() < bytes + hello.len() {
            return false;
        }
        assert!(incoming[bytes..].starts_with(hello), "a hello came out changed");
        incoming.drain(..bytes + hello.len());
        true
    }
}
