//! What a simulated door lends the core.

use std::cell::Cell;
use std::rc::Rc;

use epagent_balancer::core::chunk::{Chunk, SharedBuffer};

/// A lent buffer; counts itself.
pub struct Lent {
    bytes: Vec<u8>,
    live: Rc<Cell<usize>>,
}

impl Lent {
    pub fn chunk(bytes: Vec<u8>, live: &Rc<Cell<usize>>) -> Chunk {
        live.set(live.get() + 1);
        Chunk::shared(Rc::new(Self { bytes, live: live.clone() }))
    }
}

impl SharedBuffer for Lent {
    fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.live.set(self.live.get() - 1);
    }
}
