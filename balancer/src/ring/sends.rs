//! Sends under way: what the kernel reads from must stay until it has said that it is done.

use std::ptr;

use crate::core::chunk::Chunks;
use crate::core::io::SockId;

/// The table of sends. A slot is free, or belongs to exactly one operation in the ring.
#[derive(Default)]
pub struct Sends {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

/// One send. The header and the vector it points to are on the heap, so that a slot may move.
struct Slot {
    sock: Option<SockId>,
    chunks: Chunks,
    vector: Vec<libc::iovec>,
    header: Box<libc::msghdr>,
}

/// What to give the kernel.
pub enum Pointers {
    /// One run of bytes.
    Bytes(*const u8, u32),
    /// Several.
    Message(*const libc::msghdr),
}

impl Sends {
    /// Keeps the chunks until [`Sends::end`] is called for the slot.
    pub fn begin(&mut self, sock: SockId, chunks: Chunks) -> (u32, Pointers) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::new());
            self.slots.len() as u32 - 1
        });
        let slot = &mut self.slots[index as usize];
        slot.sock = Some(sock);
        slot.chunks = chunks;
        (index, slot.pointers())
    }

    /// The kernel is done with the slot; whose send it was.
    pub fn end(&mut self, index: u32) -> Option<SockId> {
        let slot = self.slots.get_mut(index as usize)?;
        let sock = slot.sock.take()?;
        slot.chunks.clear();
        self.free.push(index);
        Some(sock)
    }
}

impl Slot {
    fn new() -> Self {
        let header = libc::msghdr {
            msg_name: ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: ptr::null_mut(),
            msg_iovlen: 0,
            msg_control: ptr::null_mut(),
            msg_controllen: 0,
            msg_flags: 0,
        };
        Self { sock: None, chunks: Chunks::new(), vector: Vec::new(), header: Box::new(header) }
    }

    fn pointers(&mut self) -> Pointers {
        if let [only] = self.chunks.as_slice() {
            return Pointers::Bytes(only.as_ptr(), only.len().min(u32::MAX as usize) as u32);
        }
        self.vector.clear();
        self.vector.extend(
            self.chunks.iter().map(|chunk| libc::iovec {
                iov_base: chunk.as_ptr().cast_mut().cast(),
                iov_len: chunk.len(),
            }),
        );
        self.header.msg_iov = self.vector.as_mut_ptr();
        self.header.msg_iovlen = self.vector.len();
        Pointers::Message(&raw const *self.header)
    }
}
