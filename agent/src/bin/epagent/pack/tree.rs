//! A folder as a tar.
//!
//! It is looked through first, and every file is opened once: so whatever can't be packed is known before anything
//! is sent. Two looks at the same files give the same bytes: entries are in the order of their names, and of what a
//! file system knows only kind, mode, time of change and, for images, owner are told.

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use tar::{Builder, EntryType, Header};

use super::PackError;
use super::ignore::{FILE_BYTES_MAX, FILE_NAME, Ignore};

/// The most entries of one tree.
const ENTRIES_MAX: usize = 1_000_000;

/// For whom the tree is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Owned by root of the jail; `.epagentignore` and `.git` are left out.
    App,
    /// Owners are kept, as numbers. What a running system mounts over (/dev, /proc, /sys) is packed empty.
    Image,
}

/// A folder that was looked through.
#[derive(Debug)]
pub struct Tree {
    root: PathBuf,
    purpose: Purpose,
    /// Relative to the root, in the order of names, a folder before what is in it.
    entries: Vec<PathBuf>,
}

impl Tree {
    pub fn look_through(root: &Path, purpose: Purpose) -> Result<Self, PackError> {
        let ignore = match purpose {
            Purpose::App => read_ignore(root)?,
            Purpose::Image => Ignore::default(),
        };
        let mut tree = Self { root: root.to_owned(), purpose, entries: Vec::new() };
        tree.look_into(Path::new(""), &ignore)?;
        Ok(tree)
    }

    fn look_into(&mut self, folder: &Path, ignore: &Ignore) -> Result<(), PackError> {
        let full = self.root.join(folder);
        let read = |source| PackError::Read { path: full.clone(), source };
        let mut names = Vec::new();
        for entry in fs::read_dir(&full).map_err(read)? {
            names.push(entry.map_err(read)?.file_name());
        }
        names.sort();
        for name in names {
            let path = folder.join(name);
            let full = self.root.join(&path);
            let meta =
                full.symlink_metadata().map_err(|source| PackError::Read { path: full.clone(), source })?;
            if self.purpose == Purpose::App && ignore.leaves_out(&path, meta.is_dir()) {
                continue;
            }
            check_entry(&full, &meta)?;
            if self.entries.len() >= ENTRIES_MAX {
                return Err(PackError::TooMany { path: self.root.clone(), max: ENTRIES_MAX });
            }
            self.entries.push(path.clone());
            let is_mounted_over = ["dev", "proc", "sys"].iter().any(|name| path == Path::new(name));
            if meta.is_dir() && !(self.purpose == Purpose::Image && is_mounted_over) {
                self.look_into(&path, ignore)?;
            }
        }
        Ok(())
    }

    pub fn has(&self, name: &str) -> bool {
        self.entries.iter().any(|path| path == Path::new(name))
    }

    /// Writes the tar.
    pub fn write(&self, output: impl Write) -> Result<(), PackError> {
        let mut tar = Builder::new(output);
        // Names of files with several of them, by device and inode.
        let mut known = HashMap::new();
        for path in &self.entries {
            self.write_entry(&mut tar, path, &mut known)?;
        }
        tar.into_inner().and_then(|mut output| output.flush()).map_err(|source| PackError::Write { source })
    }

