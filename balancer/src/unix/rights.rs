//! SO_PASSRIGHTS (Linux 6.16): whether a unix socket's peer may send it descriptors.
//!
//! Off, a peer's sendmsg with SCM_RIGHTS fails with EPERM. On, which is the default, the descriptors travel
//! with the bytes, and whoever receives the bytes without asking for them closes them, in his own time: for
//! a TCP socket with SO_LINGER and unsent data that is as long as the peer has set, in the middle of a
//! plain receive. [tried: 8 s]

use std::os::fd::AsFd;

use crate::sockets;

/// From include/uapi/asm-generic/socket.h.
const SO_PASSRIGHTS: libc::c_int = 83;

/// Has every descriptor refused that the socket's peer sends. ENOPROTOOPT before Linux 6.16.
pub fn refuse(socket: impl AsFd) -> rustix::io::Result<()> {
    sockets::set_option(socket, libc::SOL_SOCKET, SO_PASSRIGHTS, 0)
}
