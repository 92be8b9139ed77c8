//! Releases: image, configuration and versions of secrets, immutable.
//!
//! ```text
//!   building ── built and sealed ──▶ ready ── its tree was dropped ──▶ removed
//!      └──── its first deploy failed ──┴──▶ failed ── likewise ──▶ removed
//! ```
//!
//! A release serves when the newest deploy that is done is one of it; what serves is therefore never written down
//! twice.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use epagent_core::name::{AppName, ImageName, ReleaseNumber};
use epagent_core::spec::AppSpec;
use sqlx::sqlite::SqliteRow;
use sqlx::{FromRow, Row, SqliteConnection};

use crate::error::During;
use crate::row::{RowExt, json, signed};
use crate::{Result, Store, secret};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    pub app: AppName,
    pub number: ReleaseNumber,
    /// The release whose built tree in the pool this one runs on: itself, unless only the configuration differs.
    pub tree: ReleaseNumber,
    pub image: ImageName,
    pub spec: AppSpec,
    /// What `epagent config` had set when the release was made; it goes before the spec's `env`.
    pub config: BTreeMap<String, String>,
    pub config_version: i64,
    /// Versions by name.
    pub secrets: BTreeMap<String, i64>,
    pub state: ReleaseState,
    pub created_at_ms: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReleaseState {
    Building,
    /// Built, and may be deployed at any time.
    Ready,
    /// Its first deploy failed.
    Failed,
    /// Its tree is gone.
    Removed,
}

impl ReleaseState {
    pub fn as_str(self) -> &'static str {
        match self {
            ReleaseState::Building => "building",
            ReleaseState::Ready => "ready",
            ReleaseState::Failed => "failed",
            ReleaseState::Removed => "removed",
        }
    }
}

impl FromStr for ReleaseState {
    type Err = UnknownReleaseState;

    fn from_str(text: &str) -> Result<Self, UnknownReleaseState> {
        use ReleaseState::*;
        [Building, Ready, Failed, Removed]
            .into_iter()
            .find(|state| state.as_str() == text)
            .ok_or_else(|| UnknownReleaseState(text.to_owned()))
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a state of a release")]
pub struct UnknownReleaseState(String);

impl FromRow<'_, SqliteRow> for Release {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        Ok(Release {
            app: row.parsed("app")?,
            number: ReleaseNumber(row.try_get("number")?),
            tree: ReleaseNumber(row.try_get("tree")?),
            image: row.parsed("image")?,
            spec: row.json("spec")?,
            config: row.json("config")?,
            config_version: row.try_get("config_version")?,
            secrets: row.json("secrets")?,
            state: row.parsed("state")?,
            created_at_ms: row.unsigned("created_at_ms")?,
        })
    }
}

impl Store {
    pub async fn release(&self, app: &AppName, number: ReleaseNumber) -> Result<Option<Release>> {
        const OPERATION: &str = "read a release";
        let mut db = self.readers.acquire().await.during(OPERATION)?;
        find(&mut db, app, number).await.during(OPERATION)
    }

    /// Newest first.
    pub async fn releases(&self, app: &AppName) -> Result<Vec<Release>> {
        sqlx::query_as("SELECT * FROM releases WHERE app = ?1 ORDER BY number DESC")
            .bind(app.as_str())
            .fetch_all(&self.readers)
            .await
            .during("read an app's releases")
    }

    /// The release of the newest deploy that is done. During `switching` and `draining` that is still the release
    /// before: the deploy under way says more.
    pub async fn release_serving(&self, app: &AppName) -> Result<Option<Release>> {
        const OPERATION: &str = "read the release that serves";
        let mut db = self.readers.acquire().await.during(OPERATION)?;
        serving(&mut db, app).await.during(OPERATION)
    }

    /// The release that served before the current one and can be deployed: where a rollback goes.
    pub async fn release_previous(&self, app: &AppName) -> Result<Option<Release>> {
        sqlx::query_as(
            "SELECT releases.* FROM deploys
             JOIN releases ON releases.app = deploys.app AND releases.number = deploys.release
             WHERE deploys.app = ?1 AND deploys.phase = 'done' AND releases.state = 'ready'
               AND deploys.release <> (SELECT release FROM deploys
                                       WHERE app = ?1 AND phase = 'done' ORDER BY id DESC LIMIT 1)
             ORDER BY deploys.id DESC LIMIT 1",
        )
        .bind(app.as_str())
        .fetch_optional(&self.readers)
        .await
        .during("read the release that served before")
    }

