//! A terminal for an exec'ed command, in the instance's own devpts.
//!
//! The master is opened below the devpts mount that init made itself, never by a path of the instance, and is
//! verified; the slave comes from the master and not from a name (CVE-2025-52565).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use crate::monitor::protocol::TtySize;
use crate::spec::User;

/// DEVPTS_SUPER_MAGIC of linux/magic.h.
const DEVPTS_MAGIC: u64 = 0x1cd1;
/// The ptmx node of any devpts instance: its fixed inode and device number.
const PTMX_INODE: u64 = 2;
const PTMX_DEVICE: (u32, u32) = (5, 2);

#[derive(Debug)]
pub(super) struct Terminal {
    pub master: OwnedFd,
    pub slave: OwnedFd,
}

/// Opens a pair, sized before any program can look at it, owned by the user who will sit at it.
pub(super) fn open(devpts: BorrowedFd<'_>, size: TtySize, user: User) -> io::Result<Terminal> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let master = rustix::fs::openat2(devpts, "ptmx", flags, Mode::empty(), resolve)?;
    verify(master.as_fd())?;
    rustix::pty::unlockpt(&master)?;
    let slave = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, slave)?;
    resize(master.as_fd(), size)?;
    rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(user.uid)), None)?;
    Ok(Terminal { master, slave })
}

pub(super) fn resize(master: BorrowedFd<'_>, size: TtySize) -> io::Result<()> {
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(rustix::termios::tcsetwinsize(master, size)?)
}

fn verify(master: BorrowedFd<'_>) -> io::Result<()> {
    let stat = rustix::fs::fstat(master)?;
    let right = rustix::fs::fstatfs(master)?.f_type as u64 == DEVPTS_MAGIC
        && stat.st_ino == PTMX_INODE
        && FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)) == PTMX_DEVICE;
    if right {
        Ok(())
    } else {
        Err(io::Error::other("ptmx is not the multiplexer of this instance's devpts"))
    }
}
