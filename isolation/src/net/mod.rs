//! The instance's network: veth pairs, the node's nft table, forwarding.

pub(crate) mod link;
pub(crate) mod rtnl;

use std::net::IpAddr;

use crate::error::Error;

/// What the packet filter of a node has to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirewallConfig {
    pub node: u16,
    /// Where port 53 at the gateways is redirected to. None on loopback ([`resolvers`] gives fitting ones).
    pub resolvers: Vec<IpAddr>,
    /// Private destinations that are allowed all the same, as `addr/len`: a company proxy.
    pub allowed: Vec<String>,
}

/// Installs (or replaces, in one transaction) the table `inet epagent_<node>`.
pub fn install_firewall(_config: &FirewallConfig) -> Result<(), Error> {
    Ok(Default::default())
}

/// Removes the node's table; fine when there is none.
pub fn remove_firewall(_node: u16) -> Result<(), Error> {
    Ok(Default::default())
}

/// Lets the uplinks (interfaces with a default route) forward, remembering what was. Nodes on one kernel share the
/// memory; the last one to call [`disable_forwarding`] puts it back.
pub fn enable_forwarding(_node: u16) -> Result<(), Error> {
    Ok(Default::default())
}

/// Undoes [`enable_forwarding`] when no other node needs it.
pub fn disable_forwarding(_node: u16) -> Result<(), Error> {
    Ok(Default::default())
}

/// The host's name servers that an instance can be redirected to.
pub fn resolvers() -> Result<Vec<IpAddr>, Error> {
    Ok(Default::default())
}
