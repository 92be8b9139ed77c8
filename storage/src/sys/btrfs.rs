//! The btrfs ioctls this crate needs, over its own `repr(C)` structures (linux/btrfs.h, linux/btrfs_tree.h).
//!
//! Own structures rather than a binding crate: the ones there are run bindgen and need libclang. The command-line tool
//! is no way either: its columns change between versions, and Debian 12's cannot switch on simple quotas.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

const MAGIC: u64 = 0x94;

const fn ioc(direction: u64, number: u64, size: usize) -> libc::c_ulong {
    (direction << 30 | (size as u64) << 16 | MAGIC << 8 | number) as libc::c_ulong
}
const fn iow(number: u64, size: usize) -> libc::c_ulong {
    ioc(1, number, size)
}
const fn ior(number: u64, size: usize) -> libc::c_ulong {
    ioc(2, number, size)
}
const fn iowr(number: u64, size: usize) -> libc::c_ulong {
    ioc(3, number, size)
}

pub(crate) const TREE_ROOT: u64 = 1;
pub(crate) const TREE_QUOTA: u64 = 8;

pub(crate) const KEY_INODE_ITEM: u32 = 1;
pub(crate) const KEY_ROOT_ITEM: u32 = 132;
pub(crate) const KEY_ROOT_REF: u32 = 156;
pub(crate) const KEY_QGROUP_STATUS: u32 = 240;
pub(crate) const KEY_QGROUP_INFO: u32 = 242;
pub(crate) const KEY_QGROUP_LIMIT: u32 = 244;
pub(crate) const KEY_QGROUP_RELATION: u32 = 246;

/// The inode number of every subvolume's root directory.
pub(crate) const FIRST_FREE_OBJECTID: u64 = 256;

const NAME_BYTES: usize = 4040;
const SUBVOL_RDONLY: u64 = 1 << 1;
const SUBVOL_QGROUP_INHERIT: u64 = 1 << 2;
const SUBVOL_SPEC_BY_ID: u64 = 1 << 4;
const LIMIT_MAX_RFER: u64 = 1 << 0;
const LIMIT_MAX_EXCL: u64 = 1 << 1;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct QgroupLimit {
    flags: u64,
    max_rfer: u64,
    max_excl: u64,
    rsv_rfer: u64,
    rsv_excl: u64,
}

#[repr(C)]
struct QgroupInherit {
    flags: u64,
    num_qgroups: u64,
    num_ref_copies: u64,
    num_excl_copies: u64,
    limit: QgroupLimit,
    qgroups: [u64; 1],
}

#[repr(C)]
struct VolArgsV2 {
    fd: i64,
    transid: u64,
    flags: u64,
    /// Union: (size, pointer to `QgroupInherit`) or unused.
    inherit_size: u64,
    inherit: *const QgroupInherit,
    unused: [u64; 2],
    /// Union: a name, or a subvolume id in its first eight bytes.
    name: [u8; NAME_BYTES],
}
const _: () = assert!(size_of::<VolArgsV2>() == 4096);

impl VolArgsV2 {
    fn new(name: &str) -> io::Result<Box<Self>> {
        if name.is_empty() || name.len() >= 256 || name.contains(['/', '\0']) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let mut args = Box::new(Self {
            fd: 0,
            transid: 0,
            flags: 0,
            inherit_size: 0,
            inherit: std::ptr::null(),
            unused: [0; 2],
            name: [0; NAME_BYTES],
        });
        args.name[..name.len()].copy_from_slice(name.as_bytes());
        Ok(args)
    }
}

#[repr(C)]
struct SearchArgsV2 {
    tree_id: u64,
    min_objectid: u64,
    max_objectid: u64,
    min_offset: u64,
    max_offset: u64,
    min_transid: u64,
    max_transid: u64,
    min_type: u32,
    max_type: u32,
    nr_items: u32,
    unused: u32,
    unused_tail: [u64; 4],
    buf_size: u64,
    buf: [u8; SEARCH_BUF_BYTES],
}
const SEARCH_BUF_BYTES: usize = 16 << 10;
/// The size in the ioctl number leaves out the buffer, a flexible array in the kernel's header.
const SEARCH_ARGS_BYTES: usize = 112;
const _: () = assert!(size_of::<SearchArgsV2>() == SEARCH_ARGS_BYTES + SEARCH_BUF_BYTES);

