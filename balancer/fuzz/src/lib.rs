//! What is tried with arbitrary bytes: the parsers of what strangers send, and the core itself. Each entry
//! takes any bytes and panics when a promise is broken.
//!
//! libFuzzer drives them, from the seeds (nightly; nothing here is unsafe, so no sanitizer is needed):
//!
//! ```text
//! cargo +nightly fuzz run -s none http_head corpus/http_head seeds/http_head -- -len_control=0
//! ```
//!
//! `tests/fuzz.rs` includes the same files and drives them with seeded bytes, so that every test run tries some
//! thousands.

mod door;
mod parsers;
mod tls_records;

pub use self::door::completions;
pub use self::parsers::{client_hello, http_head, proxy_header};
pub use self::tls_records::{hello, tls_records};
