//! The decisions of epagent, without effects.
//!
//! Nothing here opens a file, reads a clock or draws a random number: time and fresh identifiers are arguments,
//! and what should happen comes back as data. That is what lets a deploy be simulated step by step, cut at any
//! of them, and continued.
//!
//! | module | what it decides |
//! |---|---|
//! | [`name`] | what an app, process, volume, image or jail may be called |
//! | [`spec`] | what a release asks for: the manifest after validation |
//! | [`route`] | what an operator may say about a host or a port |
//! | [`phase`] | the phases of a deploy and which may follow which |
//! | [`app`] | one app's next actions, from what is wanted and what is seen |
//! | [`health`] | when checks that rise and fall make an instance healthy |
//! | [`backoff`] | how long to wait before a crashed instance is started again |
//! | [`clock`] | which of two clocks measures what |
//! | [`exit`] | how a process ended, in words |
//! | [`verdict`] | what a failed deploy tells the operator |

#![forbid(unsafe_code)]

pub mod app;
pub mod backoff;
pub mod clock;
pub mod exit;
pub mod health;
pub mod name;
pub mod phase;
pub mod route;
pub mod spec;
pub mod verdict;
