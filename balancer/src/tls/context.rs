//! What all TLS connections share: versions and ciphers, session tickets, and the certificates.
//!
//! TLS 1.2 and 1.3 with rustls's own choice of ciphers (`ring`). HTTP listeners agree on `http/1.1` (h2 is
//! not offered); on others the application protocol is not ours to know, and none is spoken of. Sessions
//! are resumed by tickets, under a key that all threads share and that changes every six hours, or out of
//! a bounded cache for TLS 1.2 clients without tickets. Neither survives the process: after a restart
//! clients do one whole handshake. Early data (0-RTT) is not accepted, since it can be replayed.

use std::sync::Arc;

use rustls::crypto::{CryptoProvider, ring};
use rustls::server::ServerSessionMemoryCache;
use rustls::{Error, ServerConfig};

use super::certificates::Certificates;

/// Sessions of TLS 1.2 clients without tickets that are remembered.
const SESSIONS_MAX: usize = 4_096;
/// The application protocol of HTTP listeners (RFC 7301 §6).
const HTTP_1_1: &[u8] = b"http/1.1";

/// Shared by all threads.
pub struct Context {
    pub provider: Arc<CryptoProvider>,
    pub certificates: Arc<Certificates>,
    http: Arc<ServerConfig>,
    other: Arc<ServerConfig>,
}

impl Context {
    /// With no certificate in force yet.
    pub fn new() -> Result<Self, Error> {
        let provider = Arc::new(ring::default_provider());
        let certificates: Arc<Certificates> = Arc::default();
        let mut other = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(certificates.clone());
        other.ticketer = ring::Ticketer::new()?;
        other.session_storage = ServerSessionMemoryCache::new(SESSIONS_MAX);
        let mut http = other.clone();
        http.alpn_protocols = vec![HTTP_1_1.to_vec()];
        Ok(Self { provider, certificates, http: Arc::new(http), other: Arc::new(other) })
    }

    pub fn config(&self, http: bool) -> Arc<ServerConfig> {
        if http { self.http.clone() } else { self.other.clone() }
    }
}
