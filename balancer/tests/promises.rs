//! What a door promises the core, held by each door on sockets of the system's.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use epagent_balancer::core::chunk::{Chunk, Chunks};
use epagent_balancer::core::io::{
    AfterSend, Completion, Errno, ListenerId, Op, RawSocket, RecvEnd, RecvMode, SendMode, SockId,
};
use epagent_balancer::door::Door;
use epagent_balancer::doors::{AnyDoor, BufferSizes, Io};
use epagent_balancer::unix::UnixSockets;
use nix::libc;
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{setsockopt, sockopt};

const LISTENER: ListenerId = ListenerId(7);
const PATIENCE: Duration = Duration::from_secs(20);
/// Small, so that little data takes many of them.
const BUFFERS: BufferSizes = BufferSizes { count: 64, size_bytes: 4096 };

/// A door with one listener, and what it has said.
struct Rig {
    io: Io,
    door: AnyDoor,
    address: SocketAddr,
    said: Vec<Completion>,
    sockets: u32,
}

impl Rig {
    fn new(io: Io) -> Self {
        let waker = Arc::new(EventFd::new().expect("a waker"));
        let mut door = AnyDoor::open(io, BUFFERS, waker, UnixSockets::default()).expect("a door");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        listener.set_nonblocking(true).expect("as listeners are");
        let address = listener.local_addr().expect("its address");
        door.add_listener(LISTENER, Arc::new(OwnedFd::from(listener)));
        let mut rig = Self { io, door, address, said: Vec::new(), sockets: 0 };
        rig.apply([Op::Accept(LISTENER)]);
        rig
    }

    fn apply(&mut self, ops: impl IntoIterator<Item = Op>) {
        self.door.apply(&mut ops.into_iter().collect()).expect("the door works");
    }

    /// One wake; everything new that the door says.
    fn wake(&mut self) -> &[Completion] {
        let known = self.said.len();
        self.door.wait(Some(Duration::from_millis(20)), &mut self.said).expect("the door works");
        &self.said[known..]
    }

    /// Wakes until the door has said what is looked for.
    fn until<T>(&mut self, what: &str, look: impl Fn(&Completion) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.said.iter().position(|said| look(said).is_some()) {
                let found = self.said.remove(at);
                return look(&found).expect("found just now");
            }
            assert!(Instant::now() < deadline, "{}: gave up on {what}: {:?}", self.io, self.said);
            self.wake();
        }
    }

    /// A client's connection, and its name here.
    fn connection(&mut self) -> (TcpStream, SockId) {
        let client = TcpStream::connect(self.address).expect("a connection");
        client.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let raw = self.until("a connection", accepted);
        let sock = SockId { index: self.sockets, generation: 3 };
        self.sockets += 1;
        self.apply([Op::Adopt { raw, sock }]);
        (client, sock)
    }

    /// Everything received from a socket so far.
    fn received(&self, from: SockId) -> usize {
        let count = |said: &Completion| match said {
            Completion::Received { sock, chunk } if *sock == from => chunk.len(),
            _ => 0,
        };
        self.said.iter().map(count).sum()
    }
}

fn accepted(said: &Completion) -> Option<RawSocket> {
    match said {
        Completion::Accepted { listener: LISTENER, raw, .. } => Some(*raw),
        _ => None,
    }
}

fn ended(of: SockId) -> impl Fn(&Completion) -> Option<RecvEnd> {
    move |said| match said {
        Completion::RecvEnded { sock, why } if *sock == of => Some(*why),
        _ => None,
    }
}

fn sent(of: SockId) -> impl Fn(&Completion) -> Option<Result<usize, Errno>> {
    move |said| match said {
        Completion::Sent { sock, bytes } if *sock == of => Some(Ok(*bytes)),
        Completion::SendFailed { sock, error } if *sock == of => Some(Err(*error)),
        _ => None,
    }
}

fn chunks(count: usize) -> Chunks {
    (0..count).map(|_| Chunk::owned(vec![b'x'; 65_536])).collect()
}

