//! The control socket: who may speak on it ([`server`]), what is said ([`protocol`]), how to say it
//! ([`client`]).
//!
//! It is a unix stream socket carrying one JSON object per line, a request and then its response. The
//! sender pushes whole tables and asks for status; the balancer never calls back, so it needs nobody: it
//! serves from its saved table until somebody speaks to it again.

pub mod audit;
pub mod certificates;
pub mod client;
pub mod connections;
pub mod counters;
pub mod memory;
pub mod protocol;
pub mod said;
pub mod server;
pub mod traffic;
