//! Secrets: sealed per row, versioned, and never shown.
//!
//! Setting a secret adds a version. A release names the versions it was made with, so that a rollback gets the
//! values it had; versions that no release can be deployed with any more are removed.

use std::collections::BTreeMap;
use std::fmt;

use epagent_core::name::AppName;
use serde::{Deserialize, Deserializer};
use sqlx::sqlite::SqliteRow;
use sqlx::{FromRow, Row, SqliteConnection};
use zeroize::Zeroizing;

use crate::error::During;
use crate::key::{Key, Sealed};
use crate::row::{RowExt, signed};
use crate::write::WriteTx;
use crate::{Release, Result, Store, StoreError, app};

/// Bytes of one value.
pub const SECRET_BYTES_MAX: usize = 64 << 10;
/// Secrets an app may have.
pub const SECRETS_MAX: usize = 128;

/// New values by name; none removes.
pub type SecretChanges = BTreeMap<String, Option<SecretValue>>;

/// The value of a secret. It does not print, it does not serialize, and its memory is wiped when it is dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretValue(Zeroizing<String>);

impl SecretValue {
    pub fn new(value: String) -> Self {
        Self(Zeroizing::new(value))
    }

    /// The value itself, for the memfd that carries it to the app and for nothing else.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretValue(…)")
    }
}

impl<'de> Deserialize<'de> for SecretValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::new)
    }
}

/// A secret that is set, without its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Secret {
    pub name: String,
    pub version: i64,
    pub set_at_ms: u64,
}

impl FromRow<'_, SqliteRow> for Secret {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        Ok(Secret {
            name: row.try_get("name")?,
            version: row.try_get("version")?,
            set_at_ms: row.unsigned("set_at_ms")?,
        })
    }
}

impl Store {
    /// The secrets the next release gets, by name.
    pub async fn secrets(&self, app: &AppName) -> Result<Vec<Secret>> {
        const OPERATION: &str = "read the names of an app's secrets";
        let mut db = self.readers.acquire().await.during(OPERATION)?;
        current(&mut db, app).await.during(OPERATION)
    }

    /// Sets and removes secrets without a deploy, for an app that does not run; [`crate::Target::Reconfigure`] does
    /// both in one. The names were checked by the caller.
    pub async fn secrets_change(&self, app: &AppName, changes: &SecretChanges, now_ms: u64) -> Result<()> {
        let mut tx = self.write(OPERATION_CHANGE).await?;
        app::require(&mut tx, OPERATION_CHANGE, app).await?;
        change(&mut tx, &self.key, app, changes, now_ms).await?;
        tx.commit().await
    }

    /// The values the release was made with.
    pub async fn release_secrets(&self, release: &Release) -> Result<BTreeMap<String, SecretValue>> {
        let mut values = BTreeMap::new();
        for (name, &version) in &release.secrets {
            values.insert(name.clone(), self.secret_value(&release.app, name, version).await?);
        }
        Ok(values)
    }

    async fn secret_value(&self, app: &AppName, name: &str, version: i64) -> Result<SecretValue> {
        let row: Option<(Vec<u8>, Vec<u8>)> = sqlx::query_as(
            "SELECT nonce, sealed FROM secrets WHERE app = ?1 AND name = ?2 AND version = ?3 AND removed = 0",
        )
        .bind(app.as_str())
        .bind(name)
        .bind(version)
        .fetch_optional(&self.readers)
        .await
        .during("read a secret")?;
        let Some((nonce, sealed)) = row else {
            return Err(StoreError::SecretLost { app: app.clone(), name: name.to_owned(), version });
        };
        let damaged = || StoreError::SecretDamaged { app: app.clone(), name: name.to_owned(), version };
        let plain = self
            .key
            .open_sealed(&context(app, name, version), &Sealed { nonce, sealed })
            .ok_or_else(damaged)?;
        let text = std::str::from_utf8(&plain).map_err(|_| damaged())?;
        Ok(SecretValue::new(text.to_owned()))
    }
}

const OPERATION_CHANGE: &str = "change an app's secrets";

/// What is authenticated beside the value. None of the three contains a NUL byte.
fn context(app: &AppName, name: &str, version: i64) -> Vec<u8> {
    format!("epagent secret\0{app}\0{name}\0{version}").into_bytes()
}

