//! Sockets as both doors make and end them.

#![allow(unsafe_code)]

use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};

/// Most bytes written to a TCP socket that the kernel keeps before they have gone out. Without, it is as many as a send
/// buffer may grow to (`net.ipv4.tcp_wmem`, 4 MiB): some hundred clients that read nothing would take all the memory
/// that the host has for TCP (`net.ipv4.tcp_mem`), and everybody's connections would suffer.
const UNSENT_BYTES_MAX: libc::c_int = 256 * 1024;

/// Sets the options of a TCP socket, or of a listener, from which the accepted ones inherit them: that saves the
/// system calls for each. A socket without them works too.
pub fn prepare(socket: impl AsFd) {
    let socket = socket.as_fd();
    let _ = sockopt::set_tcp_nodelay(socket, true);
    let _ = sockopt::set_socket_keepalive(socket, true);
    // Urgent bytes are passed on in their place among the others, not left out.
    let _ = sockopt::set_socket_oobinline(socket, true);
    let _ = set_option(socket, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, UNSENT_BYTES_MAX);
}

/// Sets an option that no crate here knows.
pub fn set_option(
    socket: impl AsFd,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> rustix::io::Result<()> {
    let len = size_of_val(&value) as libc::socklen_t;
    let socket = socket.as_fd().as_raw_fd();
    // SAFETY: the value is an int, as these options want it, which outlives the call; the descriptor is open.
    match unsafe { libc::setsockopt(socket, level, name, (&raw const value).cast(), len) } {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::NOPROTOOPT)),
    }
}

/// A TCP socket to connect to this address with.
pub fn tcp(address: SocketAddr, flags: SocketFlags) -> rustix::io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, flags | SocketFlags::CLOEXEC, None)?;
    prepare(&socket);
    Ok(socket)
}

/// Begins a connect by TCP; it has ended when the socket can be written to, and [`error`] says how.
pub fn begin_connect(address: SocketAddr) -> rustix::io::Result<OwnedFd> {
    let socket = tcp(address, SocketFlags::NONBLOCK)?;
    match connect(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

/// The error that a socket has, which is none when its connect worked.
pub fn error(socket: impl AsFd) -> rustix::io::Result<()> {
    sockopt::socket_error(socket)?
}

/// From now on, closing the socket is a reset.
pub fn reset_on_close(socket: impl AsFd) {
    // Without it the peer sees FIN where it should see RST; nothing else to do about it.
    let _ = sockopt::set_socket_linger(socket, Some(Duration::ZERO));
}
