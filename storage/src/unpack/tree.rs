//! Writing entries below one directory descriptor, never above it.
//!
//! Every folder is opened by `openat2` from the root descriptor: for an upload with no symbolic link on the way at all,
//! for an image with links resolved inside the image as if it were the root (`/lib` is a link in every modern one). The
//! last component is never followed: what is in its way is removed, then the new entry created exclusively. No mount is
//! crossed. An image may be unpacked at the root of a jail, which has mounts of its own there (`/tmp`, `/etc/hosts`):
//! what an image has beneath those would never be seen, and is ignored and counted.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use super::entries::{Entry, Kind};
use super::meter::Meter;
use super::names::{DEPTH_MAX, Name, shown, symlink_stays_inside};
use super::{Policy, UnpackError};

const COPY_BYTES: usize = 128 << 10;
/// On-disk ids are a jail's: 0 to 65535.
const ID_MAX: u64 = 65_535;
/// openat2 asks for another attempt when a rename raced it.
const ATTEMPTS_MAX: u32 = 16;
/// Links may make a tree deeper than any one name.
const REMOVE_DEPTH_MAX: usize = 2 * DEPTH_MAX;
/// Folders of an image that jails mount over; what an image has in them is never seen.
const JAIL_FOLDERS: [&[u8]; 5] = [b"dev", b"proc", b"run", b"sys", b"tmp"];

pub(super) struct Tree {
    root: OwnedFd,
    policy: Policy,
    /// The folder of the last entry; most entries share it with their neighbour.
    last: Option<(Name, OwnedFd)>,
}

impl Tree {
    pub(super) fn new(root: OwnedFd, policy: Policy) -> Self {
        Self { root, policy, last: None }
    }

    /// Checks one entry and writes it, or counts it as ignored when the jail covers its place.
    pub(super) fn put(
        &mut self,
        entry: &Entry,
        data: &mut dyn Read,
        meter: &Meter,
    ) -> Result<(), UnpackError> {
        let is_put = !(self.policy == Policy::Image && is_jails_own(&entry.name))
            && self.try_put(entry, data, meter)?;
        if !is_put {
            meter.count_ignored();
        }
        Ok(())
    }