/// One issue of an ioctl whose argument is a structure of the size in `request`.
fn ioctl<T>(fd: BorrowedFd<'_>, request: libc::c_ulong, arg: &mut T) -> io::Result<i32> {
    // SAFETY: `arg` is a live exclusive reference to the repr(C) structure that `request` names; each caller below
    // pairs the two, and any pointer inside `arg` outlives the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, std::ptr::from_mut(arg)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn with_group<T>(group: Option<u64>, args: &mut VolArgsV2, call: impl FnOnce(&mut VolArgsV2) -> T) -> T {
    let Some(group) = group else { return call(args) };
    let inherit = QgroupInherit {
        flags: 0,
        num_qgroups: 1,
        num_ref_copies: 0,
        num_excl_copies: 0,
        limit: QgroupLimit::default(),
        qgroups: [group],
    };
    args.flags |= SUBVOL_QGROUP_INHERIT;
    args.inherit_size = size_of::<QgroupInherit>() as u64;
    args.inherit = &raw const inherit;
    let result = call(args);
    args.inherit = std::ptr::null();
    result
}

/// Creates an empty subvolume `name` in `dir`, a member of `group` from birth.
pub(crate) fn subvol_create(dir: impl AsFd, name: &str, group: Option<u64>) -> io::Result<()> {
    let mut args = VolArgsV2::new(name)?;
    with_group(group, &mut args, |args| ioctl(dir.as_fd(), iow(24, size_of::<VolArgsV2>()), args))?;
    Ok(())
}

/// Creates `name` in `dir` as a writable snapshot of the subvolume `source`, a member of `group` from birth.
pub(crate) fn subvol_snapshot(
    source: impl AsFd,
    dir: impl AsFd,
    name: &str,
    group: Option<u64>,
) -> io::Result<()> {
    let mut args = VolArgsV2::new(name)?;
    args.fd = i64::from(source.as_fd().as_raw_fd());
    with_group(group, &mut args, |args| ioctl(dir.as_fd(), iow(23, size_of::<VolArgsV2>()), args))?;
    Ok(())
}

/// Deletes the subvolume with this id, wherever it is and whatever it is called (Linux 5.7). `fs` is any directory of
/// the file system that contains it.
pub(crate) fn subvol_destroy(fs: impl AsFd, id: u64) -> io::Result<()> {
    let mut args = VolArgsV2::new("-")?;
    args.flags = SUBVOL_SPEC_BY_ID;
    args.name[..8].copy_from_slice(&id.to_ne_bytes());
    ioctl(fs.as_fd(), iow(63, size_of::<VolArgsV2>()), args.as_mut())?;
    Ok(())
}

pub(crate) fn subvol_is_read_only(subvol: impl AsFd) -> io::Result<bool> {
    let mut flags = 0u64;
    ioctl(subvol.as_fd(), ior(25, 8), &mut flags)?;
    Ok(flags & SUBVOL_RDONLY != 0)
}

/// Sets or clears the read-only property. The kernel commits the transaction before it returns.
pub(crate) fn subvol_set_read_only(subvol: impl AsFd, read_only: bool) -> io::Result<()> {
    let mut flags = 0u64;
    ioctl(subvol.as_fd(), ior(25, 8), &mut flags)?;
    let mut wanted = if read_only { flags | SUBVOL_RDONLY } else { flags & !SUBVOL_RDONLY };
    if wanted == flags {
        return Ok(());
    }
    ioctl(subvol.as_fd(), iow(26, 8), &mut wanted)?;
    Ok(())
}

