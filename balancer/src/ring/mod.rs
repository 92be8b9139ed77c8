//! The io_uring door: one ring per thread, one enter per batch.
//!
//! Multishot accept and receive, receives into shared buffers (`buffers`), sends straight from them,
//! ordinary descriptors, and generations in the tokens (`token`), so that a late completion of a closed
//! socket is known for what it is. `shutdown` and socket options are plain system calls:
//! IORING_OP_SHUTDOWN always goes to a worker thread.
//!
//! This is the one place with unsafe code on the data path. What it relies on: memory given to the kernel
//! lives in `buffers::Buffers` or `sends::Sends` until the kernel says it is done, or (connect
//! addresses) until the entry has been submitted; and the ring is dropped before either.

#![allow(unsafe_code)]

mod buffers;
pub mod inherit;
mod sends;
mod setup;
mod token;

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{EnterFlags, IoUring, cqueue, opcode, squeue};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{self, SockaddrLike, SockaddrStorage};
use rustix::net::SocketFlags;

use self::buffers::{Buffers, GROUP};
use self::sends::{Pointers, Sends};
use self::setup::Receives;
use self::token::Token;
use crate::core::chunk::Chunks;
use crate::core::io::{
    AfterSend, Completion, Errno, ListenerId, Op, RawSocket, RecvEnd, RecvMode, SendMode, SockId,
};
use crate::door::Door;
use crate::sockets;
use crate::table::Address;
use crate::unix::UnixSockets;

/// After so much a multishot receive is armed anew, where the kernel can end it: what a burst may bring
/// before the core is asked.
const CAP_BYTES: u32 = 128 * 1024;
/// Most sends whose ends are told of later: what they were sent from is lent until then.
const UNTOLD_MAX: usize = 32;

/// The io_uring door of one thread.
pub struct Ring {
    // Dropped first: from then on the kernel touches none of the memory below.
    uring: IoUring,
    buffers: Buffers,
    receives: Receives,
    sends: Sends,
    /// Sends of this batch that complete only if they fail or fall short: their slots, and how much they are of.
    untold: Vec<(u32, usize)>,
    /// Some are from a batch before: what became of them was not to be known.
    untold_before: bool,
    slots: Vec<Slot>,
    listeners: HashMap<u32, Arc<OwnedFd>>,
    /// Addresses of connects that are not yet submitted.
    #[expect(clippy::vec_box, reason = "the kernel is given their places, so they must not move")]
    addresses: Vec<Box<SockaddrStorage>>,
    /// What is known without entering the ring.
    ready: Vec<Completion>,
    reaped: Vec<cqueue::Entry>,
    waker: Arc<EventFd>,
    /// What the kernel reads the waker's count into.
    woken: Box<u64>,
    wake_armed: bool,
    unix: UnixSockets,
}

