//! Records of a TLS connection, a stranger's and a client's, fed by libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    epagent_balancer_fuzz::tls_records(bytes);
});
