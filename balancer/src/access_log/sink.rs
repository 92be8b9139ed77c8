//! Where lines go: a file that may be moved away under us, standard output, or the journal.

use std::fs::{File, OpenOptions};
use std::io::{self, Stdout, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Target;
use super::format::Format;
use super::journal::entry;
use crate::core::access::Access;
use crate::journal::Journal;

/// How often it is looked at whether the file at the path is still ours.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Buffered before it is written in one go.
const BUFFER_BYTES: usize = 64 * 1024;

/// An open target.
pub enum Sink {
    Stdout(Buffered<Stdout>),
    File { file: Buffered<File>, path: PathBuf, looked_at: Instant },
    Journal(Journal),
}

/// Lines on their way to a writer.
pub struct Buffered<W: Write> {
    out: W,
    bytes: Vec<u8>,
    lines: u64,
    /// The last thing written may have been half a line.
    torn: bool,
}

impl Sink {
    pub fn open(target: &Target) -> io::Result<Self> {
        Ok(match target {
            Target::Stdout => Sink::Stdout(Buffered::new(io::stdout())),
            Target::Journal(path) => Sink::Journal(Journal::open(path)?),
            Target::File(path) => {
                Sink::File { file: Buffered::new(open(path)?), path: path.clone(), looked_at: Instant::now() }
            }
        })
    }

    /// Goes on in another file when ours no longer stands at the path.
    pub fn renew(&mut self) {
        let Sink::File { file, path, looked_at } = self else { return };
        if looked_at.elapsed() < LOOK_EVERY {
            return;
        }
        *looked_at = Instant::now();
        // One that cannot be opened leaves us with the one we have.
        if !is_at(&file.out, path)
            && let Ok(new) = open(path)
        {
            *file = Buffered::new(new);
        }
    }

    /// Takes a line; returns how many were lost on the way so far.
    pub fn write(&mut self, format: Format, at: Duration, access: &Access) -> u64 {
        match self {
            Sink::Stdout(out) => out.write(format, at, access),
            Sink::File { file, .. } => file.write(format, at, access),
            Sink::Journal(journal) => u64::from(!journal.write(&entry(access))),
        }
    }

    /// Sees to it that what was taken is written; returns how many lines were not.
    pub fn flush(&mut self) -> u64 {
        match self {
            Sink::Stdout(out) => out.flush(),
            Sink::File { file, .. } => file.flush(),
            Sink::Journal(_) => 0,
        }
    }
}

impl<W: Write> Buffered<W> {
    fn new(out: W) -> Self {
        Self { out, bytes: Vec::with_capacity(2 * BUFFER_BYTES), lines: 0, torn: false }
    }

    fn write(&mut self, format: Format, at: Duration, access: &Access) -> u64 {
        if self.torn && self.bytes.is_empty() {
            self.bytes.push(b'\n');
        }
        self.lines += 1;
        // Writing to a vector cannot fail.
        let _ = format.write(&mut self.bytes, at, access);
        if self.bytes.len() < BUFFER_BYTES { 0 } else { self.flush() }
    }

    /// What cannot be written is given up: keeping it would only postpone that.
    fn flush(&mut self) -> u64 {
        let lines = std::mem::take(&mut self.lines);
        self.torn = self.out.write_all(&self.bytes).and_then(|()| self.out.flush()).is_err();
        self.bytes.clear();
        if self.torn { lines } else { 0 }
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}

/// Whether the file is the one at the path.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes some bytes, then none, then everything.
    struct FullDisk {
        left: usize,
        written: Vec<u8>,
    }

    impl Write for FullDisk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let count = bytes.len().min(self.left);
            self.left -= count;
            self.written.extend_from_slice(&bytes[..count]);
            if count == 0 { Err(io::Error::from(io::ErrorKind::StorageFull)) } else { Ok(count) }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_costs_the_lines_it_did_not_take_and_no_others() {
        let mut buffered = Buffered::new(FullDisk { left: 30, written: Vec::new() });
        let mut line = || buffered.write(Format::Common, Duration::ZERO, &Access::default());
        assert_eq!((line(), line()), (0, 0));
        assert_eq!(buffered.flush(), 2);
        buffered.out.left = usize::MAX;
        buffered.write(Format::Common, Duration::ZERO, &Access::default());
        assert_eq!(buffered.flush(), 0);
        let text = String::from_utf8(buffered.out.written).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!((lines.len(), lines[0].len(), lines[1].ends_with("- 0")), (2, 30, true), "{text}");
    }
}
