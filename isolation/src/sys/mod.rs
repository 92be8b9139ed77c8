//! The door: every `unsafe` of this crate, and nothing that decides.
//!
//! Here are the calls that neither nix nor rustix offer as safe functions: clone3 with a cgroup, mount_setattr,
//! close_range, signal dispositions, and taking over inherited descriptors. Each is a thin safe function whose
//! SAFETY note says what makes it so. The rest of the crate is `deny(unsafe_code)`.

#![allow(unsafe_code)]

pub(crate) mod memory;
pub(crate) mod message;
pub(crate) mod mount;
pub(crate) mod process;

use std::io;

/// The result of a raw system call that returns -1 with errno.
fn checked(value: libc::c_long) -> io::Result<libc::c_long> {
    if value < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}
