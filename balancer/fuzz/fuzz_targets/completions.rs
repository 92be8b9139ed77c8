//! The core behind a door that says what it likes, fed by libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| drop(epagent_balancer_fuzz::completions(bytes)));
