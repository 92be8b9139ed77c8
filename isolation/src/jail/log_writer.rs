//! The log writer: a forked child of the monitor that alone touches the log folder.
//!
//! It reads frames until the pipe ends, which is the monitor's end or its word. It writes
//!
//! ```text
//! current.log    2026-11-22T03:15:00.123456Z o text of a line
//! previous.log   what current.log was when it had reached its size
//! exit.json      the exit record, once
//! ```
//!
//! Lines are the app's bytes as they are. A line without an end is cut at [`LINE_BYTES_MAX`]. A disk that fails or
//! is full costs lines, which are counted into the record; a disk that hangs, hangs this process and nobody else.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

use super::log::{FRAME_BYTES_MAX, HEADER_BYTES, Kind};
use crate::monitor::record::ExitRecord;

/// Longest line; a longer one becomes several.
const LINE_BYTES_MAX: usize = 16 << 10;
const CURRENT: &str = "current.log";
const PREVIOUS: &str = "previous.log";
const RECORD: &str = "exit.json";
const RECORD_NEW: &str = "exit.json.new";

/// Writes until `frames` ends. The folder is only ever touched through its descriptor.
pub(super) fn run(frames: OwnedFd, folder: OwnedFd, limit_bytes: u64) {
    let mut writer = Writer::new(folder, limit_bytes);
    let mut pending = Vec::with_capacity(2 * FRAME_BYTES_MAX);
    let mut chunk = vec![0; 4 * FRAME_BYTES_MAX];
    loop {
        match rustix::io::read(&frames, &mut chunk) {
            Err(rustix::io::Errno::INTR) => continue,
            Ok(0) | Err(_) => break,
            Ok(length) => pending.extend_from_slice(&chunk[..length]),
        }
        let mut used = 0;
        while let Some((frame, size)) = Frame::parse(&pending[used..]) {
            writer.take(&frame);
            used += size;
        }
        pending.drain(..used);
        writer.flush();
    }
    writer.finish();
}

/// One frame as [`super::log::Sink`] sends it.
#[derive(Debug)]
struct Frame<'a> {
    kind: Kind,
    time_us: u64,
    payload: &'a [u8],
}

impl Frame<'_> {
    /// The first frame of `bytes` and its size; `None` if it is not complete.
    fn parse(bytes: &[u8]) -> Option<(Frame<'_>, usize)> {
        let header = bytes.first_chunk::<HEADER_BYTES>()?;
        let length = usize::from(u16::from_ne_bytes([header[2], header[3]]));
        let mut time = [0; 8];
        time.copy_from_slice(&header[4..]);
        let payload = bytes.get(HEADER_BYTES..HEADER_BYTES + length)?;
        let kind = Kind::from_letter(header[0]).unwrap_or(Kind::Note);
        Some((Frame { kind, time_us: u64::from_ne_bytes(time), payload }, HEADER_BYTES + length))
    }
}

struct Writer {
    folder: OwnedFd,
    limit_bytes: u64,
    current: Option<File>,
    size_bytes: u64,
    /// Finished lines, to be written in one go.
    buffer: Vec<u8>,
    /// Unfinished lines of stdout and stderr.
    partial: [Vec<u8>; 2],
    record: Vec<u8>,
    lost_bytes: u64,
}

impl Writer {
    fn new(folder: OwnedFd, limit_bytes: u64) -> Writer {
        let mut writer = Writer {
            folder,
            limit_bytes,
            current: None,
            size_bytes: 0,
            buffer: Vec::new(),
            partial: [Vec::new(), Vec::new()],
            record: Vec::new(),
            lost_bytes: 0,
        };
        writer.open();
        writer
    }

    fn take(&mut self, frame: &Frame<'_>) {
        match frame.kind {
            Kind::Record => self.record.extend_from_slice(frame.payload),
            Kind::Note => self.line(frame.time_us, Kind::Note, frame.payload),
            Kind::Stdout | Kind::Stderr => self.output(frame),
        }
    }

    fn output(&mut self, frame: &Frame<'_>) {
        let stream = usize::from(frame.kind == Kind::Stderr);
        let mut partial = std::mem::take(&mut self.partial[stream]);
        for part in frame.payload.split_inclusive(|byte| *byte == b'\n') {
            partial.extend_from_slice(part.strip_suffix(b"\n").unwrap_or(part));
            if part.ends_with(b"\n") || partial.len() >= LINE_BYTES_MAX {
                self.line(frame.time_us, frame.kind, &partial);
                partial.clear();
            }
        }
        self.partial[stream] = partial;
    }

    fn line(&mut self, time_us: u64, kind: Kind, text: &[u8]) {
        self.buffer.extend_from_slice(rfc3339(time_us).as_bytes());
        self.buffer.extend([b' ', kind.letter(), b' ']);
        self.buffer.extend_from_slice(text);
        self.buffer.push(b'\n');
        // Not more than a line over the limit, even when one chunk holds many lines.
        if self.size_bytes + self.buffer.len() as u64 >= self.limit_bytes {
            self.flush();
        }
    }

