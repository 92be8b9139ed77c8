//! What the `epagent` command and `epagentd` share.

#![deny(unsafe_code)]

pub mod activation;
pub mod manifest;
