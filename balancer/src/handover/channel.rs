//! The channel between two processes: messages in JSON, one to a packet, and descriptors beside them.
//!
//! Nothing here waits unless a deadline is given. What may be large (a table, a status) goes as a descriptor
//! of memory, so that every packet is small and sending one never has to wait for a reader.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use rustix::fs::MemfdFlags;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::lifeline::Lifeline;
use crate::control::protocol::{Counters, StatusQuery};
use crate::server::poll_timeout;

/// Most descriptors in one message; the kernel takes 253 (SCM_MAX_FD).
pub const DESCRIPTORS_MAX: usize = 200;
/// Longest message.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Largest thing that goes as a descriptor of memory.
const BODY_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// What processes say to each other. In brackets the descriptors that go with it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    /// To the launcher: execute what its arguments say [the folder it is in, if not by path].
    Launch {},
    /// It runs [its pidfd].
    Launched { pid: u32 },
    /// It does not.
    Unlaunchable { why: String },

    /// To the new process: what it begins with [the table].
    Hello { protocol: u32, program: PathBuf, lifeline: Lifeline },
    /// [As many descriptors as names.]
    Sockets { names: Vec<String> },
    /// That was all.
    Given {},
    /// Everything is in place but accepting.
    Ready { protocol: u32 },
    /// The new process ends.
    Failed { why: String },
    /// The new process is in charge, says the one with this pid [control connections, then channels to those
    /// that drain already].
    Go { by: u32, peers: usize, draining: Vec<Elder>, past: Box<Counters> },

    /// Route by this table [the table].
    Table { version: u64 },
    /// It is in force.
    Taken { version: u64 },
    /// Asks for a report.
    Status { question: u64, query: StatusQuery },
    /// What the old process still has, also unasked before it ends [a status].
    Report { question: u64 },
    /// Routes that begin to hold something and have no upstream, in the old process.
    Starving { routes: Vec<String> },
    /// Finish soon.
    End {},
}

/// A process that drains, as its successors know it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Elder {
    pub pid: u32,
    pub drains_for_ms: u64,
}

/// A message, and what came with it.
#[derive(Debug)]
pub struct Parcel {
    pub message: Message,
    pub descriptors: Vec<OwnedFd>,
}