#[repr(C)]
struct SubvolInfo {
    tree_id: u64,
    name: [u8; 256],
    parent_id: u64,
    dir_id: u64,
    generation: u64,
    flags: u64,
    uuids: [[u8; 16]; 3],
    ctransid: u64,
    otransid: u64,
    stransid: u64,
    rtransid: u64,
    times: [[u64; 2]; 4],
    reserved: [u64; 8],
}
const _: () = assert!(size_of::<SubvolInfo>() == 504);

/// The id of the subvolume that contains `fd`, and the transaction that created it.
pub(crate) struct SubvolIdentity {
    pub(crate) id: u64,
    pub(crate) created_generation: u64,
}

pub(crate) fn subvol_identity(fd: impl AsFd) -> io::Result<SubvolIdentity> {
    // SAFETY: SubvolInfo is plain integers and byte arrays, for which all zeroes is a value.
    let mut info: Box<SubvolInfo> = Box::new(unsafe { std::mem::zeroed() });
    ioctl(fd.as_fd(), ior(60, size_of::<SubvolInfo>()), info.as_mut())?;
    Ok(SubvolIdentity { id: info.tree_id, created_generation: info.otransid })
}

/// Starts a commit and waits for it. Unlike syncfs this does not write out every tenant's dirty data first.
pub(crate) fn commit(fs: impl AsFd) -> io::Result<()> {
    let mut transid = 0u64;
    ioctl(fs.as_fd(), ior(24, 8), &mut transid)?;
    match ioctl(fs.as_fd(), iow(22, 8), &mut transid) {
        // "No such transaction": it ended before we asked.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        other => other.map(drop),
    }
}

#[repr(C)]
struct FsInfo {
    max_id: u64,
    num_devices: u64,
    fsid: [u8; 16],
    sizes: [u32; 3],
    csum: [u16; 2],
    flags: u64,
    generation: u64,
    rest: [u8; 1024 - 64],
}
const _: () = assert!(size_of::<FsInfo>() == 1024);
const FS_INFO_GENERATION: u64 = 1 << 1;

fn fs_info(fs: impl AsFd, flags: u64) -> io::Result<Box<FsInfo>> {
    // SAFETY: FsInfo is plain integers and byte arrays, for which all zeroes is a value.
    let mut info: Box<FsInfo> = Box::new(unsafe { std::mem::zeroed() });
    info.flags = flags;
    ioctl(fs.as_fd(), ior(31, size_of::<FsInfo>()), info.as_mut())?;
    Ok(info)
}

/// The last committed transaction.
pub(crate) fn fs_generation(fs: impl AsFd) -> io::Result<u64> {
    Ok(fs_info(fs, FS_INFO_GENERATION)?.generation)
}

/// The identity of the file system, under which sysfs shows it.
pub(crate) fn fs_id(fs: impl AsFd) -> io::Result<[u8; 16]> {
    Ok(fs_info(fs, 0)?.fsid)
}

#[repr(C)]
struct SpaceArgs<const N: usize> {
    slots: u64,
    total: u64,
    spaces: [[u64; 3]; N],
}

/// How the file system divides its devices.
pub(crate) struct Space {
    /// Raw bytes taken by chunks that hold no data, copies included.
    pub(crate) metadata_raw_bytes: u64,
    /// Data and metadata share chunks.
    pub(crate) is_mixed: bool,
}

pub(crate) fn space(fs: impl AsFd) -> io::Result<Space> {
    const SLOTS: usize = 32;
    const DATA: u64 = 1;
    const METADATA: u64 = 1 << 2;
    const TWO_COPIES: u64 = 1 << 4 | 1 << 5 | 1 << 6; // RAID1, DUP, RAID10
    const GLOBAL_RESERVE: u64 = 1 << 49;
    let mut args = SpaceArgs::<SLOTS> { slots: SLOTS as u64, total: 0, spaces: [[0; 3]; SLOTS] };
    ioctl(fs.as_fd(), iowr(20, 16), &mut args)?;
    let mut space = Space { metadata_raw_bytes: 0, is_mixed: false };
    for &[flags, total, _used] in args.spaces.iter().take(args.total.min(SLOTS as u64) as usize) {
        match flags {
            _ if flags & GLOBAL_RESERVE != 0 => {}
            _ if flags & DATA != 0 => space.is_mixed |= flags & METADATA != 0,
            _ if flags & TWO_COPIES != 0 => space.metadata_raw_bytes += total * 2,
            _ => space.metadata_raw_bytes += total,
        }
    }
    Ok(space)
}

