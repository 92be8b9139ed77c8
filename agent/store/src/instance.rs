//! Instances: those that live, and the last that ended.
//!
//! An instance is written down before the runner is asked to start it, so that a jail the store does not know is
//! one to be removed, and a row the runner does not know is one whose start was cut.

use epagent_core::exit::Exit;
use epagent_core::name::{AppName, DeployId, JailId, ProcessName, ReleaseNumber};
use sqlx::sqlite::SqliteRow;
use sqlx::{FromRow, Row};

use crate::error::During;
use crate::row::{RowExt, json, signed};
use crate::{Result, Store, app};

/// Ended instances that are kept, per app.
pub const ENDED_KEPT: i64 = 50;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    pub jail: JailId,
    pub app: AppName,
    /// The deploy that started it, or whose release it replaces a crashed instance of.
    pub deploy: DeployId,
    pub release: ReleaseNumber,
    pub process: ProcessName,
    /// Its place among the instances of its process, from 0.
    pub index: u32,
    /// As [`epagent_core`] or the API name it; the store does not look at it.
    pub state: String,
    pub address: Option<String>,
    pub created_at_ms: u64,
    pub started_at_ms: Option<u64>,
    /// It lives until this is set.
    pub ended_at_ms: Option<u64>,
    pub exit: Option<Exit>,
    /// How many of its place ended before it, in a row.
    pub restarts: u32,
}

/// An instance that is about to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewInstance {
    pub jail: JailId,
    pub app: AppName,
    pub deploy: DeployId,
    pub release: ReleaseNumber,
    pub process: ProcessName,
    pub index: u32,
    pub state: String,
    pub restarts: u32,
}

impl FromRow<'_, SqliteRow> for Instance {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        Ok(Instance {
            jail: row.parsed("jail")?,
            app: row.parsed("app")?,
            deploy: DeployId(row.try_get("deploy")?),
            release: ReleaseNumber(row.try_get("release")?),
            process: row.parsed("process")?,
            index: row.try_get("idx")?,
            state: row.try_get("state")?,
            address: row.try_get("address")?,
            created_at_ms: row.unsigned("created_at_ms")?,
            started_at_ms: row.unsigned_or_null("started_at_ms")?,
            ended_at_ms: row.unsigned_or_null("ended_at_ms")?,
            exit: row.json_or_null("exit")?,
            restarts: row.try_get("restarts")?,
        })
    }
}

impl Store {
    /// Writes it down before it is started. The app must exist.
    pub async fn instance_add(&self, new: &NewInstance, now_ms: u64) -> Result<()> {
        const OPERATION: &str = "record a new instance";
        let mut tx = self.write(OPERATION).await?;
        app::require(&mut tx, OPERATION, &new.app).await?;
        sqlx::query(
            "INSERT INTO instances (jail, app, deploy, release, process, idx, state, created_at_ms, restarts)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
        )
        .bind(new.jail.as_str())
        .bind(new.app.as_str())
        .bind(new.deploy.0)
        .bind(new.release.0)
        .bind(new.process.as_str())
        .bind(new.index)
        .bind(&new.state)
        .bind(signed(now_ms))
        .bind(new.restarts)
        .execute(tx.db())
        .await
        .during(OPERATION)?;
        tx.commit().await
    }

    /// Its jail runs and is reached at `address`. Says whether there is such a live instance.
    pub async fn instance_started(
        &self,
        jail: &JailId,
        state: &str,
        address: Option<&str>,
        now_ms: u64,
    ) -> Result<bool> {
        const OPERATION: &str = "record the start of an instance";
        let mut tx = self.write(OPERATION).await?;
        let instance: Option<Instance> = sqlx::query_as(
            "UPDATE instances SET state = ?2, address = ?3, started_at_ms = coalesce(started_at_ms, ?4)
             WHERE jail = ?1 AND ended_at_ms IS NULL RETURNING *",
        )
        .bind(jail.as_str())
        .bind(state)
        .bind(address)
        .bind(signed(now_ms))
        .fetch_optional(tx.db())
        .await
        .during(OPERATION)?;
        let Some(instance) = instance else { return Ok(false) };
        let message = format!("{} started", instance.called());
        tx.event(Some(&instance.app), Some(instance.deploy), "instance.started", &message, now_ms).await?;
        tx.commit().await?;
        Ok(true)
    }

