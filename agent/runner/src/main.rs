//! The privileged hands.

fn main() {}
