//! Opening a subvolume by its id, so that no name a tenant chose is ever looked up.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use super::btrfs::{FIRST_FREE_OBJECTID, KEY_INODE_ITEM, KeyRange, tree_search};

/// `struct file_handle` with the body that btrfs encodes for an inode without its parent (fs/btrfs/export.h).
#[repr(C, packed(4))]
struct Handle {
    bytes: u32,
    kind: i32,
    objectid: u64,
    root: u64,
    generation: u32,
}
const HANDLE_BODY_BYTES: u32 = 20;
const FILEID_BTRFS_WITHOUT_PARENT: i32 = 0x4d;

/// Opens the root directory of subvolume `id` on the file system of `fs`.
pub(crate) fn open_by_id(fs: impl AsFd, id: u64) -> io::Result<OwnedFd> {
    let inode = tree_search(
        &fs,
        KeyRange {
            tree: id,
            objectid: (FIRST_FREE_OBJECTID, FIRST_FREE_OBJECTID),
            kind: KEY_INODE_ITEM,
            offset: (0, u64::MAX),
        },
    )?;
    let generation = inode.first().map(|item| item.word(0)).ok_or(io::ErrorKind::NotFound)?;
    let mut handle = Handle {
        bytes: HANDLE_BODY_BYTES,
        kind: FILEID_BTRFS_WITHOUT_PARENT,
        objectid: FIRST_FREE_OBJECTID,
        root: id,
        // The kernel's handle has 32 bits for it too.
        generation: generation as u32,
    };
    // SAFETY: `handle` has the layout of struct file_handle with `bytes` bytes of body behind the two words, and lives
    // across the call, which only reads it.
    let fd = unsafe {
        libc::open_by_handle_at(
            fs.as_fd().as_raw_fd(),
            (&raw mut handle).cast(),
            libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this descriptor to us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