    /// False when a mount covers the entry's place.
    fn try_put(&mut self, entry: &Entry, data: &mut dyn Read, meter: &Meter) -> Result<bool, UnpackError> {
        let owner = self.owner(entry)?;
        let name = &entry.name;
        let Some((parent, leaf)) = name.split() else { return self.put_root(entry, owner).map(|()| true) };
        match &entry.kind {
            Kind::File { size } => meter.charge_bytes(*size)?,
            Kind::Symlink { target } => self.check_symlink(name, &parent, target)?,
            Kind::Special(kind) => return Err(UnpackError::SpecialFile { name: name.shown(), kind }),
            Kind::Folder | Kind::HardLink { .. } => {}
        }
        let Some(folder) = self.folder(&parent)? else { return Ok(false) };
        match &entry.kind {
            Kind::File { size } => {
                let file = self.make_way(&folder, leaf, name, |folder, leaf| {
                    let flags =
                        OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    rustix::fs::openat(folder, leaf, flags, Mode::RUSR | Mode::WUSR)
                })?;
                let Some(file) = file else { return Ok(false) };
                copy(data, &file, *size, name)?;
                set_attributes(&file, owner, self.file_mode(entry.mode), name)?;
                set_mtime(&file, entry.mtime, name)?;
                Ok(true)
            }
            Kind::Folder => self.put_folder(&folder, leaf, entry, owner),
            Kind::Symlink { target } => {
                let made = self.make_way(&folder, leaf, name, |folder, leaf| {
                    rustix::fs::symlinkat(target.as_slice(), folder, leaf)
                })?;
                if made.is_none() {
                    return Ok(false);
                }
                // A folder opened by this path before may be elsewhere now.
                self.last = None;
                rustix::fs::chownat(&folder, leaf, Some(owner.0), Some(owner.1), AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(|e| UnpackError::io("set the owner of", name.shown(), e))?;
                Ok(true)
            }
            Kind::HardLink { target } => self.put_hard_link(&folder, leaf, name, target),
            Kind::Special(_) => Ok(false),
        }
    }

    fn owner(&self, entry: &Entry) -> Result<(Uid, Gid), UnpackError> {
        if self.policy == Policy::App {
            return Ok((Uid::ROOT, Gid::ROOT));
        }
        if let Some(id) = [entry.uid, entry.gid].into_iter().find(|&id| id > ID_MAX) {
            return Err(UnpackError::IdOutOfRange { name: entry.name.shown(), id });
        }
        Ok((Uid::from_raw(entry.uid as u32), Gid::from_raw(entry.gid as u32)))
    }

    fn file_mode(&self, mode: u32) -> Mode {
        match self.policy {
            // Whoever deployed it can read and replace it, and nothing in it gains rights.
            Policy::App => Mode::from_raw_mode(mode & 0o777 | 0o600),
            Policy::Image => Mode::from_raw_mode(mode & 0o7777),
        }
    }

    fn folder_mode(&self, mode: u32) -> Mode {
        match self.policy {
            Policy::App => Mode::from_raw_mode(mode & 0o777 | 0o700),
            Policy::Image => Mode::from_raw_mode(mode & 0o7777),
        }
    }

    /// `./`: an image's root has a mode and an owner; an upload's is not its business.
    fn put_root(&self, entry: &Entry, owner: (Uid, Gid)) -> Result<(), UnpackError> {
        match (&entry.kind, self.policy) {
            (Kind::Folder, Policy::App) => Ok(()),
            (Kind::Folder, Policy::Image) => {
                set_attributes(&self.root, owner, self.folder_mode(entry.mode), &entry.name)
            }
            _ => Err(UnpackError::BadName { name: entry.name.shown(), why: "the root is a folder" }),
        }
    }

    fn put_folder(
        &mut self,
        folder: &OwnedFd,
        leaf: &[u8],
        entry: &Entry,
        owner: (Uid, Gid),
    ) -> Result<bool, UnpackError> {
        let name = &entry.name;
        if kind_at(folder, leaf, name)? != Some(FileType::Directory) {
            let made = self
                .make_way(folder, leaf, name, |folder, leaf| rustix::fs::mkdirat(folder, leaf, Mode::RWXU))?;
            if made.is_none() {
                return Ok(false);
            }
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat2(
            folder,
            leaf,
            flags,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_XDEV,
        ) {
            Ok(made) => set_attributes(&made, owner, self.folder_mode(entry.mode), name).map(|()| true),
            // Mounted over by the jail, e.g. /proc: what is beneath keeps what it has.
            Err(Errno::XDEV) => Ok(false),
            Err(e) => Err(UnpackError::io("open", name.shown(), e)),
        }
    }

    fn check_symlink(&self, name: &Name, parent: &Name, target: &[u8]) -> Result<(), UnpackError> {
        if target.is_empty() || target.contains(&0) {
            return Err(UnpackError::BadName {
                name: name.shown(),
                why: "the link's target is empty or has a NUL byte",
            });
        }
        match self.policy == Policy::App && !symlink_stays_inside(parent.depth(), target) {
            true => Err(UnpackError::SymlinkOut { name: name.shown(), target: shown(target) }),
            false => Ok(()),
        }
    }

    fn put_hard_link(
        &mut self,
        folder: &OwnedFd,
        leaf: &[u8],
        name: &Name,
        target: &Name,
    ) -> Result<bool, UnpackError> {
        let bad = |why| UnpackError::BadHardLink { name: name.shown(), target: target.shown(), why };
        let Some((target_parent, target_leaf)) = target.split() else { return Err(bad("is to a folder")) };
        let target_folder = match self.open_folder(&target_parent) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Err(bad("leads to nothing")),
            other => other.map_err(|e| self.on_the_way(&target_parent, e))?,
        };
        match kind_at(&target_folder, target_leaf, target)? {
            Some(FileType::RegularFile) => {}
            Some(FileType::Symlink) if self.policy == Policy::Image => {}
            Some(_) => return Err(bad("is not to a file")),
            None => return Err(bad("leads to nothing")),
        }
        if is_same(&target_folder, target_leaf, folder, leaf) {
            return Ok(true);
        }
        let made = self.make_way(folder, leaf, name, |folder, leaf| {
            rustix::fs::linkat(&target_folder, target_leaf, folder, leaf, AtFlags::empty())
        })?;
        Ok(made.is_some())
    }

    /// Creates `leaf`, first removing what is in its way; `None` when that is a mount of the jail's.
    fn make_way<T>(
        &mut self,
        folder: &OwnedFd,
        leaf: &[u8],
        name: &Name,
        create: impl Fn(&OwnedFd, &[u8]) -> Result<T, Errno>,
    ) -> Result<Option<T>, UnpackError> {
        let failed = |e| UnpackError::io("create", name.shown(), e);
        match create(folder, leaf) {
            Err(Errno::EXIST) => {
                self.last = None;
                match remove(folder, leaf, name)? {
                    Removed::Gone => create(folder, leaf).map(Some).map_err(failed),
                    Removed::Covered if self.policy == Policy::Image => Ok(None),
                    Removed::Covered => Err(failed(Errno::BUSY)),
                }
            }
            other => other.map(Some).map_err(failed),
        }
    }

    /// Opens a folder, making it (and those above it) where it is missing; `None` when an image's is beneath a mount.
    fn folder(&mut self, name: &Name) -> Result<Option<OwnedFd>, UnpackError> {
        let copy = |fd: &OwnedFd| fd.try_clone().map_err(|e| UnpackError::io("open", name.shown(), e));
        if let Some((last, fd)) = &self.last
            && last == name
        {
            return copy(fd).map(Some);
        }
        let Some(folder) = self.make_folder(name)? else { return Ok(None) };
        self.last = Some((name.clone(), copy(&folder)?));
        Ok(Some(folder))
    }

    fn make_folder(&self, name: &Name) -> Result<Option<OwnedFd>, UnpackError> {
        match self.open_folder(name) {
            Err(Errno::NOENT) => {}
            Err(Errno::XDEV) if self.policy == Policy::Image => return Ok(None),
            other => return other.map(Some).map_err(|e| self.on_the_way(name, e)),
        }
        let Some((parent, leaf)) = name.split() else { return Err(self.on_the_way(name, Errno::NOENT)) };
        let Some(above) = self.make_folder(&parent)? else { return Ok(None) };
        match rustix::fs::mkdirat(&above, leaf, Mode::from_raw_mode(0o755)) {
            // A link that leads to nothing; opening it says so again.
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(UnpackError::io("create", name.shown(), e)),
        }
        self.open_folder(name).map(Some).map_err(|e| self.on_the_way(name, e))
    }

    pub(super) fn open_folder(&self, name: &Name) -> Result<OwnedFd, Errno> {
        let inside = match self.policy {
            Policy::App => ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
            Policy::Image => ResolveFlags::IN_ROOT,
        };
        let resolve = inside | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut attempt = 1;
        loop {
            match rustix::fs::openat2(&self.root, name.path(), flags, Mode::empty(), resolve) {
                Err(Errno::AGAIN) if attempt < ATTEMPTS_MAX => attempt += 1,
                other => return other,
            }
        }
    }

    fn on_the_way(&self, name: &Name, error: Errno) -> UnpackError {
        match error {
            Errno::LOOP => UnpackError::ThroughSymlink { name: name.shown() },
            Errno::NOTDIR => {
                UnpackError::BadName { name: name.shown(), why: "something on the way is no folder" }
            }
            Errno::NOENT => {
                UnpackError::BadName { name: name.shown(), why: "a link on the way leads to nothing" }
            }
            Errno::XDEV => {
                UnpackError::BadName { name: name.shown(), why: "another file system is on the way" }
            }
            e => UnpackError::io("open", name.shown(), e),
        }
    }

    /// What happened behind our back (a whiteout): forget what we had open.
    pub(super) fn forget(&mut self) {
        self.last = None;
    }
}

fn is_jails_own(name: &Name) -> bool {
    name.depth() > 1 && name.first().is_some_and(|first| JAIL_FOLDERS.contains(&first))
}

fn copy(data: &mut dyn Read, file: &OwnedFd, size: u64, name: &Name) -> Result<(), UnpackError> {
    let mut file = File::from(file.try_clone().map_err(|e| UnpackError::io("write", name.shown(), e))?);
    let mut buf = vec![0; COPY_BYTES.min(size as usize)];
    let mut left = size;
    while left > 0 {
        let want = buf.len().min(left as usize);
        let read = match data.read(&mut buf[..want]) {
            Ok(0) => return Err(UnpackError::Truncated { at: name.shown() }),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            other => {
                other.map_err(|source| UnpackError::Io { op: "read", name: Some(name.shown()), source })?
            }
        };
        file.write_all(&buf[..read]).map_err(|e| UnpackError::io("write", name.shown(), e))?;
        left -= read as u64;
    }
    Ok(())
}

/// Owner first: changing it clears the set-id bits.
fn set_attributes(fd: &impl AsFd, owner: (Uid, Gid), mode: Mode, name: &Name) -> Result<(), UnpackError> {
    rustix::fs::fchown(fd, Some(owner.0), Some(owner.1))
        .map_err(|e| UnpackError::io("set the owner of", name.shown(), e))?;
    rustix::fs::fchmod(fd, mode).map_err(|e| UnpackError::io("set the mode of", name.shown(), e))
}

fn set_mtime(fd: &OwnedFd, mtime: i64, name: &Name) -> Result<(), UnpackError> {
    let time = Timespec { tv_sec: mtime, tv_nsec: 0 };
    rustix::fs::futimens(fd, &Timestamps { last_access: time, last_modification: time })
        .map_err(|e| UnpackError::io("set the time of", name.shown(), e))
}

fn kind_at(folder: &OwnedFd, leaf: &[u8], name: &Name) -> Result<Option<FileType>, UnpackError> {
    match rustix::fs::statat(folder, leaf, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(UnpackError::io("stat", name.shown(), e)),
    }
}

fn is_same(a: &OwnedFd, a_leaf: &[u8], b: &OwnedFd, b_leaf: &[u8]) -> bool {
    let stat = |folder, leaf| rustix::fs::statat(folder, leaf, AtFlags::SYMLINK_NOFOLLOW);
    match (stat(a, a_leaf), stat(b, b_leaf)) {
        (Ok(a), Ok(b)) => (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino),
        _ => false,
    }
}

/// What became of something to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Removed {
    Gone,
    /// It is a mount point of the jail's, or has one below it, and stays.
    Covered,
}

