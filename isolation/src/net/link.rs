//! Both ends of an instance's veth.
//!
//! The outer end belongs to the host and is made by the monitor, which puts the inner one straight into the
//! namespace of init. When that namespace dies, the kernel removes both.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::thread;
use std::time::Duration;

use super::rtnl::Rtnl;
use crate::error::Error;
use crate::spec::NetSpec;

/// Name of the inner end.
pub(crate) const INNER: &str = "eth0";
/// A predecessor's namespace, and with it the link's name, goes away some time after its last process.
const NAME_TRIES: u32 = 50;
const NAME_POLL: Duration = Duration::from_millis(10);

/// Makes the pair, configures the outer end and brings it up.
pub(crate) fn make_outer(net: &NetSpec, inside: BorrowedFd<'_>) -> Result<(), Error> {
    let name = net.link();
    let failed = |operation| Error::path(operation, &name);
    let mut rtnl = Rtnl::open().map_err(Error::call("open rtnetlink"))?;
    add(&mut rtnl, net, inside).map_err(failed("make link"))?;
    harden(&name)?;
    let index = rtnl.index(&name).map_err(failed("find link"))?;
    for (address, prefix) in ends(net, |pair| pair.0) {
        rtnl.add_address(index, address, prefix).map_err(failed("set address of link"))?;
    }
    rtnl.set_up(index).map_err(failed("bring up link"))
}

/// Configures the inner end. Runs in the instance's network namespace.
pub(crate) fn configure_inner(net: &NetSpec) -> io::Result<()> {
    let mut rtnl = Rtnl::open()?;
    let index = rtnl.index(INNER)?;
    for (address, prefix) in ends(net, |pair| pair.1) {
        rtnl.add_address(index, address, prefix)?;
    }
    rtnl.set_up(index)?;
    for (gateway, _) in ends(net, |pair| pair.0) {
        rtnl.add_default_route(index, gateway)?;
    }
    Ok(())
}

/// Brings the loopback of this network namespace up.
pub(crate) fn loopback_up() -> io::Result<()> {
    let mut rtnl = Rtnl::open()?;
    let index = rtnl.index("lo")?;
    rtnl.set_up(index)
}

/// A slot has one instance: whatever still has the name is a predecessor's and goes.
fn add(rtnl: &mut Rtnl, net: &NetSpec, inside: BorrowedFd<'_>) -> io::Result<()> {
    for _ in 0..NAME_TRIES {
        match rtnl.add_veth(&net.link(), INNER, inside, net.mtu) {
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {
                rtnl.delete_link(&net.link())?;
                thread::sleep(NAME_POLL);
            }
            result => return result,
        }
    }
    Err(io::Error::from_raw_os_error(libc::EEXIST))
}

/// One address of each family, chosen from (host, inside), with its prefix length.
fn ends(net: &NetSpec, choose: fn((IpAddr, IpAddr)) -> IpAddr) -> Vec<(IpAddr, u8)> {
    let v4 = net.v4.map(|pair| (choose((pair.host.into(), pair.inside.into())), 31));
    let v6 = net.v6.map(|pair| (choose((pair.host.into(), pair.inside.into())), 127));
    v4.into_iter().chain(v6).collect()
}

/// What the outer end must and must not do, whatever the host's defaults are.
const SETTINGS: [(&str, &str); 15] = [
    ("ipv4/conf/{}/forwarding", "1"),
    ("ipv4/conf/{}/rp_filter", "1"),
    ("ipv4/conf/{}/accept_redirects", "0"),
    ("ipv4/conf/{}/send_redirects", "0"),
    ("ipv4/conf/{}/accept_source_route", "0"),
    ("ipv4/conf/{}/proxy_arp", "0"),
    ("ipv4/conf/{}/route_localnet", "0"),
    // ARP is answered for the link's own address alone.
    ("ipv4/conf/{}/arp_ignore", "2"),
    ("ipv6/conf/{}/forwarding", "1"),
    ("ipv6/conf/{}/accept_ra", "0"),
    ("ipv6/conf/{}/accept_redirects", "0"),
    ("ipv6/conf/{}/accept_dad", "0"),
    ("ipv6/conf/{}/autoconf", "0"),
    ("ipv6/conf/{}/proxy_ndp", "0"),
    // No link-local address of our own: one address less to reach us at.
    ("ipv6/conf/{}/addr_gen_mode", "1"),
];

/// Sets them; a host without IPv6 has no such files.
fn harden(name: &str) -> Result<(), Error> {
    for (file, value) in SETTINGS {
        let file = Path::new("/proc/sys/net").join(file.replace("{}", name));
        match fs::write(&file, value) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && file.starts_with("/proc/sys/net/ipv6") => {}
            result => result.map_err(Error::path("set", file))?,
        }
    }
    Ok(())
}
