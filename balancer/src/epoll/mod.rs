//! The epoll door: for where io_uring is denied (a container's seccomp filter, `kernel.io_uring_disabled`,
//! an old kernel). The same operations, a system call each.
//!
//! ```text
//!   apply ── sends, connects, closes: done at once ──▶ ready ──┐
//!                                                              ├──▶ completions
//!   wait ─── readable, says epoll ──▶ due ── one turn each ────┘
//!                                      ▲          │ there is more
//!                                      └──────────┘
//! ```
//!
//! Sockets are registered once, edge-triggered, so that arming and stopping a receive costs no call: what
//! epoll has said is kept in the socket's slot until it is used up. In one wake each readable socket has one
//! turn, and one that has more to give goes to the end of the line, so that a fast sender starves nobody.
//! Listeners are level-triggered and exclusive: a connection wakes one thread.
//!
//! Unlike in the ring nothing outlives the call that did it: a send that does not wait is over when `apply`
//! returns, and an accept that is told to stop has stopped. No unsafe code is needed here.

#![forbid(unsafe_code)]

mod buffers;
mod slot;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno as SysErrno;
use rustix::net::{Shutdown, SocketFlags};

use self::buffers::Buffers;
use self::slot::{Interest, Slot};
use crate::core::io::{AfterSend, Completion, Errno, ListenerId, Op, RawSocket, RecvEnd, SendMode, SockId};
use crate::door::Door;
use crate::sockets;
use crate::table::Address;
use crate::unix::UnixSockets;

/// Most events taken in one wake.
const EVENTS_MAX: usize = 1024;
/// With so many receives a batch has its fill: what is received has to be sent, and meanwhile nobody is
/// received from.
const RECEIVES_PER_BATCH_MAX: usize = 128;
/// Most connections accepted from one listener in one wake.
const ACCEPTS_PER_WAKE_MAX: usize = 64;

/// The epoll door of one thread.
pub struct Epoll {
    epoll: OwnedFd,
    events: Vec<Event>,
    slots: Vec<Option<Slot>>,
    listeners: HashMap<u32, Listener>,
    /// Accepted, and not yet adopted or refused.
    unadopted: HashMap<i32, OwnedFd>,
    /// Readable sockets whose receive is armed, in the order of their turns.
    due: VecDeque<SockId>,
    /// What `apply` has found out.
    ready: Vec<Completion>,
    /// The last wake did not look at epoll.
    skipped: bool,
    buffers: Buffers,
    unix: UnixSockets,
    /// Open for as long as it is registered.
    _waker: Arc<EventFd>,
}

struct Listener {
    socket: Arc<OwnedFd>,
    armed: bool,
}

