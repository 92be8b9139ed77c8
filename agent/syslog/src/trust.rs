//! Who vouches for a server.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};

use crate::Trust;
use crate::link::LinkError;

/// Where Debian's ca-certificates puts all authorities together.
const SYSTEM: &str = "/etc/ssl/certs/ca-certificates.crt";
/// The largest file of authorities.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// Read at each connection, so that a file that was replaced counts from the next one on.
pub fn client_config(trust: &Trust) -> Result<Arc<ClientConfig>, LinkError> {
    let path = match trust {
        Trust::System => Path::new(SYSTEM),
        Trust::File(path) => path,
    };
    let failed = |why: String| LinkError::Trust { path: path.to_owned(), why };
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(FILE_BYTES_MAX).read_to_end(&mut bytes));
    read.map_err(|error| failed(error.to_string()))?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&bytes) {
        let certificate = certificate.map_err(|error| failed(error.to_string()))?;
        // One that nothing understands is one less to be trusted.
        let _ = roots.add(certificate);
    }
    if roots.is_empty() {
        return Err(failed("there is no certificate in it".to_owned()));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = versions.map_err(|error| failed(error.to_string()))?;
    Ok(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()))
}
