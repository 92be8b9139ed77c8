//! Messages between the epagent processes.
//!
//! | module | who speaks |
//! |---|---|
//! | [`api`] | the `epagent` command (or `curl`) to `epagentd`: HTTP and JSON on a unix socket |
//! | [`runner`] | `epagentd` to `epagent-runner`: a closed list of requests, one packet each |
//! | [`said`] | what a daemon logged, for `epagentd` to send on |
//! | [`table`] | `epagentd` to `epagent-balancer`: the whole routing table, and what is in flight |
//!
//! Types only. What a message may name is decided by its type: names are parsed when they are deserialized
//! ([`epagent_core::name`]), and no request to the runner has a field for a host path, a host command, a device,
//! an id range or a host address.

#![forbid(unsafe_code)]

// The words of the messages, for those who know the messages alone: the runner depends on no other crate of the
// agent's than this one.
pub use epagent_core::{name, spec};

pub mod api;
pub mod runner;
pub mod said;
pub mod table;
