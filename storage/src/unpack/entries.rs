//! Reading a tar: what each entry says, once all its headers agree.
//!
//! The `tar` crate finds headers and checks sums; extension headers are read here, because their size must be bounded
//! before they are read, and because two headers that disagree are an attack on whichever reader believes the other
//! one. Refused are: a PAX size that differs from the header's, a second extension header of the same kind, data behind
//! entries that have none, sparse files, and an archive without its end mark.

use std::io::{self, Read};

use sha2::Sha256;
use tar::{Archive, EntryType, Header};

use super::UnpackError;
use super::meter::{Meter, Metered, Watch};
use super::names::{NAME_BYTES_MAX, Name, shown};
use super::tree::Tree;

/// Extended attributes come in these as well; a longer one is none we want in memory.
const PAX_BYTES_MAX: u64 = 1 << 20;

/// What an entry is.
#[derive(Debug)]
pub(super) enum Kind {
    File { size: u64 },
    Folder,
    Symlink { target: Vec<u8> },
    HardLink { target: Name },
    Special(&'static str),
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: Name,
    pub(super) kind: Kind,
    pub(super) mode: u32,
    pub(super) uid: u64,
    pub(super) gid: u64,
    pub(super) mtime: i64,
}

/// Unpacks a plain tar.
pub(super) fn unpack_tar(input: impl Read, meter: &Meter, tree: &mut Tree) -> Result<(), UnpackError> {
    walk(input, meter, None, |entry, data| tree.put(entry, data, meter))
}

/// Calls `visit` for each entry of a decompressed tar, reads it to its very end, and hashes it if asked.
pub(super) fn walk(
    input: impl Read,
    meter: &Meter,
    hash: Option<&mut Sha256>,
    mut visit: impl FnMut(&Entry, &mut dyn Read) -> Result<(), UnpackError>,
) -> Result<(), UnpackError> {
    let watch = Watch::default();
    let mut archive = Archive::new(Metered::new(input, meter, &watch, hash));
    let mut at = "the first entry".to_owned();
    let mut extensions = Extensions::default();
    let entries = archive.entries().map_err(|e| watch.explain(meter, e, &at))?;
    for raw in entries.raw(true) {
        let mut raw = raw.map_err(|e| watch.explain(meter, e, &at))?;
        meter.charge_entry()?;
        let header = raw.header().clone();
        let size = header.entry_size().map_err(|e| watch.explain(meter, e, &at))?;
        let mut failed = None;
        let mut read = |limit: u64| {
            read_extension(&mut raw, size, limit).map_err(|e| match e {
                None => {
                    UnpackError::Malformed { what: format!("an extension header of {size} bytes after {at}") }
                }
                Some(e) => watch.explain(meter, e, &at),
            })
        };
        match header.entry_type() {
            EntryType::XHeader => extensions.set_pax(&read(PAX_BYTES_MAX)?)?,
            EntryType::XGlobalHeader => refuse_global(&read(PAX_BYTES_MAX)?)?,
            EntryType::GNULongName => extensions.set_name(read(NAME_BYTES_MAX as u64 + 1)?)?,
            EntryType::GNULongLink => extensions.set_link(read(NAME_BYTES_MAX as u64 + 1)?)?,
            _ => {
                let entry = std::mem::take(&mut extensions).entry(&header, size)?;
                at = entry.name.shown();
                let mut data = Noted { inner: &mut raw, failed: &mut failed };
                let result = visit(&entry, &mut data);
                if let Some(error) = failed {
                    return Err(watch.explain(meter, error, &at));
                }
                result?;
            }
        }
    }
    if watch.at_end.get() {
        return Err(UnpackError::Truncated { at: format!("the end mark after {at}") });
    }
    drain(archive.into_inner(), &watch, meter)
}

/// Behind the end mark only padding may follow: other bytes are an entry some other reader would see.
fn drain(mut rest: impl Read, watch: &Watch, meter: &Meter) -> Result<(), UnpackError> {
    let mut buf = vec![0; 64 << 10];
    loop {
        match rest.read(&mut buf) {
            Ok(0) => return Ok(()),
            Ok(read) if buf[..read].iter().all(|&byte| byte == 0) => {}
            Ok(_) => return Err(UnpackError::Malformed { what: "data behind the end mark".into() }),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(watch.explain(meter, e, "the end")),
        }
    }
}

/// `Err(None)`: longer than allowed.
fn read_extension(raw: &mut impl Read, size: u64, limit: u64) -> Result<Vec<u8>, Option<io::Error>> {
    if size > limit {
        return Err(None);
    }
    let mut bytes = Vec::with_capacity(size as usize);
    raw.read_to_end(&mut bytes).map_err(Some)?;
    match bytes.len() as u64 == size {
        true => Ok(bytes),
        false => Err(Some(io::ErrorKind::UnexpectedEof.into())),
    }
}

/// Remembers a read error, so that it is told from an error in writing.
struct Noted<'a, R> {
    inner: R,
    failed: &'a mut Option<io::Error>,
}

impl<R: Read> Read for Noted<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buf).inspect_err(|error| {
            if error.kind() != io::ErrorKind::Interrupted {
                *self.failed = Some(io::Error::new(error.kind(), error.to_string()));
            }
        })
    }
}

/// What the extension headers in front of an entry said.
#[derive(Debug, Default)]
struct Extensions {
    has_pax: bool,
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<i64>,
}

fn malformed(what: &str) -> UnpackError {
    UnpackError::Malformed { what: what.to_owned() }
}

fn set_once<T>(slot: &mut Option<T>, value: T, what: &str) -> Result<(), UnpackError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(malformed(what)),
    }
}

