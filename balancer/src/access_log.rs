//! The access log: one JSON object per line, written by a thread of its own.
//!
//! The data path never waits for it: lines go into a bounded queue, and what does not fit is dropped and
//! counted (`access_log_dropped`).

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::core::access::Access;

/// Most batches waiting to be written.
const BATCHES_MAX: usize = 1_024;

/// The near end, one for each data-path thread.
#[derive(Clone)]
pub struct AccessLog {
    queue: SyncSender<Batch>,
}

/// What ended in one batch of a thread.
struct Batch {
    time_ms: u64,
    accesses: Vec<Access>,
}

#[derive(Serialize)]
struct Line<'a> {
    /// Milliseconds since 1970.
    time_ms: u64,
    #[serde(flatten)]
    access: &'a Access,
}

impl AccessLog {
    /// Appends to a file.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        let (queue, batches) = mpsc::sync_channel(BATCHES_MAX);
        std::thread::Builder::new().name("access-log".to_owned()).spawn(move || write(&batches, file))?;
        Ok(Self { queue })
    }

    /// Hands over what ended; returns how much of it was dropped.
    pub fn add(&self, accesses: Vec<Access>) -> u64 {
        let count = accesses.len() as u64;
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let batch = Batch { time_ms: since_1970.as_millis() as u64, accesses };
        if self.queue.try_send(batch).is_ok() { 0 } else { count }
    }
}

/// Writes until every near end is gone. A full disk costs lines, nothing else.
fn write(batches: &Receiver<Batch>, file: File) {
    let mut file = BufWriter::new(file);
    while let Ok(first) = batches.recv() {
        let mut next = Some(first);
        while let Some(Batch { time_ms, accesses }) = next {
            for access in &accesses {
                if serde_json::to_writer(&mut file, &Line { time_ms, access }).is_ok() {
                    let _ = file.write_all(b"\n");
                }
            }
            next = batches.try_recv().ok();
        }
        let _ = file.flush();
    }
}
