//! What waits to be sent on one socket.
//!
//! ```text
//!            push              next_send
//!   (empty) ─────▶ queued, Idle ─────────┬─▶ Trying ──── sent all ────▶ Idle
//!                     ▲                  │      └─ sent less ─▶ Idle, short ─┐
//!                     │                  └─▶ Waiting ◀──────────────────────┘
//!                     └──── sent some, or stopped ─┘     (all of it lent within the budget, or spilled)
//! ```
//!
//! *Trying* is a send that does not wait and is over within the batch: what small messages use, straight from
//! the door's shared buffers. *Waiting* is a send that waits for the peer. It may wait on shared buffers too,
//! so that a fast bulk flow is never copied, but only on as many as the [budget](super::memory) lends. When few
//! are left, whoever has kept its for longer than [`PATIENCE_MS`] has to give them back: its send is stopped,
//! what is left is copied, and until it has proved quick again nothing is lent to it. So slow peers cost bounded memory of our own, and never the buffers that
//! others receive into.

use std::rc::Rc;

use super::chunk::{Chunk, Chunks};
use super::io::{Millis, SendMode};
use super::memory::{Budget, Share};

/// How long a send may wait on shared buffers while few are left.
pub const PATIENCE_MS: Millis = 30;
/// A peer that takes what waits within this is quick again.
const QUICK_MS: Millis = 10;
/// Most chunks given to one send. Far below the system's 1,024.
const CHUNKS_PER_SEND_MAX: usize = 64;
/// Most shared buffers one socket may wait on.
const LENT_MAX: usize = 32;
/// Up to this much is tried first: small messages nearly always fit.
const TRY_BYTES: usize = 16 * 1024;
/// Small spilled chunks are joined up to this size.
const JOIN_BYTES: usize = 16 * 1024;
/// Chunks up to this size are copied behind one of our own, rather than sent as a piece of their own.
const SMALL_BYTES: usize = 2 * 1024;

/// The queue of one socket, and the send under way. Small while there is neither: most sockets idle.
#[derive(Debug, Default)]
pub struct Outbox {
    busy: Option<Box<Busy>>,
    /// The peer let a send wait too long: nothing is lent to it.
    slow: bool,
}

/// What is queued; a part of it is under way.
#[derive(Debug, Default)]
struct Busy {
    queue: Chunks,
    bytes: usize,
    /// Of the queue: chunks in shared buffers, and their bytes.
    shared: usize,
    shared_bytes: usize,
    state: SendState,
    /// What the queue costs from batch to batch; none while it costs nothing.
    share: Option<Share>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum SendState {
    #[default]
    Idle,
    /// The last send took less than all of it.
    Short,
    /// With how many bytes were offered.
    Trying(usize),
    Waiting {
        since: Millis,
        stopped: bool,
    },
}

/// A send to issue.
#[derive(Debug)]
pub struct Send {
    pub chunks: Chunks,
    pub mode: SendMode,
    /// It is all that is queued.
    pub whole: bool,
}

impl Outbox {
    /// What an outbox takes that has something in it, beside the bytes, which the budget counts. Spilled chunks
    /// are joined and few are lent, so the queue is short.
    pub const BUSY_BYTES: usize = size_of::<Busy>() + 8 * size_of::<Chunk>();

    /// Bytes not yet taken by the socket.
    pub fn bytes(&self) -> usize {
        self.busy.as_ref().map_or(0, |busy| busy.bytes)
    }

    pub fn is_empty(&self) -> bool {
        self.busy.is_none()
    }

    /// The peer does not keep up.
    pub fn is_slow(&self) -> bool {
        self.slow
    }

    /// A send is under way that does not wait.
    pub fn is_trying(&self) -> bool {
        self.busy.as_ref().is_some_and(|busy| matches!(busy.state, SendState::Trying(_)))
    }

    /// A send waits on shared buffers.
    pub fn is_lending(&self) -> bool {
        self.busy.as_ref().is_some_and(|busy| busy.is_waiting() && busy.shared > 0)
    }

    /// Bytes wait in memory of our own.
    pub fn is_spilling(&self) -> bool {
        self.busy.as_ref().is_some_and(|busy| busy.share.is_some() && busy.bytes > busy.shared_bytes)
    }

    /// Adds bytes at the end.
    pub fn push(&mut self, chunk: Chunk) {
        if !chunk.is_empty() {
            self.busy.get_or_insert_default().push(chunk);
        }
    }

    /// Brings the queue within the budget, and returns the next send to issue: none while one is under way
    /// or nothing is queued. Called once everything of a batch is queued.
    pub fn next_send(&mut self, now: Millis, budget: &Rc<Budget>) -> Option<Send> {
        let slow = self.slow;
        let busy = self.busy.as_mut()?;
        match busy.state {
            SendState::Trying(_) => None,
            SendState::Waiting { .. } => {
                busy.settle_share(budget, slow);
                None
            }
            SendState::Idle if busy.must_try(budget, slow) => Some(busy.try_send()),
            SendState::Idle | SendState::Short => {
                busy.settle_share(budget, slow);
                Some(busy.wait_send(now))
            }
        }
    }