fn by_each_door(promise: impl Fn(Rig)) {
    [Io::Uring, Io::Epoll].into_iter().for_each(|io| promise(Rig::new(io)));
}

#[test]
fn a_receive_for_one_chunk_takes_no_more_than_its_limit_and_ends() {
    by_each_door(|mut rig| {
        let (mut client, sock) = rig.connection();
        client.write_all(&[b'x'; 1000]).expect("taken");
        for total in [300, 600, 900, 1000] {
            rig.apply([Op::Recv { sock, mode: RecvMode::Once { limit_bytes: 300 } }]);
            assert_eq!(rig.until("its end", ended(sock)), RecvEnd::Ended);
            assert_eq!(rig.received(sock), total, "{}", rig.io);
        }
    });
}

#[test]
fn a_stopped_receive_says_so_and_loses_nothing() {
    by_each_door(|mut rig| {
        let (mut client, sock) = rig.connection();
        rig.apply([Op::Recv { sock, mode: RecvMode::Many }]);
        rig.wake();
        rig.apply([Op::StopRecv { sock }]);
        assert_eq!(rig.until("its end", ended(sock)), RecvEnd::Ended);
        client.write_all(b"while nobody receives").expect("taken");
        for _ in 0..3 {
            rig.wake();
        }
        assert_eq!(rig.received(sock), 0, "{}", rig.io);
        drop(client);
        // One may end by itself before.
        let mut end = RecvEnd::Ended;
        while end == RecvEnd::Ended {
            rig.apply([Op::Recv { sock, mode: RecvMode::Many }]);
            end = rig.until("its end", ended(sock));
        }
        assert_eq!(end, RecvEnd::Eof, "{}", rig.io);
        assert_eq!(rig.received(sock), b"while nobody receives".len(), "{}", rig.io);
    });
}

#[test]
fn the_end_is_told_to_whoever_asks_late() {
    by_each_door(|mut rig| {
        let (client, sock) = rig.connection();
        drop(client);
        for _ in 0..3 {
            rig.wake();
        }
        rig.apply([Op::Recv { sock, mode: RecvMode::Many }]);
        assert_eq!(rig.until("its end", ended(sock)), RecvEnd::Eof);
    });
}

#[test]
fn a_reset_is_told_and_made() {
    by_each_door(|mut rig| {
        let (client, sock) = rig.connection();
        rig.apply([Op::Recv { sock, mode: RecvMode::Many }]);
        setsockopt(&client, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 }).expect("linger");
        drop(client);
        assert_eq!(rig.until("its end", ended(sock)), RecvEnd::Failed(Errno(libc::ECONNRESET)));
        rig.apply([Op::Close { sock, reset: false }]);
        let (mut client, sock) = rig.connection();
        rig.apply([Op::Recv { sock, mode: RecvMode::Many }, Op::Close { sock, reset: true }]);
        rig.wake();
        let error = client.read(&mut [0; 1]).expect_err("a reset");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{}", rig.io);
        assert!(!rig.said.iter().any(|said| ended(sock)(said).is_some()), "nothing more is said of it");
    });
}

#[test]
fn a_send_that_does_not_wait_ends_at_once_and_one_that_waits_ends_when_there_is_room() {
    by_each_door(|mut rig| {
        let (mut client, sock) = rig.connection();
        // Until the socket's buffer is full.
        while {
            rig.apply([Op::Send { sock, chunks: chunks(16), mode: SendMode::Try, after: AfterSend::GoOn }]);
            rig.until("its end", sent(sock)).expect("a peer that is there") > 0
        } {}
        rig.apply([Op::Send { sock, chunks: chunks(1), mode: SendMode::WaitSome, after: AfterSend::GoOn }]);
        for _ in 0..3 {
            rig.wake();
        }
        assert!(!rig.said.iter().any(|said| sent(sock)(said).is_some()), "{}: there is no room", rig.io);
        let reader = std::thread::spawn(move || {
            let mut block = vec![0; 1 << 20];
            while matches!(client.read(&mut block), Ok(1..)) {}
        });
        assert!(rig.until("its end", sent(sock)).expect("a peer that is there") > 0);
        rig.apply([Op::Close { sock, reset: false }]);
        rig.wake();
        reader.join().expect("it has read all");
    });
}

