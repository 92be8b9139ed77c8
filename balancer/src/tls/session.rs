//! One TLS connection as the server, over bytes: ciphertext and plain text in, plain text and ciphertext
//! out. Nothing here knows of sockets.
//!
//! rustls is used by its unbuffered interface: it keeps no ciphertext, so a connection between two records
//! holds no buffer at all, and every byte that waits is in one of ours, where it is bounded.

use std::mem;
use std::sync::Arc;

use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncodeTlsData, EncryptError, UnbufferedStatus, WriteTraffic,
};
use rustls::{Error, HandshakeKind, PeerIncompatible, ServerConfig};

use super::certificates::{self, Shown};
use crate::core::secure::{Secured, TlsFault};

/// Most plain text in one record (RFC 8446 §5.1).
pub const RECORD_BYTES: usize = 16 * 1024;
/// Room for what a record adds to its plain text, in any version: at most 5 of header and 255 of the rest
/// (RFC 8446 §5.2).
pub const RECORD_OVERHEAD_BYTES: usize = 512;
/// Most a client may send before its handshake is done. A hello with a post-quantum key share has some two
/// thousand bytes.
pub const HANDSHAKE_BYTES_MAX: usize = 64 * 1024;
/// Alerts in which we differ from rustls.
const PROTOCOL_VERSION: u8 = 70;
/// RFC 6066 §3.
const UNRECOGNIZED_NAME: u8 = 112;

/// A connection and the beginning of a record of which the rest has not come.
pub struct Session {
    tls: UnbufferedServerConnection,
    kept: Vec<u8>,
    /// Bytes heard while the handshake lasts.
    heard_bytes: usize,
    /// What the client was shown, until the handshake is done.
    shown: Option<Box<Shown>>,
    secured: bool,
    /// An error has ended it; rustls is not to be asked again.
    is_over: bool,
}

/// What came of what was heard.
#[derive(Default)]
pub struct Heard {
    pub plain: Vec<u8>,
    /// The handshake is done with this.
    pub secured: Option<Box<Secured>>,
    /// The client said its goodbye.
    pub closed: bool,
}

/// The connection cannot go on. The alert that says so to the peer, if there is one, has been written
/// behind the other replies.
#[derive(Debug)]
pub struct Fault(pub TlsFault);

/// Nothing more can be encrypted: the keys are used up, or the connection is over.
#[derive(Debug)]
pub struct Sealed;

/// What to do once all that was heard has been taken in.
enum Then<'a> {
    Nothing,
    Seal(&'a [u8]),
    Goodbye,
}

impl Session {
    pub fn new(config: Arc<ServerConfig>) -> Result<Self, Error> {
        let tls = UnbufferedServerConnection::new(config)?;
        Ok(Self { tls, kept: Vec::new(), heard_bytes: 0, shown: None, secured: false, is_over: false })
    }

    /// Takes in ciphertext. `replies` gets what the protocol has to answer; `scratch` is any vector.
    pub fn hear(
        &mut self,
        cipher: &[u8],
        scratch: &mut Vec<u8>,
        replies: &mut Vec<u8>,
    ) -> Result<Heard, Fault> {
        if self.is_over {
            return Err(Fault(TlsFault::Broken));
        }
        if !self.secured {
            self.check_beginning(cipher)?;
        }
        let mut heard = Heard { plain: Vec::with_capacity(cipher.len()), ..Heard::default() };
        scratch.clear();
        scratch.append(&mut self.kept);
        scratch.extend_from_slice(cipher);
        let mut used = 0;
        let driven = self.drive(scratch, &mut used, Then::Nothing, &mut heard, replies);
        match certificates::take_decided() {
            None => {}
            Some(Ok(shown)) => self.shown = Some(Box::new(shown)),
            Some(Err(fault)) => {
                self.is_over = true;
                replies.extend_from_slice(&plain_alert(UNRECOGNIZED_NAME));
                return Err(Fault(fault));
            }
        }
        if let Err(error) = driven {
            match error {
                // What came before TLS 1.2 does not know this extension, which rustls looks for first.
                Error::PeerIncompatible(PeerIncompatible::SignatureAlgorithmsExtensionRequired) => {
                    self.is_over = true;
                    replies.extend_from_slice(&plain_alert(PROTOCOL_VERSION));
                    return Err(Fault(TlsFault::NoSharedVersion));
                }
                _ => self.add_alert(&mut scratch[used..], replies),
            }
            return Err(Fault(classify(&error)));
        }
        self.kept = scratch[used..].to_vec();
        if !self.secured {
            if !self.tls.is_handshaking() {
                self.secured = true;
                heard.secured = Some(self.proof());
            } else if self.heard_bytes > HANDSHAKE_BYTES_MAX {
                return Err(Fault(TlsFault::Broken));
            }
        }
        Ok(heard)
    }

