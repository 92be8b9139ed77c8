//! The least that a ring can do between two sockets: what no balancer of this design can be cheaper than.
//!
//! One thread, one multishot receive for each socket from a ring of buffers, one send without a completion for what
//! it brings, one enter for each batch; what comes together with the end leaves together with FIN. It has no routes, deadlines, limits or counts, it connects while the others
//! wait, and it gives a buffer back on the word of the kernel that a send into an empty socket copies at once: it is
//! good for small requests in closed loops, and for nothing else.

use std::alloc::{Layout, alloc_zeroed};
use std::collections::HashMap;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::{BufRingEntry, Fd};
use io_uring::{IoUring, cqueue, opcode, squeue};
use nix::errno::Errno;
use nix::sys::socket::{Backlog, MsgFlags, Shutdown, listen, send, setsockopt, shutdown, sockopt};

const GROUP: u16 = 0;
const BUFFERS: u16 = 1024;
const BUFFER_BYTES: usize = 4096;
const PAGE_BYTES: usize = 4096;
/// From linux/socket.h.
const MSG_MORE: MsgFlags = MsgFlags::from_bits_retain(0x8000);
/// Marks the completion of an accept; other completions carry a descriptor.
const ACCEPT: u64 = u64::MAX;
/// Marks that of a send, which there is only when it failed.
const SEND: u64 = u64::MAX - 1;

/// Passes bytes and ends between clients and the upstream, an address or `unix:PATH`, until it is killed.
pub fn proxy(address: &str, upstream: &str) {
    let listener = TcpListener::bind(address).expect("a listener");
    listen(&listener, Backlog::MAXCONN).expect("a longer queue");
    setsockopt(&listener, sockopt::TcpNoDelay, &true).expect("an option that accepted sockets inherit");
    let mut front = Front::new(listener.as_raw_fd());
    front.push(&opcode::AcceptMulti::new(Fd(front.listener)).build().user_data(ACCEPT));
    loop {
        front.uring.submit_and_wait(1).expect("entering the ring");
        // What was sent from them has been copied.
        front.buffers.give_back();
        front.serve(upstream);
        front.end();
    }
}

struct Front {
    uring: IoUring,
    buffers: Buffers,
    listener: RawFd,
    /// The other side of each socket.
    peers: HashMap<RawFd, RawFd>,
    batch: Vec<cqueue::Entry>,
    /// Sockets whose end is in the batch.
    ending: Vec<RawFd>,
    /// Sockets that receive no more.
    ended: Vec<RawFd>,
}

impl Front {
    fn new(listener: RawFd) -> Self {
        let uring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_submit_all()
            .setup_cqsize(16 * 1024)
            .build(4096)
            .expect("a ring");
        let buffers = Buffers::new();
        let address = buffers.entries as u64;
        // SAFETY: the entries are never freed.
        unsafe { uring.submitter().register_buf_ring_with_flags(address, BUFFERS, GROUP, 0) }
            .expect("registering the buffers");
        Self {
            uring,
            buffers,
            listener,
            peers: HashMap::new(),
            batch: Vec::new(),
            ending: Vec::new(),
            ended: Vec::new(),
        }
    }

    fn serve(&mut self, upstream: &str) {
        let mut batch = std::mem::take(&mut self.batch);
        batch.extend(self.uring.completion());
        // The end of a socket that brings something too comes right behind it.
        let ends = |completion: &cqueue::Entry| completion.result() == 0;
        self.ending.extend(batch.iter().filter(|entry| ends(entry)).map(|entry| entry.user_data() as RawFd));
        for completion in batch.drain(..) {
            match completion.user_data() {
                ACCEPT => self.accepted(completion.result(), upstream),
                SEND => {}
                fd => self.received(fd as RawFd, &completion),
            }
        }
        self.batch = batch;
        self.ending.clear();
    }

    fn accepted(&mut self, client: RawFd, upstream: &str) {
        assert!(client >= 0, "accepting: {}", Errno::from_raw(-client));
        let Ok(server) = connect(upstream) else {
            close(client);
            return;
        };
        let server = server.into_raw_fd();
        self.peers.extend([(client, server), (server, client)]);
        self.receive(client);
        self.receive(server);
    }

