//! What is tried with arbitrary bytes: the parsers of what strangers send, and the core itself. Each entry
//! takes any bytes and panics when a promise is broken.
//!
//! `cargo fuzz run TARGET` (in this folder, nightly) drives them with libFuzzer; `tests/fuzz.rs` includes this
//! file and drives them with seeded bytes, so that every test run tries some thousands.

mod door;
mod parsers;

pub use self::door::completions;
pub use self::parsers::{client_hello, http_head, proxy_header};
