//! Jails: namespaces, private root, cgroups, seccomp, network; and `epagent-jail`, the monitor.

#![deny(unsafe_code)]

pub mod cgroup;
pub mod error;
pub mod id;
pub mod inspect;
pub mod launch;
pub mod monitor;
pub mod net;
pub mod spec;
pub mod sweep;

pub use error::Error;
mod apply;
mod handover;
pub mod jail;
mod plan;
mod seccomp;
mod sys;
