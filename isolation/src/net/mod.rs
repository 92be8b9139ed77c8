//! The instance's network: routed veth pairs, the node's packet filter, forwarding.
//!
//! ```text
//!  instance eth0 ═══ /31, /127 ═══ ep<node>-<slot> host ── forward, masquerade ── uplink
//!                                        │ input: only answers           (table inet epagent_<node>)
//!                                        │ port 53: to the configured resolvers
//!                                        └ other instances, private ranges: refused
//! ```
//!
//! There is no bridge, so there are no neighbours to spoof. The filter is one static table per node that matches
//! links by name; no rule comes or goes with an instance.

pub(crate) mod link;
pub(crate) mod rtnl;

mod block;
mod firewall;
mod forwarding;
mod resolvers;

pub use block::{guard_block, unguard_block};
pub use firewall::{Cidr, FirewallConfig, install_firewall, keep_firewall, remove_firewall};
pub use forwarding::{disable_forwarding, enable_forwarding};
pub use resolvers::resolvers;
