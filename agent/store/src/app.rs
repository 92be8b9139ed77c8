//! Apps, and what the operator said about them: wanted or not, how many instances, which volumes.

use std::collections::BTreeMap;
use std::str::FromStr;

use epagent_core::name::{AppName, ProcessName, VolumeName};
use sqlx::sqlite::SqliteRow;
use sqlx::{FromRow, Row, SqliteConnection};

use crate::error::During;
use crate::row::{RowExt, signed};
use crate::write::WriteTx;
use crate::{Result, Store, StoreError};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct App {
    pub app: AppName,
    pub created_at_ms: u64,
    pub wanted: Wanted,
}

/// What the operator wants of an app.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    Running,
    Stopped,
    /// Being removed. There is no way back; the row goes by [`Store::app_remove`] when nothing else of it is left,
    /// so that a removal that was cut goes on after a restart.
    Removed,
}

impl Wanted {
    pub fn as_str(self) -> &'static str {
        match self {
            Wanted::Running => "running",
            Wanted::Stopped => "stopped",
            Wanted::Removed => "removed",
        }
    }
}

impl FromStr for Wanted {
    type Err = UnknownWanted;

    fn from_str(text: &str) -> Result<Self, UnknownWanted> {
        [Wanted::Running, Wanted::Stopped, Wanted::Removed]
            .into_iter()
            .find(|wanted| wanted.as_str() == text)
            .ok_or_else(|| UnknownWanted(text.to_owned()))
    }
}

#[derive(Debug, thiserror::Error)]
#[error("an app can't be wanted {0:?}")]
pub struct UnknownWanted(String);

/// A volume an app was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    pub app: AppName,
    pub volume: VolumeName,
    pub quota_bytes: u64,
    /// Where the app sees it.
    pub path: String,
}

impl FromRow<'_, SqliteRow> for App {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        Ok(App {
            app: row.parsed("app")?,
            created_at_ms: row.unsigned("created_at_ms")?,
            wanted: row.parsed("wanted")?,
        })
    }
}

impl FromRow<'_, SqliteRow> for Volume {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        Ok(Volume {
            app: row.parsed("app")?,
            volume: row.parsed("volume")?,
            quota_bytes: row.unsigned("quota_bytes")?,
            path: row.try_get("path")?,
        })
    }
}

impl Store {
    /// Makes the app unless it exists; says whether it did. Refused while an app of that name is being removed.
    pub async fn app_ensure(&self, app: &AppName, now_ms: u64) -> Result<bool> {
        let mut tx = self.write("create an app").await?;
        let created = ensure(&mut tx, app, now_ms).await?;
        tx.commit().await?;
        Ok(created)
    }

    pub async fn app(&self, app: &AppName) -> Result<Option<App>> {
        sqlx::query_as("SELECT * FROM apps WHERE app = ?1")
            .bind(app.as_str())
            .fetch_optional(&self.readers)
            .await
            .during("read an app")
    }

    /// By name.
    pub async fn apps(&self) -> Result<Vec<App>> {
        sqlx::query_as("SELECT * FROM apps ORDER BY app")
            .fetch_all(&self.readers)
            .await
            .during("read the apps")
    }

    /// Records what the operator wants; says whether it is a change. From [`Wanted::Removed`] there is no way back.
    pub async fn app_want(&self, app: &AppName, wanted: Wanted, now_ms: u64) -> Result<bool> {
        const OPERATION: &str = "change what is wanted of an app";
        let mut tx = self.write(OPERATION).await?;
        let is =
            find(tx.db(), app).await.during(OPERATION)?.ok_or_else(|| StoreError::NoApp(app.clone()))?.wanted;
        if is == wanted {
            return Ok(false);
        }
        if is == Wanted::Removed {
            return Err(StoreError::AppRemoved(app.clone()));
        }
        sqlx::query("UPDATE apps SET wanted = ?2 WHERE app = ?1")
            .bind(app.as_str())
            .bind(wanted.as_str())
            .execute(tx.db())
            .await
            .during(OPERATION)?;
        let message = format!("{app} is wanted {}", wanted.as_str());
        tx.event(Some(app), None, "app.wanted", &message, now_ms).await?;
        tx.commit().await?;
        Ok(true)
    }

    /// Forgets the app with its releases, configuration, secrets, deploys, instances and volumes; its events stay.
    /// Says whether there was one.
    pub async fn app_remove(&self, app: &AppName, now_ms: u64) -> Result<bool> {
        const OPERATION: &str = "remove an app";
        let mut tx = self.write(OPERATION).await?;
        let done = sqlx::query("DELETE FROM apps WHERE app = ?1")
            .bind(app.as_str())
            .execute(tx.db())
            .await
            .during(OPERATION)?;
        if done.rows_affected() == 0 {
            return Ok(false);
        }
        tx.event(Some(app), None, "app.destroyed", &format!("{app} was removed"), now_ms).await?;
        tx.commit().await?;
        Ok(true)
    }

