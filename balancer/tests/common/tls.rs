//! Certificates made on the spot, and TLS clients that trust them.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::Resumption;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion};

use super::PATIENCE;

/// Who signs.
pub struct Authority {
    key: rcgen::KeyPair,
    params: rcgen::CertificateParams,
    certificate: rcgen::Certificate,
}

impl Authority {
    pub fn new() -> Self {
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, "an authority of tests");
        let certificate = params.self_signed(&key).expect("a certificate");
        Self { key, params, certificate }
    }

    pub fn pem(&self) -> String {
        self.certificate.pem()
    }

    /// A certificate for these names, and its key.
    pub fn issue(&self, names: &[&str], until_year: i32) -> (String, String) {
        let until = rcgen::date_time_ymd(until_year, 1, 1);
        self.issue_until(names, until.unix_timestamp().unsigned_abs())
    }

    /// The same, valid until this second of Unix time.
    pub fn issue_until(&self, names: &[&str], until_unix_s: u64) -> (String, String) {
        let key = rcgen::KeyPair::generate().expect("a key");
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = rcgen::CertificateParams::new(names).expect("parameters");
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(until_unix_s);
        let issuer = rcgen::Issuer::from_params(&self.params, &self.key);
        let certificate = params.signed_by(&key, &issuer).expect("a certificate");
        (certificate.pem(), key.serialize_pem())
    }

    /// The same, as the pair `id` of a folder.
    pub fn write(&self, dir: &Path, id: &str, names: &[&str]) {
        self.write_pair(dir, id, self.issue(names, 2090));
    }

    /// What was issued, as the pair `id` of a folder.
    pub fn write_pair(&self, dir: &Path, id: &str, (certificate, key): (String, String)) {
        std::fs::write(dir.join(format!("{id}.key")), key).expect("written");
        std::fs::write(dir.join(format!("{id}.crt")), certificate).expect("written");
    }

    /// A client that trusts it, and remembers sessions.
    pub fn client(&self, versions: &[&'static SupportedProtocolVersion]) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.der().clone()).expect("a root");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.resumption = Resumption::in_memory_sessions(64);
        Arc::new(config)
    }
}

pub type TlsStream = StreamOwned<ClientConnection, TcpStream>;

/// Connects; the handshake is done with the first bytes.
pub fn connect(config: &Arc<ClientConfig>, address: SocketAddr, name: &str) -> TlsStream {
    try_connect(config, address, name).expect("a connection")
}

pub fn try_connect(
    config: &Arc<ClientConfig>,
    address: SocketAddr,
    name: &str,
) -> std::io::Result<TlsStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    let name = ServerName::try_from(name.to_owned()).expect("a name");
    let client = ClientConnection::new(config.clone(), name).map_err(std::io::Error::other)?;
    Ok(StreamOwned::new(client, stream))
}

/// Does the handshake, or says why not.
pub fn shake_hands(stream: &mut TlsStream) -> std::io::Result<()> {
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock)?;
    }
    Ok(())
}

/// Sends a GET and reads a response with Content-Length: its head and body.
pub fn try_get(
    stream: &mut (impl Read + Write),
    host: &str,
    path: &str,
) -> std::io::Result<(String, Vec<u8>)> {
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes())?;
    read_response(stream)
}

pub fn get(stream: &mut (impl Read + Write), host: &str, path: &str) -> (String, Vec<u8>) {
    try_get(stream, host, path).expect("a response")
}

pub fn read_response(stream: &mut impl Read) -> std::io::Result<(String, Vec<u8>)> {
    let (mut bytes, mut piece) = (Vec::new(), [0; 16 * 1024]);
    loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
            let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
            let length: usize = length.and_then(|length| length.parse().ok()).unwrap_or(0);
            if bytes.len() >= end + 4 + length {
                return Ok((head, bytes.split_off(end + 4)));
            }
        }
        match stream.read(&mut piece)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            count => bytes.extend_from_slice(&piece[..count]),
        }
    }
}