#[test]
fn a_send_that_nothing_follows_tells_how_much_was_taken_with_whatever_completes_next() {
    by_each_door(|mut rig| {
        let (client, sock) = rig.connection();
        let quiet = |pieces| Op::Send {
            sock,
            chunks: chunks(pieces),
            mode: SendMode::Try,
            after: AfterSend::Nothing,
        };
        let (offered, mut taken) = (16 * 65_536, 0);
        loop {
            rig.apply([quiet(16)]);
            let bytes = rig.until("its end", sent(sock)).expect("a peer that is there");
            taken += bytes;
            if bytes < offered {
                break;
            }
        }
        let reader = std::thread::spawn(move || {
            let mut heard = 0;
            let mut block = vec![0; 1 << 20];
            while let Ok(bytes @ 1..) = (&client).read(&mut block) {
                heard += bytes;
            }
            heard
        });
        rig.apply([Op::ShutdownWrite { sock }]);
        rig.wake();
        assert_eq!(reader.join().expect("it reads to the end"), taken, "{}", rig.io);
    });
}

#[test]
fn many_sends_that_nothing_follows_are_each_told_once() {
    by_each_door(|mut rig| {
        let connections: Vec<(TcpStream, SockId)> = (0..50).map(|_| rig.connection()).collect();
        let chunk = || std::iter::once(Chunk::owned(b"hello".to_vec())).collect::<Chunks>();
        let send = |sock| Op::Send { sock, chunks: chunk(), mode: SendMode::Try, after: AfterSend::Nothing };
        rig.apply(connections.iter().map(|(_, sock)| send(*sock)));
        for (client, sock) in &connections {
            let mut heard = [0; 5];
            rig.wake();
            (&mut &*client).read_exact(&mut heard).expect("what was sent");
            assert_eq!(rig.until("its end", sent(*sock)), Ok(5));
        }
        let again = |said: &Completion| matches!(said, Completion::Sent { .. });
        assert!(!rig.said.iter().any(again), "{}: told twice", rig.io);
    });
}

#[test]
fn the_last_bytes_travel_with_the_end() {
    by_each_door(|mut rig| {
        let (mut client, sock) = rig.connection();
        let chunks: Chunks = std::iter::once(Chunk::owned(b"goodbye".to_vec())).collect();
        rig.apply([Op::Send { sock, chunks, mode: SendMode::Try, after: AfterSend::Fin }]);
        assert_eq!(rig.until("its end", sent(sock)), Ok(b"goodbye".len()));
        client.set_nonblocking(true).expect("a socket");
        let early = client.peek(&mut [0; 16]).expect_err("they wait for the end");
        assert_eq!(early.kind(), std::io::ErrorKind::WouldBlock, "{}", rig.io);
        client.set_nonblocking(false).expect("a socket");
        rig.apply([Op::ShutdownWrite { sock }]);
        rig.wake();
        let mut heard = String::new();
        client.read_to_string(&mut heard).expect("the end");
        assert_eq!(heard, "goodbye", "{}", rig.io);
    });
}

#[test]
fn a_waiting_send_can_be_stopped() {
    by_each_door(|mut rig| {
        let (client, sock) = rig.connection();
        rig.apply([Op::Send { sock, chunks: chunks(64), mode: SendMode::Try, after: AfterSend::GoOn }]);
        rig.until("its end", sent(sock)).expect("a peer that is there");
        rig.apply([Op::Send { sock, chunks: chunks(1024), mode: SendMode::WaitAll, after: AfterSend::GoOn }]);
        rig.wake();
        rig.apply([Op::StopSend { sock }]);
        let taken = rig.until("its end", sent(sock)).expect("a peer that is there");
        assert!(taken < 1024 * 65_536, "{}: nobody reads", rig.io);
        drop(client);
    });
}