/// Removes `leaf` with everything below it, following nothing; absent is fine.
pub(super) fn remove(folder: &OwnedFd, leaf: &[u8], name: &Name) -> Result<Removed, UnpackError> {
    remove_at(folder, leaf, name, 0)
}

fn remove_at(folder: &OwnedFd, leaf: &[u8], name: &Name, depth: usize) -> Result<Removed, UnpackError> {
    let failed = |e: Errno| UnpackError::io("remove", name.shown(), e);
    if depth > REMOVE_DEPTH_MAX {
        return Err(UnpackError::BadName { name: name.shown(), why: "what it replaces is too deep" });
    }
    match rustix::fs::unlinkat(folder, leaf, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(Removed::Gone),
        Err(Errno::BUSY) => return Ok(Removed::Covered),
        Err(Errno::ISDIR) => {}
        Err(e) => return Err(failed(e)),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let inside = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let below = match rustix::fs::openat2(folder, leaf, flags, Mode::empty(), inside) {
        Err(Errno::XDEV) => return Ok(Removed::Covered),
        other => other.map_err(failed)?,
    };
    let mut removed = Removed::Gone;
    for child in children(&below, name)? {
        if remove_at(&below, &child, name, depth + 1)? == Removed::Covered {
            removed = Removed::Covered;
        }
    }
    if removed == Removed::Gone {
        rustix::fs::unlinkat(folder, leaf, AtFlags::REMOVEDIR).map_err(failed)?;
    }
    Ok(removed)
}

pub(super) fn children(folder: &OwnedFd, name: &Name) -> Result<Vec<Vec<u8>>, UnpackError> {
    let failed = |e: Errno| UnpackError::io("list", name.shown(), e);
    let mut children = Vec::new();
    for entry in Dir::read_from(folder).map_err(failed)? {
        let child = entry.map_err(failed)?.file_name().to_bytes().to_vec();
        if child != b"." && child != b".." {
            children.push(child);
        }
    }
    Ok(children)
}