/// Why there is no epoll door.
#[derive(Debug, thiserror::Error)]
pub enum EpollError {
    #[error("cannot make an epoll descriptor")]
    Create(#[source] io::Error),
    #[error("cannot watch the wake-up descriptor with epoll")]
    Waker(#[source] io::Error),
}

/// What an event is about.
enum Token {
    Waker,
    Listener(ListenerId),
    Sock(SockId),
}

impl Epoll {
    /// A door that receives into buffers of `buffer_size` bytes, and keeps `buffer_count` for the next time.
    pub fn new(
        buffer_count: u16,
        buffer_size: usize,
        waker: Arc<EventFd>,
        unix: UnixSockets,
    ) -> Result<Self, EpollError> {
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(|error| EpollError::Create(error.into()))?;
        // Edge-triggered each write to it is news, and its count need not be read.
        epoll::add(&epoll, &waker, Token::Waker.pack(), EventFlags::IN | EventFlags::ET)
            .map_err(|error| EpollError::Waker(error.into()))?;
        Ok(Self {
            epoll,
            events: Vec::with_capacity(EVENTS_MAX),
            slots: Vec::new(),
            listeners: HashMap::new(),
            unadopted: HashMap::new(),
            due: VecDeque::new(),
            ready: Vec::new(),
            skipped: false,
            buffers: Buffers::new(usize::from(buffer_count), buffer_size),
            unix,
            _waker: waker,
        })
    }

    fn perform(&mut self, op: Op) -> io::Result<()> {
        match op {
            Op::Accept(id) => self.accept(id),
            Op::StopAccept(id) => self.stop_accept(id),
            Op::Adopt { raw, sock } => self.adopt(raw, sock),
            Op::Refuse { raw } => {
                if let Some(socket) = self.unadopted.remove(&raw.0) {
                    sockets::reset_on_close(&socket);
                }
            }
            Op::Connect { sock, address } => {
                if let Err(error) = self.connect(sock, &address) {
                    let error = Errno(error.raw_os_error());
                    self.ready.push(Completion::ConnectFailed { sock, error });
                }
            }
            Op::Recv { sock, mode } => {
                if let Some(slot) = find(&mut self.slots, sock) {
                    slot.recv = Some(mode);
                    line_up(slot, &mut self.due);
                }
            }
            Op::StopRecv { sock } => {
                if find(&mut self.slots, sock).is_some_and(|slot| slot.recv.take().is_some()) {
                    self.ready.push(Completion::RecvEnded { sock, why: RecvEnd::Ended });
                }
            }
            Op::Send { sock, chunks, mode, after } => {
                let Some(slot) = find(&mut self.slots, sock) else { return Ok(()) };
                match slot.send(chunks, mode, after) {
                    Some(over) => self.ready.push(over),
                    None => watch(&self.epoll, slot, Interest::ReadingAndWriting),
                }
            }
            Op::StopSend { sock } => {
                let Some(slot) = find(&mut self.slots, sock) else { return Ok(()) };
                if slot.waiting_send.take().is_some() {
                    self.ready.push(Completion::Sent { sock, bytes: 0 });
                    watch(&self.epoll, slot, Interest::Reading);
                }
            }
            Op::ShutdownWrite { sock } => {
                if let Some(slot) = find(&mut self.slots, sock) {
                    // Fails only where the peer is gone already, which its receive reports.
                    let _ = rustix::net::shutdown(&slot.socket, Shutdown::Write);
                }
            }
            Op::Close { sock, reset } => self.close(sock, reset),
            // What decorates the door does these, with operations of the others.
            Op::StartTls { .. } | Op::EndTls { .. } => return Err(io::ErrorKind::Unsupported.into()),
        }
        Ok(())
    }

    fn accept(&mut self, id: ListenerId) {
        let Some(listener) = self.listeners.get_mut(&id.0) else {
            return self.ready.push(Completion::AcceptEnded { listener: id, error: None });
        };
        let flags = EventFlags::IN | EventFlags::EXCLUSIVE;
        match epoll::add(&self.epoll, &listener.socket, Token::Listener(id).pack(), flags) {
            Ok(()) => listener.armed = true,
            Err(error) => {
                let error = Some(Errno(error.raw_os_error()));
                self.ready.push(Completion::AcceptEnded { listener: id, error });
            }
        }
    }

    /// Nobody else would say that accepting has ended; of a listener that was removed, neither.
    fn stop_accept(&mut self, id: ListenerId) {
        if self.disarm(id) || !self.listeners.contains_key(&id.0) {
            self.ready.push(Completion::AcceptEnded { listener: id, error: None });
        }
    }

    /// Looks at a listener no more; false when it was not looked at.
    fn disarm(&mut self, id: ListenerId) -> bool {
        let Some(listener) = self.listeners.get_mut(&id.0) else { return false };
        if !std::mem::replace(&mut listener.armed, false) {
            return false;
        }
        // It was added, and is open.
        let _ = epoll::delete(&self.epoll, &listener.socket);
        true
    }

    /// A listener has connections. Those left after this are told of again.
    fn accept_some(&mut self, id: ListenerId, out: &mut Vec<Completion>) {
        for _ in 0..ACCEPTS_PER_WAKE_MAX {
            let Some(listener) = self.listeners.get(&id.0).filter(|listener| listener.armed) else { return };
            match rustix::net::acceptfrom_with(&listener.socket, SocketFlags::CLOEXEC) {
                Ok((socket, peer)) => {
                    let raw = RawSocket(socket.as_raw_fd());
                    self.unadopted.insert(raw.0, socket);
                    let peer = peer.and_then(|peer| peer.try_into().ok());
                    out.push(Completion::Accepted { listener: id, raw, peer });
                }
                // All are accepted, or another thread was faster.
                Err(SysErrno::AGAIN) => return,
                // A client that gave up in the queue is no fault.
                Err(SysErrno::INTR | SysErrno::CONNABORTED) => {}
                Err(error) => {
                    self.disarm(id);
                    let error = Some(Errno(error.raw_os_error()));
                    return out.push(Completion::AcceptEnded { listener: id, error });
                }
            }
        }
    }

    fn adopt(&mut self, raw: RawSocket, sock: SockId) {
        let Some(socket) = self.unadopted.remove(&raw.0) else { return };
        let mut slot = Slot::new(sock, socket, Interest::Reading);
        if self.register(&slot).is_err() {
            slot.give_up();
        }
        self.put(slot);
    }

    /// A connect to a unix socket is over at once; one by TCP when the socket can be written to.
    fn connect(&mut self, sock: SockId, address: &Address) -> rustix::io::Result<()> {
        let slot = match address {
            Address::Unix(path) => Slot::new(sock, self.unix.connect(path)?, Interest::Reading),
            Address::Tcp(address) => {
                let socket = sockets::begin_connect(*address)?;
                let slot = Slot::new(sock, socket, Interest::ReadingAndWriting);
                Slot { connecting: true, ..slot }
            }
        };
        self.register(&slot)?;
        if !slot.connecting {
            self.ready.push(Completion::Connected { sock });
        }
        self.put(slot);
        Ok(())
    }

    fn register(&self, slot: &Slot) -> rustix::io::Result<()> {
        epoll::add(&self.epoll, &slot.socket, Token::Sock(slot.sock).pack(), slot.interest.flags())
    }

    fn put(&mut self, slot: Slot) {
        let index = slot.sock.index as usize;
        if index >= self.slots.len() {
            self.slots.resize_with(index + 1, || None);
        }
        self.slots[index] = Some(slot);
    }

    /// Closing also ends the registration.
    fn close(&mut self, sock: SockId, reset: bool) {
        let Some(slot) = find(&mut self.slots, sock) else { return };
        if reset {
            sockets::reset_on_close(&slot.socket);
        }
        self.slots[sock.index as usize] = None;
    }

    /// Takes in what epoll says of a socket.
    fn event(&mut self, sock: SockId, flags: EventFlags, out: &mut Vec<Completion>) {
        // One that was closed in the same wake, or whose descriptor a child shortly had a copy of.
        let Some(slot) = find(&mut self.slots, sock) else { return };
        if slot.connecting {
            slot.connecting = false;
            out.push(match sockets::error(&slot.socket) {
                Ok(()) => Completion::Connected { sock },
                Err(error) => Completion::ConnectFailed { sock, error: Errno(error.raw_os_error()) },
            });
        }
        if let Some(chunks) = slot.waiting_send.take()
            && let Some(over) = slot.send(chunks, SendMode::WaitSome, AfterSend::GoOn)
        {
            out.push(over);
            watch(&self.epoll, slot, Interest::Reading);
        }
        slot.note(flags);
        line_up(slot, &mut self.due);
    }

    /// Those in line have one turn each, until the batch has received its fill; then the others are first.
    fn take_turns(&mut self, out: &mut Vec<Completion>) {
        let enough = out.len() + RECEIVES_PER_BATCH_MAX;
        for _ in 0..self.due.len() {
            if out.len() >= enough {
                return;
            }
            let Some(sock) = self.due.pop_front() else { return };
            let Some(slot) = find(&mut self.slots, sock) else { continue };
            slot.due = false;
            slot.receive(&self.buffers, out);
            line_up(slot, &mut self.due);
        }
    }

    /// Asks epoll, unless there is something to do already and it was asked the last time.
    fn look(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.events.clear();
        let busy = !self.ready.is_empty() || !self.due.is_empty();
        self.skipped = busy && !self.skipped;
        if self.skipped {
            return Ok(());
        }
        let timeout = if busy { Some(Duration::ZERO) } else { timeout };
        let timeout = timeout.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        match epoll::wait(&self.epoll, spare_capacity(&mut self.events), timeout.as_ref()) {
            Ok(_) | Err(SysErrno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Door for Epoll {
    fn add_listener(&mut self, id: ListenerId, socket: Arc<OwnedFd>) {
        self.listeners.insert(id.0, Listener { socket, armed: false });
    }

    fn remove_listener(&mut self, id: ListenerId) {
        self.disarm(id);
        self.listeners.remove(&id.0);
    }

    fn apply(&mut self, ops: &mut Vec<Op>) -> io::Result<()> {
        for op in ops.drain(..) {
            self.perform(op)?;
        }
        Ok(())
    }

    fn wait(&mut self, timeout: Option<Duration>, completions: &mut Vec<Completion>) -> io::Result<()> {
        self.look(timeout)?;
        completions.append(&mut self.ready);
        let events = std::mem::take(&mut self.events);
        for event in &events {
            let (data, flags) = (event.data, event.flags);
            match Token::unpack(data) {
                Token::Waker => {}
                Token::Listener(id) => self.accept_some(id, completions),
                Token::Sock(sock) => self.event(sock, flags, completions),
            }
        }
        self.events = events;
        self.take_turns(completions);
        Ok(())
    }
}

impl Token {
    const WAKER: u64 = u64::MAX;
    /// Above every generation.
    const LISTENER: u64 = 1 << 63;

    fn pack(self) -> EventData {
        EventData::new_u64(match self {
            Self::Waker => Self::WAKER,
            Self::Listener(id) => Self::LISTENER | u64::from(id.0),
            Self::Sock(sock) => u64::from(sock.generation) << 32 | u64::from(sock.index),
        })
    }

    fn unpack(data: EventData) -> Self {
        match data.u64() {
            Self::WAKER => Self::Waker,
            bits if bits & Self::LISTENER != 0 => Self::Listener(ListenerId(bits as u32)),
            bits => Self::Sock(SockId { index: bits as u32, generation: (bits >> 32) as u32 }),
        }
    }
}

fn find(slots: &mut [Option<Slot>], sock: SockId) -> Option<&mut Slot> {
    slots.get_mut(sock.index as usize)?.as_mut().filter(|slot| slot.sock == sock)
}

/// Puts a socket in line if it wants to receive and there may be something.
fn line_up(slot: &mut Slot, due: &mut VecDeque<SockId>) {
    if slot.readable && slot.recv.is_some() && !std::mem::replace(&mut slot.due, true) {
        due.push_back(slot.sock);
    }
}

fn watch(epoll: &OwnedFd, slot: &mut Slot, interest: Interest) {
    if slot.interest != interest {
        slot.interest = interest;
        // It is registered and open, and wanting something else of it needs no memory. Room that came
        // before this call is told of, too.
        let _ = epoll::modify(epoll, &slot.socket, Token::Sock(slot.sock).pack(), interest.flags());
    }
}
