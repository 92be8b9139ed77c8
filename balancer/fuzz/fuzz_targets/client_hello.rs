#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| epagent_balancer_fuzz::client_hello(bytes));
