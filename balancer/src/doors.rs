//! Which door a process uses: the ring where it is to be had, else epoll.
//!
//! Found out once, before the first thread starts, and the same for all threads.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use serde::{Deserialize, Serialize};

use crate::core::io::{Completion, ListenerId, Op};
use crate::door::Door;
use crate::epoll::{Epoll, EpollError};
use crate::ring::{Ring, RingError};
use crate::tls::TlsDoor;
use crate::tls::context::Context;
use crate::unix::UnixSockets;

/// What is asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum IoChoice {
    /// io_uring where it is to be had, else epoll.
    #[default]
    Auto,
    /// io_uring or nothing.
    Uring,
    /// epoll.
    Epoll,
}

/// What is used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Io {
    #[default]
    Uring,
    Epoll,
}

/// Receive buffers of a thread.
#[derive(Debug, Clone, Copy)]
pub struct BufferSizes {
    pub count: u16,
    pub size_bytes: usize,
}

/// Why there is no door.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    #[error("cannot make the wake-up descriptor of a data-path thread")]
    Waker(#[source] nix::Error),
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error(transparent)]
    Epoll(#[from] EpollError),
}

impl IoChoice {
    /// Tries what is asked for. Where io_uring was preferred and is not to be had, also why.
    pub fn decide(self, buffers: BufferSizes) -> Result<(Io, Option<RingError>), DoorError> {
        let try_ring = || {
            let waker = EventFd::new().map_err(DoorError::Waker)?;
            Ok(Ring::new(buffers.count, buffers.size_bytes, Arc::new(waker), UnixSockets::default())
                .map(drop)?)
        };
        match self {
            Self::Epoll => Ok((Io::Epoll, None)),
            Self::Uring => try_ring().map(|()| (Io::Uring, None)),
            Self::Auto => match try_ring() {
                Ok(()) => Ok((Io::Uring, None)),
                // Buffers that cannot be had are a mistake of the operator's, not a lack of the kernel's.
                Err(DoorError::Ring(error)) if !matches!(error, RingError::Buffers { .. }) => {
                    Ok((Io::Epoll, Some(error)))
                }
                Err(error) => Err(error),
            },
        }
    }
}

impl fmt::Display for Io {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Uring => "io_uring",
            Self::Epoll => "epoll",
        })
    }
}

/// What a door keeps of a socket, and of a send of its that is under way.
pub const SOCKET_BYTES_MAX: usize = 512;

/// How the door of a thread is made.
#[derive(Clone)]
pub struct Doors {
    pub io: Io,
    pub buffers: BufferSizes,
    pub unix: UnixSockets,
    pub tls: Arc<Context>,
}

impl Doors {
    /// The calling thread's door, which it alone may use.
    pub fn open(&self, waker: Arc<EventFd>) -> Result<TlsDoor<AnyDoor>, DoorError> {
        let door = AnyDoor::open(self.io, self.buffers, waker, self.unix.clone())?;
        Ok(TlsDoor::new(door, self.tls.clone()))
    }
}

/// Either door.
pub enum AnyDoor {
    Ring(Box<Ring>),
    Epoll(Box<Epoll>),
}

impl AnyDoor {
    /// The calling thread's door, which it alone may use.
    pub fn open(
        io: Io,
        buffers: BufferSizes,
        waker: Arc<EventFd>,
        unix: UnixSockets,
    ) -> Result<Self, DoorError> {
        let BufferSizes { count, size_bytes } = buffers;
        Ok(match io {
            Io::Uring => Self::Ring(Box::new(Ring::new(count, size_bytes, waker, unix)?)),
            Io::Epoll => Self::Epoll(Box::new(Epoll::new(count, size_bytes, waker, unix)?)),
        })
    }

    fn get(&mut self) -> &mut dyn Door {
        match self {
            Self::Ring(ring) => &mut **ring,
            Self::Epoll(epoll) => &mut **epoll,
        }
    }
}

impl Door for AnyDoor {
    fn add_listener(&mut self, id: ListenerId, socket: Arc<OwnedFd>) {
        self.get().add_listener(id, socket);
    }

    fn remove_listener(&mut self, id: ListenerId) {
        self.get().remove_listener(id);
    }

    fn apply(&mut self, ops: &mut Vec<Op>) -> io::Result<()> {
        self.get().apply(ops)
    }

    fn wait(&mut self, timeout: Option<Duration>, completions: &mut Vec<Completion>) -> io::Result<()> {
        self.get().wait(timeout, completions)
    }
}
