//! The buffers the kernel receives into: one region, shared by all connections of a ring.
//!
//! ```text
//!   kernel's (in the buffer ring) ── a receive fills it ──▶ lent to the core as a Lease
//!        ▲                                                        │ last reference dropped
//!        └────────── give_back, before each enter ◀── returned ◀──┘
//! ```
//!
//! A bundle fills several buffers with one completion, which names only the first. The others follow it in
//! the order in which the kernel was given them, so that order is kept beside the ring. How much each took
//! is the length of its entry, not our nominal size: the kernel may have shortened the last one.

use std::cell::RefCell;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::BufRingEntry;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::core::chunk::{Chunk, SharedBuffer};

/// The buffer group; a ring has one.
pub const GROUP: u16 = 0;

/// An anonymous mapping.
struct Mapping {
    base: NonNull<libc::c_void>,
    len: usize,
}

impl Mapping {
    fn new(len: usize) -> io::Result<Self> {
        let size = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new private mapping at an address of the kernel's choosing touches nothing of ours.
        let base = unsafe { mmap_anonymous(None, size, protection, MapFlags::MAP_PRIVATE)? };
        Ok(Self { base, len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and len are those of the mapping made in `new`, and nothing refers to it any more:
        // leases hold the pool that holds it, and the ring that wrote to it is closed before its owner
        // lets go (field order in `Ring`).
        let _ = unsafe { munmap(self.base, self.len) };
    }
}

/// The memory of the buffers, and the ids of those that came back.
struct Pool {
    memory: Mapping,
    size: usize,
    returned: RefCell<Vec<u16>>,
}

/// A buffer lent to the core, filled with `len` bytes.
struct Lease {
    pool: Rc<Pool>,
    id: u16,
    len: usize,
}

impl SharedBuffer for Lease {
    fn bytes(&self) -> &[u8] {
        let base = self.pool.memory.base.as_ptr().cast::<u8>();
        // SAFETY: the buffer `id` lies inside the mapping, which the pool keeps; `len` was checked against
        // its size; and the kernel does not write to it until it is given back, which is when this lease
        // is dropped.
        unsafe { std::slice::from_raw_parts(base.add(usize::from(self.id) * self.pool.size), self.len) }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.pool.returned.borrow_mut().push(self.id);
    }
}

/// The ring of buffers registered with the kernel, and the pool behind it.
pub struct Buffers {
    entries: Mapping,
    pool: Rc<Pool>,
    /// Which buffer each entry of the ring was last given, and the other way round.
    ids: Vec<u16>,
    places: Vec<u16>,
    tail: u16,
    mask: u16,
}

impl Buffers {
    /// Makes `count` (a power of two) buffers of `size` bytes, all of them the kernel's once registered.
    pub fn new(count: u16, size: usize) -> io::Result<Self> {
        if !count.is_power_of_two() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the buffer count is no power of two"));
        }
        let entries = Mapping::new(usize::from(count) * size_of::<BufRingEntry>())?;
        let memory = Mapping::new(usize::from(count) * size)?;
        let returned = RefCell::new((0..count).collect());
        let pool = Rc::new(Pool { memory, size, returned });
        let (ids, places) = (vec![0; usize::from(count)], vec![0; usize::from(count)]);
        let mut buffers = Self { entries, pool, ids, places, tail: 0, mask: count - 1 };
        buffers.give_back();
        Ok(buffers)
    }

    /// Address and length of the ring, for registering it.
    pub fn ring(&self) -> (u64, u16) {
        (self.entries.base.as_ptr() as u64, self.mask + 1)
    }

    pub fn size(&self) -> usize {
        self.pool.size
    }

    /// The buffers the kernel filled with `len` bytes, in order, from this one on. It is the caller's duty
    /// to ask once for each completion, and before the next [`Buffers::give_back`].
    pub fn lend(&self, first: u16, len: usize, mut each: impl FnMut(Chunk)) {
        debug_assert!(first <= self.mask);
        let mut place = self.places[usize::from(first & self.mask)];
        let mut left = len;
        loop {
            let filled = left.min(self.entry_len(place));
            let id = self.ids[usize::from(place)];
            each(Chunk::shared(Rc::new(Lease { pool: self.pool.clone(), id, len: filled })));
            left -= filled;
            // An entry of no length would be the kernel's fault; better a lost connection than a hang.
            if left == 0 || filled == 0 {
                return;
            }
            place = (place + 1) & self.mask;
        }
    }

    /// How much of the buffer in this place the kernel offered to the receive that took it.
    fn entry_len(&self, place: u16) -> usize {
        let base = self.entries.base.as_ptr().cast::<BufRingEntry>();
        // SAFETY: the place is below the ring's length, and the kernel is done with an entry it consumed.
        let entry = unsafe { &*base.add(usize::from(place & self.mask)) };
        (entry.len() as usize).min(self.pool.size)
    }

    /// Gives the kernel every buffer that nobody refers to any more.
    pub fn give_back(&mut self) {
        let pool = self.pool.clone();
        let mut returned = pool.returned.borrow_mut();
        if returned.is_empty() {
            return;
        }
        let base = self.entries.base.as_ptr().cast::<BufRingEntry>();
        let memory = pool.memory.base.as_ptr() as u64;
        for id in returned.drain(..) {
            let place = self.tail & self.mask;
            // SAFETY: the index is below the ring's length. The kernel reads entries only up to the tail
            // it has seen, so this one is ours to write.
            let entry = unsafe { &mut *base.add(usize::from(place)) };
            entry.set_addr(memory + u64::from(id) * pool.size as u64);
            entry.set_len(pool.size as u32);
            entry.set_bid(id);
            (self.ids[usize::from(place)], self.places[usize::from(id)]) = (id, place);
            self.tail = self.tail.wrapping_add(1);
        }
        // SAFETY: base is the start of the registered ring, where the kernel keeps the tail; it is aligned
        // for u16, and both sides only access it atomically.
        let tail = unsafe { &*BufRingEntry::tail(base).cast::<AtomicU16>() };
        tail.store(self.tail, Ordering::Release);
    }
}