fn without_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|&byte| byte == 0) {
        bytes.truncate(end);
    }
    bytes
}

fn number<T: std::str::FromStr>(value: &[u8]) -> Result<T, UnpackError> {
    let text = std::str::from_utf8(value).ok();
    text.and_then(|text| text.parse().ok()).ok_or_else(|| malformed("a number in an extension header"))
}

impl Extensions {
    fn set_name(&mut self, bytes: Vec<u8>) -> Result<(), UnpackError> {
        set_once(&mut self.long_name, without_nul(bytes), "two long names for one entry")
    }

    fn set_link(&mut self, bytes: Vec<u8>) -> Result<(), UnpackError> {
        set_once(&mut self.long_link, without_nul(bytes), "two long link names for one entry")
    }

    fn set_pax(&mut self, bytes: &[u8]) -> Result<(), UnpackError> {
        if std::mem::replace(&mut self.has_pax, true) {
            return Err(malformed("two extension headers for one entry"));
        }
        for record in records(bytes) {
            let (key, value) = record?;
            match key {
                b"path" => set_once(&mut self.path, value.to_vec(), "two paths in one extension header")?,
                b"linkpath" => set_once(&mut self.link, value.to_vec(), "two links in one extension header")?,
                b"size" => set_once(&mut self.size, number(value)?, "two sizes in one extension header")?,
                b"uid" => self.uid = Some(number(value)?),
                b"gid" => self.gid = Some(number(value)?),
                b"mtime" => {
                    let whole = value.split(|&byte| byte == b'.').next().unwrap_or_default();
                    self.mtime = Some(number(whole)?);
                }
                key if key.starts_with(b"GNU.sparse.") => {
                    return Err(UnpackError::Unsupported { what: "sparse files".into() });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The entry all headers together describe.
    fn entry(self, header: &Header, size: u64) -> Result<Entry, UnpackError> {
        let path = self.path.or(self.long_name).unwrap_or_else(|| header.path_bytes().into_owned());
        let name = Name::parse(&path)?;
        let link = || {
            let in_header = || header.link_name_bytes().map(|bytes| bytes.into_owned());
            self.link.clone().or_else(|| self.long_link.clone()).or_else(in_header).unwrap_or_default()
        };
        if let Some(extended) = self.size.filter(|&extended| extended != size) {
            return Err(UnpackError::SizeMismatch { name: name.shown(), header: size, extended });
        }
        let kind = match header.entry_type() {
            // Before POSIX a folder was a file whose name ends in a slash.
            EntryType::Regular if path.ends_with(b"/") => Kind::Folder,
            EntryType::Regular | EntryType::Continuous => Kind::File { size },
            EntryType::Directory => Kind::Folder,
            EntryType::Symlink => Kind::Symlink { target: link() },
            EntryType::Link => {
                Kind::HardLink { target: Name::parse(&link()).map_err(|e| hard_link_out(&name, e))? }
            }
            EntryType::Char => Kind::Special("character device"),
            EntryType::Block => Kind::Special("block device"),
            EntryType::Fifo => Kind::Special("pipe"),
            EntryType::GNUSparse => return Err(UnpackError::Unsupported { what: "sparse files".into() }),
            other => {
                let what = format!("entries of the type {:?}", char::from(other.as_byte()));
                return Err(UnpackError::Unsupported { what });
            }
        };
        if size != 0 && !matches!(kind, Kind::File { .. }) {
            return Err(UnpackError::SizeMismatch { name: name.shown(), header: size, extended: 0 });
        }
        let field = |value: io::Result<u64>, extended: Option<u64>| match extended {
            Some(value) => Ok(value),
            None => value.map_err(|e| UnpackError::Malformed { what: format!("{e} in {}", name.shown()) }),
        };
        Ok(Entry {
            mode: header
                .mode()
                .map_err(|e| UnpackError::Malformed { what: format!("{e} in {}", name.shown()) })?,
            uid: field(header.uid(), self.uid)?,
            gid: field(header.gid(), self.gid)?,
            mtime: self.mtime.unwrap_or_else(|| header.mtime().map_or(0, |t| i64::try_from(t).unwrap_or(0))),
            name,
            kind,
        })
    }
}

fn hard_link_out(name: &Name, error: UnpackError) -> UnpackError {
    match error {
        UnpackError::ParentName { name: target } | UnpackError::AbsoluteName { name: target } => {
            UnpackError::BadHardLink { name: name.shown(), target, why: "leads out of the archive" }
        }
        other => other,
    }
}

/// A global header may carry a comment (git writes one), but nothing that changes what entries mean.
fn refuse_global(bytes: &[u8]) -> Result<(), UnpackError> {
    for record in records(bytes) {
        let (key, _) = record?;
        if matches!(key, b"path" | b"linkpath" | b"size" | b"uid" | b"gid") || key.starts_with(b"GNU.sparse.")
        {
            return Err(UnpackError::Malformed { what: format!("a global header that sets {}", shown(key)) });
        }
    }
    Ok(())
}

/// The records `LENGTH KEY=VALUE\n` of a PAX header (POSIX.1-2017, pax, "pax Header Block").
fn records(mut bytes: &[u8]) -> impl Iterator<Item = Result<(&[u8], &[u8]), UnpackError>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let record = split_record(bytes);
        bytes = record.map_or(&[][..], |(_, _, rest)| rest);
        Some(record.map(|(key, value, _)| (key, value)).ok_or_else(|| malformed("an extension header")))
    })
}

fn split_record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().position(|&byte| byte == b' ')?;
    let length: usize = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
    let record = bytes.get(space + 1..length)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|&byte| byte == b'=')?;
    Some((&record[..equals], &record[equals + 1..], &bytes[length..]))
}
