//! Certificates from a folder, as operators and ACME clients lay them out, and their exchange at run time.
//!
//! ```text
//! DIR/shop.crt + DIR/shop.key                       the pair `shop`: PEM, the chain after the certificate
//! DIR/shop/fullchain.pem + DIR/shop/privkey.pem     the same, as certbot and others write it
//! ```
//!
//! The folder is read whole at start, on the control request `reload_certificates` and on SIGHUP: an ACME
//! client's deploy hook runs `epagent-balancer reload-certificates`, which fails when a pair was refused.
//! Times of change are not watched: a client that writes two files cannot be caught between them that way.
//!
//! Pairs stand alone. One that cannot be used, or whose halves do not belong together, is said with its
//! reason, and what was in force under its name stays; only one whose files are gone goes. The folder is
//! the operator's own, so links in it are followed. Keys are read and never shown.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem};
use rustls::sign::CertifiedKey;

use super::certificates::{Pair, Store};
use super::x509::{self, UnixSeconds};
use crate::core::secure::Names;

/// Most pairs; more are said and left out.
pub const PAIRS_MAX: usize = 10_000;
/// Most bytes of a file. A chain of five certificates has some ten thousand.
const FILE_BYTES_MAX: u64 = 256 * 1024;

/// The folder.
pub struct Folder {
    path: PathBuf,
    provider: Arc<CryptoProvider>,
}

/// Why a pair, or the folder, is not used.
#[derive(Debug, thiserror::Error)]
pub enum PairError {
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} is larger than {FILE_BYTES_MAX} bytes")]
    Large { path: PathBuf },
    #[error("there is no {path}, which belongs to {other}")]
    HalfMissing { path: PathBuf, other: PathBuf },
    #[error("{path} has no {what} in PEM")]
    Pem {
        path: PathBuf,
        what: &'static str,
        #[source]
        source: pem::Error,
    },
    #[error("{path} has no certificate in PEM")]
    NoCertificate { path: PathBuf },
    #[error("{path} has a certificate that cannot be understood")]
    Certificate { path: PathBuf },
    #[error("the key {key} cannot be used, or does not belong to the certificate {certificate}")]
    Key {
        key: PathBuf,
        certificate: PathBuf,
        #[source]
        source: rustls::Error,
    },
    #[error("{file} and {folder} are both there, and only one of them can have this name")]
    Twice { file: PathBuf, folder: PathBuf },
    #[error("there are more than {PAIRS_MAX} pairs; this one is left out")]
    TooMany,
}

/// A pair that is not used, or the folder (`id` is empty) that cannot be read.
#[derive(Debug)]
pub struct Refusal {
    pub id: String,
    pub error: PairError,
    /// What was in force under this name stays.
    pub kept: bool,
}

/// How the files of a pair are laid out.
#[derive(Default)]
struct Layout {
    flat: bool,
    nested: bool,
}

/// The two files of a pair.
struct Files {
    certificate: PathBuf,
    key: PathBuf,
}

impl Folder {
    pub fn new(path: PathBuf, provider: Arc<CryptoProvider>) -> Self {
        Self { path, provider }
    }

    /// What the folder has now, and what of it is refused. Where a pair cannot be used, that of `before`
    /// stays; where the folder cannot be read, all of them do.
    pub fn read(&self, before: &Store) -> (Store, Vec<Refusal>) {
        let found = match self.find() {
            Ok(found) => found,
            Err(error) => {
                let kept = !before.pairs().is_empty();
                return (
                    Store::new(before.pairs().to_vec()),
                    vec![Refusal { id: String::new(), error, kept }],
                );
            }
        };
        let (mut pairs, mut refusals) = (Vec::new(), Vec::new());
        for (index, (id, layout)) in found.into_iter().enumerate() {
            let read = match index {
                ..PAIRS_MAX => self.files(&id, &layout).and_then(|files| self.read_pair(&id, &files)),
                _ => Err(PairError::TooMany),
            };
            match read {
                Ok(pair) => pairs.push(Arc::new(pair)),
                Err(error) => {
                    let old = before.pairs().iter().find(|pair| pair.id == id);
                    refusals.push(Refusal { id, error, kept: old.is_some() });
                    pairs.extend(old.cloned());
                }
            }
        }
        (Store::new(pairs), refusals)
    }

    /// The pairs of which at least one file is there, by name.
    fn find(&self) -> Result<BTreeMap<String, Layout>, PairError> {
        let failed = |source| PairError::Read { path: self.path.clone(), source };
        let mut found: BTreeMap<String, Layout> = BTreeMap::new();
        for entry in std::fs::read_dir(&self.path).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            // A name that is no text can be renamed; what is hidden is being written.
            let Some(name) = name.to_str().filter(|name| !name.starts_with('.')) else { continue };
            let path = self.path.join(name);
            let flat = name.strip_suffix(".crt").or_else(|| name.strip_suffix(".key"));
            if let Some(id) = flat {
                found.entry(id.to_owned()).or_default().flat = true;
            } else if [path.join("fullchain.pem"), path.join("privkey.pem")].iter().any(|file| file.exists())
            {
                found.entry(name.to_owned()).or_default().nested = true;
            }
        }
        Ok(found)
    }

    fn files(&self, id: &str, layout: &Layout) -> Result<Files, PairError> {
        let flat = self.path.join(format!("{id}.crt"));
        let folder = self.path.join(id);
        match layout {
            Layout { flat: true, nested: true } => Err(PairError::Twice { file: flat, folder }),
            Layout { nested: true, .. } => {
                Ok(Files { certificate: folder.join("fullchain.pem"), key: folder.join("privkey.pem") })
            }
            _ => Ok(Files { certificate: flat, key: self.path.join(format!("{id}.key")) }),
        }
    }

    fn read_pair(&self, id: &str, files: &Files) -> Result<Pair, PairError> {
        let chain = read_file(&files.certificate, &files.key)?;
        let key = read_file(&files.key, &files.certificate)?;
        let path = || files.certificate.clone();
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&chain)
            .collect::<Result<_, _>>()
            .map_err(|source| PairError::Pem { path: path(), what: "valid certificate", source })?;
        let key = PrivateKeyDer::from_pem_slice(&key).map_err(|source| PairError::Pem {
            path: files.key.clone(),
            what: "private key",
            source,
        })?;
        let first = chain.first().ok_or_else(|| PairError::NoCertificate { path: path() })?;
        let unclear = || PairError::Certificate { path: path() };
        let validity = x509::validity(first).ok_or_else(unclear)?;
        let parsed = webpki::EndEntityCert::try_from(first).map_err(|_| unclear())?;
        let names = Names(parsed.valid_dns_names().map(str::to_ascii_lowercase).collect());
        let key = CertifiedKey::from_der(chain, key, &self.provider).map_err(|source| PairError::Key {
            key: files.key.clone(),
            certificate: path(),
            source,
        })?;
        Ok(Pair::new(id.to_owned(), names, validity, key))
    }
}

/// A file whole; `other` is what it belongs to.
fn read_file(path: &Path, other: &Path) -> Result<Vec<u8>, PairError> {
    let failed = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::NotFound => {
            PairError::HalfMissing { path: path.to_owned(), other: other.to_owned() }
        }
        _ => PairError::Read { path: path.to_owned(), source },
    };
    // What is no file must not be waited for.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(PairError::Large { path: path.to_owned() });
    }
    Ok(bytes)
}

/// The system's time of day.
pub fn now() -> UnixSeconds {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    UnixSeconds(since.map_or(0, |since| since.as_secs() as i64))
}
