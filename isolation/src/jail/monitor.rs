//! The monitor's process: performs what [`super::core`] decides, in one poll loop.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{WaitId, WaitIdOptions};

use super::birth::{BEGIN, Born};
use super::channel;
use super::core::{Action, ClientId, Core, Input, LastUsage};
use super::log::{self, Kind, Sink, Tap};
use super::server::{Incoming, Server};
use crate::cgroup::CgroupRoot;
use crate::id::JailId;
use crate::monitor::protocol::Message;

/// How often a killed instance is looked at until it is empty.
const EMPTY_POLL: Duration = Duration::from_millis(2);
/// How long an init that has closed its channel may take to end.
const INIT_END_WAIT_NS: i64 = 100_000_000;
/// How often, at most, subscribers are told of dropped output.
const DROPPED_EVERY: Duration = Duration::from_secs(1);

/// The monitor after the birth of its instance.
#[derive(Debug)]
pub(super) struct Monitor {
    id: JailId,
    cgroups: Rc<CgroupRoot>,
    core: Core,
    server: Server,
    sink: Sink,
    /// Gone once it is reaped.
    writer: Option<OwnedFd>,
    instance: Option<Instance>,
    tap: Option<Tap>,
    /// v1: becomes readable when the memory limit is hit.
    oom: Option<OwnedFd>,
    /// Held for the lease process; nothing is read from it yet.
    _lease: Option<OwnedFd>,
    started: Instant,
    dropped_told: (u64, Instant),
}

/// Init, until it is reaped.
#[derive(Debug)]
struct Instance {
    pidfd: OwnedFd,
    /// Closed when init has closed its end.
    channel: Option<OwnedFd>,
}

/// What the monitor was made with.
#[derive(Debug)]
pub(super) struct Parts {
    pub id: JailId,
    pub cgroups: Rc<CgroupRoot>,
    pub core: Core,
    pub server: Server,
    pub sink: Sink,
    pub writer: Option<OwnedFd>,
    pub oom: Option<OwnedFd>,
    pub lease: Option<OwnedFd>,
    pub started: Instant,
}

/// What a wake-up was for.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Source {
    Listener,
    Client(ClientId),
    Channel,
    Init,
    Writer,
    Oom,
    Output,
}

impl Monitor {
    pub(super) fn new(parts: Parts) -> Monitor {
        Monitor {
            id: parts.id,
            cgroups: parts.cgroups,
            core: parts.core,
            server: parts.server,
            sink: parts.sink,
            writer: parts.writer,
            instance: None,
            tap: None,
            oom: parts.oom,
            _lease: parts.lease,
            started: parts.started,
            dropped_told: (0, parts.started),
        }
    }

    /// Takes over a living init.
    pub(super) fn adopt(&mut self, born: Born) {
        self.tap = Tap::new(born.stdout, born.stderr).ok();
        self.instance = Some(Instance { pidfd: born.pidfd, channel: Some(born.channel) });
        self.feed(Input::InitCloned { pid: born.pid }, &[]);
    }

    /// The set-up failed on this side. If it did because init had given up, init's own words come first.
    pub(super) fn start_failed(&mut self, step: &str, error: String) {
        if step == BEGIN && self.init_ends() {
            self.reap_init();
        }
        self.feed(Input::StartFailed { step: step.to_owned(), error }, &[]);
    }

    fn init_ends(&self) -> bool {
        let Some(instance) = &self.instance else { return false };
        let mut polled = [PollFd::new(&instance.pidfd, PollFlags::IN)];
        let wait = Timespec { tv_sec: 0, tv_nsec: INIT_END_WAIT_NS };
        rustix::event::poll(&mut polled, Some(&wait)).is_ok_and(|ended| ended > 0)
    }

    /// Until a client releases the ended instance.
    pub(super) fn run(&mut self) {
        while self.turn() {}
    }

