//! The key that seals secrets: 32 random bytes in a file of its own, 0600, outside of the database and its backups.
//!
//! ```text
//!   key file │ key_check row │
//!   ─────────┼───────────────┼─────────────────────────────────────────────
//!   absent   │ absent        │ first start: make the file, then the row
//!   present  │ absent        │ first start, cut in between: write the row
//!   present  │ present       │ the row must open with the key, else refuse
//!   absent   │ present       │ refuse: a new key would lose every secret
//! ```
//!
//! The file is written under another name, synced and then linked: under its own name it is complete or not there.
//!
//! Where systemd hands the key over as a credential, it is read and never made: a state without it is refused, whether
//! something was sealed or not.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use chacha20poly1305::aead::{Aead, KeyInit, OsRng, Payload, rand_core::RngCore};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use sqlx::SqlitePool;
use zeroize::Zeroizing;

use crate::error::During;
use crate::{Result, StoreError};

const KEY_BYTES: usize = 32;
const NONCE_BYTES: usize = 24;
const CHECK_CONTEXT: &[u8] = b"epagent key check";

/// Where the key comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyFile {
    /// A file of our own, made on the first call.
    Own(PathBuf),
    /// A credential that the service manager shows to this process alone (systemd.exec(5), LoadCredential=).
    Given(PathBuf),
}

/// Holds the key, which the cipher wipes when it is dropped.
pub struct Key(XChaCha20Poly1305);

/// A sealed value beside the nonce it was sealed with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sealed {
    pub nonce: Vec<u8>,
    pub sealed: Vec<u8>,
}

impl KeyFile {
    fn path(&self) -> &Path {
        let (KeyFile::Own(path) | KeyFile::Given(path)) = self;
        path
    }
}

impl Key {
    /// Reads the key file, or makes it when it is ours and nothing was sealed yet.
    pub(crate) async fn open(file: &KeyFile, writer: &SqlitePool) -> Result<Key> {
        const OPERATION: &str = "read the check of the key";
        let check: Option<(Vec<u8>, Vec<u8>)> = sqlx::query_as("SELECT nonce, sealed FROM key_check")
            .fetch_optional(writer)
            .await
            .during(OPERATION)?;
        let path = file.path();
        let missing = || StoreError::KeyMissing { path: path.to_owned() };
        let key = match (file, &check) {
            (KeyFile::Given(_), _) => read(path, Guard::Manager)?.ok_or_else(missing)?,
            (KeyFile::Own(_), check) => {
                remove_unfinished(path)?;
                match (read(path, Guard::Mode)?, check) {
                    (Some(key), _) => key,
                    (None, Some(_)) => return Err(missing()),
                    (None, None) => {
                        create(path)?;
                        remove_unfinished(path)?;
                        read(path, Guard::Mode)?.ok_or_else(missing)?
                    }
                }
            }
        };
        match check {
            Some((nonce, sealed)) => {
                key.open_sealed(CHECK_CONTEXT, &Sealed { nonce, sealed })
                    .ok_or_else(|| StoreError::KeyWrong { path: path.to_owned() })?;
            }
            None => {
                let Sealed { nonce, sealed } = key.seal(CHECK_CONTEXT, b"")?;
                sqlx::query("INSERT INTO key_check (id, nonce, sealed) VALUES (1, ?1, ?2)")
                    .bind(nonce)
                    .bind(sealed)
                    .execute(writer)
                    .await
                    .during("write the check of the key")?;
            }
        }
        Ok(key)
    }

    /// Seals `plain`; it opens with the same context only.
    pub(crate) fn seal(&self, context: &[u8], plain: &[u8]) -> Result<Sealed> {
        // A nonce of 192 bits may be drawn at random for each value (draft-irtf-cfrg-xchacha).
        let mut nonce = [0; NONCE_BYTES];
        OsRng.try_fill_bytes(&mut nonce).map_err(|_| StoreError::Random { operation: "seal a secret" })?;
        let sealed = self
            .0
            .encrypt(&XNonce::from(nonce), Payload { msg: plain, aad: context })
            .map_err(|_| StoreError::Seal)?;
        Ok(Sealed { nonce: nonce.to_vec(), sealed })
    }

