//! A tar of the operator's: what it is packed with, and the files at its root that say what it is.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

use super::PackError;

/// The longest manifest.
pub const TEXT_BYTES_MAX: u64 = 1 << 20;
/// How much of an archive is looked through, unpacked: as much as the agent would take. Whoever puts the manifest
/// first is not affected, whatever follows.
const LOOKED_THROUGH_BYTES_MAX: u64 = 4 << 30;

/// How a file is packed, told by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Packing {
    pub fn of(first: &[u8]) -> Self {
        match first {
            [0x1f, 0x8b, ..] => Packing::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Packing::Zstd,
            _ => Packing::Plain,
        }
    }
}

/// What the root of an archive holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Root {
    /// Texts of the files that were asked for.
    pub texts: Vec<(String, String)>,
    /// The names of files at the root.
    pub names: Vec<String>,
}

impl Root {
    pub fn text(&self, name: &str) -> Option<&str> {
        self.texts.iter().find(|(found, _)| found == name).map(|(_, text)| text.as_str())
    }
}

/// A reader of what `file` holds, unpacked.
pub fn unpacked(file: File) -> io::Result<Box<dyn Read>> {
    let mut reader = BufReader::new(file);
    let mut first = [0; 4];
    let mut length = 0;
    while length < first.len() {
        match reader.read(&mut first[length..])? {
            0 => break,
            n => length += n,
        }
    }
    reader.seek(SeekFrom::Start(0))?;
    Ok(match Packing::of(&first[..length]) {
        Packing::Plain => Box::new(reader),
        Packing::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(reader)),
        Packing::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(reader)?),
    })
}

/// Looks for `wanted` at the root of the archive, in that order of preference: with the first one found, the look
/// ends.
pub fn look_for(path: &Path, wanted: &[&str]) -> Result<Root, PackError> {
    let file = File::open(path).map_err(|source| PackError::Read { path: path.to_owned(), source })?;
    let broken = |source| PackError::Archive { path: path.to_owned(), source };
    let mut tar = tar::Archive::new(unpacked(file).map_err(broken)?.take(LOOKED_THROUGH_BYTES_MAX));
    let mut root = Root::default();
    for entry in tar.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        let Some(name) = name_at_root(&entry.path().map_err(broken)?) else {
            continue;
        };
        if wanted.contains(&name.as_str()) && entry.header().entry_type().is_file() {
            let mut text = String::new();
            entry.by_ref().take(TEXT_BYTES_MAX).read_to_string(&mut text).map_err(broken)?;
            root.texts.push((name.clone(), text));
        }
        let is_first_choice = Some(name.as_str()) == wanted.first().copied();
        root.names.push(name);
        if is_first_choice {
            break;
        }
    }
    if root.names.is_empty() {
        // A file of zeros is an empty tar to the library, and nothing else is shorter than a block.
        return Err(broken(io::Error::new(io::ErrorKind::InvalidData, "no entries in it")));
    }
    Ok(root)
}

/// Whether the archive is of an OCI layout: those begin with the layout's own files, whoever writes them.
pub fn is_layout(path: &Path) -> Result<bool, PackError> {
    let file = File::open(path).map_err(|source| PackError::Read { path: path.to_owned(), source })?;
    let broken = |source| PackError::Archive { path: path.to_owned(), source };
    let mut tar = tar::Archive::new(unpacked(file).map_err(broken)?);
    let Some(first) = tar.entries().map_err(broken)?.next() else {
        return Err(broken(io::Error::new(io::ErrorKind::InvalidData, "no entries in it")));
    };
    let first = first.map_err(broken)?;
    let name = first.path().map_err(broken)?;
    let top = name.components().find(|part| *part != Component::CurDir);
    let of_layout = ["blobs", "oci-layout", "index.json", "manifest.json"];
    Ok(top.is_some_and(|part| of_layout.iter().any(|name| part.as_os_str() == *name)))
}

/// Unpacks a layout. The library keeps every entry below `folder`.
pub fn unpack_layout(path: &Path, folder: &Path) -> Result<(), PackError> {
    let file = File::open(path).map_err(|source| PackError::Read { path: path.to_owned(), source })?;
    let unpacked = unpacked(file).and_then(|reader| tar::Archive::new(reader).unpack(folder));
    unpacked.map_err(|source| PackError::Archive { path: path.to_owned(), source })
}

/// `epagent.toml` and `./epagent.toml`, but not `sub/epagent.toml`.
fn name_at_root(path: &Path) -> Option<String> {
    let mut parts = path.components().filter(|part| *part != Component::CurDir);
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(name)), None) => name.to_str().map(str::to_owned),
        _ => None,
    }
}

/// A small text file. `NotFound` is told apart by callers.
pub fn read_text(path: &PathBuf, bytes_max: u64) -> io::Result<String> {
    let mut text = String::new();
    let mut file = File::open(path)?.take(bytes_max + 1);
    file.read_to_string(&mut text)?;
    if text.len() as u64 > bytes_max {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("it is longer than {bytes_max} bytes"),
        ));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn tar_of(entries: &[(&str, &str)]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, text) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, text.as_bytes()).unwrap();
        }
        tar.into_inner().unwrap()
    }

    fn look(bytes: &[u8]) -> Result<Root, PackError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        look_for(file.path(), &["epagent.toml", "Procfile"])
    }

    #[test]
    fn the_manifest_is_found_whatever_it_is_packed_with() {
        let tar = tar_of(&[("sub/epagent.toml", "no"), ("./epagent.toml", "yes"), ("x", "")]);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&tar).unwrap();
        let zstd = zstd::encode_all(tar.as_slice(), 1).unwrap();
        for bytes in [tar, gzip.finish().unwrap(), zstd] {
            assert_eq!(look(&bytes).unwrap().text("epagent.toml"), Some("yes"));
        }
    }

    #[test]
    fn a_procfile_comes_with_the_names_beside_it() {
        let root = look(&tar_of(&[("Procfile", "web: x"), ("package.json", "{}"), ("a/b", "")])).unwrap();
        assert_eq!(root.text("Procfile"), Some("web: x"));
        assert_eq!(root.names, ["Procfile", "package.json"]);
    }

    #[test]
    fn what_follows_the_manifest_is_not_looked_at() {
        let mut bytes = tar_of(&[("epagent.toml", "yes")]);
        bytes.truncate(1024);
        bytes.extend_from_slice(&[0xff; 5000]);
        assert_eq!(look(&bytes).unwrap().text("epagent.toml"), Some("yes"));
    }

    #[test]
    fn what_is_no_archive_is_called_that() {
        for bytes in [&b"\x7fELF, and so on"[..], b"", &[0; 1024], &[0x1f, 0x8b, 0, 0]] {
            let error = look(bytes).unwrap_err();
            assert!(error.to_string().contains("archive"), "{error}");
        }
    }
}