    /// Appends plain text, at most [`RECORD_BYTES`], as one record.
    pub fn seal(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Result<(), Sealed> {
        debug_assert!(plain.len() <= RECORD_BYTES);
        self.write(Then::Seal(plain), out)
    }

    /// Appends the goodbye, after which nothing may be sealed.
    pub fn goodbye(&mut self, out: &mut Vec<u8>) -> Result<(), Sealed> {
        self.write(Then::Goodbye, out)
    }

    fn write(&mut self, then: Then<'_>, out: &mut Vec<u8>) -> Result<(), Sealed> {
        if self.is_over {
            return Err(Sealed);
        }
        // What was heard has been taken in whole, so what is left of it cannot say anything new.
        let (mut kept, mut heard, mut used) = (mem::take(&mut self.kept), Heard::default(), 0);
        let written = self.drive(&mut kept, &mut used, then, &mut heard, out);
        self.is_over = written.is_err();
        kept.drain(..used);
        self.kept = kept;
        written.map_err(|_| Sealed)
    }

    /// Lets the protocol go on until it needs more bytes, and then does what was asked. `used` is how many
    /// of `incoming` it needs no longer, also after an error; the others must be shown to it again.
    fn drive(
        &mut self,
        incoming: &mut [u8],
        used: &mut usize,
        then: Then<'_>,
        heard: &mut Heard,
        out: &mut Vec<u8>,
    ) -> Result<(), Error> {
        loop {
            let UnbufferedStatus { mut discard, state, .. } =
                self.tls.process_tls_records(&mut incoming[*used..]);
            let mut blocked = false;
            let state = match state {
                Ok(state) => state,
                Err(error) => {
                    *used += discard;
                    return Err(error);
                }
            };
            match state {
                ConnectionState::ReadTraffic(mut traffic) => {
                    while let Some(record) = traffic.next_record() {
                        let record = record?;
                        discard += record.discard;
                        heard.plain.extend_from_slice(record.payload);
                    }
                }
                ConnectionState::EncodeTlsData(mut data) => {
                    append(out, &mut data);
                }
                // Everything written is sent, in order, by whoever called.
                ConnectionState::TransmitTlsData(data) => data.done(),
                ConnectionState::PeerClosed => heard.closed = true,
                ConnectionState::WriteTraffic(traffic) => {
                    carry_out(traffic, &then, out)?;
                    blocked = true;
                }
                ConnectionState::BlockedHandshake => blocked = true,
                ConnectionState::Closed => {
                    heard.closed = true;
                    blocked = true;
                }
                // Early data is not offered.
                _ => return Err(Error::General("a state that was not asked for".to_owned())),
            }
            *used += discard;
            if blocked {
                let over = !matches!(then, Then::Nothing) && self.tls.is_handshaking();
                return if over { Err(Error::HandshakeNotComplete) } else { Ok(()) };
            }
        }
    }

    /// The first byte tells TLS from everything else.
    fn check_beginning(&mut self, cipher: &[u8]) -> Result<(), Fault> {
        let first = cipher.first().filter(|_| self.heard_bytes == 0);
        self.heard_bytes += cipher.len();
        match first {
            None | Some(22) => Ok(()),
            Some(b'A'..=b'Z') => Err(Fault(TlsFault::PlainHttp)),
            Some(_) => Err(Fault(TlsFault::NotTls)),
        }
    }

    /// Puts the alert of an error behind the replies. `incoming` is what the error left.
    fn add_alert(&mut self, incoming: &mut [u8], replies: &mut Vec<u8>) {
        self.is_over = true;
        // Whatever else was to be written has been by now, so it is one message or none; and asking again
        // would be to look at what is wrong again.
        if let Ok(ConnectionState::EncodeTlsData(mut data)) = self.tls.process_tls_records(incoming).state {
            append(replies, &mut data);
        }
    }

    fn proof(&mut self) -> Box<Secured> {
        let shown = self.shown.take().unwrap_or_default();
        Box::new(Secured {
            server_name: shown.server_name,
            names: shown.names,
            by_default: shown.by_default,
            resumed: self.tls.handshake_kind() == Some(HandshakeKind::Resumed),
        })
    }
}

/// A fatal alert before anything is encrypted, as a record of its own.
fn plain_alert(description: u8) -> [u8; 7] {
    [21, 3, 3, 0, 2, 2, description]
}

/// Appends a message, which says itself how long it is.
fn append(out: &mut Vec<u8>, data: &mut EncodeTlsData<'_, ServerConnectionData>) {
    let start = out.len();
    if let Err(EncodeError::InsufficientSize(needed)) = data.encode(&mut []) {
        out.resize(start + needed.required_size, 0);
        let written = data.encode(&mut out[start..]).unwrap_or(0);
        out.truncate(start + written);
    }
}

fn carry_out(
    mut traffic: WriteTraffic<'_, ServerConnectionData>,
    then: &Then<'_>,
    out: &mut Vec<u8>,
) -> Result<(), Error> {
    let start = out.len();
    let size = match then {
        Then::Nothing => return Ok(()),
        Then::Seal(plain) => plain.len(),
        Then::Goodbye => 0,
    };
    out.resize(start + size + RECORD_OVERHEAD_BYTES, 0);
    let mut written = match then {
        Then::Seal(plain) => traffic.encrypt(plain, &mut out[start..]),
        _ => traffic.queue_close_notify(&mut out[start..]),
    };
    if let (Err(EncryptError::InsufficientSize(needed)), Then::Seal(plain)) = (&written, then) {
        // A message of the protocol's own goes before it.
        out.resize(start + needed.required_size, 0);
        written = traffic.encrypt(plain, &mut out[start..]);
    }
    out.truncate(start + *written.as_ref().unwrap_or(&0));
    written.map(|_| ()).map_err(|_| Error::EncryptError)
}

fn classify(error: &Error) -> TlsFault {
    match error {
        Error::AlertReceived(_) => TlsFault::Rejected,
        Error::PeerIncompatible(
            PeerIncompatible::Tls12NotOffered
            | PeerIncompatible::Tls12NotOfferedOrEnabled
            | PeerIncompatible::SupportedVersionsExtensionRequired
            | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
            | PeerIncompatible::ServerDoesNotSupportTls12Or13,
        ) => TlsFault::NoSharedVersion,
        Error::PeerIncompatible(_) | Error::NoApplicationProtocol => TlsFault::NothingShared,
        _ => TlsFault::Broken,
    }
}
