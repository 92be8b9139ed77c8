//! The access log: one line for each request and plain connection, written by a thread of its own.
//!
//! ```text
//! data-path threads ── batches, bounded ──▶ the log's thread ──▶ a file, standard output, or the journal
//!         └─ no room: dropped and counted          └─ not taken: dropped and counted (`access_log_dropped`)
//! ```
//!
//! The data path never waits for it. A file is opened anew when another one stands at its path, looked at
//! once a second, so that whoever rotates logs needs to tell nobody. At the end of the process what is queued is
//! still written, for as long as [`FINISH_TIMEOUT`].

mod format;
mod journal;
mod sink;

use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub use self::format::Format;
use self::sink::Sink;
use crate::core::access::Access;

/// Most batches waiting to be written.
const BATCHES_MAX: usize = 1_024;
/// How long the end of the process waits for what is queued.
pub const FINISH_TIMEOUT: Duration = Duration::from_secs(2);

/// What is logged, how, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogOptions {
    pub target: Target,
    pub format: Format,
    /// Of what went well, one in so many is logged; of what did not, all.
    pub sample: u32,
}

/// Where lines go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// `-`: standard output.
    Stdout,
    /// `journal`, or `journald:PATH` for one that listens elsewhere: systemd's journal, with a field for each fact.
    Journal(PathBuf),
    File(PathBuf),
}

impl FromStr for Target {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text.split_once(':') {
            _ if text == "-" => Target::Stdout,
            _ if text == "journald" => Target::Journal(crate::journal::SOCKET.into()),
            Some(("journald", path)) => Target::Journal(path.into()),
            _ => Target::File(text.into()),
        })
    }
}

/// The near end, one for each data-path thread.
#[derive(Clone)]
pub struct AccessLog {
    queue: SyncSender<Entry>,
    dropped: Arc<AtomicU64>,
}

/// The log as the process has it.
pub struct RunningLog {
    near: AccessLog,
}

/// What the log's thread is given.
enum Entry {
    Batch(Batch),
    /// Everything before this is to be written, and then it is said.
    Finish(Sender<()>),
}

/// What ended in one batch of a thread.
struct Batch {
    at: Duration,
    accesses: Vec<Access>,
}

impl RunningLog {
    /// Opens the target and starts the thread.
    pub fn start(options: &LogOptions) -> io::Result<Self> {
        let mut sink = Sink::open(&options.target)?;
        let format = options.format;
        let (queue, batches) = mpsc::sync_channel(BATCHES_MAX);
        let dropped = Arc::new(AtomicU64::new(0));
        let near = AccessLog { queue, dropped: dropped.clone() };
        let write = move || write(&batches, &mut sink, format, &dropped);
        std::thread::Builder::new().name("access-log".to_owned()).spawn(write)?;
        Ok(Self { near })
    }

    /// For one more data-path thread.
    pub fn near_end(&self) -> AccessLog {
        self.near.clone()
    }

    /// Lines that were dropped since the start.
    pub fn dropped(&self) -> u64 {
        self.near.dropped.load(Ordering::Relaxed)
    }

    /// Waits until what is queued has been written, if that comes to an end.
    pub fn finish(self) {
        let (done, finished) = mpsc::channel();
        // No room for it: whatever takes the lines has stopped taking them.
        if self.near.queue.try_send(Entry::Finish(done)).is_ok() {
            let _ = finished.recv_timeout(FINISH_TIMEOUT);
        }
    }
}

impl AccessLog {
    /// Hands over what ended; what there is no room for is dropped.
    pub fn add(&self, accesses: Vec<Access>) {
        let count = accesses.len() as u64;
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if self.queue.try_send(Entry::Batch(Batch { at, accesses })).is_err() {
            self.dropped.fetch_add(count, Ordering::Relaxed);
        }
    }
}

/// Writes until every near end is gone. A full disk costs lines, nothing else.
fn write(entries: &Receiver<Entry>, sink: &mut Sink, format: Format, dropped: &AtomicU64) {
    while let Ok(first) = entries.recv() {
        sink.renew();
        let mut next = Some(first);
        let mut finished = None;
        while let Some(entry) = next {
            match entry {
                Entry::Batch(Batch { at, accesses }) => {
                    let lost: u64 = accesses.iter().map(|access| sink.write(format, at, access)).sum();
                    dropped.fetch_add(lost, Ordering::Relaxed);
                }
                Entry::Finish(done) => finished = Some(done),
            }
            next = entries.try_recv().ok();
        }
        dropped.fetch_add(sink.flush(), Ordering::Relaxed);
        // Who waits for it may have given up.
        if let Some(done) = finished {
            let _ = done.send(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_told_apart() {
        for (text, target) in [
            ("-", Target::Stdout),
            ("journald", Target::Journal("/run/systemd/journal/socket".into())),
            ("journald:/tmp/x", Target::Journal("/tmp/x".into())),
            ("/var/log/a:b", Target::File("/var/log/a:b".into())),
            ("journald.log", Target::File("journald.log".into())),
        ] {
            assert_eq!(text.parse(), Ok(target), "{text}");
        }
    }
}
