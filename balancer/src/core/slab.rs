//! Slots with generations: a key of a freed slot finds nothing, also after the slot is used again.

use std::marker::PhantomData;

use super::io::{GENERATION_BITS, SockId};

const GENERATION_MASK: u32 = (1 << GENERATION_BITS) - 1;

/// A typed key: which slot, and which use of it.
pub trait Key: Copy {
    fn new(index: u32, generation: u32) -> Self;
    fn index(self) -> u32;
    fn generation(self) -> u32;
}

macro_rules! key {
    ($name:ty) => {
        impl Key for $name {
            fn new(index: u32, generation: u32) -> Self {
                Self { index, generation }
            }
            fn index(self) -> u32 {
                self.index
            }
            fn generation(self) -> u32 {
                self.generation
            }
        }
    };
}

/// An upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UpstreamKey {
    index: u32,
    generation: u32,
}

/// A route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RouteKey {
    index: u32,
    generation: u32,
}

/// Who has something of a route or a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SourceKey {
    index: u32,
    generation: u32,
}

impl RouteKey {
    /// Finds nothing.
    pub const NONE: RouteKey = RouteKey { index: u32::MAX, generation: 0 };
}

key!(SockId);
key!(UpstreamKey);
key!(RouteKey);
key!(SourceKey);

/// A growing array of slots. Memory follows the most that were ever in use at a time.
#[derive(Debug)]
pub struct Slab<K, T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    key: PhantomData<K>,
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    value: Option<T>,
}

impl<K, T> Default for Slab<K, T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new(), key: PhantomData }
    }
}

impl<K, T> Slab<K, T> {
    /// What a slot takes, free or not.
    pub const SLOT_BYTES: usize = size_of::<Slot<T>>() + size_of::<u32>();
}

impl<K: Key, T> Slab<K, T> {
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub fn insert(&mut self, value: T) -> K {
        if let Some(index) = self.free.pop() {
            let slot = &mut self.slots[index as usize];
            slot.generation = (slot.generation + 1) & GENERATION_MASK;
            slot.value = Some(value);
            return K::new(index, slot.generation);
        }
        // Descriptors are numbered with an i32, so there are always fewer sockets than u32 slots.
        let index = self.slots.len() as u32;
        self.slots.push(Slot { generation: 0, value: Some(value) });
        K::new(index, 0)
    }

    pub fn remove(&mut self, id: K) -> Option<T> {
        let slot =
            self.slots.get_mut(id.index() as usize).filter(|slot| slot.generation == id.generation())?;
        let value = slot.value.take()?;
        self.free.push(id.index());
        Some(value)
    }

    pub fn get(&self, id: K) -> Option<&T> {
        let slot = self.slots.get(id.index() as usize).filter(|slot| slot.generation == id.generation())?;
        slot.value.as_ref()
    }

    pub fn get_mut(&mut self, id: K) -> Option<&mut T> {
        let slot =
            self.slots.get_mut(id.index() as usize).filter(|slot| slot.generation == id.generation())?;
        slot.value.as_mut()
    }

    pub fn iter(&self) -> impl Iterator<Item = (K, &T)> {
        self.iter_from(0)
    }

    /// From the slot of this index on.
    pub fn iter_from(&self, from: u32) -> impl Iterator<Item = (K, &T)> {
        self.slots.iter().enumerate().skip(from as usize).filter_map(|(index, slot)| {
            let id = K::new(index as u32, slot.generation);
            slot.value.as_ref().map(|value| (id, value))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_key_never_finds_a_new_value() {
        let mut slab: Slab<SockId, &str> = Slab::default();
        let old = slab.insert("old");
        assert_eq!(slab.remove(old), Some("old"));
        let new = slab.insert("new");
        assert_eq!((new.index, slab.get(old), slab.get(new)), (old.index, None, Some(&"new")));
        assert_eq!((slab.remove(old), slab.len()), (None, 1));
    }
}