    /// None when it was sealed with another key or context, or is damaged.
    pub(crate) fn open_sealed(&self, context: &[u8], sealed: &Sealed) -> Option<Zeroizing<Vec<u8>>> {
        let nonce = <[u8; NONCE_BYTES]>::try_from(&sealed.nonce[..]).ok()?;
        let payload = Payload { msg: &sealed.sealed, aad: context };
        self.0.decrypt(&XNonce::from(nonce), payload).ok().map(Zeroizing::new)
    }
}

/// What keeps others from reading the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Guard {
    Mode,
    /// A folder that only this service can enter. Files in it may have a mask of an access list in their mode.
    Manager,
}

fn read(path: &Path, guard: Guard) -> Result<Option<Key>> {
    let failed = |source| StoreError::File { operation: "read the key file", path: path.to_owned(), source };
    let refused = |reason| StoreError::KeyFile { path: path.to_owned(), reason };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(refused("is not a file"));
    }
    if guard == Guard::Mode && metadata.mode() & 0o077 != 0 {
        return Err(refused(
            "can be read by others than its owner: chmod 0600 it, and set the secrets anew if it was read",
        ));
    }
    let mut bytes = Zeroizing::new([0; KEY_BYTES + 1]);
    let mut len = 0;
    let mut limited = file.take(bytes.len() as u64);
    while len < bytes.len() {
        match limited.read(&mut bytes[len..]).map_err(failed)? {
            0 => break,
            count => len += count,
        }
    }
    if len != KEY_BYTES {
        return Err(refused("does not hold 32 bytes: put it back from its backup"));
    }
    match XChaCha20Poly1305::new_from_slice(&bytes[..KEY_BYTES]) {
        Ok(cipher) => Ok(Some(Key(cipher))),
        Err(_) => Err(refused("does not hold 32 bytes: put it back from its backup")),
    }
}

fn create(path: &Path) -> Result<()> {
    let failed = |operation: &'static str, path: &Path| {
        let path = path.to_owned();
        move |source| StoreError::File { operation, path, source }
    };
    let mut bytes = Zeroizing::new([0; KEY_BYTES]);
    OsRng
        .try_fill_bytes(&mut bytes[..])
        .map_err(|_| StoreError::Random { operation: "make the key that seals secrets" })?;

    let new = unfinished(path);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&new)
        .map_err(failed("create the key file", &new))?;
    file.write_all(&bytes[..]).map_err(failed("write the key file", &new))?;
    file.sync_all().map_err(failed("sync the key file", &new))?;
    // A link, unlike a rename, never takes the place of a file that is there.
    fs::hard_link(&new, path).map_err(failed("create the key file", path))?;
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(failed("sync the folder of the key file", folder))
}

fn unfinished(path: &Path) -> PathBuf {
    path.with_extension("new")
}

/// Removes what a start that was cut here left, or the second name of a key that was just made.
fn remove_unfinished(path: &Path) -> Result<()> {
    let path = unfinished(path);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(StoreError::File { operation: "remove the unfinished key file", path, source: error })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> Key {
        Key(XChaCha20Poly1305::new_from_slice(&[byte; KEY_BYTES]).unwrap())
    }

    #[test]
    fn a_sealed_value_opens_with_its_key_and_context_only() {
        let sealed = key(1).seal(b"shop DATABASE_URL 1", b"postgres://").unwrap();
        assert_eq!(&key(1).open_sealed(b"shop DATABASE_URL 1", &sealed).unwrap()[..], b"postgres://");
        assert!(key(2).open_sealed(b"shop DATABASE_URL 1", &sealed).is_none());
        assert!(key(1).open_sealed(b"shop DATABASE_URL 2", &sealed).is_none());
        assert!(key(1).open_sealed(b"shop DATABASE_URL 1", &Sealed { nonce: vec![], ..sealed }).is_none());
    }

    #[test]
    fn equal_values_look_different_when_sealed() {
        assert_ne!(key(1).seal(b"", b"same").unwrap(), key(1).seal(b"", b"same").unwrap());
    }
}
