//! The node's nft table. Static: it names links by prefix and never changes with instances.

use std::fmt;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::Error;

/// nft takes some milliseconds. While a machine boots it waits for modules behind everybody else's: an emulated one took
/// more than 10 s. It is run before and after the runner's loop and by children of it, never in it.
const NFT_TIMEOUT: Duration = Duration::from_secs(60);
/// For a look at what is there. With what may follow it stays below the deadline of a child of the runner's.
const LOOK_TIMEOUT: Duration = Duration::from_secs(20);
/// What nft says of a table that is not there.
const NO_SUCH: &str = "No such file or directory";
const NFT_POLL: Duration = Duration::from_millis(2);
/// Most of nft's words in an error.
const NFT_ERROR_BYTES_MAX: u64 = 2048;

/// Destinations that an instance must not reach: this network, private, shared, loopback, link-local with the
/// metadata services, protocol assignments, benchmarks, multicast, reserved (RFC 6890).
const CLOSED_V4: [&str; 11] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/4",
    "240.0.0.0/4",
];
/// The same for IPv6, and the prefixes that only wrap an IPv4 address.
const CLOSED_V6: [&str; 7] =
    ["::/127", "::ffff:0:0/96", "64:ff9b::/96", "2002::/16", "fc00::/7", "fe80::/10", "ff00::/8"];

/// What the packet filter of a node has to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirewallConfig {
    pub node: u16,
    /// Where port 53 at the gateways is redirected to. None on loopback ([`super::resolvers`] gives fitting ones).
    pub resolvers: Vec<IpAddr>,
    /// Private destinations that are allowed all the same: a company proxy.
    pub allowed: Vec<Cidr>,
}

/// A block of addresses, `address/prefix`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    address: IpAddr,
    prefix: u8,
}

