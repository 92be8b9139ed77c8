//! What the `epagent` command and `epagentd` share.

#![forbid(unsafe_code)]

pub mod manifest;
