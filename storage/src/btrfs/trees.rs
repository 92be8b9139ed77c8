//! Deleting a subvolume together with whatever a tenant nested inside it.
//!
//! Nested subvolumes have names and flags of a tenant's choosing. They are found in the root tree, by id, and deleted
//! by id; no name is read, and no path walked.

use std::io;
use std::os::fd::OwnedFd;

use crate::error::{Error, Result};
use crate::sys::{self, KEY_ROOT_ITEM, KEY_ROOT_REF, KeyRange, TREE_ROOT};

/// Subvolumes one object may have nested inside. Each costs its owner 16 KiB of quota, so 1 GiB of quota makes at most
/// as many.
pub(crate) const NESTED_MAX: usize = 65_536;

/// `struct btrfs_root_item`: the flags stand behind the 160 bytes of the inode item and six 64-bit words.
const ROOT_FLAGS_WORD: usize = (160 + 6 * 8) / 8;
const ROOT_FLAG_RDONLY: u64 = 1;

pub(super) fn destroy(root: &OwnedFd, tree: OwnedFd, what: &str) -> Result<()> {
    let failed = |e: io::Error| Error::io("delete", what, e);
    let id = sys::subvol_identity(&tree).map_err(failed)?.id;
    // Nothing here is the pool's own top level, whatever the caller passes.
    if id < sys::FIRST_FREE_OBJECTID {
        return Err(failed(io::Error::from_raw_os_error(libc::EINVAL)));
    }
    drop(tree);
    // Found anew each round, since a process of the tenant's may still be creating; bounded by the rounds.
    for _ in 0..ROUNDS_MAX {
        match delete_family(root, id, what) {
            Err(Error::Io { source, .. }) if source.raw_os_error() == Some(libc::ENOTEMPTY) => {}
            other => return other,
        }
    }
    Err(failed(io::Error::from_raw_os_error(libc::ENOTEMPTY)))
}

/// How often new nested subvolumes may turn up while we delete.
const ROUNDS_MAX: u32 = 16;

fn delete_family(root: &OwnedFd, id: u64, what: &str) -> Result<()> {
    let failed = |e: io::Error| Error::io("delete", what, e);
    // Parents before children; deleting goes backwards.
    let mut family = vec![id];
    let mut next = 0;
    while let Some(&parent) = family.get(next) {
        next += 1;
        let children = children_of(root, parent).map_err(failed)?;
        if !children.is_empty() {
            make_writable(root, parent).map_err(failed)?;
        }
        family.extend(children);
        if family.len() > NESTED_MAX {
            return Err(Error::TooManyNested { op: "delete", what: what.to_owned(), bound: NESTED_MAX });
        }
    }
    for &member in family.iter().rev() {
        match sys::subvol_destroy(root, member) {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
            Err(e) => return Err(failed(e)),
        }
    }
    Ok(())
}

fn children_of(root: &OwnedFd, parent: u64) -> io::Result<Vec<u64>> {
    let refs = sys::tree_search(
        root,
        KeyRange { tree: TREE_ROOT, objectid: (parent, parent), kind: KEY_ROOT_REF, offset: (0, u64::MAX) },
    )?;
    Ok(refs.iter().map(|item| item.offset).collect())
}

/// A read-only parent does not let go of its children.
fn make_writable(root: &OwnedFd, id: u64) -> io::Result<()> {
    let items = sys::tree_search(
        root,
        KeyRange { tree: TREE_ROOT, objectid: (id, id), kind: KEY_ROOT_ITEM, offset: (0, u64::MAX) },
    )?;
    let read_only = items.last().is_some_and(|item| item.word(ROOT_FLAGS_WORD) & ROOT_FLAG_RDONLY != 0);
    match read_only {
        true => sys::subvol_set_read_only(sys::open_by_id(root, id)?, false),
        false => Ok(()),
    }
}
