//! Heads of requests and responses, and chunked bodies, fed by libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| epagent_balancer_fuzz::http_head(bytes));
