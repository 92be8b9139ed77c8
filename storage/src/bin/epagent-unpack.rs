//! The unpacker.

fn main() {}
