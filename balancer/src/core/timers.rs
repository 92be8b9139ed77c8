//! Deadlines, kept lazily: a socket has one entry, which is looked at again when it comes up.
//!
//! A deadline that moves later (each request moves one) costs nothing until the entry comes up; only one
//! that moves earlier adds an entry. Entries of sockets that are gone stay until they come up too, or until there are
//! more than two for each socket that is there: then all that nobody waits for are dropped at once.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::io::{Millis, SockId};

/// When which socket is to be looked at.
#[derive(Debug, Default)]
pub struct Timers {
    heap: BinaryHeap<Reverse<(Millis, SockId)>>,
}

impl Timers {
    pub fn push(&mut self, at: Millis, sock: SockId) {
        self.heap.push(Reverse((at, sock)));
    }

    pub fn len(&self) -> usize {
        self.heap.len()
    }

    /// Drops the entries that are waited for no longer.
    pub fn retain(&mut self, is_awaited: impl Fn(Millis, SockId) -> bool) {
        self.heap.retain(|Reverse((at, sock))| is_awaited(*at, *sock));
    }

    pub fn next_at(&self) -> Option<Millis> {
        self.heap.peek().map(|Reverse((at, _))| *at)
    }

    /// The next entry that is due.
    pub fn pop_due(&mut self, now: Millis) -> Option<(Millis, SockId)> {
        if self.next_at()? > now {
            return None;
        }
        self.heap.pop().map(|Reverse(entry)| entry)
    }
}
