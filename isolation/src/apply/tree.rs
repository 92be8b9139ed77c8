//! Walking the new root, one component and one descriptor at a time.
//!
//! Every component is opened with `openat2` below its parent, and a symlink anywhere on the way is an error that
//! names it: an image whose `/dev` or `/proc` is a symlink (CVE-2019-19921, CVE-2026-41579) neither leads out nor
//! surprises. There is no race to win either: no tenant code exists yet. Mounts are crossed, since they are ours.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::id::JailPath;

/// The root directory and what is below it.
#[derive(Debug)]
pub(super) struct Tree {
    root: OwnedFd,
}

/// What stands at the last component of a path.
#[derive(Debug)]
pub(super) enum Entry {
    Missing,
    File,
    Symlink,
    Other,
}

impl Tree {
    pub(super) fn new(root: OwnedFd) -> Tree {
        Tree { root }
    }

    pub(super) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// The directory at `path`, made (with its parents) if it is missing.
    pub(super) fn directory(&self, path: &JailPath) -> io::Result<OwnedFd> {
        self.walk(path, true)
    }

    /// The directory at `path`, which must be there.
    pub(super) fn existing(&self, path: &JailPath) -> io::Result<OwnedFd> {
        self.walk(path, false)
    }

    /// The regular file at `path`, made empty if it is missing.
    pub(super) fn file(&self, path: &JailPath) -> io::Result<OwnedFd> {
        let (parent, name) = self.parent(path)?;
        match entry(parent.as_fd(), name)? {
            Entry::Missing => create(parent.as_fd(), name).map_err(|e| explain(e, path))?,
            Entry::File => {}
            Entry::Symlink => return Err(symlink_in_the_way(path.as_str())),
            Entry::Other => {
                return Err(io::Error::other(format!("{path} in the image is not a regular file")));
            }
        }
        open_last(parent.as_fd(), name)
    }

    /// A new file at `path`; nothing may be there.
    pub(super) fn empty_file(&self, path: &JailPath) -> io::Result<OwnedFd> {
        let (parent, name) = self.parent(path)?;
        create(parent.as_fd(), name)?;
        open_last(parent.as_fd(), name)
    }

    /// A new symlink at `path`; nothing may be there.
    pub(super) fn symlink(&self, path: &JailPath, target: &str) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        Ok(rustix::fs::symlinkat(target, &parent, name)?)
    }

    /// The directory `path` is in (made if missing) and its last component.
    pub(super) fn parent<'a>(&self, path: &'a JailPath) -> io::Result<(OwnedFd, &'a str)> {
        let (parent, name) = path.as_str().rsplit_once('/').unwrap_or(("", path.as_str()));
        let parent = if parent.is_empty() { "/" } else { parent };
        let parent = JailPath::new(parent).map_err(io::Error::other)?;
        Ok((self.walk(&parent, true)?, name))
    }

    fn walk(&self, path: &JailPath, make: bool) -> io::Result<OwnedFd> {
        let mut at = rustix::io::fcntl_dupfd_cloexec(&self.root, 0)?;
        let mut walked = String::new();
        for name in path.as_str().split('/').filter(|name| !name.is_empty()) {
            walked.push('/');
            walked.push_str(name);
            at = match open_directory(at.as_fd(), name) {
                Err(Errno::NOENT) if make => {
                    let mode = Mode::from_raw_mode(0o755);
                    rustix::fs::mkdirat(&at, name, mode).map_err(|e| explain_missing(e, &walked))?;
                    open_directory(at.as_fd(), name)?
                }
                Err(Errno::LOOP | Errno::NOTDIR) => {
                    return Err(match entry(at.as_fd(), name)? {
                        Entry::Symlink => symlink_in_the_way(&walked),
                        _ => io::Error::other(format!("{walked} in the image is not a directory")),
                    });
                }
                Err(errno) => return Err(io::Error::other(format!("{walked}: {errno}"))),
                Ok(next) => next,
            };
        }
        Ok(at)
    }
}

/// What `name` in `parent` is, itself.
pub(super) fn entry(parent: BorrowedFd<'_>, name: &str) -> io::Result<Entry> {
    match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(Entry::Missing),
        Err(errno) => Err(errno.into()),
        Ok(stat) => Ok(match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Entry::File,
            FileType::Symlink => Entry::Symlink,
            _ => Entry::Other,
        }),
    }
}

/// A reference to `name` in `parent`, to a symlink itself if it is one.
pub(super) fn open_last(parent: BorrowedFd<'_>, name: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat2(parent, name, flags, Mode::empty(), ResolveFlags::BENEATH)?)
}

/// An empty regular file, new.
pub(super) fn create(parent: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o644)).map(drop).map_err(Into::into)
}

fn open_directory(parent: BorrowedFd<'_>, name: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(parent, name, flags, Mode::empty(), resolve)
}

fn symlink_in_the_way(path: &str) -> io::Error {
    io::Error::other(format!("{path} in the image is a symlink; it must be a real directory or file"))
}

fn explain_missing(errno: Errno, path: &str) -> io::Error {
    match errno {
        Errno::ROFS => {
            let text = format!("the image has no {path}, and its root is read-only");
            io::Error::new(io::ErrorKind::ReadOnlyFilesystem, text)
        }
        errno => io::Error::other(format!("make {path}: {errno}")),
    }
}

fn explain(error: io::Error, path: &JailPath) -> io::Error {
    match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem => explain_missing(Errno::ROFS, path.as_str()),
        _ => error,
    }
}