    /// One wake-up; false at the end.
    fn turn(&mut self) -> bool {
        let mut going = true;
        for source in self.wait() {
            going &= self.serve(source);
        }
        if let Some(tap) = &mut self.tap {
            tap.pump(Instant::now(), &mut self.sink);
        }
        self.tell_dropped();
        if self.core.waits_for_empty() && !self.cgroups.app_populated(&self.id) {
            going &= self.emptied();
        }
        going && self.feed(Input::Tick, &[])
    }

    fn serve(&mut self, source: Source) -> bool {
        match source {
            Source::Listener => {
                self.server.accept();
                true
            }
            Source::Client(client) => self.serve_client(client),
            Source::Channel => self.serve_channel(),
            Source::Init => self.reap_init(),
            Source::Writer => {
                self.reap_writer();
                true
            }
            Source::Oom => {
                let _ = self.oom.as_ref().map(|event| rustix::io::read(event, &mut [0; 8]));
                self.feed(Input::OutOfMemory, &[])
            }
            // Pumped in every turn.
            Source::Output => true,
        }
    }

    /// Sleeps until something happens or is due.
    fn wait(&self) -> Vec<Source> {
        let mut sources: Vec<(Source, BorrowedFd<'_>)> = vec![(Source::Listener, self.server.listener())];
        sources.extend(self.server.clients().map(|(client, socket)| (Source::Client(client), socket)));
        if let Some(instance) = &self.instance {
            sources.extend(instance.channel.as_ref().map(|channel| (Source::Channel, channel.as_fd())));
            sources.push((Source::Init, instance.pidfd.as_fd()));
        }
        sources.extend(self.writer.as_ref().map(|writer| (Source::Writer, writer.as_fd())));
        sources.extend(self.oom.as_ref().map(|event| (Source::Oom, event.as_fd())));
        sources.extend(self.tap.iter().flat_map(Tap::polled).map(|end| (Source::Output, end)));
        let mut polled: Vec<PollFd<'_>> =
            sources.iter().map(|(_, fd)| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        let timeout = self.next_wake().and_then(|left| Timespec::try_from(left).ok());
        if rustix::event::poll(&mut polled, timeout.as_ref()).is_err() {
            return Vec::new();
        }
        let woken = sources.iter().zip(&polled).filter(|(_, poll)| !poll.revents().is_empty());
        woken.map(|((source, _), _)| *source).collect()
    }

    /// How long nothing is due; `None`: for ever.
    fn next_wake(&self) -> Option<Duration> {
        let now = Instant::now();
        let core = self.core.deadline_ms().map(|ms| self.started + Duration::from_millis(ms));
        let refill = self.tap.as_ref().and_then(Tap::refill_at);
        let empty = self.core.waits_for_empty().then(|| now + EMPTY_POLL);
        let dropped =
            (self.sink.dropped_bytes() > self.dropped_told.0).then(|| self.dropped_told.1 + DROPPED_EVERY);
        let next = core.into_iter().chain(refill).chain(empty).chain(dropped).min()?;
        // Rounded up: the core counts whole milliseconds.
        Some(next.saturating_duration_since(now) + Duration::from_millis(1))
    }

    fn serve_client(&mut self, client: ClientId) -> bool {
        match self.server.receive(client) {
            Incoming::Nothing => true,
            Incoming::Gone => self.drop_client(client),
            Incoming::Unknown { seq, request } => self.feed(Input::UnknownCall { client, seq, request }, &[]),
            Incoming::Call { seq, call, fds } => {
                self.feed(Input::Call { client, seq, call: *call, fds: fds.len() }, &fds)
            }
        }
    }

    fn drop_client(&mut self, client: ClientId) -> bool {
        self.server.forget(client);
        self.feed(Input::ClientGone { client }, &[])
    }

    fn serve_channel(&mut self) -> bool {
        let Some(instance) = &mut self.instance else { return true };
        let received = instance.channel.as_ref().map(channel::receive);
        match received {
            Some(Ok(Some((message, fds)))) => self.feed(Input::FromInit(message), &fds),
            _ => {
                // Init is ending; its pidfd tells when it has.
                instance.channel = None;
                true
            }
        }
    }

    /// Messages sent before the end are taken first: the app's status is among them.
    fn reap_init(&mut self) -> bool {
        while self.instance.as_ref().is_some_and(|instance| instance.channel.is_some()) {
            if !self.serve_channel() {
                return false;
            }
        }
        let Some(instance) = self.instance.take() else { return true };
        let _ = rustix::process::waitid(WaitId::PidFd(instance.pidfd.as_fd()), WaitIdOptions::EXITED);
        self.feed(Input::InitEnded, &[])
    }

    /// Without a writer the log is lost; the monitor goes on.
    fn reap_writer(&mut self) {
        if let Some(writer) = self.writer.take() {
            let _ = rustix::process::waitid(WaitId::PidFd(writer.as_fd()), WaitIdOptions::EXITED);
        }
    }

    fn tell_dropped(&mut self) {
        let (now, total_bytes) = (Instant::now(), self.sink.dropped_bytes());
        if total_bytes > self.dropped_told.0 && now >= self.dropped_told.1 + DROPPED_EVERY {
            self.dropped_told = (total_bytes, now);
            self.feed(Input::LogDropped { total_bytes }, &[]);
        }
    }

    /// Nobody is left who could write: the rest of the output is taken, then the counters.
    fn emptied(&mut self) -> bool {
        if let Some(mut tap) = self.tap.take() {
            tap.drain(&mut self.sink);
        }
        let total_bytes = self.sink.dropped_bytes();
        if total_bytes > self.dropped_told.0 {
            self.dropped_told.0 = total_bytes;
            self.feed(Input::LogDropped { total_bytes }, &[]);
        }
        self.oom = None;
        let usage = self.cgroups.usage(&self.id).unwrap_or_default();
        let usage = LastUsage {
            memory_peak_bytes: usage.memory_peak_bytes,
            cpu_us: usage.cpu_us,
            oom_killed: usage.oom_kills.unwrap_or(0) > 0,
            now_us: log::now_us(),
        };
        self.feed(Input::Emptied { usage }, &[])
    }

    /// Gives one input to the core and performs its actions; false when the monitor is to end.
    fn feed(&mut self, input: Input, fds: &[OwnedFd]) -> bool {
        let now_ms = self.started.elapsed().as_millis() as u64;
        let mut going = true;
        for action in self.core.handle(input, now_ms, log::now_us()) {
            going &= self.perform(action, fds);
        }
        going
    }

    fn perform(&mut self, action: Action, fds: &[OwnedFd]) -> bool {
        let passed =
            |with_fds: bool| fds.iter().filter(move |_| with_fds).map(AsFd::as_fd).collect::<Vec<_>>();
        match action {
            Action::ToInit { message, with_fds } => {
                if let Some(channel) = self.instance.as_ref().and_then(|instance| instance.channel.as_ref()) {
                    // An init that cannot be told anything is ending, and its pidfd tells so.
                    let _ = channel::send(channel.as_fd(), &message, &passed(with_fds));
                }
                true
            }
            Action::Answer { client, seq, answer, with_fds } => {
                self.send(client, &Message::Answer { seq, answer }, &passed(with_fds))
            }
            Action::Event { client, event } => self.send(client, &Message::Event { event }, &[]),
            Action::KillInstance => {
                // Reads of cgroup.events decide whether it worked.
                let _ = self.cgroups.kill_app(&self.id);
                true
            }
            Action::WriteRecord(record) => {
                if let Ok(bytes) = serde_json::to_vec(&record) {
                    self.sink.put(Kind::Record, &bytes);
                }
                self.sink.close();
                true
            }
            Action::End => false,
        }
    }

    fn send(&mut self, client: ClientId, message: &Message, fds: &[BorrowedFd<'_>]) -> bool {
        match self.server.send(client, message, fds) {
            Ok(()) => true,
            Err(_) => self.drop_client(client),
        }
    }
}
