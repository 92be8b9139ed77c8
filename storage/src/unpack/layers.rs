//! Image layers, one upon the other, with their whiteouts (OCI image specification, layer.md).
//!
//! `.wh.NAME` removes NAME of the layers below; `.wh..wh..opq` removes all that the layers below put into its folder.
//! Neither touches what this layer put there, in whatever order the entries come, so each layer keeps a set of what it
//! has put down.

use std::collections::HashSet;
use std::io::{self, BufRead, BufReader, Read};

use sha2::{Digest, Sha256};

use super::entries::{Entry, walk};
use super::frame::{Compression, LayerHeader, MAGIC, read_header};
use super::meter::{Hashed, Meter};
use super::names::Name;
use super::tree::{self, Tree};
use super::{UnpackError, zstd_decoder};

const WHITEOUT: &[u8] = b".wh.";
/// Names that belong to the tools which first had whiteouts.
const WHITEOUT_META: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Unpacks a stream of layers; returns how many.
pub(super) fn unpack_layers(
    mut input: impl BufRead,
    meter: &Meter,
    tree: &mut Tree,
) -> Result<u32, UnpackError> {
    let mut magic = [0; MAGIC.len()];
    input
        .read_exact(&mut magic)
        .map_err(|_| UnpackError::Truncated { at: "the magic of the layers".into() })?;
    if &magic != MAGIC {
        return Err(UnpackError::Malformed { what: "the magic of the layers".into() });
    }
    let mut layer = 1;
    while let Some(header) = read_header(&mut input, layer)? {
        unpack_layer(&mut input, &header, layer, meter, tree)?;
        layer += 1;
    }
    match input.read(&mut [0]) {
        Ok(0) => Ok(layer - 1),
        Ok(_) => Err(UnpackError::Malformed { what: "data behind the last layer".into() }),
        Err(source) => Err(UnpackError::Io { op: "read", name: None, source }),
    }
}

fn unpack_layer(
    input: &mut impl BufRead,
    header: &LayerHeader,
    layer: u32,
    meter: &Meter,
    tree: &mut Tree,
) -> Result<(), UnpackError> {
    let compression = header.compression()?;
    let (mut digest, mut diff_id) = (Sha256::new(), Sha256::new());
    let mut blob = input.take(header.length);
    let mut put_down = PutDown::default();
    let visit = |entry: &Entry, data: &mut dyn Read| put_down.apply(entry, data, meter, tree);
    let packed = BufReader::new(Hashed::new(&mut blob, &mut digest));
    let result = match compression {
        Compression::None => walk(packed, meter, Some(&mut diff_id), visit),
        Compression::Gzip => {
            walk(flate2::bufread::MultiGzDecoder::new(packed), meter, Some(&mut diff_id), visit)
        }
        Compression::Zstd => walk(zstd_decoder(packed)?, meter, Some(&mut diff_id), visit),
    };
    // A blob the stream does not hold to its end is cut, whatever its reader made of that.
    result.map_err(|e| if is_cut(&mut blob) { cut(layer) } else { e })?;
    io::copy(&mut Hashed::new(&mut blob, &mut digest), &mut io::sink())
        .map_err(|source| UnpackError::Io { op: "read", name: None, source })?;
    if blob.limit() > 0 {
        return Err(cut(layer));
    }
    verify(layer, "digest", &header.digest, digest)?;
    verify(layer, "diff_id", &header.diff_id, diff_id)
}

fn cut(layer: u32) -> UnpackError {
    UnpackError::Truncated { at: format!("layer {layer}") }
}

/// Whether the stream ended inside the blob.
fn is_cut(blob: &mut io::Take<impl BufRead>) -> bool {
    blob.limit() > 0 && blob.fill_buf().is_ok_and(<[u8]>::is_empty)
}

fn verify(layer: u32, which: &'static str, expected: &str, hash: Sha256) -> Result<(), UnpackError> {
    let found: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    match expected.strip_prefix("sha256:") {
        Some(expected) if expected == found => Ok(()),
        _ => {
            let expected = super::names::shown(expected.as_bytes());
            Err(UnpackError::WrongDigest { layer, which, expected, found: format!("sha256:{found}") })
        }
    }
}

/// What one layer has put down so far, and the folders on the way there, by hash.
#[derive(Default)]
struct PutDown {
    names: HashSet<u64>,
}

impl PutDown {
    fn apply(
        &mut self,
        entry: &Entry,
        data: &mut dyn Read,
        meter: &Meter,
        tree: &mut Tree,
    ) -> Result<(), UnpackError> {
        let Some((folder, leaf)) = entry.name.split() else { return tree.put(entry, data, meter) };
        match leaf.strip_prefix(WHITEOUT) {
            None => {
                tree.put(entry, data, meter)?;
                self.remember(&entry.name);
                Ok(())
            }
            Some(_) if leaf == OPAQUE => self.clear(&folder, tree),
            Some(_) if leaf.starts_with(WHITEOUT_META) => Ok(()),
            Some(b"" | b"." | b"..") => {
                Err(UnpackError::BadName { name: entry.name.shown(), why: "a whiteout of nothing" })
            }
            Some(hidden) => self.hide(&folder, hidden, tree),
        }
    }

    fn remember(&mut self, name: &Name) {
        let mut name = Some(name.clone());
        while let Some(current) = name.filter(|name| !name.is_root()) {
            if !self.names.insert(current.digest()) {
                return;
            }
            name = current.split().map(|(parent, _)| parent);
        }
    }

    fn hide(&self, folder: &Name, hidden: &[u8], tree: &mut Tree) -> Result<(), UnpackError> {
        let name = folder.join(hidden);
        if self.names.contains(&name.digest()) {
            return Ok(());
        }
        if let Ok(below) = tree.open_folder(folder) {
            tree::remove(&below, hidden, &name)?;
            tree.forget();
        }
        Ok(())
    }

    /// Removes what is in `folder` from below, keeping what this layer put there.
    fn clear(&self, folder: &Name, tree: &mut Tree) -> Result<(), UnpackError> {
        let Ok(below) = tree.open_folder(folder) else { return Ok(()) };
        for child in tree::children(&below, folder)? {
            let name = folder.join(&child);
            match self.names.contains(&name.digest()) {
                false => {
                    tree::remove(&below, &child, &name)?;
                }
                true if is_real_folder(&below, &child) => self.clear(&name, tree)?,
                true => {}
            }
        }
        tree.forget();
        Ok(())
    }
}

fn is_real_folder(folder: &std::os::fd::OwnedFd, child: &[u8]) -> bool {
    rustix::fs::statat(folder, child, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir())
}
