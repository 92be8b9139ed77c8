//! What waits to be sent on one socket.
//!
//! ```text
//!            push                 next_send
//!   (empty) ─────▶ queued, idle ───────────▶ Trying ── sent all ──▶ idle
//!                     ▲                        │ sent less
//!                     │                        ▼
//!                     └──── sent some ───── Waiting     (everything queued is now owned)
//! ```
//!
//! *Trying* is a send that does not wait, straight from the door's shared buffers, and is over within the
//! batch. When it falls short the peer is slow: what is left is copied, and from then on the socket waits
//! on bytes of our own. So shared buffers are never held from one batch to the next, and what one slow peer
//! can cost is the bound its sources are throttled at.

use std::collections::VecDeque;

use super::chunk::Chunk;

/// Most chunks given to one send. Far below the system's 1,024.
const CHUNKS_PER_SEND_MAX: usize = 64;
/// Small spilled chunks are joined up to this size.
const JOIN_BYTES: usize = 16 * 1024;
/// Chunks up to this size are copied behind one of our own, rather than sent as a piece of their own.
const SMALL_BYTES: usize = 2 * 1024;

/// The queue of one socket, and the send under way.
#[derive(Debug, Default)]
pub struct Outbox {
    queue: VecDeque<Chunk>,
    bytes: usize,
    state: SendState,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum SendState {
    #[default]
    Idle,
    /// With how many bytes were offered.
    Trying(usize),
    Waiting,
}

impl Outbox {
    /// Bytes not yet taken by the socket.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Adds bytes at the end.
    pub fn push(&mut self, chunk: Chunk) {
        if chunk.is_empty() {
            return;
        }
        self.bytes += chunk.len();
        let waiting = self.state == SendState::Waiting;
        if (waiting || chunk.len() <= SMALL_BYTES)
            && self.queue.back_mut().is_some_and(|last| last.try_extend(&chunk, JOIN_BYTES))
        {
            return;
        }
        self.queue.push_back(if waiting { chunk.into_owned() } else { chunk });
    }

    /// The next send to issue, and whether it may wait; none while one is under way or nothing is queued.
    pub fn next_send(&mut self) -> Option<(Vec<Chunk>, bool)> {
        if self.state != SendState::Idle || self.queue.is_empty() {
            return None;
        }
        let chunks: Vec<Chunk> = self.queue.iter().take(CHUNKS_PER_SEND_MAX).cloned().collect();
        let wait = !self.queue.iter().any(Chunk::is_shared);
        let offered = chunks.iter().map(|chunk| chunk.len()).sum();
        self.state = if wait { SendState::Waiting } else { SendState::Trying(offered) };
        Some((chunks, wait))
    }

    /// The send under way is over; `bytes` of it were taken.
    pub fn sent(&mut self, bytes: usize) {
        debug_assert!(self.state != SendState::Idle, "a send ended that was never issued");
        debug_assert!(bytes <= self.bytes, "more was sent than was queued");
        let state = std::mem::take(&mut self.state);
        self.take(bytes);
        if matches!(state, SendState::Trying(offered) if bytes < offered) {
            self.spill();
        }
    }

    fn take(&mut self, mut bytes: usize) {
        self.bytes -= bytes.min(self.bytes);
        while let Some(front) = self.queue.front_mut() {
            if front.len() > bytes {
                front.advance(bytes);
                return;
            }
            bytes -= front.len();
            self.queue.pop_front();
        }
    }

    /// Copies what is queued, so that the next send may wait.
    fn spill(&mut self) {
        let queue = std::mem::take(&mut self.queue);
        for chunk in queue {
            let joined = self.queue.back_mut().is_some_and(|last| last.try_extend(&chunk, JOIN_BYTES));
            if !joined {
                self.queue.push_back(chunk.into_owned());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::super::chunk::SharedBuffer;
    use super::*;

    struct Lent(Vec<u8>);

    impl SharedBuffer for Lent {
        fn bytes(&self) -> &[u8] {
            &self.0
        }
    }

    fn lend(bytes: &[u8]) -> (Chunk, std::rc::Weak<Lent>) {
        let lent = Rc::new(Lent(bytes.to_vec()));
        let weak = Rc::downgrade(&lent);
        (Chunk::shared(lent), weak)
    }

    #[test]
    fn a_short_send_gives_shared_buffers_back() {
        let mut outbox = Outbox::default();
        let (chunk, lent) = lend(b"hello world");
        outbox.push(chunk);
        let (chunks, wait) = outbox.next_send().unwrap();
        assert!(!wait && outbox.next_send().is_none());
        drop(chunks);
        outbox.sent(5);
        assert!(lent.upgrade().is_none(), "the buffer is still held");
        let (chunks, wait) = outbox.next_send().unwrap();
        assert!(wait);
        assert_eq!(&*chunks[0], b" world");
        let (late, lent) = lend(b"!");
        outbox.push(late);
        assert!(lent.upgrade().is_none(), "a waiting outbox holds a shared buffer");
        outbox.sent(6);
        let (chunks, _) = outbox.next_send().unwrap();
        assert_eq!(&*chunks[0], b"!");
        outbox.sent(1);
        assert!(outbox.is_empty() && outbox.bytes() == 0);
    }

    #[test]
    fn small_spilled_chunks_are_joined() {
        let mut outbox = Outbox::default();
        outbox.push(Chunk::owned(b"x".to_vec()));
        let (_in_flight, wait) = outbox.next_send().unwrap();
        assert!(wait);
        for _ in 0..1000 {
            outbox.push(lend(b"y").0);
        }
        assert_eq!((outbox.queue.len(), outbox.bytes()), (2, 1001));
    }
}