    /// What `epagent scale` said, by process; processes it did not name are as the manifest has them.
    pub async fn scale(&self, app: &AppName) -> Result<BTreeMap<ProcessName, u32>> {
        const OPERATION: &str = "read an app's scale";
        let rows: Vec<SqliteRow> = sqlx::query("SELECT process, instances FROM scale WHERE app = ?1")
            .bind(app.as_str())
            .fetch_all(&self.readers)
            .await
            .during(OPERATION)?;
        rows.iter()
            .map(|row| Ok((row.parsed("process")?, row.try_get("instances")?)))
            .collect::<sqlx::Result<_>>()
            .during(OPERATION)
    }

    /// Sets the numbers of the processes named, which the caller has checked against the app's spec.
    pub async fn scale_set(
        &self,
        app: &AppName,
        scale: &BTreeMap<ProcessName, u32>,
        now_ms: u64,
    ) -> Result<()> {
        const OPERATION: &str = "set an app's scale";
        let mut tx = self.write(OPERATION).await?;
        require(&mut tx, OPERATION, app).await?;
        for (process, instances) in scale {
            sqlx::query(
                "INSERT INTO scale (app, process, instances) VALUES (?1, ?2, ?3)
                 ON CONFLICT (app, process) DO UPDATE SET instances = excluded.instances",
            )
            .bind(app.as_str())
            .bind(process.as_str())
            .bind(*instances)
            .execute(tx.db())
            .await
            .during(OPERATION)?;
        }
        let scale: Vec<String> =
            scale.iter().map(|(process, instances)| format!("{process}={instances}")).collect();
        let message = format!("{app} is scaled to {}", scale.join(" "));
        tx.event(Some(app), None, "app.scaled", &message, now_ms).await?;
        tx.commit().await
    }

    /// Records a volume, or its new quota and path.
    pub async fn volume_ensure(&self, volume: &Volume) -> Result<()> {
        const OPERATION: &str = "record a volume";
        let mut tx = self.write(OPERATION).await?;
        require(&mut tx, OPERATION, &volume.app).await?;
        sqlx::query(
            "INSERT INTO volumes (app, volume, quota_bytes, path) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (app, volume) DO UPDATE SET quota_bytes = excluded.quota_bytes, path = excluded.path",
        )
        .bind(volume.app.as_str())
        .bind(volume.volume.as_str())
        .bind(signed(volume.quota_bytes))
        .bind(&volume.path)
        .execute(tx.db())
        .await
        .during(OPERATION)?;
        tx.commit().await
    }

    /// The volumes of one app or of all.
    pub async fn volumes(&self, app: Option<&AppName>) -> Result<Vec<Volume>> {
        sqlx::query_as("SELECT * FROM volumes WHERE ?1 IS NULL OR app = ?1 ORDER BY app, volume")
            .bind(app.map(AppName::as_str))
            .fetch_all(&self.readers)
            .await
            .during("read the volumes")
    }

    /// Says whether there was one.
    pub async fn volume_remove(&self, app: &AppName, volume: &VolumeName) -> Result<bool> {
        const OPERATION: &str = "remove a volume";
        let mut tx = self.write(OPERATION).await?;
        let done = sqlx::query("DELETE FROM volumes WHERE app = ?1 AND volume = ?2")
            .bind(app.as_str())
            .bind(volume.as_str())
            .execute(tx.db())
            .await
            .during(OPERATION)?;
        tx.commit().await?;
        Ok(done.rows_affected() > 0)
    }
}

pub(crate) async fn find(db: &mut SqliteConnection, app: &AppName) -> sqlx::Result<Option<App>> {
    sqlx::query_as("SELECT * FROM apps WHERE app = ?1").bind(app.as_str()).fetch_optional(db).await
}

/// The app, which must exist and must not be about to be removed.
pub(crate) async fn require(tx: &mut WriteTx, operation: &'static str, app: &AppName) -> Result<App> {
    match find(tx.db(), app).await.during(operation)? {
        None => Err(StoreError::NoApp(app.clone())),
        Some(App { wanted: Wanted::Removed, .. }) => Err(StoreError::AppRemoved(app.clone())),
        Some(found) => Ok(found),
    }
}

pub(crate) async fn ensure(tx: &mut WriteTx, app: &AppName, now_ms: u64) -> Result<bool> {
    const OPERATION: &str = "create an app";
    match require(tx, OPERATION, app).await {
        Ok(_) => return Ok(false),
        Err(StoreError::NoApp(_)) => {}
        Err(error) => return Err(error),
    }
    sqlx::query("INSERT INTO apps (app, created_at_ms) VALUES (?1, ?2)")
        .bind(app.as_str())
        .bind(signed(now_ms))
        .execute(tx.db())
        .await
        .during(OPERATION)?;
    tx.event(Some(app), None, "app.created", &format!("{app} was created"), now_ms).await?;
    Ok(true)
}