    fn write_entry(
        &self,
        tar: &mut Builder<impl Write>,
        path: &Path,
        known: &mut HashMap<(u64, u64), PathBuf>,
    ) -> Result<(), PackError> {
        let full = self.root.join(path);
        let read = |source| PackError::Read { path: full.clone(), source };
        let written = |source| PackError::Write { source };
        let meta = full.symlink_metadata().map_err(read)?;
        if meta.is_symlink() {
            let target = fs::read_link(&full).map_err(read)?;
            let mut header = self.header(&meta, EntryType::Symlink);
            return tar.append_link(&mut header, path, target).map_err(written);
        }
        if meta.is_dir() {
            let mut header = self.header(&meta, EntryType::Directory);
            return tar.append_data(&mut header, path, io::empty()).map_err(written);
        }
        check_entry(&full, &meta)?;
        if meta.nlink() > 1 {
            match known.get(&(meta.dev(), meta.ino())) {
                Some(first) => {
                    let mut header = self.header(&meta, EntryType::Link);
                    return tar.append_link(&mut header, path, first).map_err(written);
                }
                None => known.insert((meta.dev(), meta.ino()), path.to_owned()),
            };
        }
        let file = File::open(&full).map_err(read)?;
        // Of the file that was opened, whatever the name stands for by now.
        let meta = file.metadata().map_err(read)?;
        let mut header = self.header(&meta, EntryType::Regular);
        header.set_size(meta.len());
        let mut content = Exact { file, left: meta.len(), failed: None };
        match (tar.append_data(&mut header, path, &mut content), content.failed.take()) {
            (_, Some(None)) => Err(PackError::Changed { path: full }),
            (_, Some(Some(source))) => Err(PackError::Read { path: full, source }),
            (Err(source), None) => Err(PackError::Write { source }),
            (Ok(()), None) => Ok(()),
        }
    }

    fn header(&self, meta: &Metadata, kind: EntryType) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(0);
        header.set_mode(meta.mode() & 0o7777);
        header.set_mtime(u64::try_from(meta.mtime()).unwrap_or(0));
        let (uid, gid) = match self.purpose {
            Purpose::App => (0, 0),
            Purpose::Image => (meta.uid(), meta.gid()),
        };
        header.set_uid(u64::from(uid));
        header.set_gid(u64::from(gid));
        header
    }
}

/// As many bytes as were announced: not more when the file grew, and an error when it became shorter.
struct Exact {
    file: File,
    left: u64,
    /// Some(None): it ended early.
    failed: Option<Option<io::Error>>,
}

impl Read for Exact {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if length == 0 {
            return Ok(0);
        }
        match self.file.read(&mut buffer[..length]) {
            Ok(0) => {
                self.failed = Some(None);
                Err(io::ErrorKind::UnexpectedEof.into())
            }
            Ok(n) => {
                self.left -= n as u64;
                Ok(n)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(error) => {
                let kind = error.kind();
                self.failed = Some(Some(error));
                Err(kind.into())
            }
        }
    }
}

/// That it is of a kind that can be packed and read by whoever runs the command.
fn check_entry(full: &Path, meta: &Metadata) -> Result<(), PackError> {
    let kind = meta.file_type();
    let what = if kind.is_socket() {
        "a socket"
    } else if kind.is_fifo() {
        "a named pipe"
    } else if kind.is_block_device() || kind.is_char_device() {
        "a device"
    } else {
        if kind.is_file() {
            File::open(full).map_err(|source| PackError::Read { path: full.to_owned(), source })?;
        }
        return Ok(());
    };
    Err(PackError::Kind { path: full.to_owned(), what })
}