#[test]
fn what_is_not_accepted_waits_and_a_stopped_accept_says_so() {
    by_each_door(|mut rig| {
        let stopped = |said: &Completion| match said {
            Completion::AcceptEnded { listener: LISTENER, error } => Some(*error),
            _ => None,
        };
        rig.apply([Op::StopAccept(LISTENER)]);
        assert_eq!(rig.until("the end of accepting", stopped), None);
        let _waiting = TcpStream::connect(rig.address).expect("the system's queue takes it");
        for _ in 0..3 {
            rig.wake();
        }
        assert!(!rig.said.iter().any(|said| accepted(said).is_some()), "{}", rig.io);
        rig.apply([Op::Accept(LISTENER)]);
        let raw = rig.until("a connection", accepted);
        rig.apply([Op::Refuse { raw }]);
        rig.door.remove_listener(LISTENER);
        rig.apply([Op::StopAccept(LISTENER)]);
        assert_eq!(rig.until("the end of accepting", stopped), None);
    });
}

#[test]
fn a_connect_to_nobody_fails_and_one_to_somebody_works() {
    by_each_door(|mut rig| {
        let nobody = {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
            listener.local_addr().expect("its address")
        };
        let somebody = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let [one, two] = [100, 101].map(|index| SockId { index, generation: 0 });
        rig.apply([
            Op::Connect { sock: one, address: nobody.into() },
            Op::Connect { sock: two, address: somebody.local_addr().expect("its address").into() },
        ]);
        let failed = rig.until("a failure", |said| match said {
            Completion::ConnectFailed { sock, error } if *sock == one => Some(*error),
            _ => None,
        });
        assert_eq!(failed, Errno(libc::ECONNREFUSED));
        rig.until("a connection", |said| match said {
            Completion::Connected { sock } if *sock == two => Some(()),
            _ => None,
        });
        rig.apply([one, two].map(|sock| Op::Close { sock, reset: false }));
    });
}

#[test]
fn whoever_sends_without_end_starves_nobody() {
    by_each_door(|mut rig| {
        let (mut flood, fast) = rig.connection();
        let (mut modest, slow) = rig.connection();
        rig.apply([fast, slow].map(|sock| Op::Recv { sock, mode: RecvMode::Many }));
        let flooding = std::thread::spawn(move || while flood.write_all(&[b'x'; 1 << 20]).is_ok() {});
        let (mut flooded, mut wakes, mut short) = (0, 0, 0);
        let deadline = Instant::now() + PATIENCE;
        while rig.received(slow) < 5 {
            if flooded > 1 << 20 {
                if wakes == 0 {
                    modest.write_all(b"hello").expect("taken");
                }
                wakes += 1;
            }
            assert!(wakes < 200 && Instant::now() < deadline, "{}: not heard in {wakes} wakes", rig.io);
            let fresh = rig.wake();
            let most = fresh.iter().filter(|said| matches!(said, Completion::Received { .. })).count();
            assert!(most <= usize::from(BUFFERS.count), "{}: one wake brought {most} chunks", rig.io);
            // As the core does: buffers are given back, and a receive that met a shortage is armed before others, for
            // a little at a time as long as it lasts.
            let mut over: Vec<(RecvEnd, SockId)> = [slow, fast]
                .into_iter()
                .filter_map(|sock| Some((fresh.iter().find_map(ended(sock))?, sock)))
                .collect();
            over.sort_by_key(|(why, _)| *why != RecvEnd::NoBuffers);
            short =
                if over.iter().any(|(why, _)| *why == RecvEnd::NoBuffers) { 10 } else { short.max(1) - 1 };
            flooded += rig.received(fast);
            rig.said.retain(|said| matches!(said, Completion::Received { sock, .. } if *sock == slow));
            let mode = if short > 0 { RecvMode::Once { limit_bytes: 65_536 } } else { RecvMode::Many };
            rig.apply(over.into_iter().map(|(_, sock)| Op::Recv { sock, mode }));
        }
        rig.apply([fast, slow].map(|sock| Op::Close { sock, reset: true }));
        rig.wake();
        flooding.join().expect("it was reset");
    });
}