impl FromStr for Cidr {
    type Err = String;
    fn from_str(text: &str) -> Result<Cidr, String> {
        let refused = || format!("{text:?} is not an address or address/prefix");
        let (address, prefix) =
            text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
        let address: IpAddr = address.parse().map_err(|_| refused())?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.map_or(Ok(longest), |prefix| prefix.parse().map_err(|_| refused()))?;
        if prefix > longest { Err(refused()) } else { Ok(Cidr { address, prefix }) }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// Installs (or replaces, in one transaction) the table `inet epagent_<node>`.
pub fn install_firewall(config: &FirewallConfig) -> Result<(), Error> {
    if let Some(resolver) = config.resolvers.iter().find(|resolver| resolver.is_loopback()) {
        let reason = format!("resolver {resolver} is on loopback, where no instance's packet can be sent");
        return Err(Error::Refused { operation: "install packet filter", reason });
    }
    nft("install packet filter", &ruleset(config), NFT_TIMEOUT)
}

/// Installs the table when it is gone, as after somebody's `nft flush ruleset`; whether it was. What cannot be looked at
/// is not gone.
pub fn keep_firewall(config: &FirewallConfig) -> Result<bool, Error> {
    match look(config.node) {
        Ok(()) => Ok(false),
        Err(Error::Refused { reason, .. }) if reason.contains(NO_SUCH) => {
            install_firewall(config).map(|()| true)
        }
        Err(error) => Err(error),
    }
}

fn look(node: u16) -> Result<(), Error> {
    nft("look for packet filter", &format!("list table inet epagent_{node}\n"), LOOK_TIMEOUT)
}

/// Removes the node's table; fine when there is none.
pub fn remove_firewall(node: u16) -> Result<(), Error> {
    let script = format!("add table inet epagent_{node}\ndelete table inet epagent_{node}\n");
    nft("remove packet filter", &script, NFT_TIMEOUT)
}

/// Whether a node's table is there.
pub(super) fn is_installed(node: u16) -> bool {
    look(node).is_ok()
}

/// The whole table. `accept` in one chain ends that chain alone: what other tables of the host say still counts.
fn ruleset(config: &FirewallConfig) -> String {
    let node = config.node;
    let resolvers_v4: Vec<Ipv4Addr> = config.resolvers.iter().filter_map(as_v4).collect();
    let resolvers_v6: Vec<Ipv6Addr> = config.resolvers.iter().filter_map(as_v6).collect();
    let dns = [redirect(node, "ip", &resolvers_v4), redirect(node, "ip6", &resolvers_v6)].concat();
    let resolved = [resolved("ip", &resolvers_v4), resolved("ip6", &resolvers_v6)].concat();
    let allowed: String = config.allowed.iter().map(|block| accept(*block)).collect();
    let (closed_v4, closed_v6) = (CLOSED_V4.join(", "), CLOSED_V6.join(", "));
    format!(
        r#"add table inet epagent_{node}
delete table inet epagent_{node}
table inet epagent_{node} {{
  # A source address that is not routed back to this very link is a lie.
  chain antispoof {{
    type filter hook prerouting priority raw; policy accept;
    iifname != "ep{node}-*" accept
    fib saddr . iif oif missing drop
  }}
  chain dns {{
    type nat hook prerouting priority dstnat; policy accept;
{dns}  }}
  # The host and the agent: answers to what they asked, and neighbour discovery.
  chain to_host {{
    type filter hook input priority filter - 10; policy accept;
    iifname != "ep{node}-*" accept
    ct state established,related accept
    icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
    drop
  }}
  chain forward {{
    type filter hook forward priority filter - 10; policy accept;
    iifname "ep{node}-*" jump from_instance
    oifname "ep{node}-*" jump to_instance
  }}
  chain from_instance {{
    oifname "ep*" drop
    ct state established,related accept
{resolved}{allowed}    ip daddr {{ {closed_v4} }} reject with icmpx admin-prohibited
    ip6 daddr {{ {closed_v6} }} reject with icmpx admin-prohibited
    accept
  }}
  chain to_instance {{
    ct state established,related accept
    drop
  }}
  chain nat {{
    type nat hook postrouting priority srcnat; policy accept;
    iifname "ep{node}-*" oifname != "ep*" masquerade
  }}
}}
"#
    )
}

/// Questions to any address of the host go to the resolvers of that family, taking turns.
fn redirect<A: fmt::Display>(node: u16, family: &str, resolvers: &[A]) -> String {
    let target = match resolvers {
        [] => return String::new(),
        [one] => one.to_string(),
        many => {
            let turns: Vec<String> =
                many.iter().enumerate().map(|(turn, server)| format!("{turn} : {server}")).collect();
            format!("numgen inc mod {} map {{ {} }}", many.len(), turns.join(", "))
        }
    };
    let nfproto = if family == "ip" { "ipv4" } else { "ipv6" };
    format!(
        "    iifname \"ep{node}-*\" meta nfproto {nfproto} fib daddr type local meta l4proto {{ tcp, udp }} th dport 53 dnat {family} to {target}\n"
    )
}

/// Only what came by the redirect: the resolvers themselves stay closed where they are private.
fn resolved<A: fmt::Display>(family: &str, resolvers: &[A]) -> String {
    if resolvers.is_empty() {
        return String::new();
    }
    let servers: Vec<String> = resolvers.iter().map(A::to_string).collect();
    let servers = servers.join(", ");
    format!(
        "    ct status dnat {family} daddr {{ {servers} }} meta l4proto {{ tcp, udp }} th dport 53 accept\n"
    )
}

fn accept(block: Cidr) -> String {
    let family = if block.address.is_ipv4() { "ip" } else { "ip6" };
    format!("    {family} daddr {block} accept\n")
}

fn as_v4(address: &IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(v4) => Some(*v4),
        IpAddr::V6(_) => None,
    }
}

fn as_v6(address: &IpAddr) -> Option<Ipv6Addr> {
    match address {
        IpAddr::V6(v6) => Some(*v6),
        IpAddr::V4(_) => None,
    }
}

/// Runs `nft -f -` on a script of at most a few KiB, with a deadline.
fn nft(operation: &'static str, script: &str, timeout: Duration) -> Result<(), Error> {
    let failed = |source| Error::Call { operation, source };
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(Error::path("run", "nft"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // Less than a pipe holds. A child that ended early is judged by its status.
        let _ = stdin.write_all(script.as_bytes());
    }
    let deadline = Instant::now() + timeout;
    let status = loop {
        match child.try_wait().map_err(failed)? {
            Some(status) => break status,
            None if Instant::now() < deadline => thread::sleep(NFT_POLL),
            None => {
                let _ = child.kill().and_then(|()| child.wait());
                return Err(Error::Refused { operation, reason: "nft did not end".to_owned() });
            }
        }
    };
    if status.success() {
        return Ok(());
    }
    let mut reason = String::new();
    if let Some(stderr) = child.stderr.take() {
        let _ = stderr.take(NFT_ERROR_BYTES_MAX).read_to_string(&mut reason);
    }
    Err(Error::Refused { operation, reason: format!("nft ended with {status}: {}", reason.trim()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_parsed_once_and_strictly() {
        assert_eq!("10.1.0.0/16".parse::<Cidr>().map(|cidr| cidr.to_string()), Ok("10.1.0.0/16".into()));
        assert_eq!("10.1.2.3".parse::<Cidr>().map(|cidr| cidr.to_string()), Ok("10.1.2.3/32".into()));
        for bad in ["", "10.0.0.0/33", "10.0.0/8", "::/129", "10.0.0.0/8 accept; drop", "a"] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn exceptions_stand_before_what_they_are_exceptions_from() {
        let resolvers = ["10.9.9.9", "10.9.9.8", "2001:db8::53"].map(|ip| ip.parse().unwrap()).to_vec();
        let text =
            ruleset(&FirewallConfig { node: 7, resolvers, allowed: vec!["10.1.2.3/32".parse().unwrap()] });
        let at = |part: &str| text.find(part).unwrap_or_else(|| panic!("{part} in {text}"));
        assert!(at("oifname \"ep*\" drop") < at("ct status dnat ip daddr { 10.9.9.9, 10.9.9.8 }"));
        assert!(at("ip daddr 10.1.2.3/32 accept") < at("reject"));
        assert!(text.contains("dnat ip to numgen inc mod 2 map { 0 : 10.9.9.9, 1 : 10.9.9.8 }"));
        assert!(text.contains("iifname \"ep7-*\" meta nfproto ipv6") && !text.contains("{node}"));
    }

    #[test]
    fn a_resolver_on_loopback_is_refused() {
        let config =
            FirewallConfig { node: 7, resolvers: vec!["127.0.0.53".parse().unwrap()], allowed: vec![] };
        assert!(install_firewall(&config).unwrap_err().to_string().contains("loopback"));
    }
}
