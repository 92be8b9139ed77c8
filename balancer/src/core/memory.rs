//! What waits in memory, and how much of it there may be.
//!
//! A byte that could not be sent at once waits in one of two places. *Lent*: still in the door's shared
//! buffer that it was received into. That costs nothing, but the buffer is missing to whoever receives next,
//! so at most [`Limits::lent_max`] buffers may be lent from batch to batch, half of what the door has, and
//! when half of those are, the longest lent are called back.
//! *Spilled*: copied into memory of our own, which costs the copy and the memory, at most
//! [`Limits::spill_bytes_max`] of it; from [`Limits::pressed_bytes`] on, flows are throttled harder.
//!
//! What was received and cannot be used yet is *kept*: heads that are not complete, bodies that have nowhere to
//! go. It has a bound of its own, [`Limits::kept_bytes_max`], so that clients who send heads without end throttle
//! nobody's transfer; beyond it, who keeps more than [`KEPT_FAIR_BYTES`] is turned away.
//!
//! Each outbox that waits holds its share ([`Share`]) and gives it back when it is dropped, and so does each
//! socket with what it keeps ([`Kept`]), so the totals are right whichever way a socket ends.

use std::cell::Cell;
use std::rc::Rc;

use crate::control::protocol::MemoryStatus;

/// A connection may keep so much however much others keep: nearly every head fits.
pub const KEPT_FAIR_BYTES: usize = 8 * 1024;

/// The bounds of one core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The door's shared buffers: how many, and the size of one.
    pub buffers: usize,
    pub buffer_bytes: u32,
    /// Shared buffers that may stay lent from one batch to the next.
    pub lent_max: usize,
    /// From so many bytes in memory of our own on, no more is taken in than is sent off.
    pub pressed_bytes: usize,
    /// Most bytes that may wait in memory of our own; a connection that would exceed it is cut.
    pub spill_bytes_max: usize,
    /// From so many kept bytes on, who keeps more than its fair share has to go.
    pub kept_bytes_max: usize,
}

impl Limits {
    /// What slow peers of all threads together may cost in memory of our own.
    pub const SPILL_BYTES_MAX: usize = 32 * 1024 * 1024;
    /// What unfinished heads and bodies of all threads together may cost.
    pub const KEPT_BYTES_MAX: usize = 32 * 1024 * 1024;

    /// Those of one thread of `threads`, whose door has so many buffers of this size.
    pub fn of_thread(buffers: u16, buffer_bytes: usize, threads: u32) -> Self {
        let spill_bytes_max = Self::SPILL_BYTES_MAX / threads.max(1) as usize;
        Self {
            buffers: usize::from(buffers),
            buffer_bytes: buffer_bytes.min(u32::MAX as usize) as u32,
            lent_max: usize::from(buffers) / 2,
            pressed_bytes: spill_bytes_max / 2,
            spill_bytes_max,
            kept_bytes_max: Self::KEPT_BYTES_MAX / threads.max(1) as usize,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::of_thread(512, 32 * 1024, 1)
    }
}

/// How much is in use, of how much.
#[derive(Debug, Default)]
pub struct Budget {
    limits: Limits,
    lent: Cell<usize>,
    spilled_bytes: Cell<usize>,
    kept_bytes: Cell<usize>,
}

impl Budget {
    pub fn new(limits: Limits) -> Rc<Self> {
        Rc::new(Self { limits, ..Self::default() })
    }

    pub fn lent(&self) -> usize {
        self.lent.get()
    }

