//! The configuration of an app: what `epagent config` sets and the next release takes.

use std::collections::BTreeMap;

use epagent_core::name::AppName;
use sqlx::SqliteConnection;

use crate::error::During;
use crate::write::WriteTx;
use crate::{Result, Store, StoreError, app};

/// Names and values of one app together. All of it travels in one packet to the runner, beside the manifest's `env`.
pub const CONFIG_BYTES_MAX: usize = 32 << 10;

/// Variables of one app; with the manifest's `env` and what the agent sets, the runner takes 512.
pub const CONFIG_NAMES_MAX: usize = 200;

/// New values by name; none unsets.
pub type ConfigChanges = BTreeMap<String, Option<String>>;

/// The configuration the next release gets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// Counts the changes; 0 before the first.
    pub version: i64,
    pub values: BTreeMap<String, String>,
}

impl Store {
    /// None when there is no such app.
    pub async fn config(&self, app: &AppName) -> Result<Option<Config>> {
        const OPERATION: &str = "read an app's configuration";
        let mut db = self.readers.acquire().await.during(OPERATION)?;
        current(&mut db, app).await.during(OPERATION)
    }

    /// Changes the configuration without a deploy, for an app that does not run; [`crate::Target::Reconfigure`]
    /// does both in one. Returns the new configuration. The names were checked by the caller.
    pub async fn config_change(&self, app: &AppName, changes: &ConfigChanges, now_ms: u64) -> Result<Config> {
        let mut tx = self.write(OPERATION_CHANGE).await?;
        app::require(&mut tx, OPERATION_CHANGE, app).await?;
        let config = change(&mut tx, app, changes, now_ms).await?;
        tx.commit().await?;
        Ok(config)
    }
}

const OPERATION_CHANGE: &str = "change an app's configuration";

pub(crate) async fn current(db: &mut SqliteConnection, app: &AppName) -> sqlx::Result<Option<Config>> {
    // One statement sees one state of the file.
    let rows: Vec<(i64, Option<String>, Option<String>)> = sqlx::query_as(
        "SELECT apps.config_version, config.name, config.value
         FROM apps LEFT JOIN config ON config.app = apps.app WHERE apps.app = ?1",
    )
    .bind(app.as_str())
    .fetch_all(db)
    .await?;
    let Some(&(version, ..)) = rows.first() else { return Ok(None) };
    let values = rows.into_iter().filter_map(|(_, name, value)| Some((name?, value?))).collect();
    Ok(Some(Config { version, values }))
}

/// Applies the changes to an app that exists, and tells of it by names only.
pub(crate) async fn change(
    tx: &mut WriteTx,
    app: &AppName,
    changes: &ConfigChanges,
    now_ms: u64,
) -> Result<Config> {
    let mut config = current(tx.db(), app)
        .await
        .during(OPERATION_CHANGE)?
        .ok_or_else(|| StoreError::NoApp(app.clone()))?;
    if changes.is_empty() {
        return Ok(config);
    }
    config.version = sqlx::query_scalar(
        "UPDATE apps SET config_version = config_version + 1 WHERE app = ?1 RETURNING config_version",
    )
    .bind(app.as_str())
    .fetch_one(tx.db())
    .await
    .during(OPERATION_CHANGE)?;
    for (name, value) in changes {
        match value {
            Some(value) => set(tx, app, name, value, config.version).await?,
            None => unset(tx, app, name).await?,
        }
    }
    apply(&mut config.values, changes);
    let bytes = config.values.iter().map(|(name, value)| name.len() + value.len()).sum();
    if bytes > CONFIG_BYTES_MAX {
        let what = format!("bytes in the configuration of {app}");
        return Err(StoreError::TooMuch { what, found: bytes, limit: CONFIG_BYTES_MAX });
    }
    let names = config.values.len();
    if names > CONFIG_NAMES_MAX {
        let what = format!("variables in the configuration of {app}");
        return Err(StoreError::TooMuch { what, found: names, limit: CONFIG_NAMES_MAX });
    }
    let names: Vec<&str> = changes.keys().map(String::as_str).collect();
    let message = format!("configuration {} of {app} changes {}", config.version, names.join(", "));
    tx.event(Some(app), None, "app.config", &message, now_ms).await?;
    Ok(config)
}

fn apply(values: &mut BTreeMap<String, String>, changes: &ConfigChanges) {
    for (name, value) in changes {
        match value {
            Some(value) => values.insert(name.clone(), value.clone()),
            None => values.remove(name),
        };
    }
}

async fn set(tx: &mut WriteTx, app: &AppName, name: &str, value: &str, version: i64) -> Result<()> {
    if value.contains('\0') {
        return Err(StoreError::NulByte { name: name.to_owned() });
    }
    sqlx::query(
        "INSERT INTO config (app, name, value, version) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (app, name) DO UPDATE SET value = excluded.value, version = excluded.version",
    )
    .bind(app.as_str())
    .bind(name)
    .bind(value)
    .bind(version)
    .execute(tx.db())
    .await
    .during(OPERATION_CHANGE)?;
    Ok(())
}

async fn unset(tx: &mut WriteTx, app: &AppName, name: &str) -> Result<()> {
    sqlx::query("DELETE FROM config WHERE app = ?1 AND name = ?2")
        .bind(app.as_str())
        .bind(name)
        .execute(tx.db())
        .await
        .during(OPERATION_CHANGE)?;
    Ok(())
}
