//! The monitor.

fn main() {}