    /// The send under way is over; `bytes` of it were taken.
    pub fn sent(&mut self, now: Millis, bytes: usize) {
        debug_assert!(self.busy.is_some(), "a send ended that was never issued");
        let Some(busy) = &mut self.busy else { return };
        busy.take(bytes);
        let over = busy.queue.is_empty();
        busy.state = match busy.state {
            SendState::Trying(offered) if bytes < offered => SendState::Short,
            SendState::Waiting { since, stopped } => {
                self.slow &= stopped || now - since > QUICK_MS || !over;
                // It has just been waited for; another try would only be refused.
                SendState::Short
            }
            _ => SendState::Idle,
        };
        if over {
            self.busy = None;
        }
    }

    /// Whether a send has waited on shared buffers for too long, and is to be stopped. Says so once.
    pub fn has_lent_too_long(&mut self, now: Millis) -> bool {
        let Some(busy) = self.busy.as_mut().filter(|busy| busy.shared > 0) else { return false };
        let SendState::Waiting { since, stopped: stopped @ false } = &mut busy.state else { return false };
        *stopped = now >= *since + PATIENCE_MS;
        self.slow |= *stopped;
        *stopped
    }
}

impl Busy {
    fn is_waiting(&self) -> bool {
        matches!(self.state, SendState::Waiting { .. })
    }

    fn push(&mut self, chunk: Chunk) {
        self.bytes += chunk.len();
        let small = chunk.len() <= SMALL_BYTES;
        if small && self.queue.last_mut().is_some_and(|last| last.try_extend(&chunk, JOIN_BYTES)) {
            return;
        }
        if chunk.is_shared() {
            self.shared += 1;
            self.shared_bytes += chunk.len();
        }
        self.queue.push(chunk);
    }

    fn try_send(&mut self) -> Send {
        let chunks = self.next_chunks();
        self.state = SendState::Trying(chunks.iter().map(|chunk| chunk.len()).sum());
        Send { mode: SendMode::Try, whole: chunks.len() == self.queue.len(), chunks }
    }

    fn wait_send(&mut self, now: Millis) -> Send {
        let chunks = self.next_chunks();
        self.state = SendState::Waiting { since: now, stopped: false };
        // What is lent is sent off whole, or stopped; of what is ours every byte taken shows that the peer
        // is alive.
        let lent = chunks.iter().any(Chunk::is_shared);
        let mode = if lent { SendMode::WaitAll } else { SendMode::WaitSome };
        Send { mode, whole: chunks.len() == self.queue.len(), chunks }
    }

    fn next_chunks(&self) -> Chunks {
        self.queue.iter().take(CHUNKS_PER_SEND_MAX).cloned().collect()
    }

    /// How many shared buffers may be lent here in all.
    fn lendable(&self, budget: &Budget) -> usize {
        LENT_MAX.min(budget.lent_left() + self.lent())
    }

    fn lent(&self) -> usize {
        self.share.as_ref().map_or(0, Share::lent)
    }

    /// Whether what is queued should be tried first: when it is little, when nothing may be lent, or when
    /// the most that may wait is less than what is there.
    fn must_try(&self, budget: &Budget, slow: bool) -> bool {
        self.shared > 0 && (slow || self.bytes <= TRY_BYTES || self.shared > self.lendable(budget))
    }

    /// What stays for longer than this batch is lent as far as the budget goes; the rest is copied.
    fn settle_share(&mut self, budget: &Rc<Budget>, slow: bool) {
        // A send under way reads from its buffers until it is over, whatever is decided here.
        let kept = if self.is_waiting() { self.lent() } else { 0 };
        let lendable = if slow { kept } else { self.lendable(budget).max(kept) };
        let crumbs = self.queue.iter().any(|chunk| chunk.is_shared() && chunk.len() <= SMALL_BYTES);
        if self.shared > lendable || crumbs {
            self.spill(lendable);
        }
        let share = self.share.get_or_insert_with(|| Share::new(budget));
        share.set(self.shared, self.bytes - self.shared_bytes);
    }

    fn take(&mut self, mut bytes: usize) {
        debug_assert!(bytes <= self.bytes, "more was sent than was queued");
        self.bytes -= bytes.min(self.bytes);
        let mut whole = 0;
        for chunk in &mut self.queue {
            let taken = chunk.len().min(bytes);
            let over = taken == chunk.len();
            if chunk.is_shared() {
                self.shared_bytes -= taken;
                self.shared -= usize::from(over);
            }
            bytes -= taken;
            if !over {
                chunk.advance(taken);
                break;
            }
            whole += 1;
        }
        self.queue.drain(..whole);
    }

