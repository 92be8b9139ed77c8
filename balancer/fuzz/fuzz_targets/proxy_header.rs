//! PROXY headers, versions 1 and 2, fed by libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| epagent_balancer_fuzz::proxy_header(bytes));
