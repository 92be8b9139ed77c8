//! Files that belong to the instance rather than to its image.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;

use rustix::fs::{Gid, Mode, OFlags, Uid};

use super::tree::{self, Entry, Tree};
use super::{attach, bind};
use crate::id::JailPath;
use crate::spec::{FileSpec, User};

/// Writes a new file.
pub(super) fn write(tree: &Tree, file: &FileSpec, user: User) -> io::Result<()> {
    let (parent, name) = tree.parent(&file.path)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = rustix::fs::openat(&parent, name, flags, Mode::from_raw_mode(0o600))?;
    rustix::fs::fchown(&made, Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(user.gid)))?;
    rustix::fs::fchmod(&made, Mode::from_raw_mode(file.mode & 0o777))?;
    File::from(made).write_all(file.content.as_bytes())
}

/// Binds `source` over `target`. A symlink at `target` is covered itself, whatever it points to: Debian images have
/// `/etc/resolv.conf` as one. Returns a note when a read-only image has no such file to cover.
pub(super) fn bind_over(tree: &Tree, source: &JailPath, target: &JailPath) -> io::Result<Option<String>> {
    let left_out = |what: &str| Ok(Some(format!("{target} left out: {what}, and the root is read-only")));
    let (parent, name) = match tree.parent(target) {
        Err(e) if e.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            return left_out("the image has no such directory");
        }
        result => result?,
    };
    match tree::entry(parent.as_fd(), name)? {
        Entry::File | Entry::Symlink => {}
        Entry::Other => return Err(io::Error::other(format!("{target} in the image is not a file"))),
        Entry::Missing => match tree::create(parent.as_fd(), name) {
            Err(e) if e.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                return left_out("the image has no such file");
            }
            result => result?,
        },
    }
    let view = bind(tree.file(source)?.as_fd())?;
    attach(&view, tree::open_last(parent.as_fd(), name)?.as_fd())?;
    Ok(None)
}
