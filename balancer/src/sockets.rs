//! Sockets as both doors make and end them.

use std::io::IoSlice;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    self, AddressFamily, SendAncillaryBuffer, SendFlags, SocketFlags, SocketType, connect, sendmsg,
    socket_with, sockopt,
};

use crate::core::chunk::Chunk;
use crate::core::io::AfterSend;

/// Sets the options of a TCP socket, or of a listener, from which the accepted ones inherit them: that saves the
/// system calls for each. A socket without them works too.
pub fn prepare(socket: impl AsFd) {
    let socket = socket.as_fd();
    let _ = sockopt::set_tcp_nodelay(socket, true);
    let _ = sockopt::set_socket_keepalive(socket, true);
    // Urgent bytes are passed on in their place among the others, not left out.
    let _ = sockopt::set_socket_oobinline(socket, true);
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

/// Sends what fits now; EAGAIN when nothing does. What FIN is to follow waits for it.
pub fn send(socket: impl AsFd, chunks: &[Chunk], after: AfterSend) -> rustix::io::Result<usize> {
    let mut flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    flags.set(SendFlags::MORE, after == AfterSend::Fin);
    retry_on_intr(|| match chunks {
        [only] => net::send(&socket, only, flags),
        several => {
            let slices: Vec<IoSlice<'_>> = several.iter().map(|chunk| IoSlice::new(chunk)).collect();
            sendmsg(&socket, &slices, &mut SendAncillaryBuffer::default(), flags)
        }
    })
}

/// From now on, closing the socket is a reset.
pub fn reset_on_close(socket: impl AsFd) {
    // Without it the peer sees FIN where it should see RST; nothing else to do about it.
    let _ = sockopt::set_socket_linger(socket, Some(Duration::ZERO));
}
