//! The way of an app's output: pipe → monitor → bounded pipe → log writer → files.
//!
//! ```text
//! app stdout, stderr ──▶ Tap (monitor) ── frames, never blocking ──▶ Writer (forked child) ──▶ current.log
//! ```
//!
//! The monitor reads, stamps and passes on; it never waits for a disk. When the writer stalls, frames that do not
//! fit the pipe are dropped and counted. When an app writes faster than [`RATE_BYTES_PER_S`], its pipe is left full
//! for the rest of the time slice: the app waits, the host's CPU does not pay for the flood.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// What one instance may log, averaged over [`SLICE`].
pub(super) const RATE_BYTES_PER_S: usize = 8 << 20;
/// How long a budget lasts.
pub(super) const SLICE: Duration = Duration::from_millis(50);
const BUDGET_BYTES: usize = RATE_BYTES_PER_S / 1000 * SLICE.as_millis() as usize;
/// Frames waiting for the writer.
const PIPE_BYTES: usize = 256 << 10;
/// Writes of at most PIPE_BUF bytes into a pipe are whole or not at all.
pub(super) const FRAME_BYTES_MAX: usize = libc::PIPE_BUF;
pub(super) const HEADER_BYTES: usize = 12;
pub(super) const PAYLOAD_BYTES_MAX: usize = FRAME_BYTES_MAX - HEADER_BYTES;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Stdout,
    Stderr,
    /// A note of the monitor's own.
    Note,
    /// The exit record: to be written to `exit.json`.
    Record,
}

impl Kind {
    /// As in the log: one letter.
    pub(super) fn letter(self) -> u8 {
        match self {
            Kind::Stdout => b'o',
            Kind::Stderr => b'e',
            Kind::Note => b'm',
            Kind::Record => b'r',
        }
    }

    pub(super) fn from_letter(letter: u8) -> Option<Kind> {
        [Kind::Stdout, Kind::Stderr, Kind::Note, Kind::Record]
            .into_iter()
            .find(|kind| kind.letter() == letter)
    }
}

/// Microseconds since 1970, of the wall clock: for people and records, never for decisions.
pub(super) fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

/// The bounded pipe to the log writer.
#[derive(Debug)]
pub(super) struct Sink {
    pipe: Option<OwnedFd>,
    dropped_bytes: u64,
    /// Dropped since the last frame that went through.
    unsaid_bytes: u64,
}

/// A sink and the end for the writer.
pub(super) fn pipe() -> io::Result<(Sink, OwnedFd)> {
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    // Best effort: a smaller pipe drops earlier.
    let _ = rustix::pipe::fcntl_setpipe_size(&write, PIPE_BYTES);
    rustix::io::ioctl_fionbio(&write, true)?;
    Ok((Sink { pipe: Some(write), dropped_bytes: 0, unsaid_bytes: 0 }, read))
}

impl Sink {
    /// A sink without a writer: output is thrown away, and not counted as lost.
    pub(super) fn none() -> Sink {
        Sink { pipe: None, dropped_bytes: 0, unsaid_bytes: 0 }
    }

    /// Bytes that no log holds.
    pub(super) fn dropped_bytes(&self) -> u64 {
        self.dropped_bytes
    }

    /// Sends one frame, or counts it as dropped.
    pub(super) fn put(&mut self, kind: Kind, payload: &[u8]) {
        if self.unsaid_bytes > 0 {
            let note = format!(
                "{} bytes of output were dropped: the log could not be written fast enough",
                self.unsaid_bytes
            );
            if self.try_put(Kind::Note, note.as_bytes()) {
                self.unsaid_bytes = 0;
            }
        }
        for part in payload.chunks(PAYLOAD_BYTES_MAX) {
            if !self.try_put(kind, part) {
                self.dropped_bytes += part.len() as u64;
                self.unsaid_bytes += part.len() as u64;
            }
        }
    }

    /// No more frames: the writer ends when it has written what there is.
    pub(super) fn close(&mut self) {
        self.pipe = None;
    }