    /// Says whether there is such a live instance.
    pub async fn instance_state(&self, jail: &JailId, state: &str) -> Result<bool> {
        const OPERATION: &str = "record the state of an instance";
        let mut tx = self.write(OPERATION).await?;
        let done = sqlx::query("UPDATE instances SET state = ?2 WHERE jail = ?1 AND ended_at_ms IS NULL")
            .bind(jail.as_str())
            .bind(state)
            .execute(tx.db())
            .await
            .during(OPERATION)?;
        tx.commit().await?;
        Ok(done.rows_affected() > 0)
    }

    /// It ended. Said again, it changes nothing; says whether there was such a live instance.
    pub async fn instance_ended(&self, jail: &JailId, state: &str, exit: &Exit, now_ms: u64) -> Result<bool> {
        const OPERATION: &str = "record the end of an instance";
        let mut tx = self.write(OPERATION).await?;
        let instance: Option<Instance> = sqlx::query_as(
            "UPDATE instances SET state = ?2, exit = ?3, ended_at_ms = ?4
             WHERE jail = ?1 AND ended_at_ms IS NULL RETURNING *",
        )
        .bind(jail.as_str())
        .bind(state)
        .bind(json(exit).during(OPERATION)?)
        .bind(signed(now_ms))
        .fetch_optional(tx.db())
        .await
        .during(OPERATION)?;
        let Some(instance) = instance else { return Ok(false) };
        sqlx::query(
            "DELETE FROM instances WHERE jail IN
                 (SELECT jail FROM instances WHERE app = ?1 AND ended_at_ms IS NOT NULL
                  ORDER BY ended_at_ms DESC, jail LIMIT -1 OFFSET ?2)",
        )
        .bind(instance.app.as_str())
        .bind(ENDED_KEPT)
        .execute(tx.db())
        .await
        .during(OPERATION)?;
        // What was said of the instance itself goes with it; another in its place is another.
        sqlx::query("DELETE FROM route_drains WHERE upstream = ?1")
            .bind(jail.as_str())
            .execute(tx.db())
            .await
            .during(OPERATION)?;
        let message = format!("{} {exit}", instance.called());
        tx.event(Some(&instance.app), Some(instance.deploy), "instance.exited", &message, now_ms).await?;
        tx.commit().await?;
        Ok(true)
    }

    pub async fn instance(&self, jail: &JailId) -> Result<Option<Instance>> {
        sqlx::query_as("SELECT * FROM instances WHERE jail = ?1")
            .bind(jail.as_str())
            .fetch_optional(&self.readers)
            .await
            .during("read an instance")
    }

    /// The live instances of one app or of all.
    pub async fn instances_live(&self, app: Option<&AppName>) -> Result<Vec<Instance>> {
        sqlx::query_as(
            "SELECT * FROM instances WHERE ended_at_ms IS NULL AND (?1 IS NULL OR app = ?1)
             ORDER BY app, process, idx, created_at_ms, jail",
        )
        .bind(app.map(AppName::as_str))
        .fetch_all(&self.readers)
        .await
        .during("read the live instances")
    }

    /// The last instances that ended, the latest first; at most [`ENDED_KEPT`] per app. Those that are not here and
    /// not live are forgotten, and their logs may go.
    pub async fn instances_ended(&self, app: Option<&AppName>) -> Result<Vec<Instance>> {
        sqlx::query_as(
            "SELECT * FROM instances WHERE ended_at_ms IS NOT NULL AND (?1 IS NULL OR app = ?1)
             ORDER BY ended_at_ms DESC, jail",
        )
        .bind(app.map(AppName::as_str))
        .fetch_all(&self.readers)
        .await
        .during("read the instances that ended")
    }
}

impl Instance {
    /// `web.0 of shop`.
    fn called(&self) -> String {
        format!("{}.{} of {} ({}, {})", self.process, self.index, self.app, self.release, self.jail)
    }
}