fn read_ignore(root: &Path) -> Result<Ignore, PackError> {
    let path = root.join(FILE_NAME);
    match super::archive::read_text(&path, FILE_BYTES_MAX) {
        Ok(text) => Ignore::parse(&path, &text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Ignore::default()),
        Err(source) => Err(PackError::Read { path, source }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn pack(root: &Path, purpose: Purpose) -> Vec<u8> {
        let mut bytes = Vec::new();
        Tree::look_through(root, purpose).unwrap().write(&mut bytes).unwrap();
        bytes
    }

    fn names(bytes: &[u8]) -> Vec<String> {
        let mut tar = tar::Archive::new(bytes);
        let paths = tar.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().into_owned());
        paths.map(|path| path.to_string_lossy().into_owned()).collect()
    }

    fn sample() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        for folder in ["b", "b/deep", ".git", "cache"] {
            fs::create_dir(root.join(folder)).unwrap();
        }
        for file in ["z", "a.log", "b/x", ".git/config", "cache/y", "epagent.toml"] {
            fs::write(root.join(file), file).unwrap();
        }
        fs::write(root.join(format!("b/deep/{}", "n".repeat(200))), "long").unwrap();
        symlink("../outside", root.join("b/link")).unwrap();
        fs::hard_link(root.join("z"), root.join("zz")).unwrap();
        fs::write(root.join(FILE_NAME), "*.log\ncache/\n").unwrap();
        dir
    }

    #[test]
    fn a_tree_is_packed_in_order_and_the_same_each_time() {
        let dir = sample();
        let bytes = pack(dir.path(), Purpose::App);
        assert_eq!(bytes, pack(dir.path(), Purpose::App));
        let long = format!("b/deep/{}", "n".repeat(200));
        let expected = [FILE_NAME, "b/", "b/deep/", &long, "b/link", "b/x", "epagent.toml", "z", "zz"];
        let names: Vec<String> = names(&bytes);
        let trimmed: Vec<&str> = names.iter().map(|name| name.trim_end_matches('/')).collect();
        assert_eq!(trimmed, expected.map(|name| name.trim_end_matches('/')));
    }

    #[test]
    fn links_stay_links() {
        let dir = sample();
        let bytes = pack(dir.path(), Purpose::App);
        let mut tar = tar::Archive::new(bytes.as_slice());
        for entry in tar.entries().unwrap() {
            let entry = entry.unwrap();
            let target = entry.link_name().unwrap().map(|target| target.to_string_lossy().into_owned());
            match entry.path().unwrap().to_str().unwrap() {
                "b/link" => assert_eq!(target.as_deref(), Some("../outside")),
                "zz" => assert_eq!(target.as_deref(), Some("z")),
                _ => assert_eq!(target, None),
            }
        }
    }

    #[test]
    fn owners_are_kept_for_images_only() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("dev")).unwrap();
        fs::write(dir.path().join("dev/null"), "").unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        std::os::unix::fs::chown(&file, Some(1234), Some(5)).unwrap();
        for (purpose, owner) in [(Purpose::App, (0, 0)), (Purpose::Image, (1234, 5))] {
            let bytes = pack(dir.path(), purpose);
            let mut tar = tar::Archive::new(bytes.as_slice());
            let header = tar.entries().unwrap().last().unwrap().unwrap().header().clone();
            assert_eq!((header.uid().unwrap(), header.gid().unwrap()), owner);
        }
        assert!(!names(&pack(dir.path(), Purpose::Image)).contains(&"dev/null".to_owned()));
    }

    #[test]
    fn what_cannot_be_packed_is_named_before_anything_is_sent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = Tree::look_through(dir.path(), Purpose::App).unwrap_err();
        assert!(error.to_string().contains("pipe is a named pipe"), "{error}");
        fs::remove_file(&path).unwrap();
        let socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let error = Tree::look_through(dir.path(), Purpose::Image).unwrap_err();
        assert!(error.to_string().contains("pipe is a socket"), "{error}");
        drop(socket);
        let error = Tree::look_through(&dir.path().join("nowhere"), Purpose::App).unwrap_err();
        assert!(error.to_string().contains("nowhere"), "{error}");
    }

    #[test]
    fn a_file_that_shrinks_under_way_is_an_error_and_one_that_grows_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "12345").unwrap();
        let open = || File::open(dir.path().join("file")).unwrap();
        let mut shorter = Exact { file: open(), left: 6, failed: None };
        assert!(io::copy(&mut shorter, &mut io::sink()).is_err());
        assert!(matches!(shorter.failed, Some(None)));
        let mut longer = Exact { file: open(), left: 3, failed: None };
        assert_eq!(io::copy(&mut longer, &mut io::sink()).unwrap(), 3);
    }
}
