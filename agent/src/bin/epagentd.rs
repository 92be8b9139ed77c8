//! The deciding daemon.

fn main() {}