pub(crate) async fn current(db: &mut SqliteConnection, app: &AppName) -> sqlx::Result<Vec<Secret>> {
    sqlx::query_as(
        "SELECT name, version, set_at_ms FROM secrets AS newest
         WHERE app = ?1 AND removed = 0
           AND version = (SELECT max(version) FROM secrets WHERE app = ?1 AND name = newest.name)
         ORDER BY name",
    )
    .bind(app.as_str())
    .fetch_all(db)
    .await
}

/// Applies the changes to an app that exists, and tells of it by names only.
pub(crate) async fn change(
    tx: &mut WriteTx,
    key: &Key,
    app: &AppName,
    changes: &SecretChanges,
    now_ms: u64,
) -> Result<()> {
    if changes.is_empty() {
        return Ok(());
    }
    for (name, value) in changes {
        add_version(tx, key, app, name, value.as_ref(), now_ms).await?;
    }
    let set = current(tx.db(), app).await.during(OPERATION_CHANGE)?.len();
    if set > SECRETS_MAX {
        return Err(StoreError::TooMuch {
            what: format!("secrets of {app}"),
            found: set,
            limit: SECRETS_MAX,
        });
    }
    prune(tx.db(), app).await.during(OPERATION_CHANGE)?;
    let names: Vec<&str> = changes.keys().map(String::as_str).collect();
    let message = format!("secrets of {app} change: {}", names.join(", "));
    tx.event(Some(app), None, "app.secrets", &message, now_ms).await?;
    Ok(())
}

async fn add_version(
    tx: &mut WriteTx,
    key: &Key,
    app: &AppName,
    name: &str,
    value: Option<&SecretValue>,
    now_ms: u64,
) -> Result<()> {
    let newest: Option<i64> =
        sqlx::query_scalar("SELECT max(version) FROM secrets WHERE app = ?1 AND name = ?2")
            .bind(app.as_str())
            .bind(name)
            .fetch_one(tx.db())
            .await
            .during(OPERATION_CHANGE)?;
    let version = newest.unwrap_or(0) + 1;
    let sealed = match value {
        Some(value) => {
            check(name, value)?;
            key.seal(&context(app, name, version), value.expose().as_bytes())?
        }
        None => Sealed { nonce: Vec::new(), sealed: Vec::new() },
    };
    sqlx::query(
        "INSERT INTO secrets (app, name, version, nonce, sealed, set_at_ms, removed)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
    )
    .bind(app.as_str())
    .bind(name)
    .bind(version)
    .bind(sealed.nonce)
    .bind(sealed.sealed)
    .bind(signed(now_ms))
    .bind(value.is_none())
    .execute(tx.db())
    .await
    .during(OPERATION_CHANGE)?;
    Ok(())
}

fn check(name: &str, value: &SecretValue) -> Result<()> {
    let found = value.expose().len();
    if found > SECRET_BYTES_MAX {
        let what = format!("bytes in the value of {name}");
        return Err(StoreError::TooMuch { what, found, limit: SECRET_BYTES_MAX });
    }
    if value.expose().contains('\0') {
        return Err(StoreError::NulByte { name: name.to_owned() });
    }
    Ok(())
}

/// Removes the versions that are neither the newest of their name nor named by a release that can be deployed, and
/// then the marks of removal that hide nothing any more.
pub(crate) async fn prune(db: &mut SqliteConnection, app: &AppName) -> sqlx::Result<()> {
    sqlx::query(
        "DELETE FROM secrets AS old
         WHERE app = ?1
           AND version < (SELECT max(version) FROM secrets WHERE app = ?1 AND name = old.name)
           AND NOT EXISTS (SELECT 1 FROM releases, json_each(releases.secrets) AS used
                           WHERE releases.app = ?1 AND releases.state IN ('building', 'ready')
                             AND used.key = old.name AND used.value = old.version)",
    )
    .bind(app.as_str())
    .execute(&mut *db)
    .await?;
    sqlx::query(
        "DELETE FROM secrets AS mark
         WHERE app = ?1 AND removed = 1
           AND NOT EXISTS (SELECT 1 FROM secrets WHERE app = ?1 AND name = mark.name AND removed = 0)",
    )
    .bind(app.as_str())
    .execute(db)
    .await?;
    Ok(())
}
