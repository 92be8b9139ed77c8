//! The epagent command.

fn main() {}
