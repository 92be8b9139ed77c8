//! Loop devices by ioctl (linux/loop.h).

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;

const LOOP_CLR_FD: libc::c_ulong = 0x4C01;
const LOOP_GET_STATUS64: libc::c_ulong = 0x4C05;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const AUTOCLEAR: u32 = 4;
const DIRECT_IO: u32 = 16;
/// The block size of the device: direct I/O on the backing file works in units of it.
const BLOCK_BYTES: u32 = 4096;
/// Another process may take the free device between asking and configuring.
const ATTEMPTS_MAX: u32 = 64;

#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}
const _: () = assert!(size_of::<LoopInfo64>() == 232);

#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}
const _: () = assert!(size_of::<LoopConfig>() == 304);

/// The file behind a loop device, as (st_dev, st_ino).
pub(crate) type Backing = (u64, u64);

pub(crate) fn loop_path(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

fn open_device(number: u32) -> io::Result<File> {
    File::options().read(true).write(true).open(loop_path(number))
}

/// Attaches `file` to a free loop device. The device frees itself when its last user (our descriptor, then the mount)
/// is gone; direct I/O where the file below can do it, so that nothing is cached twice.
pub(crate) fn loop_attach(file: &File) -> io::Result<(u32, File)> {
    let control = File::options().read(true).write(true).open("/dev/loop-control")?;
    let mut flags = AUTOCLEAR | DIRECT_IO;
    for _ in 0..ATTEMPTS_MAX {
        // SAFETY: LOOP_CTL_GET_FREE takes no argument.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) };
        let number = u32::try_from(number).map_err(|_| io::Error::last_os_error())?;
        let device = open_device(number)?;
        // SAFETY: LoopConfig is plain integers and byte arrays, for which all zeroes is a value.
        let mut config: Box<LoopConfig> = Box::new(unsafe { std::mem::zeroed() });
        config.fd = file.as_raw_fd() as u32;
        config.block_size = BLOCK_BYTES;
        config.info.flags = flags;
        // SAFETY: `config` is the structure LOOP_CONFIGURE takes, and lives across the call.
        let result = unsafe {
            libc::ioctl(device.as_fd().as_raw_fd(), LOOP_CONFIGURE as _, std::ptr::from_mut(config.as_mut()))
        };
        if result == 0 {
            return Ok((number, device));
        }
        match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::EBUSY) => {}
            error if error.raw_os_error() == Some(libc::EINVAL) && flags & DIRECT_IO != 0 => {
                flags = AUTOCLEAR
            }
            error => return Err(error),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}

/// What is attached to loop device `number`; `None` when nothing is (or the device is gone).
pub(crate) fn loop_backing(number: u32) -> io::Result<Option<(Backing, File)>> {
    let device = match open_device(number) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENXIO)) => return Ok(None),
        other => other?,
    };
    // SAFETY: LoopInfo64 is plain integers and byte arrays, for which all zeroes is a value.
    let mut info: LoopInfo64 = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is the structure LOOP_GET_STATUS64 fills, and lives across the call.
    let result =
        unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64 as _, std::ptr::from_mut(&mut info)) };
    if result == 0 {
        return Ok(Some(((info.device, info.inode), device)));
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        error => Err(error),
    }
}

/// Asks the device to let go of its file (at once, or when its last user is gone).
pub(crate) fn loop_detach(device: &File) -> io::Result<()> {
    // SAFETY: LOOP_CLR_FD takes no argument.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CLR_FD as _) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
