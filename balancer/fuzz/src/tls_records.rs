//! The TLS door's record input: what a stranger says in place of a handshake, and what is done to the records of a
//! client on their way.
//!
//! The first byte chooses which. A stranger's other bytes are what comes, in pieces; with a client they choose what
//! it does, and where its flights are harmed. A stranger must never be let in, and must fail for the same reason
//! however its bytes are cut; of a client, only what it said may come out, in order, and nothing after the end.

use std::cell::RefCell;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use epagent_balancer::core::chunk::Chunk;
use epagent_balancer::core::io::{
    AfterSend, Completion, ListenerId, Op, RecvEnd, RecvMode, SendMode, SockId,
};
use epagent_balancer::core::secure::{Names, TlsFault};
use epagent_balancer::door::Door;
use epagent_balancer::tls::TlsDoor;
use epagent_balancer::tls::certificates::{Pair, Store};
use epagent_balancer::tls::context::Context;
use epagent_balancer::tls::x509;
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ClientConnection, RootCertStore};

const SOCK: SockId = SockId { index: 0, generation: 0 };
/// Most a client may say before its handshake is done, and one receive of it more.
const STRANGE_BYTES_MAX: usize = (64 + 16) * 1024;
/// How often a client changes its keys. Beyond 32 in a row rustls takes it for an attack.
const NEW_KEYS_MAX: usize = 20;

/// What came of one case.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outcome {
    pub secured: bool,
    pub fault: Option<TlsFault>,
    pub end: Option<RecvEnd>,
    pub received_bytes: usize,
}

/// Tries one case.
pub fn tls_records(bytes: &[u8]) -> Outcome {
    let Some((first, rest)) = bytes.split_first() else { return Outcome::default() };
    match first % 2 {
        0 => stranger(*first, rest),
        _ => client(*first, rest),
    }
}

/// The first flight of a client of either version, to begin with.
pub fn hello(version: usize) -> Vec<u8> {
    let mut flight = Vec::new();
    new_client(version).write_tls(&mut flight).expect("a vector takes everything");
    flight
}

/// Bytes come and then the end, from somebody without any keys.
fn stranger(first: u8, bytes: &[u8]) -> Outcome {
    // Somebody who goes on and on.
    let all = match first >= 250 && !bytes.is_empty() {
        true => bytes.iter().copied().cycle().take(2 * STRANGE_BYTES_MAX).collect(),
        false => bytes.to_vec(),
    };
    let ends = [usize::MAX, 1 + usize::from(first)].map(|piece| {
        let mut above = Above::new(piece, &all[..all.len().min(usize::from(first) % 7)]);
        above.say(&all[all.len().min(usize::from(first) % 7)..]);
        above.wire.borrow_mut().fin = true;
        above.go_on();
        let taken = all.len() - above.wire.borrow().inbox.len();
        assert!(taken <= STRANGE_BYTES_MAX || above.outcome.fault.is_none(), "{taken} bytes are taken in");
        above.outcome
    });
    assert!(!ends[0].secured, "a stranger is let in");
    assert!(ends[0].fault.is_some(), "it is neither let in nor turned away");
    assert_eq!(ends[0], ends[1], "it depends on how the bytes are cut");
    ends[0]
}

/// A client does its handshake and speaks, and its flights are harmed.
fn client(first: u8, choices: &[u8]) -> Outcome {
    let mut tls = new_client(usize::from(first >> 1 & 1));
    let mut above = Above::new(1 + usize::from(first) * 64, b"");
    let (mut said, mut harmed) = (Vec::new(), false);
    let (mut choices, mut idle_turns, mut new_keys) = (choices.iter().copied(), 0, 0);
    loop {
        // It says goodbye once its handshake is done, if that ever comes.
        let wait = tls.is_handshaking() && idle_turns < 8;
        let choice = choices.next().or(wait.then_some(0));
        idle_turns += usize::from(wait);
        let mut injected = Vec::new();
        match choice.map(|choice| choice % 8) {
            Some(0..=2) if !tls.is_handshaking() => {
                let len = usize::from(choices.next().unwrap_or(1)) * 80;
                let bytes: Vec<u8> = (said.len()..said.len() + len).map(|at| (at % 251) as u8).collect();
                let taken = tls.writer().write(&bytes).expect("room for what is encrypted");
                said.extend_from_slice(&bytes[..taken]);
            }
            Some(3) => {
                let len = usize::from(choices.next().unwrap_or(0)) % 40;
                injected = choices.by_ref().take(len).collect();
            }
            Some(6) if !tls.is_handshaking() && new_keys < NEW_KEYS_MAX => {
                new_keys += 1;
                drop(tls.refresh_traffic_keys());
            }
            Some(7) => above.interrupt(choice >= Some(128)),
            None => tls.send_close_notify(),
            _ => {}
        }
        let mut flight = Vec::new();
        while tls.wants_write() {
            tls.write_tls(&mut flight).expect("a vector takes everything");
        }
        if let (Some(choice @ (4 | 5)), false) = (choice.map(|choice| choice % 8), flight.is_empty()) {
            let at = usize::from(choices.next().unwrap_or(0)) * flight.len() / 256;
            match choice {
                4 => flight[at] ^= 1 << (choices.next().unwrap_or(0) % 8),
                _ => drop(flight.remove(at)),
            }
            harmed = true;
        }
        harmed |= !injected.is_empty();
        above.say(&[injected, flight].concat());
        if choice.is_none() {
            above.wire.borrow_mut().fin = true;
        }
        above.go_on();
        let heard = std::mem::take(&mut above.wire.borrow_mut().sent);
        let gone = hear(&mut tls, &heard).is_err();
        let outcome = above.outcome;
        if choice.is_none() || gone || outcome.fault.is_some() || outcome.end.is_some() {
            break;
        }
    }
    let outcome = above.outcome;
    assert!(said.starts_with(&above.received), "what comes out is not what the client said");
    if !harmed && outcome.secured {
        assert_eq!((outcome.received_bytes, outcome.end), (said.len(), Some(RecvEnd::Eof)), "not all of it");
    }
    assert!(harmed || outcome.fault.is_none_or(|fault| fault == TlsFault::Gone), "{:?}", outcome.fault);
    outcome
}