#[repr(C)]
struct DevInfo {
    devid: u64,
    uuid: [u8; 16],
    bytes_used: u64,
    total_bytes: u64,
    unused: [u64; 379],
    path: [u8; 1024],
}
const _: () = assert!(size_of::<DevInfo>() == 4096);

/// The path of device 1 of the file system, as the kernel knows it.
pub(crate) fn first_device(fs: impl AsFd) -> io::Result<std::path::PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    // SAFETY: DevInfo is plain integers and byte arrays, for which all zeroes is a value.
    let mut info: Box<DevInfo> = Box::new(unsafe { std::mem::zeroed() });
    info.devid = 1;
    ioctl(fs.as_fd(), iowr(30, size_of::<DevInfo>()), info.as_mut())?;
    let len = info.path.iter().position(|&byte| byte == 0).unwrap_or(info.path.len());
    Ok(std::ffi::OsStr::from_bytes(&info.path[..len]).into())
}

/// What QUOTA_CTL can be told to do.
#[derive(Clone, Copy)]
pub(crate) enum QuotaCommand {
    EnableOrdinary = 1,
    EnableSimple = 4,
}

pub(crate) fn quota_control(fs: impl AsFd, command: QuotaCommand) -> io::Result<()> {
    let mut args = [command as u64, 0];
    ioctl(fs.as_fd(), iowr(40, 16), &mut args)?;
    Ok(())
}

/// Waits for the count that enabling ordinary qgroups starts.
pub(crate) fn quota_rescan_wait(fs: impl AsFd) -> io::Result<()> {
    ioctl(fs.as_fd(), ioc(0, 46, 0), &mut 0u64)?;
    Ok(())
}

pub(crate) fn qgroup_create(fs: impl AsFd, group: u64) -> io::Result<()> {
    ioctl(fs.as_fd(), iow(42, 16), &mut [1, group])?;
    Ok(())
}

pub(crate) fn qgroup_remove(fs: impl AsFd, group: u64) -> io::Result<()> {
    ioctl(fs.as_fd(), iow(42, 16), &mut [0, group])?;
    Ok(())
}

/// Makes `member` a member of `parent`. A positive result (a rescan is wanted) only concerns ordinary qgroups.
pub(crate) fn qgroup_assign(fs: impl AsFd, member: u64, parent: u64) -> io::Result<()> {
    ioctl(fs.as_fd(), iow(41, 24), &mut [1, member, parent])?;
    Ok(())
}

/// What a limit counts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Counted {
    /// All the group refers to.
    Referenced,
    /// Only what nothing else shares.
    Exclusive,
}

pub(crate) fn qgroup_limit(fs: impl AsFd, group: u64, counted: Counted, bytes: u64) -> io::Result<()> {
    let mut args = match counted {
        Counted::Referenced => [group, LIMIT_MAX_RFER, bytes, 0, 0, 0],
        Counted::Exclusive => [group, LIMIT_MAX_EXCL, 0, bytes, 0, 0],
    };
    ioctl(fs.as_fd(), ior(43, 48), &mut args)?;
    Ok(())
}

/// One item of a tree: its key and its bytes.
#[derive(Debug, Clone)]
pub(crate) struct Item {
    pub(crate) objectid: u64,
    pub(crate) kind: u32,
    pub(crate) offset: u64,
    pub(crate) bytes: Vec<u8>,
}

