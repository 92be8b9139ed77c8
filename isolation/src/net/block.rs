//! The node's block of addresses, made unreachable as a whole.
//!
//! Each instance's pair of addresses is a more specific route of its own, which goes with the instance. Without a
//! route for the rest, a packet to an instance that has just ended would leave the host by its default route, and a
//! stranger outside could answer it.

use std::io;
use std::net::IpAddr;

use crate::error::Error;

use super::rtnl::Rtnl;

/// What is not an instance's is nobody's. Fine when it is so already.
pub fn guard_block(base: IpAddr, prefix: u8) -> Result<(), Error> {
    change(base, prefix, "make unreachable", Rtnl::add_unreachable, libc::EEXIST)
}

/// Undoes [`guard_block`]; fine when there is nothing to undo.
pub fn unguard_block(base: IpAddr, prefix: u8) -> Result<(), Error> {
    change(base, prefix, "make reachable again", Rtnl::delete_unreachable, libc::ESRCH)
}

fn change(
    base: IpAddr,
    prefix: u8,
    operation: &'static str,
    apply: fn(&mut Rtnl, IpAddr, u8) -> io::Result<()>,
    fine: i32,
) -> Result<(), Error> {
    match Rtnl::open().and_then(|mut door| apply(&mut door, base, prefix)) {
        Err(error) if error.raw_os_error() != Some(fine) => {
            Err(Error::path(operation, format!("{base}/{prefix}"))(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
    use std::time::Duration;

    use super::*;

    /// TEST-NET-2 (RFC 5737), which no node is given.
    const BASE: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 64));

    struct Guarded;

    impl Drop for Guarded {
        fn drop(&mut self) {
            let _ = unguard_block(BASE, 28);
        }
    }

    #[test]
    fn an_address_of_the_block_that_nobody_has_is_unreachable_at_once() {
        guard_block(BASE, 28).unwrap();
        let _guarded = Guarded;
        guard_block(BASE, 28).expect("a second time is fine");
        let nobody = SocketAddr::from((Ipv4Addr::new(198, 51, 100, 70), 8000));
        let error = TcpStream::connect_timeout(&nobody, Duration::from_secs(2)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EHOSTUNREACH), "{error}");
        unguard_block(BASE, 28).unwrap();
        unguard_block(BASE, 28).expect("a second time is fine");
    }
}
