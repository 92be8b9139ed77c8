//! Descriptors handed over by whoever started us: systemd's socket activation protocol (sd_listen_fds(3)).
//!
//! `LISTEN_PID` is our process, `LISTEN_FDS` how many there are from descriptor 3 on, `LISTEN_FDNAMES`
//! their names, separated by colons.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// The first inherited descriptor, fixed by the protocol.
const FIRST: RawFd = 3;
/// Most descriptors taken over.
const COUNT_MAX: i32 = 1024;

/// A descriptor and the name it was given.
#[derive(Debug)]
pub struct Inherited {
    pub name: String,
    pub socket: OwnedFd,
}

/// Why inherited descriptors cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    #[error("LISTEN_FDS is {value:?}, not a number from 0 to {COUNT_MAX}")]
    BadCount { value: String },
    #[error("descriptor {fd} ({name:?}), announced by LISTEN_FDS, is not open")]
    NotOpen {
        fd: RawFd,
        name: String,
        #[source]
        source: nix::Error,
    },
}

/// Takes over the descriptors meant for this process; none when there are none. May be called once.
pub fn take() -> Result<Vec<Inherited>, InheritError> {
    let ours = std::env::var("LISTEN_PID").is_ok_and(|pid| pid == std::process::id().to_string());
    let Ok(value) = std::env::var("LISTEN_FDS") else { return Ok(Vec::new()) };
    if !ours {
        return Ok(Vec::new());
    }
    let count: i32 = match value.parse() {
        Ok(count) if (0..=COUNT_MAX).contains(&count) => count,
        _ => return Err(InheritError::BadCount { value }),
    };
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    (0..count)
        .map(|offset| {
            let name = names.next().filter(|name| !name.is_empty()).unwrap_or("unknown").to_owned();
            take_one(FIRST + offset, name)
        })
        .collect()
}

fn take_one(fd: RawFd, name: String) -> Result<Inherited, InheritError> {
    // SAFETY: only looked at; whether it is open is what the call below finds out.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    let not_open = |source| InheritError::NotOpen { fd, name: name.clone(), source };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(not_open)?;
    // SAFETY: it is open, the protocol says it is ours, and `take` is called once, before anything else
    // could have opened a descriptor of this number.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(Inherited { name, socket })
}