/// Why nothing was sent, or came.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    #[error("the other process has closed the channel")]
    Closed,
    #[error("nothing came in time")]
    Late,
    #[error("the channel failed")]
    Io(#[source] io::Error),
    #[error("a message is not understood")]
    Garbled(#[source] serde_json::Error),
}

impl From<Errno> for ChannelError {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

impl From<rustix::io::Errno> for ChannelError {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// One end.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// Both ends.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self(ours), Self(theirs)))
    }

    /// The end that whoever started us put in place of standard input, which becomes /dev/null.
    pub fn from_stdin() -> io::Result<Self> {
        let stdin = io::stdin().as_fd().try_clone_to_owned()?;
        if rustix::net::sockopt::socket_type(&stdin)? != SocketType::SEQPACKET {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
        Ok(Self(stdin))
    }

    pub fn from_descriptor(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }

    pub fn into_descriptor(self) -> OwnedFd {
        self.0
    }

    /// Another handle of the same end.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Sends at once or not at all.
    pub fn send(&self, message: &Message, descriptors: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let text = serde_json::to_vec(message).map_err(ChannelError::Garbled)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(ChannelError::Io(io::ErrorKind::InvalidInput.into()));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match rustix::net::sendmsg(&self.0, &[IoSlice::new(&text)], &mut beside, flags) {
            Ok(_) => Ok(()),
            Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => Err(ChannelError::Closed),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Sends a message that goes with something large.
    pub fn send_with(&self, message: &Message, large: &impl Serialize) -> Result<(), ChannelError> {
        let body = write_body(large)?;
        self.send(message, &[body.as_fd()])
    }

    /// What has come, if anything has.
    pub fn receive(&self) -> Result<Option<Parcel>, ChannelError> {
        let mut text = vec![0; MESSAGE_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut receive =
            || rustix::net::recvmsg(&self.0, &mut [IoSliceMut::new(&mut text)], &mut beside, flags);
        // One that ended with something unread is told of first, and what it had sent before comes after.
        let received = match receive() {
            Err(rustix::io::Errno::CONNRESET) => receive(),
            received => received,
        };
        let received = match received {
            Ok(received) => received,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(None),
            Err(rustix::io::Errno::CONNRESET) => return Err(ChannelError::Closed),
            Err(errno) => return Err(errno.into()),
        };
        let descriptors = beside
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(rights) => Some(rights),
                _ => None,
            })
            .flatten()
            .collect();
        if received.bytes == 0 {
            return Err(ChannelError::Closed);
        }
        let message = serde_json::from_slice(&text[..received.bytes]).map_err(ChannelError::Garbled)?;
        Ok(Some(Parcel { message, descriptors }))
    }

    /// The next message, if it comes by then.
    pub fn wait(&self, deadline: Instant) -> Result<Parcel, ChannelError> {
        loop {
            if let Some(parcel) = self.receive()? {
                return Ok(parcel);
            }
            if Instant::now() >= deadline {
                return Err(ChannelError::Late);
            }
            match poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], poll_timeout(deadline)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn write_body(large: &impl Serialize) -> Result<OwnedFd, ChannelError> {
    let text = serde_json::to_vec(large).map_err(ChannelError::Garbled)?;
    let memory = rustix::fs::memfd_create("epagent-balancer-handover", MemfdFlags::CLOEXEC)?;
    let mut file = File::from(memory);
    file.write_all(&text).and_then(|()| file.rewind()).map_err(ChannelError::Io)?;
    Ok(file.into())
}

/// Reads what came as a descriptor of memory.
pub fn read_body<T: DeserializeOwned>(body: OwnedFd) -> Result<T, ChannelError> {
    let mut text = Vec::new();
    File::from(body).take(BODY_BYTES_MAX).read_to_end(&mut text).map_err(ChannelError::Io)?;
    serde_json::from_slice(&text).map_err(ChannelError::Garbled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_keep_their_bounds_and_their_descriptors() {
        let (near, far) = Channel::pair().unwrap();
        assert!(far.receive().unwrap().is_none());
        near.send_with(&Message::Table { version: 7 }, &vec!["x"; 100_000]).unwrap();
        let files: Vec<File> = (0..DESCRIPTORS_MAX).map(|_| File::open("/dev/null").unwrap()).collect();
        let borrowed: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        near.send(&Message::Given {}, &borrowed).unwrap();
        let mut first = far.receive().unwrap().unwrap();
        assert_eq!(first.message, Message::Table { version: 7 });
        let body: Vec<String> = read_body(first.descriptors.remove(0)).unwrap();
        assert_eq!(body.len(), 100_000);
        let second = far.receive().unwrap().unwrap();
        assert_eq!((second.message, second.descriptors.len()), (Message::Given {}, DESCRIPTORS_MAX));
        drop(near);
        assert!(matches!(far.receive(), Err(ChannelError::Closed)));
    }

    #[test]
    fn the_last_words_of_one_that_left_something_unread_are_heard() {
        let (near, far) = Channel::pair().unwrap();
        near.send(&Message::Given {}, &[]).unwrap();
        far.send(&Message::End {}, &[]).unwrap();
        drop(far);
        assert_eq!(near.receive().unwrap().unwrap().message, Message::End {});
        assert!(matches!(near.receive(), Err(ChannelError::Closed)));
    }

    #[test]
    fn waiting_has_an_end() {
        let (near, _far) = Channel::pair().unwrap();
        let soon = Instant::now() + std::time::Duration::from_millis(20);
        assert!(matches!(near.wait(soon), Err(ChannelError::Late)));
        assert!(Instant::now() >= soon);
    }
}