    /// Copies all but the first `kept` shared chunks, and those too small to be worth a buffer.
    fn spill(&mut self, kept: usize) {
        let queue = std::mem::take(&mut self.queue);
        (self.shared, self.shared_bytes) = (0, 0);
        for chunk in queue {
            if chunk.is_shared() && chunk.len() > SMALL_BYTES && self.shared < kept {
                self.shared += 1;
                self.shared_bytes += chunk.len();
                self.queue.push(chunk);
                continue;
            }
            let joined = chunk.is_shared()
                && self.queue.last_mut().is_some_and(|last| last.try_extend(&chunk, JOIN_BYTES));
            if !joined {
                self.queue.push(chunk.into_owned());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::chunk::SharedBuffer;
    use super::super::memory::Limits;
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

    fn budget(lent_max: usize) -> Rc<Budget> {
        Budget::new(Limits { lent_max, ..Limits::default() })
    }

    fn bytes(chunks: &[Chunk]) -> Vec<u8> {
        chunks.iter().flat_map(|chunk| chunk.to_vec()).collect()
    }

    #[test]
    fn a_short_try_gives_what_may_not_be_lent_back() {
        let (mut outbox, budget) = (Outbox::default(), budget(0));
        let (chunk, lent) = lend(b"hello world");
        outbox.push(chunk);
        let send = outbox.next_send(0, &budget).unwrap();
        assert!(send.mode == SendMode::Try && outbox.next_send(0, &budget).is_none());
        drop(send);
        outbox.sent(0, 5);
        let send = outbox.next_send(0, &budget).unwrap();
        assert!(lent.upgrade().is_none(), "the buffer is still held");
        assert_eq!((send.mode, bytes(&send.chunks)), (SendMode::WaitSome, b" world".to_vec()));
        let (late, lent) = lend(b"!");
        outbox.push(late);
        assert!(outbox.next_send(0, &budget).is_none());
        assert!(lent.upgrade().is_none(), "a waiting outbox holds a shared buffer");
        drop(send);
        outbox.sent(0, 6);
        assert_eq!(bytes(&outbox.next_send(0, &budget).unwrap().chunks), b"!");
        assert_eq!(budget.spilled_bytes(), 1);
        outbox.sent(0, 1);
        assert!(outbox.is_empty() && outbox.bytes() == 0 && budget.spilled_bytes() == 0);
    }

    #[test]
    fn bulk_waits_on_lent_buffers_within_the_budget_and_for_a_while() {
        let (mut outbox, budget) = (Outbox::default(), budget(2));
        let (chunks, lent): (Vec<_>, Vec<_>) = (0..3).map(|n| lend(&vec![n; 20_000])).unzip();
        chunks.into_iter().for_each(|chunk| outbox.push(chunk));
        // More than may be lent: tried first.
        assert_eq!(outbox.next_send(0, &budget).unwrap().mode, SendMode::Try);
        outbox.sent(0, 10_000);
        let send = outbox.next_send(0, &budget).unwrap();
        assert_eq!((send.mode, budget.lent(), budget.spilled_bytes()), (SendMode::WaitAll, 2, 20_000));
        drop(send);
        assert!(lent[0].upgrade().is_some() && lent[2].upgrade().is_none());
        assert!(!outbox.has_lent_too_long(PATIENCE_MS - 1) && outbox.has_lent_too_long(PATIENCE_MS));
        assert!(!outbox.has_lent_too_long(PATIENCE_MS + 1), "it is stopped once");
        outbox.sent(PATIENCE_MS, 0);
        let send = outbox.next_send(PATIENCE_MS, &budget).unwrap();
        assert_eq!((send.mode, budget.lent(), budget.spilled_bytes()), (SendMode::WaitSome, 0, 50_000));
        assert!(lent.iter().all(|lent| lent.upgrade().is_none()) && outbox.is_slow());
        outbox.sent(PATIENCE_MS + 1, 50_000);
        assert!(!outbox.is_slow() && budget.spilled_bytes() == 0);
    }

    #[test]
    fn small_spilled_chunks_are_joined() {
        let (mut outbox, budget) = (Outbox::default(), budget(256));
        outbox.push(Chunk::owned(b"x".to_vec()));
        let in_flight = outbox.next_send(0, &budget).unwrap();
        assert_eq!(in_flight.mode, SendMode::WaitSome);
        (0..1000).for_each(|_| outbox.push(lend(b"y").0));
        assert!(outbox.next_send(0, &budget).is_none());
        let pieces = outbox.busy.as_ref().map_or(0, |busy| busy.queue.len());
        assert_eq!((pieces, outbox.bytes(), budget.lent()), (2, 1001, 0));
    }
}
