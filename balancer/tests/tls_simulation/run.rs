//! One seed: a connection from its beginning to its end, and the stand-in for the core that uses it.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use epagent_balancer::core::chunk::{Chunk, Chunks};
use epagent_balancer::core::io::{AfterSend, Completion, Errno, Op, RecvEnd, RecvMode, SendMode, SockId};
use epagent_balancer::core::secure::{Names, TlsFault};
use epagent_balancer::door::Door;
use epagent_balancer::tls::TlsDoor;
use epagent_balancer::tls::certificates::{Pair, Store};
use epagent_balancer::tls::context::Context;
use epagent_balancer::tls::x509;
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use crate::fake::{Fake, FakeDoor, Rng, Wire, pattern, take_front};
use crate::lent::Lent;
use crate::peer::{Manner, Peer};

/// More steps than any run needs; reaching it means something is stuck.
const STEPS_MAX: usize = 50_000;

/// What all seeds share: the certificate, and clients of either version, which resume sessions.
pub struct Setting {
    context: Arc<Context>,
    clients: [Arc<ClientConfig>; 2],
}

impl Setting {
    pub fn new() -> Self {
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
        let pair = Pair::new("a".to_owned(), names, validity, certified);
        context.certificates.replace(Store::new(vec![Arc::new(pair)]));
        let client = |version: &'static rustls::SupportedProtocolVersion| {
            let config = ClientConfig::builder_with_provider(context.provider.clone())
                .with_protocol_versions(&[version])
                .expect("a version")
                .with_root_certificates(roots.clone())
                .with_no_client_auth();
            Arc::new(config)
        };
        let clients = [client(&rustls::version::TLS12), client(&rustls::version::TLS13)];
        Self { context: Arc::new(context), clients }
    }
}

/// A connection and the stand-in for the core above it.
pub struct Run {
    rng: Rng,
    door: TlsDoor<FakeDoor>,
    fake: Rc<RefCell<Fake>>,
    peer: Peer,
    sock: SockId,
    ops: Vec<Op>,
    /// What the client sends, and what has come of it.
    there: Vec<u8>,
    received: Vec<u8>,
    recv: Option<RecvMode>,
    is_fed: bool,
    is_stopping: bool,
    end: Option<RecvEnd>,
    /// What the server sends, and what of it counts as sent.
    back: Vec<u8>,
    sent_bytes: usize,
    /// The bytes and the kind of the send under way.
    sending: Option<(usize, SendMode)>,
    is_stopping_send: bool,
    is_secured: bool,
    is_ending: bool,
    is_ended: bool,
    fault: Option<TlsFault>,
    is_broken: bool,
    is_closed: bool,
    last_words: Vec<u8>,
}

impl Run {
    pub fn new(setting: &Setting, seed: u64, manner: Manner) -> Self {
        let mut rng = Rng(seed);
        let sock = SockId { index: rng.below(3) as u32, generation: rng.below(5) as u32 };
        let byte_by_byte = rng.one_in(4);
        let most = if byte_by_byte { 300 } else { [2_000, 20_000, 150_000][rng.below(3)] };
        let (there, back) = (pattern(seed, rng.below(most)), pattern(seed + 1, rng.below(most)));
        let wire = Wire {
            window: if byte_by_byte { 1 + rng.below(40) } else { 64 + rng.below(100_000) },
            // Where there is much to say, not by so little at a time that the steps run out.
            piece: if byte_by_byte { 1 } else { 16 + rng.below(16_384) },
            ..Wire::default()
        };
        let config = setting.clients[rng.below(2)].clone();
        let name = ServerName::try_from("a.example").expect("a name");
        let mut client = ClientConnection::new(config, name).expect("a client");
        client.set_buffer_limit(None);
        let garble_below = if rng.one_in(2) { 600 } else { 5_000 };
        let garble_at = rng.below(garble_below);
        let peer = Peer::new(client, manner, there.clone(), garble_at);
        let fake = Rc::new(RefCell::new(Fake::new(Rng(seed + 7), wire, sock)));
        Self {
            rng,
            door: TlsDoor::new(FakeDoor(fake.clone()), setting.context.clone()),
            fake,
            peer,
            sock,
            ops: Vec::new(),
            there,
            received: Vec::new(),
            recv: None,
            is_fed: false,
            is_stopping: false,
            end: None,
            back,
            sent_bytes: 0,
            sending: None,
            is_stopping_send: false,
            is_secured: false,
            is_ending: false,
            is_ended: false,
            fault: None,
            is_broken: false,
            is_closed: false,
            last_words: Vec::new(),
        }
    }

