//! The embedded default: a pool in a file, allocated, formatted, attached and mounted by us.
//!
//! ```text
//!  (nothing) ──allocate──▶ FILE.partial-PID ──mkfs, fsync──▶ FILE ──attach──▶ /dev/loopN ──mount──▶ mount point
//! ```
//!
//! `FILE` appears by a rename, so it is always a complete file system; leftovers of `FILE.partial-PID` are removed. All of it
//! runs under the lock on `FILE.lock`.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::FallocateFlags;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::engine::open_root;
use crate::error::{Error, Result};
use crate::sys;
use crate::types::Allocation;

const MKFS_DEADLINE: Duration = Duration::from_secs(60);
/// How long unmounting waits for a last user, and the kernel for letting go of the loop device.
const RELEASE_DEADLINE: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(10);
/// Loop devices looked at when searching for one that has our file already.
const LOOP_DEVICES_MAX: usize = 4096;
/// Where btrfs keeps its magic: offset 0x40 of the superblock at 64 KiB.
const MAGIC_AT: u64 = 0x1_0040;
const MAGIC: &[u8; 8] = b"_BHRfS_M";

/// What [`up`] did and found.
pub(super) struct Up {
    pub(super) root: OwnedFd,
    pub(super) created: bool,
}

/// Brings the pool file up at `mount_point`, doing only what is still to do.
/// `new` says how large and how allocated, asked only when there is no file yet.
pub(super) fn up(
    file: &Path,
    mount_point: &Path,
    new: impl FnOnce() -> Result<(u64, Allocation)>,
) -> Result<Up> {
    let created = make_file(file, new)?;
    let backing = open_backing(file)?;
    make_mount_point(mount_point)?;
    if is_mounted(&backing, file, mount_point)? {
        return Ok(Up { root: open_root(mount_point)?, created });
    }
    let (number, device) = attach(&backing, file)?;
    mount(number, mount_point)?;
    // The mount is the device's user now; ours would keep it from freeing itself.
    drop(device);
    Ok(Up { root: open_root(mount_point)?, created })
}

/// Unmounts, and sees to it that the loop device lets go of the file.
pub(super) fn down(file: &Path, mount_point: &Path) -> Result<()> {
    let busy = |source: io::Error| Error::PoolBusy { mount_point: mount_point.to_owned(), source };
    let deadline = Instant::now() + RELEASE_DEADLINE;
    loop {
        match rustix::mount::unmount(mount_point, UnmountFlags::NOFOLLOW) {
            Ok(()) => break,
            Err(rustix::io::Errno::BUSY) if Instant::now() < deadline => sleep(POLL),
            Err(e) => return Err(busy(e.into())),
        }
    }
    let backing = open_backing(file)?;
    loop {
        let Some((_, device)) = find_device(&backing, file)? else { return Ok(()) };
        // Ask again: a device attached by hand, or by a predecessor cut short, may lack the autoclear flag.
        let _ = sys::loop_detach(&device);
        drop(device);
        if Instant::now() >= deadline {
            return Err(busy(io::Error::from_raw_os_error(libc::EBUSY)));
        }
        sleep(POLL);
    }
}

fn beside(file: &Path, suffix: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

pub(super) fn lock_path(file: &Path) -> PathBuf {
    beside(file, ".lock")
}

/// What the name of an unfinished pool file ends in, before the number of the process that makes it.
const PARTIAL: &str = ".partial";

/// Removes what openers that were killed left behind.
fn remove_partials(file: &Path) -> Result<()> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let begin = beside(Path::new(file.file_name().unwrap_or_default()), PARTIAL);
    let failed = |e| Error::io("look for unfinished pool files in", folder.display(), e);
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_name().as_encoded_bytes().starts_with(begin.as_os_str().as_encoded_bytes()) {
            match fs::remove_file(entry.path()) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io("remove", entry.path().display(), e));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// Makes the pool file unless it is there; true when it did.
fn make_file(file: &Path, new: impl FnOnce() -> Result<(u64, Allocation)>) -> Result<bool> {
    remove_partials(file)?;
    // A name of our own: the mkfs of an opener that was killed may run on and opens its file by name again.
    let partial = beside(file, &format!("{PARTIAL}-{}", std::process::id()));
    if fs::exists(file).map_err(|e| Error::io("stat", file.display(), e))? {
        check_magic(file)?;
        return Ok(false);
    }
    let (size_bytes, allocation) = new()?;
    let made = allocate(&partial, size_bytes, allocation)
        .and_then(|()| mkfs(&partial))
        .and_then(|()| put_in_place(&partial, file));
    if made.is_err() {
        // The error says what went wrong; a leftover is removed by the next attempt as well.
        let _ = fs::remove_file(&partial);
    }
    made.map(|()| true)
}

fn check_magic(file: &Path) -> Result<()> {
    let mut magic = [0u8; 8];
    let read = File::open(file).and_then(|f| f.read_exact_at(&mut magic, MAGIC_AT));
    match read {
        Ok(()) if &magic == MAGIC => Ok(()),
        Ok(()) => Err(Error::NotBtrfs { path: file.to_owned(), magic: u64::from_le_bytes(magic) }),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
            Err(Error::NotBtrfs { path: file.to_owned(), magic: 0 })
        }
        Err(e) => Err(Error::io("read", file.display(), e)),
    }
}

fn allocate(partial: &Path, size_bytes: u64, allocation: Allocation) -> Result<()> {
    let failed = |source: io::Error| match source.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => {
            Error::NoRoomForPool { file: partial.to_owned(), size_bytes, source }
        }
        _ => Error::io("allocate", partial.display(), source),
    };
    let file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(partial)
        .map_err(|e| Error::io("create", partial.display(), e))?;
    match allocation {
        Allocation::Sparse => file.set_len(size_bytes).map_err(failed),
        Allocation::Full => {
            rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size_bytes).map_err(|e| failed(e.into()))
        }
    }
}

