//! What apps print: the logs of their instances and jobs, as the log writers leave them on the pool.
//!
//! A log is two files: `current.log`, which becomes `previous.log` when it is full. While a server is away nothing is
//! read, so what it has missed is still there when it comes back, up to what both files hold.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use epagent_core::name::JailId;
use epagent_syslog::{Facility, Message};
use epagent_wire::runner::{Reply, Request};

use super::Batch;
use super::positions::Place;
use crate::apps::Parts;
use crate::clock;
use crate::logs::{CURRENT, Line, PREVIOUS, RECORD, open_in, parse};

/// What is read of one log at a time, so that no app's flood keeps the others waiting. More than the longest line.
const PIECE_BYTES: u64 = 64 << 10;

/// The logs that may have something new.
pub struct Jails {
    parts: Parts,
    open: BTreeMap<JailId, Open>,
    /// Who is read first: another one each time.
    turn: usize,
}

struct Open {
    folder: Arc<OwnedFd>,
    /// What every message of it has: whose it is.
    head: Message,
    /// It has ended and was sent whole.
    is_done: bool,
}

/// What came after a place.
#[derive(Debug, Default)]
struct Piece {
    lines: Vec<Line>,
    place: Place,
    /// There was more between the place and the first line, and it is gone.
    is_torn: bool,
    /// Nothing will come any more.
    is_last: bool,
}

impl Jails {
    pub fn new(parts: Parts) -> Jails {
        Jails { parts, open: BTreeMap::new(), turn: 0 }
    }

    pub async fn gather(&mut self, batch: &mut Batch) {
        let Some(world) = self.parts.worlds.latest() else { return };
        self.open.retain(|jail, _| world.logs.contains(jail));
        batch.positions.jails.retain(|jail, _| world.logs.contains(jail));
        for jail in &world.logs {
            if !self.open.contains_key(jail) {
                self.add(jail).await;
            }
        }
        let count = self.open.len().max(1);
        self.turn = (self.turn + 1) % count;
        let (first, then): (Vec<_>, Vec<_>) =
            self.open.iter_mut().enumerate().partition(|(index, _)| *index >= self.turn);
        for (_, (jail, open)) in first.into_iter().chain(then) {
            if batch.is_full() {
                return;
            }
            if !open.is_done {
                open.gather(jail, batch).await;
            }
        }
    }

    async fn add(&mut self, jail: &JailId) {
        let Some(folder) = self.folder(jail).await else { return };
        let head = self.head(jail).await;
        self.open.insert(jail.clone(), Open { folder: Arc::new(folder), head, is_done: false });
    }

    async fn folder(&self, jail: &JailId) -> Option<OwnedFd> {
        let answer = self.parts.runner.call_with(Request::LogOpen { jail: jail.clone() }, Vec::new()).await;
        match answer {
            Ok(answer) if matches!(answer.reply, Reply::Log) => answer.fds.into_iter().next(),
            _ => None,
        }
    }

    async fn head(&self, jail: &JailId) -> Message {
        let mut data = Vec::new();
        let app = jail.app().map(|app| app.to_string()).unwrap_or_default();
        let mut proc_id = String::new();
        data.push(("app".to_owned(), app.clone()));
        data.push(("instance".to_owned(), jail.to_string()));
        if let Ok(Some(instance)) = self.parts.store.instance(jail).await {
            proc_id = format!("{}.{}", instance.process, instance.index);
            data.push(("process".to_owned(), instance.process.to_string()));
            data.push(("index".to_owned(), instance.index.to_string()));
            data.push(("release".to_owned(), instance.release.to_string()));
            data.push(("deploy".to_owned(), instance.deploy.to_string()));
        }
        Message {
            facility: Facility::Local0,
            severity: 6,
            timestamp: String::new(),
            app_name: app,
            proc_id,
            msg_id: String::new(),
            data,
            text: Vec::new(),
        }
    }
}

impl Open {
    /// A log that can't be read now is read the next time.
    async fn gather(&mut self, jail: &JailId, batch: &mut Batch) {
        let (folder, place) = (self.folder.clone(), batch.positions.jails.get(jail).copied());
        let read = tokio::task::spawn_blocking(move || piece(&folder, place)).await;
        let Ok(Ok(piece)) = read else { return };
        if piece.is_torn {
            batch.put(&Message {
                severity: 4,
                timestamp: clock::rfc3339(clock::now_ms()),
                msg_id: "missing".to_owned(),
                text: b"lines are missing here: the log was full before they could be sent".to_vec(),
                ..self.head.clone()
            });
        }
        // Times of one form compare as texts.
        let since = batch.positions.since.clone();
        for line in piece.lines.into_iter().filter(|line| line.at >= since) {
            let (severity, stream) = if line.stderr { (3, "stderr") } else { (6, "stdout") };
            batch.put(&Message {
                severity,
                timestamp: line.at,
                msg_id: stream.to_owned(),
                text: line.text.into_bytes(),
                ..self.head.clone()
            });
        }
        batch.positions.jails.insert(jail.clone(), piece.place);
        self.is_done = piece.is_last;
    }
}

