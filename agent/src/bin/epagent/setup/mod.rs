//! Setting up a node: what the host offers ([`host`]), the two configuration files that follow ([`config`]), and
//! `epagent init`, which writes them on an installed system ([`init`]). `epagent dev` writes its own at each start.

pub mod config;
pub mod host;
pub mod init;
