//! The lease process: idle without a pair, but in place.

fn main() {}
