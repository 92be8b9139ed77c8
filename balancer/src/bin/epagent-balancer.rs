//! The balancer.

fn main() {}