/// A socket of the core's.
#[derive(Default)]
struct Slot {
    generation: u32,
    fd: Option<RawFd>,
    /// It was connected just now, so nothing can have come.
    fresh: bool,
    /// Operations in the ring that refer to it, which hold it open.
    connecting: bool,
    receiving: bool,
    /// As a slot of the table of sends.
    sending: Option<u32>,
}

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    #[error(
        "cannot set up io_uring with SINGLE_ISSUER and DEFER_TASKRUN: it needs Linux 6.1, and no policy \
         that denies io_uring_setup (sysctl kernel.io_uring_disabled, a seccomp filter); --io epoll does \
         without"
    )]
    Setup(#[source] io::Error),
    #[error("cannot allocate {count} receive buffers of {size} bytes")]
    Buffers {
        count: u16,
        size: usize,
        #[source]
        source: io::Error,
    },
    #[error("cannot register the receive buffers with io_uring")]
    Register(#[source] io::Error),
    #[error("cannot restrict io_uring to what the balancer needs")]
    Restrict(#[source] io::Error),
}

impl Ring {
    /// Sets up a ring for the calling thread, which alone may use it.
    pub fn new(
        buffer_count: u16,
        buffer_size: usize,
        waker: Arc<EventFd>,
        unix: UnixSockets,
    ) -> Result<Self, RingError> {
        let (mut uring, mut buffers) = setup::make(buffer_count, buffer_size)?;
        let receives = Receives::probe(&mut uring, &mut buffers);
        Ok(Self {
            uring,
            buffers,
            receives,
            sends: Sends::default(),
            untold: Vec::new(),
            untold_before: false,
            slots: Vec::new(),
            listeners: HashMap::new(),
            addresses: Vec::new(),
            ready: Vec::new(),
            reaped: Vec::new(),
            waker,
            woken: Box::new(0),
            wake_armed: false,
            unix,
        })
    }

    fn perform(&mut self, op: Op) -> io::Result<()> {
        match op {
            Op::Accept(id) => self.accept(id),
            Op::StopAccept(id) => self.cancel(Token::Accept { listener: id.0 }),
            Op::Adopt { raw, sock } => {
                *self.slot_mut(sock.index) =
                    Slot { generation: sock.generation, fd: Some(raw.0), ..Slot::default() };
                Ok(())
            }
            Op::Refuse { raw } => {
                // SAFETY: the core gives back, once, a descriptor that it was given and did not adopt.
                let socket = unsafe { OwnedFd::from_raw_fd(raw.0) };
                reset_on_close(raw.0);
                drop(socket);
                Ok(())
            }
            Op::Connect { sock, address } => self.connect(sock, &address),
            Op::Recv { sock, mode } => self.recv(sock, mode),
            Op::StopRecv { sock } => self.cancel(Token::Recv(sock)),
            Op::Send { sock, chunks, mode, after } => self.send(sock, chunks, mode, after),
            Op::StopSend { sock } => self.stop_send(sock),
            Op::ShutdownWrite { sock } => {
                if let Some(fd) = self.fd(sock) {
                    // Fails only where the peer is gone already, which its receive reports.
                    let _ = socket::shutdown(fd, socket::Shutdown::Write);
                }
                Ok(())
            }
            Op::Close { sock, reset } => self.close(sock, reset),
            // What decorates the door does these, with operations of the others.
            Op::StartTls { .. } | Op::EndTls { .. } => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn accept(&mut self, id: ListenerId) -> io::Result<()> {
        let Some(listener) = self.listeners.get(&id.0) else {
            self.ready.push(Completion::AcceptEnded { listener: id, error: None });
            return Ok(());
        };
        let entry = opcode::AcceptMulti::new(Fd(listener.as_raw_fd())).flags(libc::SOCK_CLOEXEC);
        self.push(entry.build(), Token::Accept { listener: id.0 })
    }

    /// A connect to a unix socket is over at once, and needs no place in the ring.
    fn connect(&mut self, sock: SockId, address: &Address) -> io::Result<()> {
        *self.slot_mut(sock.index) = Slot { generation: sock.generation, ..Slot::default() };
        let made = match address {
            Address::Tcp(address) => sockets::tcp(*address, SocketFlags::empty()),
            Address::Unix(path) => self.unix.connect(path),
        };
        let fd = match made {
            Ok(socket) => socket.into_raw_fd(),
            Err(error) => {
                let error = Errno(error.raw_os_error());
                self.ready.push(Completion::ConnectFailed { sock, error });
                return Ok(());
            }
        };
        let slot = self.slot_mut(sock.index);
        (slot.fd, slot.fresh) = (Some(fd), true);
        let Address::Tcp(address) = address else {
            self.ready.push(Completion::Connected { sock });
            return Ok(());
        };
        self.slot_mut(sock.index).connecting = true;
        let address = Box::new(SockaddrStorage::from(*address));
        let entry = opcode::Connect::new(Fd(fd), address.as_ptr(), address.len()).build();
        self.addresses.push(address);
        self.push(entry, Token::Connect(sock))
    }

    fn recv(&mut self, sock: SockId, mode: RecvMode) -> io::Result<()> {
        let Some(fd) = self.fd(sock) else { return Ok(()) };
        let slot = self.slot_mut(sock.index);
        slot.receiving = true;
        let fresh = std::mem::take(&mut slot.fresh);
        let size = self.buffers.size() as u32;
        let mut entry = match (mode, self.receives) {
            (RecvMode::Many, Receives { capped: true, .. }) => setup::recv_capped(fd, CAP_BYTES),
            (RecvMode::Many, Receives { fair: true, .. }) => opcode::RecvMulti::new(Fd(fd), GROUP).build(),
            (RecvMode::Many, _) => setup::recv_once(fd, size),
            (RecvMode::Once { limit_bytes }, Receives { bundles: true, .. }) if limit_bytes >= size => {
                setup::recv_bundle(fd, limit_bytes / size, size)
            }
            (RecvMode::Once { limit_bytes }, _) => setup::recv_once(fd, limit_bytes.min(size)),
        };
        if fresh {
            setup::poll_first(&mut entry);
        }
        self.push(entry, Token::Recv(sock))
    }

    /// What FIN is to follow is a system call, as FIN is: the two leave together, without a turn of the ring between
    /// them.
    fn send(&mut self, sock: SockId, chunks: Chunks, mode: SendMode, after: AfterSend) -> io::Result<()> {
        let Some(fd) = self.fd(sock) else { return Ok(()) };
        if (mode, after) == (SendMode::Try, AfterSend::Fin) {
            // SAFETY: the slot holds the descriptor open for the length of this call.
            let socket = unsafe { BorrowedFd::borrow_raw(fd) };
            let taken = sockets::send(socket, &chunks, after).map_err(|error| error.raw_os_error());
            self.ready.push(sent(sock, taken));
            return Ok(());
        }
        let untold = (mode, after) == (SendMode::Try, AfterSend::Nothing) && self.untold.len() < UNTOLD_MAX;
        let more = if after == AfterSend::Fin { libc::MSG_MORE } else { 0 };
        let wait = match mode {
            // With both, to be taken in part is a failure, of which is told how much.
            SendMode::Try if untold => libc::MSG_DONTWAIT | libc::MSG_WAITALL,
            SendMode::Try => libc::MSG_DONTWAIT,
            SendMode::WaitSome => 0,
            SendMode::WaitAll => libc::MSG_WAITALL,
        };
        let flags = libc::MSG_NOSIGNAL | more | wait;
        let bytes = chunks.iter().map(|chunk| chunk.len()).sum();
        let (slot, pointers) = self.sends.begin(sock, chunks);
        self.slot_mut(sock.index).sending = Some(slot);
        let entry = match pointers {
            Pointers::Bytes(bytes, len) => opcode::Send::new(Fd(fd), bytes, len).flags(flags).build(),
            Pointers::Message(header) => opcode::SendMsg::new(Fd(fd), header).flags(flags as u32).build(),
        };
        if !untold {
            return self.push(entry, Token::Send { slot });
        }
        self.untold.push((slot, bytes));
        self.push(entry.flags(squeue::Flags::SKIP_SUCCESS), Token::Send { slot })
    }

    fn stop_send(&mut self, sock: SockId) -> io::Result<()> {
        let slot = self.slots.get(sock.index as usize).filter(|slot| slot.generation == sock.generation);
        match slot.and_then(|slot| slot.sending) {
            Some(slot) => self.cancel(Token::Send { slot }),
            None => Ok(()),
        }
    }

    fn close(&mut self, sock: SockId, reset: bool) -> io::Result<()> {
        let Some(slot) = self.slots.get_mut(sock.index as usize) else { return Ok(()) };
        if slot.generation != sock.generation {
            return Ok(());
        }
        let Some(fd) = slot.fd.take() else { return Ok(()) };
        let (connecting, receiving, sending) = (slot.connecting, slot.receiving, slot.sending);
        if reset {
            reset_on_close(fd);
        }
        // What is under way holds the socket open, so the peer would not see its end. Each by its own token,
        // which the kernel looks up; by descriptor it would look through everything that waits.
        let connect = connecting.then_some(Token::Connect(sock));
        let recv = receiving.then_some(Token::Recv(sock));
        let send = sending.map(|slot| Token::Send { slot });
        for token in [connect, recv, send].into_iter().flatten() {
            self.cancel(token)?;
        }
        self.push(opcode::Close::new(Fd(fd)).build().flags(squeue::Flags::SKIP_SUCCESS), Token::Ignored)
    }

    fn cancel(&mut self, token: Token) -> io::Result<()> {
        let cancel = opcode::AsyncCancel::new(token.pack()).build();
        self.push(cancel.flags(squeue::Flags::SKIP_SUCCESS), Token::Ignored)
    }

    fn push(&mut self, entry: squeue::Entry, token: Token) -> io::Result<()> {
        let entry = entry.user_data(token.pack());
        loop {
            // SAFETY: every pointer in an entry is to memory kept as the module header says; descriptors
            // are open until a later entry closes them.
            if unsafe { self.uring.submission().push(&entry) }.is_ok() {
                return Ok(());
            }
            match self.uring.submit() {
                Ok(_) => {}
                Err(error) if is_passing(&error) => self.reap(),
                Err(error) => return Err(error),
            }
        }
    }

    fn arm_wake(&mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.wake_armed, true) {
            return Ok(());
        }
        let buffer: *mut u64 = &mut *self.woken;
        let entry = opcode::Read::new(Fd(self.waker.as_raw_fd()), buffer.cast(), 8).build();
        self.push(entry, Token::Wake)
    }

    /// Takes what the kernel has completed off its queue.
    fn reap(&mut self) {
        let Self { uring, reaped, .. } = self;
        reaped.extend(uring.completion());
    }

    fn translate(&mut self, entry: &cqueue::Entry, out: &mut Vec<Completion>) {
        let (result, flags) = (entry.result(), entry.flags());
        match Token::unpack(entry.user_data()) {
            Token::Ignored => {}
            Token::Wake => self.wake_armed = false,
            Token::Accept { listener } => self.accepted(ListenerId(listener), result, flags, out),
            Token::Connect(sock) => {
                if let Some(slot) = self.open_slot(sock) {
                    slot.connecting = false;
                    out.push(match result {
                        0 => Completion::Connected { sock },
                        error => Completion::ConnectFailed { sock, error: Errno(-error) },
                    });
                }
            }
            Token::Recv(sock) => self.received(sock, result, flags, out),
            Token::Send { slot } => {
                self.untold.retain(|(untold, _)| *untold != slot);
                self.send_ended(slot, usize::try_from(result).map_err(|_| -result), out);
            }
        }
    }

    fn send_ended(&mut self, slot: u32, taken: Result<usize, i32>, out: &mut Vec<Completion>) {
        let Some(sock) = self.sends.end(slot) else { return };
        let Some(open) = self.open_slot(sock) else { return };
        open.sending = None;
        out.push(sent(sock, taken));
    }

    /// Those of the untold sends that have not failed took all, once every entry is submitted and every completion
    /// taken.
    fn tell_untold(&mut self, reaped: &[cqueue::Entry], out: &mut Vec<Completion>) {
        let submission = self.uring.submission();
        let all_known = submission.is_empty() && !submission.cq_overflow();
        drop(submission);
        self.untold_before = !all_known && !self.untold.is_empty();
        if self.untold.is_empty() || !all_known {
            return;
        }
        let is_send = |entry: &&cqueue::Entry| matches!(Token::unpack(entry.user_data()), Token::Send { .. });
        reaped.iter().filter(is_send).for_each(|entry| self.translate(entry, out));
        let mut untold = std::mem::take(&mut self.untold);
        for (slot, bytes) in untold.drain(..) {
            self.send_ended(slot, Ok(bytes), out);
        }
        self.untold = untold;
    }

    fn accepted(&mut self, listener: ListenerId, result: i32, flags: u32, out: &mut Vec<Completion>) {
        if result >= 0 {
            let peer = peer_address(result);
            out.push(Completion::Accepted { listener, raw: RawSocket(result), peer });
        }
        if !cqueue::more(flags) {
            // A client that gave up in the queue, and being stopped, are no faults.
            let harmless = result >= 0 || matches!(-result, libc::ECANCELED | libc::ECONNABORTED);
            let error = if harmless { None } else { Some(Errno(-result)) };
            out.push(Completion::AcceptEnded { listener, error });
        }
    }

    fn received(&mut self, sock: SockId, result: i32, flags: u32, out: &mut Vec<Completion>) {
        let over = !cqueue::more(flags);
        let open = self.open_slot(sock);
        let known = open.is_some();
        if let Some(slot) = open {
            slot.receiving = !over;
        }
        if let Some(first) = cqueue::buffer_select(flags) {
            // Lent even to a socket that is closed: dropping it is what gives the buffer back.
            self.buffers.lend(first, result.max(0) as usize, |chunk| {
                if known && !chunk.is_empty() {
                    out.push(Completion::Received { sock, chunk });
                }
            });
        }
        if !known {
            return;
        }
        if over {
            let why = match result {
                0 => RecvEnd::Eof,
                1.. => RecvEnd::Ended,
                error => match -error {
                    libc::ECANCELED | libc::EINTR | libc::EAGAIN => RecvEnd::Ended,
                    libc::ENOBUFS => RecvEnd::NoBuffers,
                    errno => RecvEnd::Failed(Errno(errno)),
                },
            };
            out.push(Completion::RecvEnded { sock, why });
        }
    }

    /// The slot of a socket that the core still has.
    fn open_slot(&mut self, sock: SockId) -> Option<&mut Slot> {
        let slot = self.slots.get_mut(sock.index as usize)?;
        (slot.generation == sock.generation && slot.fd.is_some()).then_some(slot)
    }

    fn fd(&self, sock: SockId) -> Option<RawFd> {
        let slot = self.slots.get(sock.index as usize).filter(|slot| slot.generation == sock.generation)?;
        slot.fd
    }

    fn slot_mut(&mut self, index: u32) -> &mut Slot {
        let index = index as usize;
        if index >= self.slots.len() {
            self.slots.resize_with(index + 1, Slot::default);
        }
        &mut self.slots[index]
    }
}

impl Door for Ring {
    fn add_listener(&mut self, id: ListenerId, socket: Arc<OwnedFd>) {
        self.listeners.insert(id.0, socket);
    }

    fn remove_listener(&mut self, id: ListenerId) {
        self.listeners.remove(&id.0);
    }

    fn apply(&mut self, ops: &mut Vec<Op>) -> io::Result<()> {
        for op in ops.drain(..) {
            self.perform(op)?;
        }
        Ok(())
    }

    fn wait(&mut self, timeout: Option<Duration>, completions: &mut Vec<Completion>) -> io::Result<()> {
        if !self.ready.is_empty() {
            // It may lead to more to submit, and all of that goes in one enter.
            completions.append(&mut self.ready);
            return Ok(());
        }
        self.arm_wake()?;
        // Completions that the kernel keeps for lack of room name buffers by their order, which giving others
        // back would change.
        if !self.uring.submission().cq_overflow() {
            self.buffers.give_back();
        }
        let known_already = !self.reaped.is_empty() || self.untold_before;
        let timeout = if known_already { Some(Duration::ZERO) } else { timeout };
        let entered = match timeout {
            // Wanting none still runs the deferred work; no time to wait for one would also set a timer.
            Some(Duration::ZERO) => {
                let count = self.uring.submission().len() as u32;
                let flags = EnterFlags::GETEVENTS.bits();
                // SAFETY: no argument is given, and entries are as `push` says.
                unsafe { self.uring.submitter().enter::<libc::sigset_t>(count, 0, flags, None) }
            }
            Some(timeout) => {
                let timespec = Timespec::from(timeout);
                self.uring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timespec))
            }
            None => self.uring.submit_and_wait(1),
        };
        match entered {
            Ok(_) => {}
            Err(error) if is_passing(&error) => {}
            Err(error) => return Err(error),
        }
        if self.uring.submission().is_empty() {
            self.addresses.clear();
        }
        self.reap();
        let reaped = std::mem::take(&mut self.reaped);
        self.tell_untold(&reaped, completions);
        for entry in &reaped {
            self.translate(entry, completions);
        }
        self.reaped = reaped;
        self.reaped.clear();
        Ok(())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        for slot in &mut self.slots {
            if let Some(fd) = slot.fd.take() {
                // SAFETY: the slot owned this descriptor and has just let go of it.
                drop(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
}

/// Errors of an enter after which one goes on: time is up, a signal, the kernel wants its completions taken
/// first or is short of memory for the moment.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN))
}

/// What a send came to: how much was taken, or an error number.
fn sent(sock: SockId, taken: Result<usize, i32>) -> Completion {
    match taken {
        Ok(bytes) => Completion::Sent { sock, bytes },
        Err(libc::EAGAIN | libc::ECANCELED | libc::EINTR) => Completion::Sent { sock, bytes: 0 },
        Err(error) => Completion::SendFailed { sock, error: Errno(error) },
    }
}

fn reset_on_close(fd: RawFd) {
    // SAFETY: the caller owns the descriptor, which is open for the length of this call.
    sockets::reset_on_close(unsafe { BorrowedFd::borrow_raw(fd) });
}

fn peer_address(fd: RawFd) -> Option<SocketAddr> {
    let address: SockaddrStorage = socket::getpeername(fd).ok()?;
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddr::from(SocketAddrV4::from(*v4)));
    }
    address.as_sockaddr_in6().map(|v6| SocketAddr::from(SocketAddrV6::from(*v6)))
}
