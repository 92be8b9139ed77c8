//! epagentd, the deciding daemon.

fn main() {}
