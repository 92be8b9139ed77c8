//! Reading the logs of instances and jobs.
//!
//! A jail's log writer keeps `current.log` and `previous.log` in a folder that only root can reach; the runner
//! lends a descriptor of that folder. A line is `TIME STREAM TEXT`: RFC 3339, `o` or `e`, what was printed.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use epagent_core::name::JailId;
use epagent_wire::runner::Request;
use rustix::fs::{Mode, OFlags, openat};

use crate::runner::{CallError, Runner};

/// How far back a tail looks, in bytes of one file.
const TAIL_BYTES_MAX: u64 = 1 << 20;
/// The file that is written, and what it was before it was full.
pub const CURRENT: &str = "current.log";
pub const PREVIOUS: &str = "previous.log";
/// The log writer's record of a jail's end, written last.
pub const RECORD: &str = "exit.json";
/// How long the log writer of a jail that ended is waited for.
const WRITER_PATIENCE: Duration = Duration::from_secs(2);
const WRITER_POLL: Duration = Duration::from_millis(10);
/// How much a follower takes at a time.
const CHUNK_BYTES: usize = 64 << 10;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    pub at: String,
    pub stderr: bool,
    pub text: String,
}

/// Why a log can't be read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("asking the runner for it")]
    Runner(#[from] CallError),
    #[error("reading it")]
    Io(#[from] std::io::Error),
}

/// The last `lines` lines of a jail's log, and a follower of what comes after them.
///
/// Logs are on the pool, whose disk may stall: every read is done on a thread that may wait.
pub async fn open(runner: &Runner, jail: &JailId, lines: usize) -> Result<(Vec<Line>, Follower), LogError> {
    let answer = runner.call_with(Request::LogOpen { jail: jail.clone() }, Vec::new()).await?;
    let folder = answer.fds.into_iter().next().ok_or(CallError::Unexpected)?;
    let opened = tokio::task::spawn_blocking(move || tail(folder, lines)).await;
    let (lines, reader) = opened.map_err(std::io::Error::other)??;
    Ok((lines, Follower(Some(reader))))
}

/// The last lines of a jail that has ended. The end is told before the log writer has written everything that was
/// printed; its record of the end is what it writes last, and is waited for.
pub async fn last_lines(runner: &Runner, jail: &JailId, lines: usize) -> Result<Vec<Line>, LogError> {
    let answer = runner.call_with(Request::LogOpen { jail: jail.clone() }, Vec::new()).await?;
    let folder = answer.fds.into_iter().next().ok_or(CallError::Unexpected)?;
    let read = tokio::task::spawn_blocking(move || {
        let deadline = Instant::now() + WRITER_PATIENCE;
        while open_in(&folder, RECORD)?.is_none() && Instant::now() < deadline {
            std::thread::sleep(WRITER_POLL);
        }
        tail(folder, lines)
    });
    let (lines, _) = read.await.map_err(std::io::Error::other)??;
    Ok(lines)
}

/// Reads a log from some point on, through rotation. Empty after a read that failed.
pub struct Follower(Option<Reader>);

impl Follower {
    /// Lines that were added since; none when there are none yet, or when the log can't be read any more.
    pub async fn more(&mut self) -> Vec<Line> {
        let Some(mut reader) = self.0.take() else { return Vec::new() };
        let read = tokio::task::spawn_blocking(move || {
            let lines = reader.more()?;
            Ok::<_, std::io::Error>((lines, reader))
        });
        match read.await {
            Ok(Ok((lines, reader))) => {
                self.0 = Some(reader);
                lines
            }
            _ => Vec::new(),
        }
    }
}

struct Reader {
    folder: OwnedFd,
    current: Option<File>,
    rest: Vec<u8>,
}

fn tail(folder: OwnedFd, lines: usize) -> std::io::Result<(Vec<Line>, Reader)> {
    let mut bytes = Vec::new();
    if let Some(previous) = open_in(&folder, PREVIOUS)? {
        read_end(previous, &mut bytes)?;
    }
    let current = open_in(&folder, CURRENT)?;
    if let Some(current) = &current {
        read_end(current.try_clone()?, &mut bytes)?;
    }
    let mut reader = Reader { folder, current, rest: Vec::new() };
    let mut found = reader.split(&bytes);
    found.drain(..found.len().saturating_sub(lines));
    Ok((found, reader))
}

impl Reader {
    fn more(&mut self) -> std::io::Result<Vec<Line>> {
        let mut lines = Vec::new();
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            if self.current.is_none() {
                self.current = open_in(&self.folder, CURRENT)?;
            }
            let Some(file) = &mut self.current else { return Ok(lines) };
            let length = file.read(&mut chunk)?;
            if length > 0 {
                lines.extend(self.split(&chunk[..length]));
                // What came in between is left for the next call, so that a flood does not keep us here.
                return Ok(lines);
            }
            // At its end: has another file taken its name?
            let inode = file.metadata()?.ino();
            match open_in(&self.folder, CURRENT)? {
                Some(newer) if newer.metadata()?.ino() != inode => self.current = Some(newer),
                _ => return Ok(lines),
            }
        }
    }

    fn split(&mut self, bytes: &[u8]) -> Vec<Line> {
        self.rest.extend_from_slice(bytes);
        let Some(end) = self.rest.iter().rposition(|&byte| byte == b'\n') else { return Vec::new() };
        let whole: Vec<u8> = self.rest.drain(..=end).collect();
        whole.split(|&byte| byte == b'\n').filter_map(parse).collect()
    }
}

