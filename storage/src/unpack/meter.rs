//! The budget: counts what comes out of decompression, and what is unpacked from it.

use std::cell::Cell;
use std::io::{self, Read};

use sha2::{Digest, Sha256};

use super::UnpackError;

/// What the headers of one entry may take in the stream beyond its data, on average.
const OVERHEAD_BYTES_PER_ENTRY: u64 = 2048;
/// What a stream may have besides, e.g. the padding that tar adds at its end.
const OVERHEAD_BYTES: u64 = 2 << 20;

/// Shared by the readers of one unpacking, all in one thread.
#[derive(Debug)]
pub(super) struct Meter {
    max_bytes: u64,
    max_entries: u64,
    bytes: Cell<u64>,
    entries: Cell<u64>,
    ignored: Cell<u64>,
    stream_bytes: Cell<u64>,
}

impl Meter {
    pub(super) fn new(max_bytes: u64, max_entries: u64) -> Self {
        Self {
            max_bytes,
            max_entries,
            bytes: Cell::new(0),
            entries: Cell::new(0),
            ignored: Cell::new(0),
            stream_bytes: Cell::new(0),
        }
    }

    /// Charges one entry, extension headers included.
    pub(super) fn charge_entry(&self) -> Result<(), UnpackError> {
        self.entries.set(self.entries.get() + 1);
        match self.entries.get() > self.max_entries {
            true => Err(UnpackError::TooManyEntries { max_entries: self.max_entries }),
            false => Ok(()),
        }
    }

    /// Charges a file's bytes before the first of them is written.
    pub(super) fn charge_bytes(&self, size: u64) -> Result<(), UnpackError> {
        self.bytes.set(self.bytes.get().saturating_add(size));
        match self.bytes.get() > self.max_bytes {
            true => Err(self.too_many_bytes()),
            false => Ok(()),
        }
    }

    pub(super) fn count_ignored(&self) {
        self.ignored.set(self.ignored.get() + 1);
    }

    /// (entries, bytes, ignored)
    pub(super) fn totals(&self) -> (u64, u64, u64) {
        (self.entries.get(), self.bytes.get(), self.ignored.get())
    }

    fn too_many_bytes(&self) -> UnpackError {
        UnpackError::TooManyBytes { max_bytes: self.max_bytes }
    }

    /// A stream may also be a bomb without a single large file, by headers alone.
    fn stream_limit_bytes(&self) -> u64 {
        let overhead =
            self.max_entries.saturating_mul(OVERHEAD_BYTES_PER_ENTRY).saturating_add(OVERHEAD_BYTES);
        self.max_bytes.saturating_add(overhead)
    }
}

/// What a [`Metered`] reader saw; the tar reader turns its own errors into text, and this keeps the cause.
#[derive(Default)]
pub(super) struct Watch {
    pub(super) at_end: Cell<bool>,
    pub(super) over_budget: Cell<bool>,
    failure: Cell<Option<io::Error>>,
}

impl Watch {
    /// The true reason behind an error that came out of a reader stacked on the metered one.
    pub(super) fn explain(&self, meter: &Meter, error: io::Error, at: &str) -> UnpackError {
        if self.over_budget.get() {
            return meter.too_many_bytes();
        }
        if let Some(failure) = self.failure.take() {
            return match failure.kind() {
                io::ErrorKind::UnexpectedEof => UnpackError::Truncated { at: at.to_owned() },
                _ if failure.raw_os_error().is_some() => {
                    UnpackError::Io { op: "read", name: None, source: failure }
                }
                _ => UnpackError::Malformed { what: format!("{failure} at {at}") },
            };
        }
        match self.at_end.get() || error.kind() == io::ErrorKind::UnexpectedEof {
            true => UnpackError::Truncated { at: at.to_owned() },
            false => UnpackError::Malformed { what: format!("{error} at {at}") },
        }
    }
}

/// Counts (and optionally hashes) a decompressed stream.
pub(super) struct Metered<'a, R> {
    inner: R,
    meter: &'a Meter,
    watch: &'a Watch,
    hash: Option<&'a mut Sha256>,
}

impl<'a, R: Read> Metered<'a, R> {
    pub(super) fn new(inner: R, meter: &'a Meter, watch: &'a Watch, hash: Option<&'a mut Sha256>) -> Self {
        Self { inner, meter, watch, hash }
    }
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = match self.inner.read(buf) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Err(error),
            Err(error) => {
                let text = io::Error::new(error.kind(), error.to_string());
                self.watch.failure.set(Some(error));
                return Err(text);
            }
        };
        if read == 0 && !buf.is_empty() {
            self.watch.at_end.set(true);
        }
        if let Some(hash) = &mut self.hash {
            hash.update(&buf[..read]);
        }
        self.meter.stream_bytes.set(self.meter.stream_bytes.get() + read as u64);
        if self.meter.stream_bytes.get() > self.meter.stream_limit_bytes() {
            self.watch.over_budget.set(true);
            return Err(io::Error::other("over budget"));
        }
        Ok(read)
    }
}

/// Hashes a compressed stream on its way to the decompressor.
pub(super) struct Hashed<'a, R> {
    inner: R,
    hash: &'a mut Sha256,
}

impl<'a, R: Read> Hashed<'a, R> {
    pub(super) fn new(inner: R, hash: &'a mut Sha256) -> Self {
        Self { inner, hash }
    }
}

impl<R: Read> Read for Hashed<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buf)?;
        self.hash.update(&buf[..read]);
        Ok(read)
    }
}