/// Whole lines after `place`, of one file.
fn piece(folder: &OwnedFd, place: Option<Place>) -> io::Result<Piece> {
    // Before the lines are looked at: what is written after that is looked for once more.
    let has_ended = open_in(folder, RECORD)?.is_some();
    let (previous, current) = (open_in(folder, PREVIOUS)?, open_in(folder, CURRENT)?);
    let inode = |file: &File| file.metadata().map(|facts| facts.ino());
    let mut files = Vec::new();
    for file in [previous, current].into_iter().flatten() {
        files.push((inode(&file)?, file));
    }
    let place = place.filter(|place| place.inode != 0);
    let known = place.and_then(|place| files.iter().position(|(inode, _)| *inode == place.inode));
    let mut found = Piece { is_torn: place.is_some() && known.is_none(), ..Piece::default() };
    let mut offset = known.and(place).map_or(0, |place| place.offset);
    for (inode, mut file) in files.into_iter().skip(known.unwrap_or(0)) {
        found.place = Place { inode, offset };
        file.seek(SeekFrom::Start(offset))?;
        let mut bytes = Vec::new();
        file.take(PIECE_BYTES).read_to_end(&mut bytes)?;
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        if whole > 0 {
            found.lines = bytes[..whole].split(|byte| *byte == b'\n').filter_map(parse).collect();
            found.place.offset += whole as u64;
            return Ok(found);
        }
        offset = 0;
    }
    found.is_last = has_ended;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    struct Log(tempfile::TempDir, OwnedFd);

    impl Log {
        fn new() -> Log {
            let folder = tempfile::tempdir().unwrap();
            let fd = File::open(folder.path()).unwrap().into();
            Log(folder, fd)
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.0.path().join(name), text).unwrap();
        }

        fn rotate(&self, text: &str) {
            fs::rename(self.0.path().join(CURRENT), self.0.path().join(PREVIOUS)).unwrap();
            self.write(CURRENT, text);
        }

        fn all(&self, place: &mut Option<Place>) -> Vec<String> {
            let mut texts = Vec::new();
            loop {
                let piece = piece(&self.1, *place).unwrap();
                *place = Some(piece.place);
                if piece.is_torn {
                    texts.push("…".to_owned());
                }
                if piece.lines.is_empty() {
                    return texts;
                }
                texts.extend(piece.lines.into_iter().map(|line| line.text));
            }
        }
    }

    #[test]
    fn every_line_is_read_once_through_a_rotation() {
        let log = Log::new();
        let mut place = None;
        assert!(log.all(&mut place).is_empty());
        log.write(CURRENT, "t o one\nt e two\nt o ha");
        assert_eq!(log.all(&mut place), ["one", "two"]);
        log.write(CURRENT, "t o one\nt e two\nt o half\nt o three\n");
        log.rotate("t o four\n");
        assert_eq!(log.all(&mut place), ["half", "three", "four"]);
        assert!(log.all(&mut place).is_empty());
    }

    #[test]
    fn what_was_thrown_away_unread_is_told() {
        let log = Log::new();
        let mut place = None;
        log.write(CURRENT, "t o one\n");
        assert_eq!(log.all(&mut place), ["one"]);
        // Held open, so that its number is not given to another file; on btrfs that never happens.
        let _held = File::open(log.0.path().join(CURRENT)).unwrap();
        log.rotate("t o two\n");
        log.rotate("t o three\n");
        log.rotate("t o four\n");
        assert_eq!(log.all(&mut place), ["…", "three", "four"]);
    }

    #[test]
    fn a_log_is_done_when_its_end_is_recorded_and_it_was_read() {
        let log = Log::new();
        log.write(CURRENT, "t o one\n");
        log.write(RECORD, "{}");
        let first = piece(&log.1, None).unwrap();
        assert!(!first.is_last && first.lines.len() == 1);
        assert!(piece(&log.1, Some(first.place)).unwrap().is_last);
    }

    #[test]
    fn a_flood_is_taken_piece_by_piece() {
        let log = Log::new();
        let line = format!("t o {}\n", "x".repeat(1000));
        log.write(CURRENT, &line.repeat(1000));
        assert!(piece(&log.1, None).unwrap().lines.len() < 70);
        assert_eq!(log.all(&mut None).len(), 1000);
    }
}