    pub fn run(mut self) {
        // Bytes that were read before, as behind a PROXY header.
        let said = match self.rng.one_in(3) {
            true => {
                let mut fake = self.fake.borrow_mut();
                self.peer.act(&mut self.rng, &mut fake.wire);
                take_front(&mut fake.wire.to_server, self.rng.below(700))
            }
            false => Vec::new(),
        };
        let said = Chunk::owned(said);
        self.ops.push(Op::StartTls { sock: self.sock, http: true, said });
        let mut completions = Vec::new();
        for step in 0.. {
            assert!(step < STEPS_MAX, "stuck: {}", self.picture());
            self.peer.act(&mut self.rng, &mut self.fake.borrow_mut().wire);
            self.door.apply(&mut self.ops).expect("taken");
            let trying = matches!(self.sending, Some((_, SendMode::Try)));
            let lent = self.fake.borrow().live.get();
            assert!(lent == 0, "{lent} lent buffers are kept");
            self.door.wait(Some(Duration::ZERO), &mut completions).expect("waited");
            for completion in completions.drain(..) {
                self.take_in(completion);
            }
            let tried = trying && matches!(self.sending, Some((_, SendMode::Try)));
            assert!(!tried || self.is_closed, "a send that does not wait was not over at once");
            if self.is_closed {
                break;
            }
            // A length that is not what it was makes both sides wait for the other; the core's timers end that.
            if self.peer.manner == Manner::Garbles && step > STEPS_MAX / 4 {
                self.close(true);
            }
            self.go_on();
        }
        self.door.apply(&mut self.ops).expect("taken");
        self.door.wait(Some(Duration::ZERO), &mut completions).expect("waited");
        assert!(completions.is_empty(), "something is said of a closed socket: {completions:?}");
        self.check();
    }

    fn take_in(&mut self, completion: Completion) {
        assert!(!self.is_closed, "{completion:?} of a closed socket");
        match completion {
            Completion::Secured { secured, .. } => {
                assert!(!std::mem::replace(&mut self.is_secured, true), "secured twice");
                assert_eq!(secured.server_name.as_deref(), Some("a.example"));
                assert!(secured.names.cover("a.example") && !secured.by_default);
            }
            Completion::SecureFailed { fault, last_words, .. } => {
                assert!(!self.is_secured, "the handshake failed after it was done");
                self.fault = Some(fault);
                self.last_words = last_words.to_vec();
            }
            Completion::Received { chunk, .. } => {
                assert!(self.is_secured && self.recv.is_some(), "bytes that were not asked for");
                assert!(!chunk.is_empty(), "no bytes");
                if let Some(RecvMode::Once { limit_bytes }) = &mut self.recv {
                    *limit_bytes = limit_bytes.checked_sub(chunk.len() as u32).expect("within the limit");
                    self.is_fed = true;
                }
                self.received.extend_from_slice(&chunk);
            }
            Completion::RecvEnded { why, .. } => {
                let mode = self.recv.take().expect("a receive ended that was not armed");
                let fed = std::mem::take(&mut self.is_fed) || self.is_stopping || mode == RecvMode::Many;
                assert!(fed || why != RecvEnd::Ended, "a receive ended with nothing");
                match why {
                    RecvEnd::Ended | RecvEnd::NoBuffers => {}
                    RecvEnd::Failed(_) => (self.end, self.is_broken) = (Some(why), true),
                    _ => self.end = Some(why),
                }
                self.is_stopping = false;
            }
            Completion::Sent { bytes, .. } => {
                let (offered, mode) = self.sending.take().expect("a send that was asked for");
                let stopped = std::mem::take(&mut self.is_stopping_send);
                let may_be_none = stopped || mode == SendMode::Try;
                assert!(bytes <= offered && (bytes > 0 || may_be_none), "{bytes} of {offered}, {mode:?}");
                self.sent_bytes += bytes;
            }
            Completion::SendFailed { .. } => {
                assert!(
                    self.sending.take().is_some() || self.is_ending,
                    "a send failed that was not asked for"
                );
                self.is_broken = true;
            }
            Completion::TlsEnded { .. } => {
                assert!(self.is_ending, "a goodbye that was not asked for");
                self.ops.push(Op::ShutdownWrite { sock: self.sock });
                (self.is_ending, self.is_ended) = (false, true);
            }
            other => panic!("{other:?} was not asked for"),
        }
    }

