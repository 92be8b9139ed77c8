//! The server name in a ClientHello, fed by libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| epagent_balancer_fuzz::client_hello(bytes));
