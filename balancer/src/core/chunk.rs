//! A run of received or produced bytes that can be cut and shared without copying.
//!
//! A chunk is either *shared*, in a buffer that the door lent and wants back, or *owned*. Shared bytes may
//! be parsed and handed to a send that does not wait; whatever must stay longer is copied with
//! [`Chunk::into_owned`], so a slow peer can never keep a door's buffers.

use std::fmt;
use std::ops::{Deref, Range};
use std::rc::Rc;

use smallvec::SmallVec;

/// A buffer of the door's; dropping the last reference gives it back.
pub trait SharedBuffer {
    /// The bytes that were received into it.
    fn bytes(&self) -> &[u8];
}

/// What one send takes, in order: nearly always one.
pub type Chunks = SmallVec<[Chunk; 1]>;

/// Bytes; see the module header.
#[derive(Clone)]
pub struct Chunk {
    data: Data,
    start: usize,
    end: usize,
}

#[derive(Clone)]
enum Data {
    Shared(Rc<dyn SharedBuffer>),
    Owned(Rc<Vec<u8>>),
}

impl Chunk {
    /// All the bytes of a door's buffer.
    pub fn shared(buffer: Rc<dyn SharedBuffer>) -> Self {
        let end = buffer.bytes().len();
        Self { data: Data::Shared(buffer), start: 0, end }
    }

    /// Bytes of our own.
    pub fn owned(bytes: Vec<u8>) -> Self {
        let end = bytes.len();
        Self { data: Data::Owned(Rc::new(bytes)), start: 0, end }
    }

    pub fn is_shared(&self) -> bool {
        matches!(self.data, Data::Shared(_))
    }

    /// A part of it, by offsets into it. Panics when out of range, as slicing does.
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len());
        Self { data: self.data.clone(), start: self.start + range.start, end: self.start + range.end }
    }

    /// Drops the first `count` bytes.
    pub fn advance(&mut self, count: usize) {
        assert!(count <= self.len());
        self.start += count;
    }

    /// The same bytes, holding no buffer of the door's.
    pub fn into_owned(self) -> Self {
        match self.data {
            Data::Shared(_) => Self::owned(self.to_vec()),
            Data::Owned(_) => self,
        }
    }

    /// The bytes as a vector, without copying when nothing else refers to them.
    pub fn into_vec(self) -> Vec<u8> {
        let whole = self.start == 0;
        match self.data {
            Data::Owned(bytes) if whole => match Rc::try_unwrap(bytes) {
                Ok(mut bytes) => {
                    bytes.truncate(self.end);
                    bytes
                }
                Err(bytes) => bytes[..self.end].to_vec(),
            },
            Data::Owned(bytes) => bytes[self.start..self.end].to_vec(),
            Data::Shared(buffer) => buffer.bytes()[self.start..self.end].to_vec(),
        }
    }

    /// Appends to it in place when it is owned, nothing else refers to it, and it stays within `limit_bytes`.
    pub fn try_extend(&mut self, more: &[u8], limit_bytes: usize) -> bool {
        let Data::Owned(bytes) = &mut self.data else { return false };
        if bytes.len() != self.end || bytes.len() + more.len() > limit_bytes {
            return false;
        }
        let Some(bytes) = Rc::get_mut(bytes) else { return false };
        bytes.extend_from_slice(more);
        self.end = bytes.len();
        true
    }
}

impl Deref for Chunk {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.data {
            Data::Shared(buffer) => &buffer.bytes()[self.start..self.end],
            Data::Owned(bytes) => &bytes[self.start..self.end],
        }
    }
}

impl fmt::Debug for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_shared() { "shared" } else { "owned" };
        write!(f, "Chunk({kind}, {} bytes)", self.len())
    }
}