/// The client takes in what came; its plain text is thrown away.
fn hear(tls: &mut ClientConnection, mut bytes: &[u8]) -> Result<(), rustls::Error> {
    while !bytes.is_empty() {
        tls.read_tls(&mut bytes).map_err(|_| rustls::Error::DecryptError)?;
        tls.process_new_packets()?;
        while tls.reader().read(&mut [0; 4096]).is_ok_and(|count| count > 0) {}
    }
    Ok(())
}

/// The door below: what has come over the wire, and what was sent.
struct Wire {
    inbox: Vec<u8>,
    fin: bool,
    sent: Vec<u8>,
    recv: Option<RecvMode>,
    piece: usize,
    ready: Vec<Completion>,
}

struct Below(Rc<RefCell<Wire>>);

impl Door for Below {
    fn add_listener(&mut self, _: ListenerId, _: Arc<OwnedFd>) {}

    fn remove_listener(&mut self, _: ListenerId) {}

    fn apply(&mut self, ops: &mut Vec<Op>) -> io::Result<()> {
        let wire = &mut *self.0.borrow_mut();
        for op in ops.drain(..) {
            match op {
                Op::Recv { mode, .. } => {
                    assert!(wire.recv.replace(mode).is_none(), "a receive is armed twice");
                }
                Op::StopRecv { sock } => {
                    let ended = wire.recv.take().map(|_| Completion::RecvEnded { sock, why: RecvEnd::Ended });
                    wire.ready.extend(ended);
                }
                Op::Send { sock, chunks, .. } => {
                    let before = wire.sent.len();
                    chunks.iter().for_each(|chunk| wire.sent.extend_from_slice(chunk));
                    assert!(wire.sent.len() > before, "a send of nothing");
                    wire.ready.push(Completion::Sent { sock, bytes: wire.sent.len() - before });
                }
                Op::StopSend { .. } => {}
                other => panic!("{other:?} was not asked for"),
            }
        }
        Ok(())
    }

    fn wait(&mut self, _: Option<Duration>, completions: &mut Vec<Completion>) -> io::Result<()> {
        let wire = &mut *self.0.borrow_mut();
        completions.append(&mut wire.ready);
        let Some(mode) = wire.recv else { return Ok(()) };
        let room = match mode {
            RecvMode::Many => usize::MAX,
            RecvMode::Once { limit_bytes } => limit_bytes as usize,
        };
        let count = wire.inbox.len().min(wire.piece).min(room);
        if count > 0 {
            let chunk = Chunk::owned(wire.inbox.drain(..count).collect());
            completions.push(Completion::Received { sock: SOCK, chunk });
        }
        let why = match count {
            0 if wire.fin => RecvEnd::Eof,
            1.. if mode != RecvMode::Many => RecvEnd::Ended,
            _ => return Ok(()),
        };
        wire.recv = None;
        completions.push(Completion::RecvEnded { sock: SOCK, why });
        Ok(())
    }
}

/// In place of the core.
struct Above {
    door: TlsDoor<Below>,
    wire: Rc<RefCell<Wire>>,
    ops: Vec<Op>,
    is_armed: bool,
    is_sending: bool,
    received: Vec<u8>,
    outcome: Outcome,
}

impl Above {
    /// A socket that begins with TLS, when these bytes have come already.
    fn new(piece: usize, said: &[u8]) -> Self {
        let (inbox, sent, ready) = Default::default();
        let wire = Rc::new(RefCell::new(Wire { inbox, fin: false, sent, recv: None, piece, ready }));
        let start = Op::StartTls { sock: SOCK, http: true, said: Chunk::owned(said.to_vec()) };
        Self {
            door: TlsDoor::new(Below(wire.clone()), setting().context.clone()),
            wire,
            ops: vec![start],
            is_armed: false,
            is_sending: false,
            received: Vec::new(),
            outcome: Outcome::default(),
        }
    }

