//! The agent's end of the runner's socket.
//!
//! One task owns the connection: it sends what [`Runner::call`] queues, matches replies to calls by their number,
//! and passes events on. While the runner is away, calls fail at once with [`CallError::Away`]; whoever needs the
//! answer looks at the world again and asks anew, since every request may be sent twice.
//!
//! ```text
//!  away ── connect, Hello ──▶ linked ── end of stream, bad packet ──▶ away (pending calls fail), retry in 100 ms
//! ```

use std::collections::HashMap;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use epagent_wire::runner::{
    Call, Event, Message, PACKET_BYTES_MAX, PROTOCOL, Refusal, Reply, Request, World,
};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use tokio::net::UnixDatagram;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

/// Calls that wait to be sent; past it callers wait.
const CALLS_QUEUED_MAX: usize = 64;
/// Events a slow listener may be behind; it then misses some and looks at the whole world.
const EVENTS_QUEUED_MAX: usize = 1024;
/// What a call adds to its request.
const CALL_OVERHEAD_BYTES: usize = 64;
/// The most descriptors beside one packet.
const FDS_MAX: usize = 4;
/// How long the runner may take to answer. Its slow operations run in children with deadlines below this.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);
const RECONNECT_AFTER: Duration = Duration::from_millis(100);

/// A handle to the link; cheap to clone.
#[derive(Clone)]
pub struct Runner {
    calls: mpsc::Sender<Pending>,
    events: broadcast::Sender<Event>,
    linked: watch::Receiver<Option<String>>,
}

/// A reply and the descriptors that came with it.
pub struct Answer {
    pub reply: Reply,
    pub fds: Vec<OwnedFd>,
}

#[derive(Debug, thiserror::Error)]
pub enum CallError {
    #[error("the runner can't be reached")]
    Away,
    #[error("the runner did not answer in {} s", CALL_TIMEOUT.as_secs())]
    TimedOut,
    #[error("{}", .0.message)]
    Refused(Refusal),
    #[error("the request is larger than the {} KiB the runner takes", PACKET_BYTES_MAX >> 10)]
    TooLarge,
    #[error("the runner answered with something else than was asked for")]
    Unexpected,
}

struct Pending {
    request: Request,
    fds: Vec<OwnedFd>,
    answer: oneshot::Sender<Result<Answer, CallError>>,
}

/// The half that [`Link::run`] drives.
pub struct Link {
    path: PathBuf,
    calls: mpsc::Receiver<Pending>,
    events: broadcast::Sender<Event>,
    linked: watch::Sender<Option<String>>,
    next_id: u64,
}

pub fn link(path: &Path) -> (Runner, Link) {
    let (call_sender, calls) = mpsc::channel(CALLS_QUEUED_MAX);
    let (events, _) = broadcast::channel(EVENTS_QUEUED_MAX);
    let (linked_sender, linked) = watch::channel(None);
    let runner = Runner { calls: call_sender, events: events.clone(), linked };
    let link = Link { path: path.to_owned(), calls, events, linked: linked_sender, next_id: 1 };
    (runner, link)
}

impl Runner {
    pub async fn call(&self, request: Request) -> Result<Reply, CallError> {
        Ok(self.call_with(request, Vec::new()).await?.reply)
    }

    /// Sends a request with descriptors beside it.
    pub async fn call_with(&self, request: Request, fds: Vec<OwnedFd>) -> Result<Answer, CallError> {
        if self.linked.borrow().is_none() {
            return Err(CallError::Away);
        }
        // Checked here, so that only who asked is told.
        let bytes = serde_json::to_vec(&request).map_or(usize::MAX, |packet| packet.len());
        if bytes > PACKET_BYTES_MAX - CALL_OVERHEAD_BYTES || fds.len() > FDS_MAX {
            return Err(CallError::TooLarge);
        }
        let (sender, answer) = oneshot::channel();
        self.calls.send(Pending { request, fds, answer: sender }).await.map_err(|_| CallError::Away)?;
        match tokio::time::timeout(CALL_TIMEOUT, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(CallError::Away),
            Err(_) => Err(CallError::TimedOut),
        }
    }

    pub async fn observe(&self) -> Result<World, CallError> {
        let answer = self.call_with(Request::Observe, Vec::new()).await?;
        match (answer.reply, answer.fds.into_iter().next()) {
            (Reply::World(world), None) => Ok(*world),
            (Reply::WorldFile, Some(memory)) => {
                let file = std::io::BufReader::new(std::fs::File::from(memory));
                serde_json::from_reader(file).map_err(|_| CallError::Unexpected)
            }
            _ => Err(CallError::Unexpected),
        }
    }

    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Waits until the link is lost. What the runner had begun for somebody on it is then not heard of any more.
    pub async fn lost(&self) {
        let mut linked = self.linked.clone();
        // An error means that the link's task is gone, and the link with it.
        let _ = linked.wait_for(Option::is_none).await;
    }