    fn try_put(&mut self, kind: Kind, payload: &[u8]) -> bool {
        let Some(pipe) = &self.pipe else { return true };
        let mut frame = Vec::with_capacity(HEADER_BYTES + payload.len());
        frame.extend([kind.letter(), 0]);
        frame.extend((payload.len() as u16).to_ne_bytes());
        frame.extend(now_us().to_ne_bytes());
        frame.extend(payload);
        rustix::io::write(pipe, &frame).is_ok()
    }
}

/// The reading ends of the app's stdout and stderr.
#[derive(Debug)]
pub(super) struct Tap {
    ends: [Option<OwnedFd>; 2],
    left_bytes: usize,
    refill_at: Instant,
}

impl Tap {
    /// The reading ends, made non-blocking.
    pub(super) fn new(stdout: OwnedFd, stderr: OwnedFd) -> io::Result<Tap> {
        for end in [&stdout, &stderr] {
            rustix::io::ioctl_fionbio(end, true)?;
        }
        Ok(Tap {
            ends: [Some(stdout), Some(stderr)],
            left_bytes: BUDGET_BYTES,
            refill_at: Instant::now() + SLICE,
        })
    }

    /// What to poll: nothing while the budget is used up.
    pub(super) fn polled(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let ends = if self.left_bytes > 0 { &self.ends[..] } else { &[] };
        ends.iter().flatten().map(AsFd::as_fd)
    }

    /// When to look again although nothing is polled.
    pub(super) fn refill_at(&self) -> Option<Instant> {
        (self.left_bytes == 0).then_some(self.refill_at)
    }

    /// Moves what is there, within the budget.
    pub(super) fn pump(&mut self, now: Instant, sink: &mut Sink) {
        if now >= self.refill_at {
            self.left_bytes = BUDGET_BYTES;
            self.refill_at = now + SLICE;
        }
        let mut left = self.left_bytes;
        self.read(sink, &mut left);
        self.left_bytes = left;
    }

    /// Moves all that is left in the pipes, once nobody can write any more.
    pub(super) fn drain(&mut self, sink: &mut Sink) {
        // Two pipes of the default size; a tenant may have enlarged them to the unprivileged bound.
        let mut left = 2 << 20;
        self.read(sink, &mut left);
        self.ends = [None, None];
    }

    fn read(&mut self, sink: &mut Sink, left_bytes: &mut usize) {
        let mut buffer = [0; PAYLOAD_BYTES_MAX];
        for (end, kind) in self.ends.iter_mut().zip([Kind::Stdout, Kind::Stderr]) {
            while let Some(pipe) = end.as_ref().filter(|_| *left_bytes > 0) {
                match rustix::io::read(pipe, &mut buffer) {
                    Ok(0) => *end = None,
                    Ok(length) => {
                        *left_bytes = left_bytes.saturating_sub(length);
                        sink.put(kind, &buffer[..length]);
                    }
                    Err(rustix::io::Errno::INTR) => {}
                    Err(_) => break,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stalled_writer_costs_output_and_is_counted_and_told() {
        let (mut sink, _stalled) = pipe().unwrap();
        let line = vec![b'x'; PAYLOAD_BYTES_MAX];
        for _ in 0..2 * PIPE_BYTES / FRAME_BYTES_MAX {
            sink.put(Kind::Stdout, &line);
        }
        assert!(sink.dropped_bytes() >= (PIPE_BYTES / 2) as u64);
        assert_eq!(sink.dropped_bytes(), sink.unsaid_bytes);
    }

    #[test]
    fn a_flood_is_read_at_the_rate_and_no_faster() {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let (quiet, _keep) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        rustix::io::ioctl_fionbio(&write, true).unwrap();
        let mut tap = Tap::new(read, quiet).unwrap();
        let start = tap.refill_at - SLICE;
        let mut written = 0;
        for _ in 0..10_000 {
            written += rustix::io::write(&write, &[b'y'; 4096]).unwrap_or(0);
            tap.pump(start, &mut Sink::none());
        }
        assert!(written <= BUDGET_BYTES + (128 << 10), "{written} bytes within one time slice");
        assert_eq!((tap.polled().count(), tap.refill_at()), (0, Some(start + SLICE)));
        tap.pump(start + SLICE, &mut Sink::none());
        assert_eq!(tap.polled().count(), 2);
    }
}
