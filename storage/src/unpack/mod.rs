//! Unpacking what a tenant sent: archives and image layers, inside a jail of that tenant's.
//!
//! ```text
//!  stdin ─▶ format ─▶ decompress ─▶ meter (bytes) ─▶ tar entries ─▶ check ─▶ tree (below one descriptor)
//!           layers: frame ─▶ digest ─▶ decompress ─▶ diff_id ─▶ …, whiteouts applied
//! ```
//!
//! Every byte here is hostile. The jail keeps an escape from mattering; this module still refuses one, since an archive
//! that tries is broken or an attack, and its sender should hear which. Nothing is skipped silently: an entry is
//! unpacked as it says, or the whole archive is refused with the entry's name ([`UnpackError`]). The exception is what
//! jails mount over: `dev/`, `proc/`, `run/`, `sys/`, `tmp/` of an image, and whatever else is a mount when it is
//! unpacked at a jail's root. That is ignored and counted.
//!
//! Bounds: [`Options::max_bytes`] and [`Options::max_entries`] hold after decompression and over all layers together;
//! names, depths and extension headers have fixed ones. Memory stays below about 16 MiB plus
//! 16 bytes per entry of a layer, and what zstd's window needs (at most 128 MiB).
//!
//! Extended attributes (file capabilities among them) and the times of directories are not restored.

mod entries;
mod error;
pub mod frame;
mod layers;
mod meter;
mod names;
mod tree;

use std::io::{self, BufRead, Read};
use std::os::fd::OwnedFd;

use serde::Serialize;

pub use error::UnpackError;
use meter::Meter;

/// Whose rules an archive follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// An upload: owned by 0:0, permissions without set-id bits, links that stay inside.
    App,
    /// A root file system: owners and modes kept, links may be absolute (they are followed inside the image).
    Image,
}

/// How the stream is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    Tar,
    TarGz,
    TarZst,
    /// Image layers, see [`frame`].
    Layers,
}

#[derive(Debug, Clone)]
pub struct Options {
    pub policy: Policy,
    /// `None`: by the first bytes.
    pub format: Option<Format>,
    pub max_bytes: u64,
    pub max_entries: u64,
}

/// What was unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Summary {
    pub format: Format,
    pub layers: u32,
    pub entries: u64,
    pub bytes: u64,
    /// Entries of an image where jails have mounts of their own.
    pub ignored: u64,
}

/// Unpacks the whole of `input` below `into`.
pub fn unpack(input: impl BufRead, into: OwnedFd, options: &Options) -> Result<Summary, UnpackError> {
    let mut input = input;
    let (format, head) = detect(&mut input, options.format)?;
    let input = io::BufReader::new(head.as_slice().chain(input));
    let mut tree = tree::Tree::new(into, options.policy);
    let meter = Meter::new(options.max_bytes, options.max_entries);
    let mut layers = 1;
    match format {
        Format::Tar => entries::unpack_tar(input, &meter, &mut tree)?,
        Format::TarGz => entries::unpack_tar(flate2::bufread::MultiGzDecoder::new(input), &meter, &mut tree)?,
        Format::TarZst => entries::unpack_tar(zstd_decoder(input)?, &meter, &mut tree)?,
        Format::Layers if options.policy == Policy::Image => {
            layers = layers::unpack_layers(input, &meter, &mut tree)?;
        }
        Format::Layers => return Err(UnpackError::Unsupported { what: "image layers as an upload".into() }),
    }
    let (entries, bytes, ignored) = meter.totals();
    Ok(Summary { format, layers, entries, bytes, ignored })
}

fn zstd_decoder<R: BufRead>(input: R) -> Result<zstd::Decoder<'static, R>, UnpackError> {
    zstd::Decoder::with_buffer(input).map_err(|source| UnpackError::Io {
        op: "start zstd",
        name: None,
        source,
    })
}

/// As much as every magic number needs: a tar's stands at 257.
const HEAD_BYTES: usize = 512;

fn detect(input: &mut impl Read, wanted: Option<Format>) -> Result<(Format, Vec<u8>), UnpackError> {
    let mut head = Vec::with_capacity(HEAD_BYTES);
    input.take(HEAD_BYTES as u64).read_to_end(&mut head).map_err(|source| UnpackError::Io {
        op: "read",
        name: None,
        source,
    })?;
    let seen = match head.as_slice() {
        [] => return Err(UnpackError::Truncated { at: "its first byte".into() }),
        [0x1f, 0x8b, ..] => Some(Format::TarGz),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Format::TarZst),
        head if head.starts_with(frame::MAGIC) => Some(Format::Layers),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => return Err(unsupported("xz compression")),
        [b'B', b'Z', b'h', ..] => return Err(unsupported("bzip2 compression")),
        [b'P', b'K', 3, 4, ..] => return Err(unsupported("zip")),
        head if head.get(257..262) == Some(b"ustar") || head.len() == HEAD_BYTES => Some(Format::Tar),
        _ => None,
    };
    match (wanted, seen) {
        (Some(format), _) | (None, Some(format)) => Ok((format, head)),
        (None, None) => Err(UnpackError::Malformed { what: "no archive format known here".into() }),
    }
}

fn unsupported(what: &str) -> UnpackError {
    UnpackError::Unsupported { what: what.to_owned() }
}