    pub fn spilled_bytes(&self) -> usize {
        self.spilled_bytes.get()
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    pub fn status(&self) -> MemoryStatus {
        MemoryStatus {
            buffers_bytes: self.limits.buffers as u64 * u64::from(self.limits.buffer_bytes),
            lent_buffers: self.lent.get() as u64,
            lent_buffers_max: self.limits.lent_max as u64,
            waiting_bytes: self.spilled_bytes.get() as u64,
            waiting_bytes_max: self.limits.spill_bytes_max as u64,
            kept_bytes: self.kept_bytes.get() as u64,
            kept_bytes_max: self.limits.kept_bytes_max as u64,
            ..MemoryStatus::default()
        }
    }

    /// Buffers that may yet be lent.
    pub fn lent_left(&self) -> usize {
        self.limits.lent_max.saturating_sub(self.lent.get())
    }

    /// Few buffers are left to lend: those that have been lent for long are called back.
    pub fn is_lending_scarce(&self) -> bool {
        self.lent_left() < self.limits.lent_max / 2
    }

    /// Much of the memory for slow peers is in use: take in no more than what is sent off.
    pub fn is_pressed(&self) -> bool {
        self.spilled_bytes.get() >= self.limits.pressed_bytes
    }

    /// Whether who keeps so much has to go.
    pub fn is_too_much_kept(&self, by_one: usize) -> bool {
        by_one > KEPT_FAIR_BYTES && self.kept_bytes.get() > self.limits.kept_bytes_max
    }

    /// More is in use than may be: somebody has to go.
    pub fn is_exceeded(&self) -> bool {
        self.spilled_bytes.get() > self.limits.spill_bytes_max
    }
}

/// What one outbox has in use.
#[derive(Debug)]
pub struct Share {
    budget: Rc<Budget>,
    lent: usize,
    spilled_bytes: usize,
}

impl Share {
    pub fn new(budget: &Rc<Budget>) -> Self {
        Self { budget: budget.clone(), lent: 0, spilled_bytes: 0 }
    }

    pub fn lent(&self) -> usize {
        self.lent
    }

    /// Sets what is in use from now on.
    pub fn set(&mut self, lent: usize, spilled_bytes: usize) {
        let Budget { lent: all_lent, spilled_bytes: all_spilled, .. } = &*self.budget;
        all_lent.set(all_lent.get() - self.lent + lent);
        all_spilled.set(all_spilled.get() - self.spilled_bytes + spilled_bytes);
        (self.lent, self.spilled_bytes) = (lent, spilled_bytes);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0, 0);
    }
}

/// What one socket keeps.
#[derive(Debug)]
pub struct Kept {
    budget: Rc<Budget>,
    bytes: usize,
}

impl Kept {
    pub fn new(budget: &Rc<Budget>) -> Self {
        Self { budget: budget.clone(), bytes: 0 }
    }

    /// Sets how much it keeps from now on.
    pub fn set(&mut self, bytes: usize) {
        let all = &self.budget.kept_bytes;
        all.set(all.get() - self.bytes + bytes);
        self.bytes = bytes;
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.set(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_given_back_with_its_owner() {
        let budget = Budget::new(Limits {
            buffers: 8,
            buffer_bytes: 16,
            lent_max: 4,
            pressed_bytes: 50,
            spill_bytes_max: 100,
            kept_bytes_max: 2 * KEPT_FAIR_BYTES,
        });
        let mut share = Share::new(&budget);
        share.set(3, 60);
        assert_eq!((budget.lent_left(), budget.is_pressed(), budget.is_exceeded()), (1, true, false));
        share.set(1, 101);
        assert_eq!((budget.lent_left(), budget.is_exceeded()), (3, true));
        drop(share);
        assert_eq!((budget.lent(), budget.spilled_bytes(), budget.is_pressed()), (0, 0, false));
    }

    #[test]
    fn beyond_the_bound_who_keeps_much_has_to_go_and_who_keeps_little_may_stay() {
        let budget = Budget::new(Limits { kept_bytes_max: 20_000, ..Limits::default() });
        let (mut large, mut small) = (Kept::new(&budget), Kept::new(&budget));
        large.set(20_000);
        assert!(!budget.is_too_much_kept(20_000));
        small.set(100);
        assert!(budget.is_too_much_kept(20_000) && !budget.is_too_much_kept(100));
        drop(large);
        assert_eq!((budget.status().kept_bytes, budget.is_too_much_kept(20_000)), (100, false));
    }
}
