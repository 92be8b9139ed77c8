//! What stands on both sides of a front that is measured: a backend with a fixed answer, and clients in closed loops.
//! The program `epagent-load` is both.

pub mod backend;
pub mod load;
