//! Listening sockets handed over by whoever started the process.
//!
//! systemd, or `epagent dev` in its place, binds every socket and passes it on by the socket-activation protocol
//! of sd_listen_fds(3): descriptors from 3 on, counted by `LISTEN_FDS`, named by `LISTEN_FDNAMES`, meant for the
//! process `LISTEN_PID`. A killed process so loses no connection that was still queued, and an unprivileged one
//! needs no right to bind.
//!
//! The variables stay in the environment (removing one is not safe once threads run); `LISTEN_PID` keeps a child
//! from believing them.

#[allow(unsafe_code)]
mod sys;

use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

/// Descriptors that were handed over, by name. What is not taken is closed when this is dropped.
#[derive(Debug)]
pub struct Inherited {
    descriptors: Vec<(String, OwnedFd)>,
}

/// The most descriptors that are accepted.
pub const DESCRIPTORS_MAX: usize = 64;
/// The first descriptor of the protocol (SD_LISTEN_FDS_START).
const FIRST: RawFd = 3;

#[derive(Debug, thiserror::Error)]
pub enum ActivationError {
    #[error(
        "no sockets were handed over: LISTEN_PID is not this process; start it by systemd or `epagent dev`"
    )]
    NotForUs,
    #[error("LISTEN_FDS={0:?} is not a number from 1 to {DESCRIPTORS_MAX}")]
    BadCount(String),
    #[error("LISTEN_FDNAMES has {names} names for {count} descriptors")]
    BadNames { names: usize, count: usize },
    #[error("descriptor {fd} ({name}) was announced and is not open")]
    NotOpen { fd: RawFd, name: String, source: std::io::Error },
    #[error("the sockets were taken before")]
    TakenBefore,
    #[error("no socket named {0:?} was handed over")]
    Missing(String),
}

impl Inherited {
    /// Takes what the environment announces. Works once per process.
    pub fn from_env() -> Result<Self, ActivationError> {
        let variable = |name: &str| std::env::var(name).ok();
        let names = announced(
            std::process::id(),
            variable("LISTEN_PID").as_deref(),
            variable("LISTEN_FDS").as_deref(),
            variable("LISTEN_FDNAMES").as_deref(),
        )?;
        let mut claim = sys::Claim::new().ok_or(ActivationError::TakenBefore)?;
        let mut descriptors = Vec::with_capacity(names.len());
        for (fd, name) in (FIRST..).zip(names) {
            match claim.adopt(fd) {
                Ok(owned) => descriptors.push((name, owned)),
                Err(source) => return Err(ActivationError::NotOpen { fd, name, source }),
            }
        }
        Ok(Self { descriptors })
    }

    /// The first one of this name that was not taken yet.
    pub fn take(&mut self, name: &str) -> Result<OwnedFd, ActivationError> {
        match self.descriptors.iter().position(|(held, _)| held == name) {
            Some(place) => Ok(self.descriptors.remove(place).1),
            None => Err(ActivationError::Missing(name.to_owned())),
        }
    }

    /// The same, as a listening unix stream socket.
    pub fn take_unix(&mut self, name: &str) -> Result<UnixListener, ActivationError> {
        self.take(name).map(UnixListener::from)
    }

    /// The names that were not taken.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.descriptors.iter().map(|(name, _)| name.as_str())
    }
}

/// The names of the announced descriptors, in their order. `unknown` stands for those without one, as in systemd.
fn announced(
    own_pid: u32,
    listen_pid: Option<&str>,
    listen_fds: Option<&str>,
    listen_fdnames: Option<&str>,
) -> Result<Vec<String>, ActivationError> {
    if listen_pid.and_then(|pid| pid.parse().ok()) != Some(own_pid) {
        return Err(ActivationError::NotForUs);
    }
    let text = listen_fds.unwrap_or_default();
    let count = match text.parse::<usize>() {
        Ok(count @ 1..=DESCRIPTORS_MAX) => count,
        _ => return Err(ActivationError::BadCount(text.chars().take(16).collect())),
    };
    let Some(names) = listen_fdnames else {
        return Ok(vec!["unknown".to_owned(); count]);
    };
    let names: Vec<String> = names.split(':').map(str::to_owned).collect();
    if names.len() != count {
        return Err(ActivationError::BadNames { names: names.len(), count });
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_in_order() {
        let names = announced(7, Some("7"), Some("3"), Some("admin:read:http")).unwrap();
        assert_eq!(names, ["admin", "read", "http"]);
        assert_eq!(announced(7, Some("7"), Some("2"), None).unwrap(), ["unknown", "unknown"]);
    }

    #[test]
    fn what_is_meant_for_another_process_is_left_alone() {
        for pid in [None, Some(""), Some("8"), Some("x")] {
            assert!(matches!(announced(7, pid, Some("1"), None), Err(ActivationError::NotForUs)), "{pid:?}");
        }
    }

    #[test]
    fn wrong_announcements_are_refused() {
        for count in [None, Some(""), Some("0"), Some("-1"), Some("65"), Some("1x")] {
            assert!(announced(7, Some("7"), count, None).is_err(), "{count:?}");
        }
        let names = announced(7, Some("7"), Some("2"), Some("admin"));
        assert!(matches!(names, Err(ActivationError::BadNames { names: 1, count: 2 })));
    }
}