    /// The stand-in for the core does something.
    fn go_on(&mut self) {
        let sock = self.sock;
        if self.is_closed {
            return;
        }
        if self.fault.is_some() || self.is_broken {
            return self.close(true);
        }
        if !self.is_secured {
            return;
        }
        if self.peer.manner == Manner::IsClosedOn && self.rng.one_in(15) {
            let reset = self.rng.one_in(2);
            return self.close(reset);
        }
        if self.is_ended && self.end.is_some() {
            return self.close(self.end == Some(RecvEnd::Cut));
        }
        if self.recv.is_none() && self.end.is_none() && self.rng.one_in(2) {
            let limit_bytes = 1 + self.rng.below(30_000) as u32;
            let mode = if self.rng.one_in(2) { RecvMode::Once { limit_bytes } } else { RecvMode::Many };
            self.recv = Some(mode);
            self.ops.push(Op::Recv { sock, mode });
        } else if self.recv.is_some() && !self.is_stopping && self.rng.one_in(10) {
            self.is_stopping = true;
            self.ops.push(Op::StopRecv { sock });
        }
        if self.sending.is_none() && !self.is_ended && !self.is_ending && self.rng.one_in(2) {
            self.send();
        } else if matches!(self.sending, Some((_, SendMode::WaitSome | SendMode::WaitAll)))
            && !self.is_stopping_send
            && self.rng.one_in(10)
        {
            self.is_stopping_send = true;
            self.ops.push(Op::StopSend { sock });
        }
    }

    fn send(&mut self) {
        let (sock, left) = (self.sock, self.back.len() - self.sent_bytes);
        if left == 0 {
            self.is_ending = true;
            return self.ops.push(Op::EndTls { sock });
        }
        let offered = 1 + self.rng.below(left);
        let mode = [SendMode::Try, SendMode::WaitSome, SendMode::WaitAll][self.rng.below(3)];
        let owned = mode != SendMode::Try;
        let live = self.fake.borrow().live.clone();
        let (mut chunks, mut at) = (Chunks::new(), self.sent_bytes);
        let until = at + offered;
        while at < until {
            let size = 1 + self.rng.below((until - at).min(20_000));
            let bytes = self.back[at..at + size].to_vec();
            chunks.push(if owned { Chunk::owned(bytes) } else { Lent::chunk(bytes, &live) });
            at += size;
        }
        self.sending = Some((offered, mode));
        self.ops.push(Op::Send { sock, chunks, mode, after: AfterSend::GoOn });
    }

    fn close(&mut self, reset: bool) {
        self.is_closed = true;
        self.ops.push(Op::Close { sock: self.sock, reset });
    }

    /// After the end: what must have come, and how it must have ended.
    fn check(&mut self) {
        let whole_there = self.received == self.there;
        let received_prefix = self.there.starts_with(&self.received);
        assert!(received_prefix, "what the client said came out changed");
        match self.peer.manner {
            Manner::Orderly | Manner::HalfCloses => {
                assert_eq!(self.fault, None);
                assert!(
                    !self.is_broken && self.end == Some(RecvEnd::Eof) && whole_there,
                    "{}",
                    self.picture()
                );
                self.finish_reading();
                assert!(self.peer.heard_goodbye, "the client was not told goodbye");
            }
            Manner::Cuts => assert!(self.end == Some(RecvEnd::Cut) && whole_there, "{}", self.picture()),
            Manner::Resets => {
                let is_reset = self.end == Some(RecvEnd::Failed(Errno(libc::ECONNRESET)));
                // Unless everything was over before.
                let noticed = self.end == Some(RecvEnd::Eof)
                    || is_reset
                    || self.fault == Some(TlsFault::Gone)
                    || self.is_broken;
                assert!(noticed, "{}", self.picture());
            }
            Manner::SpeaksHttp => {
                assert_eq!((self.fault, self.last_words.len()), (Some(TlsFault::PlainHttp), 0));
            }
            Manner::Leaves => assert!(self.fault == Some(TlsFault::Gone) || self.is_secured),
            // Whatever was harmed: it is noticed, or came behind everything that matters.
            Manner::Garbles | Manner::IsClosedOn => {}
        }
    }

    /// Lets the client read what is still on the wire.
    fn finish_reading(&mut self) {
        for _ in 0..STEPS_MAX {
            let mut fake = self.fake.borrow_mut();
            if self.peer.is_over || (self.peer.heard_goodbye && fake.wire.to_client.is_empty()) {
                break;
            }
            self.peer.act(&mut self.rng, &mut fake.wire);
        }
        assert!(self.peer.incoming == self.back, "what the server said came out changed");
    }

    fn picture(&self) -> String {
        format!(
            "{:?}: received {} of {}, sent {} of {}, recv {:?}, end {:?}, sending {:?}, fault {:?}, secured {}, \
             broken {}",
            self.peer.manner,
            self.received.len(),
            self.there.len(),
            self.sent_bytes,
            self.back.len(),
            self.recv,
            self.end,
            self.sending,
            self.fault,
            self.is_secured,
            self.is_broken,
        )
    }
}