    fn received(&mut self, fd: RawFd, completion: &cqueue::Entry) {
        let result = completion.result();
        if result > 0 {
            let id = cqueue::buffer_select(completion.flags()).expect("a buffer with what came");
            match self.peers.get(&fd) {
                Some(peer) if self.ending.contains(&fd) => {
                    // SAFETY: the kernel has filled so much of the buffer, and has lent it.
                    let bytes = unsafe { std::slice::from_raw_parts(self.buffers.of(id), result as usize) };
                    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT | MSG_MORE;
                    // A peer that is gone shows when it is received from.
                    let _ = send(*peer, bytes, flags);
                }
                Some(peer) => {
                    let flags = (MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_WAITALL).bits();
                    let bytes = self.buffers.of(id);
                    let entry = opcode::Send::new(Fd(*peer), bytes, result as u32).flags(flags).build();
                    self.push(&entry.flags(squeue::Flags::SKIP_SUCCESS).user_data(SEND));
                }
                None => {}
            }
            self.buffers.sent.push(id);
        }
        if cqueue::more(completion.flags()) {
            return;
        }
        if result > 0 || result == -(Errno::ENOBUFS as i32) {
            self.receive(fd);
            return;
        }
        self.ended.push(fd);
    }

    /// An end is passed on, behind what was sent; sockets are closed when both have ended.
    fn end(&mut self) {
        for fd in std::mem::take(&mut self.ended) {
            let Some(peer) = self.peers.remove(&fd) else { continue };
            if self.peers.contains_key(&peer) {
                let _ = shutdown(peer, Shutdown::Write);
            } else {
                close(fd);
                close(peer);
            }
        }
    }

    fn receive(&mut self, fd: RawFd) {
        self.push(&opcode::RecvMulti::new(Fd(fd), GROUP).build().user_data(fd as u64));
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: what an entry points to is a buffer that is given back after the enter that sends from it.
        while unsafe { self.uring.submission().push(entry) }.is_err() {
            self.uring.submit().expect("submitting");
        }
    }
}

fn connect(upstream: &str) -> io::Result<OwnedFd> {
    if let Some(path) = upstream.strip_prefix("unix:") {
        return UnixStream::connect(path).map(OwnedFd::from);
    }
    let stream = TcpStream::connect(upstream)?;
    stream.set_nodelay(true)?;
    Ok(stream.into())
}

fn close(fd: RawFd) {
    // SAFETY: the descriptor is one of ours, and its receive, the last that knew it, has ended.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
}

/// The buffers that the kernel receives into, never freed.
struct Buffers {
    entries: *mut BufRingEntry,
    memory: *mut u8,
    tail: u16,
    /// Those that are being sent from.
    sent: Vec<u16>,
}

impl Buffers {
    fn new() -> Self {
        let entries = pages(usize::from(BUFFERS) * size_of::<BufRingEntry>()).cast();
        let memory = pages(usize::from(BUFFERS) * BUFFER_BYTES);
        let mut buffers = Self { entries, memory, tail: 0, sent: (0..BUFFERS).collect() };
        buffers.give_back();
        buffers
    }

    fn of(&self, id: u16) -> *const u8 {
        assert!(id < BUFFERS);
        // SAFETY: the buffer of that number lies inside the memory.
        unsafe { self.memory.add(usize::from(id) * BUFFER_BYTES) }
    }

    fn give_back(&mut self) {
        for id in std::mem::take(&mut self.sent) {
            let address = self.of(id) as u64;
            // SAFETY: the place lies inside the ring, and the kernel reads only up to the tail it has seen.
            let entry = unsafe { &mut *self.entries.add(usize::from(self.tail % BUFFERS)) };
            entry.set_addr(address);
            entry.set_len(BUFFER_BYTES as u32);
            entry.set_bid(id);
            self.tail = self.tail.wrapping_add(1);
        }
        // SAFETY: the tail lies in the first entry, aligned for it, and both sides use it atomically.
        let tail = unsafe { &*BufRingEntry::tail(self.entries).cast::<AtomicU16>() };
        tail.store(self.tail, Ordering::Release);
    }
}

fn pages(bytes: usize) -> *mut u8 {
    let layout = Layout::from_size_align(bytes, PAGE_BYTES).expect("a layout");
    // SAFETY: the layout is not empty.
    let memory = unsafe { alloc_zeroed(layout) };
    assert!(!memory.is_null(), "no memory");
    memory
}
