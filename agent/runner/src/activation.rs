//! The listening socket, as sd_listen_fds(3) describes: made by whoever started us, and kept by them while we are away,
//! so that a connection made meanwhile waits instead of failing.

use std::os::fd::OwnedFd;

use nix::sys::socket::{SockType, getsockopt, sockopt};

use crate::sys::{LISTEN_FDS_START, inherited_fd};

/// The socket of that name; it has to be a SOCK_SEQPACKET one.
pub fn listener(name: &str) -> Result<OwnedFd, String> {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    if variable("LISTEN_PID") != std::process::id().to_string() {
        return Err(
            "no socket was passed: the runner is started by systemd or by `epagent dev` (LISTEN_PID)"
                .to_owned(),
        );
    }
    let names = variable("LISTEN_FDNAMES");
    let count = variable("LISTEN_FDS").parse::<usize>().unwrap_or(0);
    let place = names.split(':').take(count).position(|given| given == name);
    let place = place.and_then(|place| i32::try_from(place).ok());
    let place =
        place.ok_or_else(|| format!("none of the {count} passed sockets ({names:?}) is named {name}"))?;
    let socket = inherited_fd(LISTEN_FDS_START + place)
        .map_err(|error| format!("take the passed socket {name}: {error}"))?;
    match getsockopt(&socket, sockopt::SockType) {
        Ok(SockType::SeqPacket) => Ok(socket),
        other => Err(format!("the passed socket {name} has to be a SOCK_SEQPACKET one, not {other:?}")),
    }
}
