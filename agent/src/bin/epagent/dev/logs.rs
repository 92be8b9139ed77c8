//! What the parts print: one file each, bounded, and its last line for when one dies.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use super::error::DevError;
use super::layout::Layout;

/// A log that is larger is moved to `NAME.log.1` at the next look, about once a second: so one part's logs take
/// at most twice this and what it prints in that second.
const LOG_BYTES_MAX: u64 = 16 << 20;
/// How much of the end is read in search of the last line.
const TAIL_BYTES: u64 = 8 << 10;
/// The longest last line that is shown.
const LINE_CHARS_MAX: usize = 400;

/// The log of one part. The file is opened for appending, by us and by the part that inherits it, so that it can
/// be emptied under its writer.
#[derive(Debug)]
pub struct Log {
    file: File,
    path: PathBuf,
}

impl Log {
    pub fn open(layout: &Layout, name: &str) -> Result<Self, DevError> {
        let path = layout.path("log").join(format!("{name}.log"));
        let opened = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(&path);
        match opened {
            Ok(file) => Ok(Self { file, path }),
            Err(source) => Err(DevError::Folder { path, source }),
        }
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    pub fn path(&self) -> &PathBuf {
        &self.path
    }

    /// Keeps the file within its bound. Lines printed between copying and emptying are lost.
    pub fn bound(&self) -> io::Result<()> {
        if self.file.metadata()?.len() > LOG_BYTES_MAX {
            fs::copy(&self.path, self.path.with_extension("log.1"))?;
            self.file.set_len(0)?;
        }
        Ok(())
    }

    /// The end of what was printed since the file had `from` bytes.
    pub fn last_line_since(&self, from: u64) -> Option<String> {
        let mut file = &self.file;
        let len = file.metadata().ok()?.len();
        file.seek(SeekFrom::Start(from.max(len.saturating_sub(TAIL_BYTES)))).ok()?;
        let mut tail = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut tail).ok()?;
        let text = String::from_utf8_lossy(&tail);
        let line = text.lines().rev().find(|line| !line.trim().is_empty())?;
        // A terminal is not to be steered by what a log holds.
        Some(line.chars().filter(|c| !c.is_control()).take(LINE_CHARS_MAX).collect())
    }

    pub fn len(&self) -> u64 {
        self.file.metadata().map_or(0, |meta| meta.len())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_log_stays_within_its_bound() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::open(dir.path()).unwrap();
        fs::create_dir(layout.path("log")).unwrap();
        let log = Log::open(&layout, "x").unwrap();
        let line = [b'x'; 1 << 20];
        for _ in 0..17 {
            log.file().write_all(&line).unwrap();
        }
        log.bound().unwrap();
        assert_eq!(log.len(), 0);
        log.file().write_all(b"after\n\n").unwrap();
        assert_eq!(log.last_line_since(0).as_deref(), Some("after"));
        assert_eq!(log.last_line_since(7), None);
        assert_eq!(fs::metadata(layout.path("log/x.log.1")).unwrap().len(), 17 << 20);
    }
}