    /// The runner's version while it is linked.
    pub fn version(&self) -> Option<String> {
        self.linked.borrow().clone()
    }
}

impl Link {
    /// Connects, serves the connection until it ends, and connects again, for ever.
    pub async fn run(&mut self) -> std::io::Result<()> {
        loop {
            match self.serve().await {
                Ok(()) => tracing::info!("the runner closed the connection"),
                Err(error) => tracing::debug!(%error, path = %self.path.display(), "no link to the runner"),
            }
            self.linked.send_replace(None);
            // Calls that slipped in while the link went down must not wait for the next one.
            while let Ok(pending) = self.calls.try_recv() {
                let _ = pending.answer.send(Err(CallError::Away));
            }
            tokio::time::sleep(RECONNECT_AFTER).await;
        }
    }

    async fn serve(&mut self) -> std::io::Result<()> {
        let socket = connect(&self.path)?;
        let mut waiting: HashMap<u64, oneshot::Sender<Result<Answer, CallError>>> = HashMap::new();
        let (sender, mut hello) = oneshot::channel();
        waiting.insert(0, sender);
        let call = Call { id: 0, request: Request::Hello { protocol: PROTOCOL } };
        let mut outgoing = Some(Outgoing { packet: serde_json::to_vec(&call)?, fds: Vec::new() });
        loop {
            // Receiving goes on while a packet waits for room: the runner may be waiting for us to take one of its.
            tokio::select! {
                packet = receive(&socket) => {
                    let Some((message, fds)) = packet? else { return Ok(()) };
                    match message {
                        Message::Event(event) => drop(self.events.send(event)),
                        Message::Reply { id, result } => {
                            if let Some(sender) = waiting.remove(&id) {
                                let answer = result.map(|reply| Answer { reply, fds }).map_err(CallError::Refused);
                                let _ = sender.send(answer);
                            }
                        }
                    }
                    if let Ok(answer) = hello.try_recv() {
                        let answer = answer.map_err(std::io::Error::other)?;
                        let Reply::Hello { version, node, .. } = answer.reply else {
                            return Err(std::io::Error::other(CallError::Unexpected));
                        };
                        tracing::info!(version, node, "linked to the runner");
                        self.linked.send_replace(Some(version));
                    }
                }
                sent = send(&socket, outgoing.as_ref()), if outgoing.is_some() => {
                    sent?;
                    outgoing = None;
                }
                Some(pending) = self.calls.recv(), if outgoing.is_none() => {
                    // A caller that gave up leaves its entry; the reply removes it.
                    let id = self.next_id;
                    self.next_id += 1;
                    waiting.insert(id, pending.answer);
                    let packet = serde_json::to_vec(&Call { id, request: pending.request })?;
                    outgoing = Some(Outgoing { packet, fds: pending.fds });
                }
            }
        }
    }
}

/// A packet on its way out.
struct Outgoing {
    packet: Vec<u8>,
    fds: Vec<OwnedFd>,
}

fn connect(path: &Path) -> std::io::Result<UnixDatagram> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    // Tokio has no type for SOCK_SEQPACKET; this one does nothing of its own but waiting for readiness, and every
    // read and write below is ours.
    UnixDatagram::from_std(socket.into())
}

/// Sends the packet whole or, when it is dropped before that, not at all.
async fn send(socket: &UnixDatagram, outgoing: Option<&Outgoing>) -> std::io::Result<()> {
    let Some(Outgoing { packet, fds }) = outgoing else { return Ok(()) };
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    socket
        .async_io(tokio::io::Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
                return Err(std::io::Error::other("too many descriptors for one request"));
            }
            rustix::net::sendmsg(socket, &[IoSlice::new(packet)], &mut control, SendFlags::NOSIGNAL)?;
            Ok(())
        })
        .await
}

/// The next message; None when the runner has gone.
async fn receive(socket: &UnixDatagram) -> std::io::Result<Option<(Message, Vec<OwnedFd>)>> {
    let mut packet = vec![0; PACKET_BYTES_MAX];
    let (length, fds) = socket
        .async_io(tokio::io::Interest::READABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut packet)];
            let received = rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
            let mut fds = Vec::new();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            Ok((received.bytes, fds))
        })
        .await?;
    if length == 0 {
        return Ok(None);
    }
    Ok(Some((serde_json::from_slice(&packet[..length])?, fds)))
}
