//! A socket of the core's: what epoll has said of it, and what the core has asked of it.

use std::os::fd::OwnedFd;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::EventFlags;
use rustix::io::{Errno as SysErrno, retry_on_intr};
use rustix::net::{RecvFlags, Shutdown, recv, shutdown};

use super::buffers::Buffers;
use crate::core::chunk::Chunks;
use crate::core::io::{AfterSend, Completion, Errno, RecvEnd, RecvMode, SendMode, SockId};
use crate::sockets;

/// Most buffers one socket may fill in its turn.
const READS_PER_TURN_MAX: usize = 4;

/// One socket.
pub struct Slot {
    pub sock: SockId,
    pub socket: OwnedFd,
    pub interest: Interest,
    pub recv: Option<RecvMode>,
    /// Something may be there to be received; known until a receive finds nothing.
    pub readable: bool,
    /// In the line of those that have a turn.
    pub due: bool,
    pub connecting: bool,
    /// A send that waits for room.
    pub waiting_send: Option<Chunks>,
}

/// What epoll is asked to tell. Room to send is asked for only while it is waited for: a unix socket would
/// tell of it after every message that its peer takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    Reading,
    ReadingAndWriting,
}

impl Interest {
    pub fn flags(self) -> EventFlags {
        let reading = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        match self {
            Self::Reading => reading,
            Self::ReadingAndWriting => reading | EventFlags::OUT,
        }
    }
}

impl Slot {
    pub fn new(sock: SockId, socket: OwnedFd, interest: Interest) -> Self {
        Self {
            sock,
            socket,
            interest,
            recv: None,
            readable: false,
            due: false,
            connecting: false,
            waiting_send: None,
        }
    }

    /// A socket that cannot be watched is ended both ways, which its next receive tells the core.
    pub fn give_up(&mut self) {
        let _ = shutdown(&self.socket, Shutdown::Both);
        self.readable = true;
    }

    /// Takes in what epoll says.
    pub fn note(&mut self, flags: EventFlags) {
        let ends = EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR;
        self.readable |= flags.intersects(ends | EventFlags::IN);
    }

    /// A turn to receive: a few buffers at most, then others have theirs.
    pub fn receive(&mut self, buffers: &Buffers, out: &mut Vec<Completion>) {
        for _ in 0..READS_PER_TURN_MAX {
            let Some(mode) = self.recv.filter(|_| self.readable) else { return };
            let sock = self.sock;
            let mut buffer = buffers.take();
            let room = match mode {
                RecvMode::Many => buffer.capacity(),
                RecvMode::Once { limit_bytes } => buffer.capacity().min(limit_bytes as usize),
            };
            let received = match room < buffer.capacity() {
                true => recv_some(&self.socket, &mut buffer, room),
                false => recv_full(&self.socket, &mut buffer),
            };
            let why = match received {
                Ok(1..) => {
                    // Also with less than there was room for there may be more: behind an urgent byte, behind
                    // a message with descriptors, or the end. None of these is told of again.
                    out.push(Completion::Received { sock, chunk: buffers.lend(buffer) });
                    match mode {
                        RecvMode::Many => continue,
                        RecvMode::Once { .. } => RecvEnd::Ended,
                    }
                }
                Ok(0) => RecvEnd::Eof,
                Err(SysErrno::AGAIN) => {
                    self.readable = false;
                    return buffers.put_back(buffer);
                }
                Err(error) => RecvEnd::Failed(Errno(error.raw_os_error())),
            };
            self.recv = None;
            return out.push(Completion::RecvEnded { sock, why });
        }
    }

    /// Sends what fits. One that waits, and finds no room, is kept for later.
    pub fn send(&mut self, chunks: Chunks, mode: SendMode, after: AfterSend) -> Option<Completion> {
        let sock = self.sock;
        match sockets::send(&self.socket, &chunks, after) {
            Ok(bytes) => Some(Completion::Sent { sock, bytes }),
            Err(SysErrno::AGAIN) if mode != SendMode::Try => {
                self.waiting_send = Some(chunks);
                None
            }
            Err(SysErrno::AGAIN) => Some(Completion::Sent { sock, bytes: 0 }),
            Err(error) => Some(Completion::SendFailed { sock, error: Errno(error.raw_os_error()) }),
        }
    }
}

/// Receives as much as the buffer holds.
fn recv_full(socket: &OwnedFd, buffer: &mut Vec<u8>) -> rustix::io::Result<usize> {
    let received = retry_on_intr(|| recv(socket, spare_capacity(buffer), RecvFlags::DONTWAIT))?;
    Ok(received.0)
}

/// Receives less than that. Such receives are small, so clearing the memory first costs little.
fn recv_some(socket: &OwnedFd, buffer: &mut Vec<u8>, room: usize) -> rustix::io::Result<usize> {
    buffer.resize(room, 0);
    let received = retry_on_intr(|| recv(socket, buffer.as_mut_slice(), RecvFlags::DONTWAIT));
    let count = received.map_or(0, |(_, count)| count);
    buffer.truncate(count);
    received.map(|_| count)
}