/// None when there is no such file.
pub fn open_in(folder: &OwnedFd, name: &str) -> std::io::Result<Option<File>> {
    match openat(folder, name, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty()) {
        Ok(file) => Ok(Some(file.into())),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Appends the end of the file, from the beginning of a line; leaves the file at its end.
fn read_end(mut file: File, bytes: &mut Vec<u8>) -> std::io::Result<()> {
    let length = file.metadata()?.len();
    let from = length.saturating_sub(TAIL_BYTES_MAX);
    file.seek(SeekFrom::Start(from))?;
    let begin = bytes.len();
    file.take(TAIL_BYTES_MAX * 2).read_to_end(bytes)?;
    if from > 0 {
        let cut =
            bytes[begin..].iter().position(|&byte| byte == b'\n').map_or(bytes.len() - begin, |at| at + 1);
        bytes.drain(begin..begin + cut);
    }
    Ok(())
}

/// None for an empty line or one that no log writer wrote.
pub fn parse(line: &[u8]) -> Option<Line> {
    let text = String::from_utf8_lossy(line);
    let (at, rest) = text.split_once(' ')?;
    let (stream, text) = rest.split_once(' ').unwrap_or((rest, ""));
    Some(Line { at: at.to_owned(), stderr: stream == "e", text: text.to_owned() })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn folder() -> (tempfile::TempDir, OwnedFd) {
        let folder = tempfile::tempdir().unwrap();
        let fd = File::open(folder.path()).unwrap().into();
        (folder, fd)
    }

    #[test]
    fn a_follower_goes_on_through_rotation() {
        let (folder, fd) = folder();
        let current = folder.path().join("current.log");
        std::fs::write(&current, "t1 o one\nt2 e two\nt3 o half").unwrap();
        let (lines, mut reader) = tail(fd, 1).unwrap();
        assert_eq!(lines, [Line { at: "t2".into(), stderr: true, text: "two".into() }]);

        let mut file = File::options().append(true).open(&current).unwrap();
        file.write_all(b" done\n").unwrap();
        assert_eq!(reader.more().unwrap()[0].text, "half done");

        std::fs::rename(&current, folder.path().join("previous.log")).unwrap();
        std::fs::write(&current, "t4 o new file\n").unwrap();
        assert_eq!(reader.more().unwrap()[0].text, "new file");
        assert!(reader.more().unwrap().is_empty());
    }

    #[test]
    fn a_log_that_is_not_there_yet_is_empty() {
        let (folder, fd) = folder();
        let (lines, mut reader) = tail(fd, 10).unwrap();
        assert!(lines.is_empty() && reader.more().unwrap().is_empty());
        std::fs::write(folder.path().join("current.log"), "t o \n").unwrap();
        assert_eq!(reader.more().unwrap()[0].text, "");
    }

    #[test]
    fn a_symlink_in_place_of_the_log_is_not_followed() {
        let (folder, fd) = folder();
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join("current.log")).unwrap();
        assert!(tail(fd, 10).is_err());
    }
}