    /// The trees that must stay in the pool: those of every release that is being built or can be deployed.
    pub async fn trees_in_use(&self, app: &AppName) -> Result<BTreeSet<ReleaseNumber>> {
        let trees: Vec<u32> = sqlx::query_scalar(
            "SELECT DISTINCT tree FROM releases WHERE app = ?1 AND state IN ('building', 'ready')",
        )
        .bind(app.as_str())
        .fetch_all(&self.readers)
        .await
        .during("read the trees in use")?;
        Ok(trees.into_iter().map(ReleaseNumber).collect())
    }

    /// Gives up a release for good, which is to be done before its tree is dropped: from here on it can't be
    /// deployed. Says whether it was; it is not when it serves or a deploy of it is under way.
    pub async fn release_remove(&self, app: &AppName, number: ReleaseNumber) -> Result<bool> {
        const OPERATION: &str = "remove a release";
        let mut tx = self.write(OPERATION).await?;
        let serves =
            serving(tx.db(), app).await.during(OPERATION)?.is_some_and(|release| release.number == number);
        if serves {
            return Ok(false);
        }
        let done = sqlx::query(
            "UPDATE releases SET state = 'removed'
             WHERE app = ?1 AND number = ?2 AND state <> 'removed'
               AND NOT EXISTS (SELECT 1 FROM deploys
                               WHERE app = ?1 AND release = ?2 AND phase NOT IN ('done', 'failed'))",
        )
        .bind(app.as_str())
        .bind(number.0)
        .execute(tx.db())
        .await
        .during(OPERATION)?;
        secret::prune(tx.db(), app).await.during(OPERATION)?;
        tx.commit().await?;
        Ok(done.rows_affected() > 0)
    }
}

pub(crate) async fn find(
    db: &mut SqliteConnection,
    app: &AppName,
    number: ReleaseNumber,
) -> sqlx::Result<Option<Release>> {
    sqlx::query_as("SELECT * FROM releases WHERE app = ?1 AND number = ?2")
        .bind(app.as_str())
        .bind(number.0)
        .fetch_optional(db)
        .await
}

pub(crate) async fn serving(db: &mut SqliteConnection, app: &AppName) -> sqlx::Result<Option<Release>> {
    sqlx::query_as(
        "SELECT releases.* FROM deploys
         JOIN releases ON releases.app = deploys.app AND releases.number = deploys.release
         WHERE deploys.app = ?1 AND deploys.phase = 'done' ORDER BY deploys.id DESC LIMIT 1",
    )
    .bind(app.as_str())
    .fetch_optional(db)
    .await
}

/// The next number of an app that exists.
pub(crate) async fn next_number(db: &mut SqliteConnection, app: &AppName) -> sqlx::Result<ReleaseNumber> {
    let number: u32 = sqlx::query_scalar(
        "UPDATE apps SET next_release = next_release + 1 WHERE app = ?1 RETURNING next_release - 1",
    )
    .bind(app.as_str())
    .fetch_one(db)
    .await?;
    Ok(ReleaseNumber(number))
}

pub(crate) async fn insert(db: &mut SqliteConnection, release: &Release) -> sqlx::Result<()> {
    sqlx::query(
        "INSERT INTO releases
             (app, number, tree, image, spec, config, config_version, secrets, state, created_at_ms)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
    )
    .bind(release.app.as_str())
    .bind(release.number.0)
    .bind(release.tree.0)
    .bind(release.image.as_str())
    .bind(json(&release.spec)?)
    .bind(json(&release.config)?)
    .bind(release.config_version)
    .bind(json(&release.secrets)?)
    .bind(release.state.as_str())
    .bind(signed(release.created_at_ms))
    .execute(db)
    .await?;
    Ok(())
}

/// The build came to its end.
pub(crate) async fn built(
    db: &mut SqliteConnection,
    app: &AppName,
    number: ReleaseNumber,
) -> sqlx::Result<()> {
    sqlx::query("UPDATE releases SET state = 'ready' WHERE app = ?1 AND number = ?2 AND state = 'building'")
        .bind(app.as_str())
        .bind(number.0)
        .execute(db)
        .await?;
    Ok(())
}

/// A deploy of it failed: the release fails with it unless it served before.
pub(crate) async fn deploy_failed(
    db: &mut SqliteConnection,
    app: &AppName,
    number: ReleaseNumber,
) -> sqlx::Result<()> {
    sqlx::query(
        "UPDATE releases SET state = 'failed'
         WHERE app = ?1 AND number = ?2 AND state IN ('building', 'ready')
           AND NOT EXISTS (SELECT 1 FROM deploys WHERE app = ?1 AND release = ?2 AND phase = 'done')",
    )
    .bind(app.as_str())
    .bind(number.0)
    .execute(&mut *db)
    .await?;
    secret::prune(db, app).await
}
