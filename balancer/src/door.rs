//! What the core needs of the outside: a door performs operations on sockets and brings completions.
//!
//! The ring ([`crate::ring`]) is one; the simulator of the tests is another. A door decides nothing: it does
//! what it is told in the order it is told, and says what became of it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::core::io::{Completion, ListenerId, Op};

/// A way to the system's sockets. Used by one thread.
pub trait Door {
    /// Makes a listening socket known by this id. Accepted connections come with the client's address.
    fn add_listener(&mut self, id: ListenerId, socket: Arc<OwnedFd>);

    /// Forgets a listening socket; an accept that is armed on it ends when it is told to stop.
    fn remove_listener(&mut self, id: ListenerId);

    /// Takes operations, in order, leaving the vector empty. They take effect at the latest when
    /// [`Door::wait`] is called and nothing has completed yet.
    fn apply(&mut self, ops: &mut Vec<Op>) -> io::Result<()>;

    /// Waits until something completes, the door is woken, or the time is up; then appends what completed.
    fn wait(&mut self, timeout: Option<Duration>, completions: &mut Vec<Completion>) -> io::Result<()>;
}
