//! Directories below the pool's root, opened and listed without ever leaving it.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Dir, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// Entries one listing may have; a pool with more is not one we made.
pub(crate) const ENTRIES_MAX: usize = 1 << 16;

/// No `..`, no symbolic link, no mount point, no way out.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// Opens a directory by a path relative to `root` made of checked names; `None` when it is not there.
pub(crate) fn open(root: impl AsFd, path: &str) -> Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    match rustix::fs::openat2(root, path, flags, Mode::empty(), BENEATH) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(Error::io("open", path, e)),
    }
}

/// Like [`open`], for what must be there.
pub(crate) fn require(root: impl AsFd, path: &str) -> Result<OwnedFd> {
    open(root, path)?.ok_or_else(|| Error::NotFound { what: path.to_owned() })
}

/// Makes `name` in `parent` if it is missing, root's alone, and opens it.
pub(crate) fn ensure(parent: impl AsFd, name: &str) -> Result<OwnedFd> {
    match rustix::fs::mkdirat(&parent, name, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => require(parent, name),
        Err(e) => Err(Error::io("make the folder", name, e)),
    }
}

/// The entries of a directory in name order. Names that are not UTF-8 are not ours and left out.
pub(crate) fn names(dir: impl AsFd) -> Result<Vec<String>> {
    let failed = |e: Errno| Error::io("list", "a folder of the pool", e);
    let mut names = Vec::new();
    for entry in Dir::read_from(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if let Ok(name) = entry.file_name().to_str()
            && name != "."
            && name != ".."
        {
            names.push(name.to_owned());
        }
        if names.len() > ENTRIES_MAX {
            return Err(failed(Errno::TOOBIG));
        }
    }
    names.sort();
    Ok(names)
}
