//! The buffers that the epoll door receives into, lent to the core as chunks.
//!
//! ```text
//!   free ── take ──▶ being filled ── lend ──▶ the core's ── last reference dropped ──▶ free
//! ```
//!
//! Made when they are needed. The core keeps few beyond a batch (`core::memory`), so there are never many more
//! than one batch fills; those beyond the number to keep are let go when they come back.

use std::cell::RefCell;
use std::rc::Rc;

use crate::core::chunk::{Chunk, SharedBuffer};

/// Receive buffers of one size.
pub struct Buffers {
    pool: Rc<Pool>,
}

struct Pool {
    size_bytes: usize,
    keep: usize,
    free: RefCell<Vec<Vec<u8>>>,
}

/// A filled buffer, lent to the core.
struct Lease {
    pool: Rc<Pool>,
    bytes: Vec<u8>,
}

impl Buffers {
    pub fn new(keep: usize, size_bytes: usize) -> Self {
        Self { pool: Rc::new(Pool { size_bytes, keep, free: RefCell::default() }) }
    }

    /// An empty buffer, with room for as much as one may hold.
    pub fn take(&self) -> Vec<u8> {
        let kept = self.pool.free.borrow_mut().pop();
        kept.unwrap_or_else(|| Vec::with_capacity(self.pool.size_bytes))
    }

    /// Lends what was received.
    pub fn lend(&self, bytes: Vec<u8>) -> Chunk {
        Chunk::shared(Rc::new(Lease { pool: self.pool.clone(), bytes }))
    }

    /// Takes a buffer back that nothing was received into.
    pub fn put_back(&self, buffer: Vec<u8>) {
        self.pool.put_back(buffer);
    }
}

impl Pool {
    fn put_back(&self, mut buffer: Vec<u8>) {
        let mut free = self.free.borrow_mut();
        if free.len() < self.keep {
            buffer.clear();
            free.push(buffer);
        }
    }
}

impl SharedBuffer for Lease {
    fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.pool.put_back(std::mem::take(&mut self.bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_empty_when_the_last_chunk_of_it_is_gone() {
        let buffers = Buffers::new(1, 64);
        let mut buffer = buffers.take();
        buffer.extend_from_slice(b"received");
        let place = buffer.as_ptr();
        let whole = buffers.lend(buffer);
        let part = whole.slice(0..3);
        drop(whole);
        assert_eq!((&*part, buffers.pool.free.borrow().len()), (&b"rec"[..], 0));
        drop(part);
        let again = buffers.take();
        assert_eq!((again.as_ptr(), again.len(), again.capacity()), (place, 0, 64));
    }

    #[test]
    fn no_more_are_kept_than_asked_for() {
        let buffers = Buffers::new(2, 64);
        let lent: Vec<Chunk> = (0..5).map(|_| buffers.lend(buffers.take())).collect();
        drop(lent);
        assert_eq!(buffers.pool.free.borrow().len(), 2);
    }
}