    fn say(&mut self, bytes: &[u8]) {
        self.wire.borrow_mut().inbox.extend_from_slice(bytes);
    }

    /// The core changes its mind about receiving, or has something to say itself.
    fn interrupt(&mut self, speaks: bool) {
        if !speaks && self.is_armed {
            self.ops.push(Op::StopRecv { sock: SOCK });
        } else if speaks && self.outcome.secured && !self.is_sending && self.outcome.end.is_none() {
            self.is_sending = true;
            let chunks = [Chunk::owned(vec![7; 20_000])].into();
            self.ops.push(Op::Send { sock: SOCK, chunks, mode: SendMode::WaitAll, after: AfterSend::GoOn });
        }
    }

    /// Until nothing happens any more.
    fn go_on(&mut self) {
        let mut completions = Vec::new();
        for round in 0.. {
            assert!(round < 1_000_000, "it goes on for ever: {:?}", self.outcome);
            let is_over = self.outcome.fault.is_some() || self.outcome.end.is_some();
            if self.outcome.secured && !is_over && !self.is_armed {
                self.is_armed = true;
                self.ops.push(Op::Recv { sock: SOCK, mode: RecvMode::Many });
            }
            let left = self.wire.borrow().inbox.len();
            self.door.apply(&mut self.ops).expect("taken");
            self.door.wait(Some(Duration::ZERO), &mut completions).expect("waited");
            let quiet = completions.is_empty() && self.wire.borrow().inbox.len() == left;
            completions.drain(..).for_each(|completion| self.take_in(completion));
            if quiet && (self.is_armed || !self.outcome.secured || is_over) {
                return;
            }
        }
    }

    fn take_in(&mut self, completion: Completion) {
        let outcome = &mut self.outcome;
        let is_over = outcome.fault.is_some() || outcome.end.is_some();
        match completion {
            Completion::Secured { .. } => {
                assert!(!is_over && !std::mem::replace(&mut outcome.secured, true), "secured twice");
            }
            Completion::SecureFailed { fault, .. } => {
                assert!(!is_over && !outcome.secured, "it fails after it was done");
                outcome.fault = Some(fault);
            }
            Completion::Received { chunk, .. } => {
                assert!(outcome.secured && self.is_armed && !is_over, "bytes that were not asked for");
                self.received.extend_from_slice(&chunk);
                outcome.received_bytes = self.received.len();
            }
            Completion::RecvEnded { why, .. } => {
                assert!(std::mem::take(&mut self.is_armed), "a receive ended that was not armed");
                let is_end = !matches!(why, RecvEnd::Ended | RecvEnd::NoBuffers);
                outcome.end = outcome.end.or(is_end.then_some(why));
            }
            Completion::Sent { .. } | Completion::SendFailed { .. } => {
                assert!(std::mem::take(&mut self.is_sending), "a send ended that was not asked for");
            }
            other => panic!("{other:?} was not asked for"),
        }
    }
}

/// What all cases share.
struct Setting {
    context: Arc<Context>,
    /// Of either version.
    clients: [Arc<ClientConfig>; 2],
}

fn new_client(version: usize) -> ClientConnection {
    let config = setting().clients[version % 2].clone();
    let name = ServerName::try_from("a.example").expect("a name");
    ClientConnection::new(config, name).expect("a client")
}

fn setting() -> &'static Setting {
    static SETTING: OnceLock<Setting> = OnceLock::new();
    SETTING.get_or_init(|| {
        let key = rcgen::KeyPair::generate().expect("a key");
        let params = rcgen::CertificateParams::new(vec!["a.example".to_owned()]).expect("parameters");
        let certificate = params.self_signed(&key).expect("a certificate").der().clone();
        let context = Context::new().expect("TLS");
        let mut roots = RootCertStore::empty();
        roots.add(certificate.clone()).expect("a root");
        let validity = x509::validity(&certificate).expect("dates");
        let private = PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
        let certified =
            CertifiedKey::from_der(vec![certificate], private, &context.provider).expect("a pair");
        let names = Names(vec!["a.example".to_owned()]);
        context.certificates.replace(Store::new(vec![Arc::new(Pair::new(
            "a".to_owned(),
            names,
            validity,
            certified,
        ))]));
        let client = |version: &'static rustls::SupportedProtocolVersion| {
            let config = ClientConfig::builder_with_provider(context.provider.clone())
                .with_protocol_versions(&[version])
                .expect("a version")
                .with_root_certificates(roots.clone())
                .with_no_client_auth();
            Arc::new(config)
        };
        let clients = [client(&rustls::version::TLS12), client(&rustls::version::TLS13)];
        Setting { context: Arc::new(context), clients }
    })
}