    fn flush(&mut self) {
        if self.buffer.is_empty() {
            return;
        }
        if self.size_bytes > 0 && self.size_bytes + self.buffer.len() as u64 > self.limit_bytes {
            self.rotate();
        }
        let length = self.buffer.len() as u64;
        let written = self.current.as_mut().is_some_and(|file| file.write_all(&self.buffer).is_ok());
        if written {
            self.size_bytes += length;
        } else {
            self.lost_bytes += length;
        }
        self.buffer.clear();
    }

    fn rotate(&mut self) {
        self.current = None;
        let _ = rustix::fs::renameat(&self.folder, CURRENT, &self.folder, PREVIOUS);
        self.open();
    }

    fn open(&mut self) {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND;
        self.current = create(self.folder.as_fd(), CURRENT, flags).ok();
        let size = self.current.as_ref().and_then(|file| file.metadata().ok());
        self.size_bytes = size.map_or(0, |metadata| metadata.len());
    }

    fn finish(&mut self) {
        for (stream, kind) in [Kind::Stdout, Kind::Stderr].into_iter().enumerate() {
            let partial = std::mem::take(&mut self.partial[stream]);
            if !partial.is_empty() {
                self.line(super::log::now_us(), kind, &partial);
            }
        }
        self.flush();
        if let Some(current) = &self.current {
            let _ = current.sync_data();
        }
        if !self.record.is_empty() {
            // Nobody is left to tell; the monitor still has the record and answers with it.
            let _ = self.write_record();
        }
    }

    /// Written whole, synced, renamed: there is a complete record or none.
    fn write_record(&self) -> io::Result<()> {
        let mut record: ExitRecord = serde_json::from_slice(&self.record)?;
        record.log_dropped_bytes += self.lost_bytes;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC;
        let mut file = create(self.folder.as_fd(), RECORD_NEW, flags)?;
        file.write_all(&serde_json::to_vec(&record)?)?;
        file.sync_all()?;
        rustix::fs::renameat(&self.folder, RECORD_NEW, &self.folder, RECORD)?;
        Ok(rustix::fs::fsync(&self.folder)?)
    }
}

/// The folder belongs to the agent alone, yet nothing in it is followed.
fn create(folder: BorrowedFd<'_>, name: &str, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::openat(folder, name, flags, Mode::from_raw_mode(0o644))?))
}

/// `2026-11-22T03:15:00.123456Z`. Days to civil date after Howard Hinnant, "chrono-Compatible Low-Level Date
/// Algorithms".
fn rfc3339(time_us: u64) -> String {
    let (seconds, micros) = (time_us / 1_000_000, time_us % 1_000_000);
    let (days, second_of_day) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second_of_day / 3_600, second_of_day / 60 % 60, second_of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> (std::path::PathBuf, OwnedFd) {
        let path = std::env::temp_dir().join(format!("epagent-log-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        let fd = File::open(&path).unwrap().into();
        (path, fd)
    }

    #[test]
    fn times_read_as_rfc_3339() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000000Z");
        assert_eq!(rfc3339(951_782_399_999_999), "2000-02-28T23:59:59.999999Z");
        assert_eq!(rfc3339(951_782_400_000_000), "2000-02-29T00:00:00.000000Z");
        assert_eq!(rfc3339(1_795_317_300_123_456), "2026-11-22T03:15:00.123456Z");
    }

    #[test]
    fn lines_are_joined_from_pieces_and_cut_when_endless() {
        let (path, fd) = folder("lines");
        let mut writer = Writer::new(fd, 1 << 20);
        for (kind, payload) in
            [(Kind::Stdout, &b"hel"[..]), (Kind::Stderr, b"err\n"), (Kind::Stdout, b"lo\nrest")]
        {
            writer.take(&Frame { kind, time_us: 0, payload });
        }
        writer.take(&Frame { kind: Kind::Stderr, time_us: 0, payload: &vec![b'z'; LINE_BYTES_MAX + 1] });
        writer.finish();
        let text = std::fs::read_to_string(path.join(CURRENT)).unwrap();
        let lines: Vec<&str> = text.lines().map(|line| line.split_once(' ').unwrap().1).collect();
        assert_eq!(lines[..2], ["e err", "o hello"]);
        assert!(lines.contains(&"o rest") && lines[2].len() == LINE_BYTES_MAX + 3, "{lines:?}");
        std::fs::remove_dir_all(path).unwrap();
    }

    #[test]
    fn two_files_of_the_limit_and_never_more() {
        let (path, fd) = folder("rotate");
        let limit = 20_000;
        let mut writer = Writer::new(fd, limit);
        for _ in 0..5_000 {
            writer.take(&Frame { kind: Kind::Stdout, time_us: 0, payload: b"twenty bytes of text\n" });
        }
        writer.finish();
        let sizes: Vec<u64> =
            [CURRENT, PREVIOUS].map(|name| path.join(name).metadata().unwrap().len()).into();
        assert!(sizes.iter().all(|size| *size <= limit + 100), "{sizes:?}");
        assert_eq!(std::fs::read_dir(&path).unwrap().count(), 2);
        std::fs::remove_dir_all(path).unwrap();
    }
}
