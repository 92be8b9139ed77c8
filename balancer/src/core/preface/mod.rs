//! What comes before a client's first request: a PROXY header, a TLS ClientHello.

pub mod client_hello;
pub mod proxy;
