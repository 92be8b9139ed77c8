//! The client at the far end, and the ways in which it may behave.

use std::io::{Read, Write};

use rustls::ClientConnection;

use crate::fake::{Rng, Wire, take_front};

/// How often a client changes its keys. Beyond 32 in a row rustls takes it for an attack.
const NEW_KEYS_MAX: usize = 20;

/// How a client behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// Says all it has and its goodbye, and reads to the end.
    Orderly,
    /// The same, and goes on reading for long after its goodbye.
    HalfCloses,
    /// Ends its stream without a goodbye.
    Cuts,
    /// Resets, at any time.
    Resets,
    /// Sends a byte that is not what it was.
    Garbles,
    SpeaksHttp,
    /// Closes in the middle of the handshake.
    Leaves,
    /// Is orderly, but the core closes on it.
    IsClosedOn,
}

/// The client.
pub struct Peer {
    tls: ClientConnection,
    pub manner: Manner,
    outgoing: Vec<u8>,
    pub incoming: Vec<u8>,
    /// The server's goodbye was heard.
    pub heard_goodbye: bool,
    said_goodbye: bool,
    pub is_over: bool,
    /// Its own bytes do it harm from here on.
    pub garble_at: usize,
    said_bytes: usize,
    new_keys: usize,
}

impl Peer {
    pub fn new(tls: ClientConnection, manner: Manner, outgoing: Vec<u8>, garble_at: usize) -> Self {
        Self {
            tls,
            manner,
            outgoing,
            incoming: Vec::new(),
            heard_goodbye: false,
            said_goodbye: false,
            is_over: false,
            garble_at,
            said_bytes: 0,
            new_keys: 0,
        }
    }

    /// A turn: takes some of what has come, and says something.
    pub fn act(&mut self, rng: &mut Rng, wire: &mut Wire) {
        if self.is_over || wire.reset || !rng.one_in(2) {
            // What reaches a socket that is closed is answered so.
            wire.reset |=
                self.is_over && self.manner == Manner::Leaves && wire.to_client.len() == wire.window;
            self.is_over |= wire.reset;
            return;
        }
        if self.manner == Manner::SpeaksHttp {
            wire.to_server.extend_from_slice(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n");
            (self.is_over, wire.to_server_fin) = (true, rng.one_in(2));
            return;
        }
        self.listen(rng, wire);
        if self.is_over {
            return;
        }
        if self.manner == Manner::Resets && rng.one_in(10) {
            (wire.reset, self.is_over) = (true, true);
            return;
        }
        self.speak(rng, wire);
    }

    fn listen(&mut self, rng: &mut Rng, wire: &mut Wire) {
        let taken = take_front(&mut wire.to_client, 1 + rng.below(60_000));
        let mut rest = &taken[..];
        while !rest.is_empty() {
            self.tls.read_tls(&mut rest).expect("room for what is decrypted");
            if let Err(error) = self.tls.process_new_packets() {
                assert!(self.manner == Manner::Garbles, "the client cannot go on: {error}");
                (self.is_over, wire.to_server_fin) = (true, true);
                return;
            }
            let mut bytes = [0; 16 * 1024];
            while let Ok(count) = self.tls.reader().read(&mut bytes) {
                if count == 0 {
                    self.heard_goodbye = true;
                    break;
                }
                self.incoming.extend_from_slice(&bytes[..count]);
            }
        }
        if wire.to_client_fin
            && wire.to_client.is_empty()
            && (self.said_goodbye || self.manner == Manner::Garbles)
        {
            (self.is_over, wire.to_server_fin) = (true, true);
        }
    }

    fn speak(&mut self, rng: &mut Rng, wire: &mut Wire) {
        if self.manner == Manner::Leaves && (rng.one_in(4) || !self.tls.is_handshaking()) {
            (self.is_over, wire.to_server_fin) = (true, true);
            return;
        }
        if !self.tls.is_handshaking() {
            let some = take_front(&mut self.outgoing, rng.below(40_000));
            self.tls.writer().write_all(&some).expect("room for what is encrypted");
            if self.new_keys < NEW_KEYS_MAX
                && rng.one_in(10)
                && self.tls.protocol_version() == Some(rustls::ProtocolVersion::TLSv1_3)
            {
                self.tls.refresh_traffic_keys().expect("new keys");
                self.new_keys += 1;
            }
            if self.outgoing.is_empty() && !self.said_goodbye {
                match self.manner {
                    Manner::Cuts => self.said_goodbye = true,
                    // It stays silent for a while and reads on, which the core must allow.
                    _ if self.manner == Manner::HalfCloses || rng.one_in(3) => {
                        self.tls.send_close_notify();
                        self.said_goodbye = true;
                    }
                    _ => {}
                }
            }
        }
        let mut said = Vec::new();
        while self.tls.wants_write() {
            self.tls.write_tls(&mut said).expect("a vector takes everything");
        }
        if self.manner == Manner::Garbles
            && (self.said_bytes..self.said_bytes + said.len()).contains(&self.garble_at)
        {
            said[self.garble_at - self.said_bytes] ^= 0x40;
        }
        self.said_bytes += said.len();
        wire.to_server.extend_from_slice(&said);
        wire.to_server_fin |= self.said_goodbye && (self.manner == Manner::Cuts || rng.one_in(2));
    }
}