/// The file is formatted before any loop device sees it, so that nothing has to be undone when mkfs fails.
fn mkfs(partial: &Path) -> Result<()> {
    let failed = |detail: String| Error::Mkfs { file: partial.to_owned(), detail };
    let tool = ["/usr/sbin/mkfs.btrfs", "/sbin/mkfs.btrfs", "/usr/bin/mkfs.btrfs", "/bin/mkfs.btrfs"]
        .into_iter()
        .find(|tool| Path::new(tool).exists())
        .ok_or_else(|| failed("the command is not there; install btrfs-progs".into()))?;
    let mut child = Command::new(tool)
        // No discard: it would give back the blocks just allocated. Data and metadata share their chunks, once each:
        // apart, a tenant who fills data chunks, empties them again and then makes very many small files leaves no
        // room for anybody's metadata, at a fraction of his quota; and two copies in one file protect from little.
        .args(["--quiet", "--nodiscard", "--label", "epagent"])
        .args(["--mixed", "--metadata", "single", "--data", "single"])
        .arg(partial)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| failed(e.to_string()))?;
    let deadline = Instant::now() + MKFS_DEADLINE;
    while child.try_wait().map_err(|e| failed(e.to_string()))?.is_none() {
        if Instant::now() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
            return Err(failed(format!("no end after {} s", MKFS_DEADLINE.as_secs())));
        }
        sleep(POLL);
    }
    // The tool says a few lines at most, which the pipe holds while we wait above.
    let output = child.wait_with_output().map_err(|e| failed(e.to_string()))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
    }
}

fn put_in_place(partial: &Path, file: &Path) -> Result<()> {
    let failed = |e| Error::io("put in place", file.display(), e);
    File::open(partial).and_then(|f| f.sync_all()).map_err(failed)?;
    fs::rename(partial, file).map_err(failed)?;
    let parent = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(failed)
}

fn open_backing(file: &Path) -> Result<File> {
    File::options().read(true).write(true).open(file).map_err(|e| Error::io("open", file.display(), e))
}

fn make_mount_point(mount_point: &Path) -> Result<()> {
    let failed = |e| Error::io("make the mount point", mount_point.display(), e);
    match fs::create_dir(mount_point) {
        Ok(()) => fs::set_permissions(mount_point, Permissions::from_mode(0o700)).map_err(failed),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(failed(e)),
    }
}

fn backing_id(backing: &File, file: &Path) -> Result<sys::Backing> {
    let meta = backing.metadata().map_err(|e| Error::io("stat", file.display(), e))?;
    Ok((meta.dev(), meta.ino()))
}

/// Whether the mount point is a mount of our file; an error when it is a mount of something else.
fn is_mounted(backing: &File, file: &Path, mount_point: &Path) -> Result<bool> {
    let root = open_root(mount_point)?;
    if !super::is_mount_root(&root, mount_point)? {
        return Ok(false);
    }
    let taken = || Error::MountPointTaken { mount_point: mount_point.to_owned(), file: file.to_owned() };
    super::check_btrfs(&root, mount_point).map_err(|_| taken())?;
    let device =
        sys::first_device(&root).map_err(|e| Error::io("ask for the device of", mount_point.display(), e))?;
    let number = device.to_str().and_then(|d| d.strip_prefix("/dev/loop")).and_then(|n| n.parse().ok());
    let mounted = match number {
        Some(number) => sys::loop_backing(number).map_err(|e| Error::io("ask", device.display(), e))?,
        None => None,
    };
    match mounted {
        Some((id, _)) if id == backing_id(backing, file)? => Ok(true),
        _ => Err(taken()),
    }
}

/// The loop device that has our file already, whoever attached it.
fn find_device(backing: &File, file: &Path) -> Result<Option<(u32, File)>> {
    let wanted = backing_id(backing, file)?;
    let failed = |e| Error::io("list", "/sys/block", e);
    for entry in fs::read_dir("/sys/block").map_err(failed)?.take(LOOP_DEVICES_MAX) {
        let name = entry.map_err(failed)?.file_name();
        let Some(number) = name.to_str().and_then(|n| n.strip_prefix("loop")).and_then(|n| n.parse().ok())
        else {
            continue;
        };
        match sys::loop_backing(number).map_err(|e| Error::io("ask", sys::loop_path(number).display(), e))? {
            Some((id, device)) if id == wanted => return Ok(Some((number, device))),
            _ => {}
        }
    }
    Ok(None)
}

/// One file never gets a second device: two caches over one file system destroy it.
fn attach(backing: &File, file: &Path) -> Result<(u32, File)> {
    match find_device(backing, file)? {
        Some(found) => Ok(found),
        None => {
            sys::loop_attach(backing).map_err(|e| Error::io("attach a loop device to", file.display(), e))
        }
    }
}

fn mount(number: u32, mount_point: &Path) -> Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
    // Discards would punch holes into the file, and the host's disk could fill up under the pool.
    rustix::mount::mount(sys::loop_path(number), mount_point, "btrfs", flags, Some(c"nodiscard"))
        .map_err(|e| Error::io("mount the pool at", mount_point.display(), e))
}

/// Opens a lock file of root's.
pub(super) fn open_lock(file: &Path) -> Result<OwnedFd> {
    let path = lock_path(file);
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .and_then(|f| f.as_fd().try_clone_to_owned())
        .map_err(|e| Error::io("open", path.display(), e))
}
