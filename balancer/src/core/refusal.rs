//! Why a tenant's unix socket is not connected to: reasons of our own beside the system's errors.
//!
//! They travel as error numbers that a connect to such a socket cannot have for any other reason, so that
//! [`super::io::Completion::ConnectFailed`] is the same for every kind of address.

use std::fmt;

use super::io::Errno;
use crate::control::protocol::Counters;

/// A reason of our own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// A symlink stands on the way, or in the socket's place.
    Symlink,
    /// What stands in its place is no socket.
    NoSocket,
    /// The socket has several names, so it may be one of the host's.
    SeveralNames,
    /// No folder of the tenants' is given.
    NoFolder,
    /// The kernel cannot keep a tenant from sending descriptors along.
    Unprotected,
}

impl Refusal {
    const ALL: [Self; 5] =
        [Self::Symlink, Self::NoSocket, Self::SeveralNames, Self::NoFolder, Self::Unprotected];

    pub fn of(error: Errno) -> Option<Self> {
        Self::ALL.into_iter().find(|refusal| refusal.errno() == error)
    }

    pub const fn errno(self) -> Errno {
        Errno(match self {
            Self::Symlink => libc::ELOOP,
            Self::NoSocket => libc::ENOTSOCK,
            Self::SeveralNames => libc::EMLINK,
            Self::NoFolder => libc::ENXIO,
            Self::Unprotected => libc::ENOPROTOOPT,
        })
    }

    pub fn counter(self, counters: &mut Counters) -> &mut u64 {
        match self {
            Self::Symlink => &mut counters.unix_symlink,
            Self::NoSocket => &mut counters.unix_no_socket,
            Self::SeveralNames => &mut counters.unix_several_names,
            Self::NoFolder | Self::Unprotected => &mut counters.unix_unavailable,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Symlink => "a symbolic link stands in its path",
            Self::NoSocket => "what stands in its place is no socket",
            Self::SeveralNames => "the socket has several names, so it may be one of the host's",
            Self::NoFolder => "there is no folder of unix sockets: start the balancer with --unix-root",
            Self::Unprotected => {
                "this kernel has no SO_PASSRIGHTS (Linux 6.16), without which an app could stop the balancer; \
                 give the app a TCP port"
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_is_known_again_and_no_error_of_the_systems_is_taken_for_one() {
        for refusal in Refusal::ALL {
            assert_eq!(Refusal::of(refusal.errno()), Some(refusal));
        }
        for errno in [libc::ENOENT, libc::EAGAIN, libc::ECONNREFUSED, libc::EPROTOTYPE, libc::EACCES] {
            assert_eq!(Refusal::of(Errno(errno)), None);
        }
    }
}
