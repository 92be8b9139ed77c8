//! TLS as far as the core has to do with it: a handshake that takes its time and may fail, a goodbye that
//! must have been taken before FIN, and ends without one. Nothing is encrypted here.

use epagent_balancer::core::chunk::Chunk;
use epagent_balancer::core::io::{Completion, Errno, RecvEnd, SockId};
use epagent_balancer::core::secure::{Names, Secured, TlsFault};

use crate::actors::Rng;
use crate::far::Far;
use crate::world::{Mode, World};

/// How far TLS has come on a socket of the door's.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum DoorTls {
    #[default]
    Off,
    Handshake,
    On,
    Ending,
}

/// How a stream that has ended ends for the core.
pub fn end_of_stream(rng: &mut Rng, mode: Mode, tls: DoorTls) -> RecvEnd {
    let cut = tls == DoorTls::On && mode == Mode::Crashes && rng.one_in(5);
    if cut { RecvEnd::Cut } else { RecvEnd::Eof }
}

impl World {
    /// What had been read already is the client's first of what is said over TLS.
    pub fn start_tls(&mut self, id: SockId, said: &[u8]) {
        let sock = self.socks.get_mut(&id).expect("TLS on an open socket");
        assert!(sock.tls == DoorTls::Off && sock.recv.is_none() && !sock.trying, "TLS begins in the middle");
        sock.tls = DoorTls::Handshake;
        self.conns[sock.conn].0.to_core.splice(..0, said.iter().copied());
    }

    pub fn end_tls(&mut self, id: SockId) {
        let sock = self.socks.get_mut(&id).expect("a goodbye on an open socket");
        assert!(sock.tls == DoorTls::On, "a goodbye in state {:?}", sock.tls);
        assert!(sock.waiting_send.is_none() && !sock.trying, "the goodbye overtakes a send");
        sock.tls = DoorTls::Ending;
    }

    /// What becomes of a handshake or goodbye that is under way.
    pub fn complete_tls(&mut self, id: SockId, group: &mut Vec<Completion>) {
        let Some(sock) = self.socks.get_mut(&id).filter(|_| self.rng.one_in(3)) else { return };
        let (conn, far) = &mut self.conns[sock.conn];
        let crashes = self.mode == Mode::Crashes;
        match sock.tls {
            DoorTls::Handshake if conn.reset || (crashes && self.rng.one_in(50)) => {
                sock.tls = DoorTls::Off;
                let last_words = match self.rng.one_in(2) {
                    true => Chunk::owned(b"alert".to_vec()),
                    false => Chunk::owned(Vec::new()),
                };
                // The client knows what it did, and wants nothing more.
                (conn.to_core_fin, conn.hung_up) = (true, true);
                if let Far::Client(n) = far {
                    self.clients[*n].vanished = true;
                }
                group.push(Completion::SecureFailed { sock: id, fault: TlsFault::Broken, last_words });
            }
            DoorTls::Handshake => {
                sock.tls = DoorTls::On;
                let names = Names(["a", "b"].map(|name| format!("{name}.example")).to_vec());
                let secured =
                    Secured { server_name: None, names: names.into(), by_default: false, resumed: false };
                group.push(Completion::Secured { sock: id, secured: Box::new(secured) });
            }
            DoorTls::Ending if conn.reset => {
                group.push(Completion::SendFailed { sock: id, error: Errno(libc::EPIPE) });
                sock.tls = DoorTls::Off;
            }
            DoorTls::Ending => {
                sock.tls = DoorTls::Off;
                group.push(Completion::TlsEnded { sock: id });
            }
            DoorTls::On | DoorTls::Off => {}
        }
    }
}