impl Item {
    /// The `index`-th little-endian 64-bit word, 0 beyond the end.
    pub(crate) fn word(&self, index: usize) -> u64 {
        match self.bytes.get(index * 8..index * 8 + 8) {
            Some(bytes) => u64::from_le_bytes(bytes.try_into().unwrap_or_default()),
            None => 0,
        }
    }
}

/// An inclusive range of keys of one type and either one object id or one id range.
#[derive(Clone, Copy)]
pub(crate) struct KeyRange {
    pub(crate) tree: u64,
    pub(crate) objectid: (u64, u64),
    pub(crate) kind: u32,
    pub(crate) offset: (u64, u64),
}

/// Items at most one search returns; more is an error, not a silent cut.
pub(crate) const SEARCH_ITEMS_MAX: usize = 1 << 20;

/// All items of `range`, in key order. A tree that does not exist has none.
pub(crate) fn tree_search(fs: impl AsFd, range: KeyRange) -> io::Result<Vec<Item>> {
    let mut items = Vec::new();
    let (mut objectid, mut offset) = (range.objectid.0, range.offset.0);
    // The kernel orders keys lexicographically by (objectid, type, offset) and filters by nothing else, so what lies
    // between two keys of the wanted kind also comes back; it is dropped below.
    let mut kind = range.kind;
    loop {
        let mut args = Box::new(SearchArgsV2 {
            tree_id: range.tree,
            min_objectid: objectid,
            max_objectid: range.objectid.1,
            min_offset: offset,
            max_offset: u64::MAX,
            min_transid: 0,
            max_transid: u64::MAX,
            min_type: kind,
            max_type: range.kind,
            nr_items: u32::MAX,
            unused: 0,
            unused_tail: [0; 4],
            buf_size: SEARCH_BUF_BYTES as u64,
            buf: [0; SEARCH_BUF_BYTES],
        });
        match ioctl(fs.as_fd(), iowr(17, SEARCH_ARGS_BYTES), args.as_mut()) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(items),
            other => other?,
        };
        if args.nr_items == 0 {
            return Ok(items);
        }
        let mut last = None;
        let mut at = 0;
        for _ in 0..args.nr_items {
            let item = parse_item(&args.buf, &mut at)?;
            last = Some((item.objectid, item.kind, item.offset));
            let wanted = item.kind == range.kind
                && (range.objectid.0..=range.objectid.1).contains(&item.objectid)
                && (range.offset.0..=range.offset.1).contains(&item.offset);
            if wanted {
                items.push(item);
            }
        }
        if items.len() > SEARCH_ITEMS_MAX {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
        let Some(next) = last.and_then(next_key) else { return Ok(items) };
        (objectid, kind, offset) = next;
        if (objectid, kind, offset) > (range.objectid.1, range.kind, u64::MAX) {
            return Ok(items);
        }
    }
}

fn next_key((objectid, kind, offset): (u64, u32, u64)) -> Option<(u64, u32, u64)> {
    match offset.checked_add(1) {
        Some(offset) => Some((objectid, kind, offset)),
        None if kind < 255 => Some((objectid, kind + 1, 0)),
        None => Some((objectid.checked_add(1)?, 0, 0)),
    }
}

fn parse_item(buf: &[u8], at: &mut usize) -> io::Result<Item> {
    let short = || io::Error::new(io::ErrorKind::InvalidData, "tree search returned a short item");
    let word = |from: usize| -> io::Result<u64> {
        let bytes = buf.get(from..from + 8).ok_or_else(short)?;
        Ok(u64::from_ne_bytes(bytes.try_into().map_err(|_| short())?))
    };
    let (objectid, offset, kind_and_len) = (word(*at + 8)?, word(*at + 16)?, word(*at + 24)?);
    let [a, b, c, d, e, f, g, h] = kind_and_len.to_ne_bytes();
    let (kind, len) = (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]) as usize);
    let start = *at + 32;
    let bytes = buf.get(start..start + len).ok_or_else(short)?.to_vec();
    *at = start + len;
    Ok(Item { objectid, kind, offset, bytes })
}
