//! Jails: namespaces, private root, cgroups, seccomp, network; and `epagent-jail`, the monitor.
//!
//! A caller with root rights describes an instance ([`spec::JailSpec`]), hands over descriptors and calls
//! [`launch::launch`]. From then on it talks to the instance's monitor ([`monitor::Client`]), which outlives it.
//!
//! ```text
//! id, spec        names, ranges, paths and the whole order, checked where they are parsed
//! plan            spec → closed list of steps; pure
//! apply           performs the steps inside the new namespaces, from descriptors alone
//! seccomp         system-call lists as data, compiled
//! jail            the processes that are ours: monitor (core decides, monitor does), log writer, init, commands
//! monitor         what others see of a monitor: protocol with versions, exit record, client
//! launch          makes cgroups and socket, starts a monitor
//! cgroup          pure v2 and hybrid behind one trait
//! net             rtnetlink, links, the node's nft table, forwarding, resolvers
//! inspect, sweep  looking at an instance; finding and removing what is left of one
//! sys             the door: all unsafe code
//! ```
//!
//! May use: the kernel, `nft`. Imports no other crate of this project; starts no thread, knows no async runtime.
//! Deliberately absent: image formats, storage, policy about what to run where, any network protocol but rtnetlink.

#![deny(unsafe_code)]

mod apply;
pub mod cgroup;
pub mod error;
mod handover;
pub mod id;
pub mod inspect;
pub mod jail;
pub mod launch;
pub mod monitor;
pub mod net;
mod plan;
mod seccomp;
pub mod spec;
pub mod sweep;
mod sys;

pub use error::Error;
