//! Deploys: the phases of [`epagent_core::phase`], one durable step at a time.
//!
//! ```text
//!   deploy_begin ─▶ received ─ deploy_advance ─▶ … ─ deploy_advance ─▶ done
//!                       └──────────── deploy_fail ───────────────────▶ failed
//! ```
//!
//! Each step changes the phase, adds a row to the deploy's history, moves the release's own state along and tells of
//! it by an event, in one transaction. An app has one deploy at a time; the second is refused with the first one's
//! number. A brain that starts reads [`Store::deploys_unfinished`] and goes on from the phase and the progress.

use std::collections::BTreeMap;
use std::str::FromStr;

use epagent_core::name::{AppName, DeployId, ReleaseNumber};
use epagent_core::phase::Phase;
use epagent_core::spec::AppSpec;
use epagent_core::verdict::Verdict;
use serde_json::Value;
use sqlx::sqlite::SqliteRow;
use sqlx::{FromRow, Row, SqliteConnection};

use crate::error::During;
use crate::release::{self, Release, ReleaseState};
use crate::row::{RowExt, cut, json, signed};
use crate::write::WriteTx;
use crate::{ConfigChanges, Result, SecretChanges, Store, StoreError, app, config, secret};

/// Deploys that are kept per app, beside those that say what serves and what served.
pub const DEPLOYS_KEPT: i64 = 100;
/// Steps of one deploy. Notes past it are dropped; phases are always recorded.
pub const STEPS_MAX: i64 = 500;
/// Longer notes are cut.
pub const NOTE_BYTES_MAX: usize = 2 << 10;

#[derive(Debug, Clone, PartialEq)]
pub struct Deploy {
    pub id: DeployId,
    pub app: AppName,
    pub kind: DeployKind,
    pub release: ReleaseNumber,
    pub phase: Phase,
    /// Why it failed, if it did.
    pub verdict: Option<Verdict>,
    pub created_at_ms: u64,
    pub ended_at_ms: Option<u64>,
    /// As [`Store::deploy_progress`] left it.
    pub progress: Value,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeployKind {
    Deploy,
    Rollback,
    Restart,
    Config,
    Start,
}

impl DeployKind {
    pub fn as_str(self) -> &'static str {
        match self {
            DeployKind::Deploy => "deploy",
            DeployKind::Rollback => "rollback",
            DeployKind::Restart => "restart",
            DeployKind::Config => "config",
            DeployKind::Start => "start",
        }
    }
}

impl FromStr for DeployKind {
    type Err = UnknownDeployKind;

    fn from_str(text: &str) -> Result<Self, UnknownDeployKind> {
        use DeployKind::*;
        [Deploy, Rollback, Restart, Config, Start]
            .into_iter()
            .find(|kind| kind.as_str() == text)
            .ok_or_else(|| UnknownDeployKind(text.to_owned()))
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a kind of deploy")]
pub struct UnknownDeployKind(String);

/// What a new deploy is to bring to serve.
#[derive(Debug)]
pub enum Target {
    /// A new release, to be built. Makes the app when it is new; takes its configuration and secrets as they are.
    Build(Box<AppSpec>),
    /// A new release on the tree and spec of the one that serves, after these changes to configuration and secrets.
    Reconfigure { config: ConfigChanges, secrets: SecretChanges },
    /// A release that is ready: an older one for a rollback, the serving one for a restart.
    Release(ReleaseNumber),
}

#[derive(Debug)]
pub struct NewDeploy {
    pub app: AppName,
    pub kind: DeployKind,
    pub target: Target,
    /// The first progress; [`Value::Null`] when there is nothing to say yet.
    pub progress: Value,
    /// The note of the first step.
    pub note: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeployStep {
    /// Counts from 1 within the deploy.
    pub sequence: i64,
    pub phase: Phase,
    pub note: String,
    pub at_ms: u64,
}

impl FromRow<'_, SqliteRow> for Deploy {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        Ok(Deploy {
            id: DeployId(row.try_get("id")?),
            app: row.parsed("app")?,
            kind: row.parsed("kind")?,
            release: ReleaseNumber(row.try_get("release")?),
            phase: row.parsed("phase")?,
            verdict: row.json_or_null("verdict")?,
            created_at_ms: row.unsigned("created_at_ms")?,
            ended_at_ms: row.unsigned_or_null("ended_at_ms")?,
            progress: row.json("progress")?,
        })
    }
}

impl FromRow<'_, SqliteRow> for DeployStep {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        Ok(DeployStep {
            sequence: row.try_get("sequence")?,
            phase: row.parsed("phase")?,
            note: row.try_get("note")?,
            at_ms: row.unsigned("at_ms")?,
        })
    }
}

impl Store {
    /// Begins a deploy in `received`, with its release. What is wanted of the app stays as it is.
    ///
    /// Fails with [`StoreError::DeployUnderWay`], [`StoreError::NoApp`], [`StoreError::AppRemoved`],
    /// [`StoreError::NothingServes`] (nothing to reconfigure) or [`StoreError::NoRelease`]; then nothing changed.
    pub async fn deploy_begin(&self, new: NewDeploy, now_ms: u64) -> Result<Deploy> {
        const OPERATION: &str = "begin a deploy";
        let NewDeploy { app, kind, target, progress, note } = new;
        let mut tx = self.write(OPERATION).await?;
        match &target {
            Target::Build(_) => drop(app::ensure(&mut tx, &app, now_ms).await?),
            Target::Reconfigure { .. } | Target::Release(_) => {
                drop(app::require(&mut tx, OPERATION, &app).await?)
            }
        }
        if let Some(deploy) = under_way(tx.db(), &app).await.during(OPERATION)? {
            return Err(StoreError::DeployUnderWay { app, deploy });
        }
        let release = self.target_release(&mut tx, &app, target, now_ms).await?;
        let deploy: Deploy = sqlx::query_as(
            "INSERT INTO deploys (app, kind, release, phase, created_at_ms, progress)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6) RETURNING *",
        )
        .bind(app.as_str())
        .bind(kind.as_str())
        .bind(release.0)
        .bind(Phase::Received.as_str())
        .bind(signed(now_ms))
        .bind(json(&progress).during(OPERATION)?)
        .fetch_one(tx.db())
        .await
        .during(OPERATION)?;
        record_phase(&mut tx, OPERATION, &deploy, &note, now_ms).await?;
        prune(tx.db(), &app).await.during(OPERATION)?;
        tx.commit().await?;
        Ok(deploy)
    }

    /// The release a deploy is of, made in its transaction unless it exists.
    async fn target_release(
        &self,
        tx: &mut WriteTx,
        app: &AppName,
        target: Target,
        now_ms: u64,
    ) -> Result<ReleaseNumber> {
        const OPERATION: &str = "make a release";
        let (spec, tree) = match target {
            Target::Release(number) => {
                return match release::find(tx.db(), app, number).await.during(OPERATION)? {
                    Some(Release { state: ReleaseState::Ready, .. }) => Ok(number),
                    _ => Err(StoreError::NoRelease { app: app.clone(), release: number }),
                };
            }
            Target::Build(spec) => (*spec, None),
            Target::Reconfigure { config, secrets } => {
                let serving = release::serving(tx.db(), app).await.during(OPERATION)?;
                let serving = serving.ok_or_else(|| StoreError::NothingServes(app.clone()))?;
                config::change(tx, app, &config, now_ms).await?;
                secret::change(tx, &self.key, app, &secrets, now_ms).await?;
                (serving.spec, Some(serving.tree))
            }
        };
        let number = release::next_number(tx.db(), app).await.during(OPERATION)?;
        let config = config::current(tx.db(), app).await.during(OPERATION)?.unwrap_or_default();
        let secrets = secret::current(tx.db(), app).await.during(OPERATION)?;
        let secrets: BTreeMap<_, _> =
            secrets.into_iter().map(|secret| (secret.name, secret.version)).collect();
        let state = if tree.is_some() { ReleaseState::Ready } else { ReleaseState::Building };
        let release = Release {
            app: app.clone(),
            number,
            tree: tree.unwrap_or(number),
            image: spec.image.clone(),
            spec,
            config: config.values,
            config_version: config.version,
            secrets,
            state,
            created_at_ms: now_ms,
        };
        release::insert(tx.db(), &release).await.during(OPERATION)?;
        Ok(number)
    }

    /// Takes a deploy from the phase the caller knows it in to the next, before the work of that phase begins.
    /// Leaving `building`, its release becomes ready. A failure has a verdict: [`Store::deploy_fail`].
    pub async fn deploy_advance(
        &self,
        id: DeployId,
        from: Phase,
        to: Phase,
        note: &str,
        now_ms: u64,
    ) -> Result<()> {
        let mut tx = self.write(OPERATION_ADVANCE).await?;
        advance(&mut tx, id, from, to, None, note, now_ms).await?;
        tx.commit().await
    }

    /// Ends a deploy as failed. Its release fails with it, unless it served before.
    pub async fn deploy_fail(&self, id: DeployId, from: Phase, verdict: &Verdict, now_ms: u64) -> Result<()> {
        let mut tx = self.write(OPERATION_ADVANCE).await?;
        advance(&mut tx, id, from, Phase::Failed, Some(verdict), &verdict.message, now_ms).await?;
        tx.commit().await
    }

    /// Adds a note within the phase, for those who watch. Past [`STEPS_MAX`] it is dropped.
    pub async fn deploy_note(&self, id: DeployId, note: &str, now_ms: u64) -> Result<()> {
        const OPERATION: &str = "add a note to a deploy";
        let mut tx = self.write(OPERATION).await?;
        let deploy = find(tx.db(), id).await.during(OPERATION)?.ok_or(StoreError::NoDeploy(id))?;
        let last = last_step(tx.db(), id).await.during(OPERATION)?;
        if last >= STEPS_MAX {
            return Ok(());
        }
        record_step(&mut tx, OPERATION, &deploy, note, now_ms).await?;
        tx.commit().await
    }

    /// Records how far the work of the phase is, before what it says is done or after, as the caller's own recovery
    /// needs it.
    pub async fn deploy_progress(&self, id: DeployId, progress: &Value) -> Result<()> {
        const OPERATION: &str = "record a deploy's progress";
        let mut tx = self.write(OPERATION).await?;
        let done = sqlx::query("UPDATE deploys SET progress = ?2 WHERE id = ?1")
            .bind(id.0)
            .bind(json(progress).during(OPERATION)?)
            .execute(tx.db())
            .await
            .during(OPERATION)?;
        if done.rows_affected() == 0 {
            return Err(StoreError::NoDeploy(id));
        }
        tx.commit().await
    }

    pub async fn deploy(&self, id: DeployId) -> Result<Option<Deploy>> {
        const OPERATION: &str = "read a deploy";
        let mut db = self.readers.acquire().await.during(OPERATION)?;
        find(&mut db, id).await.during(OPERATION)
    }

    /// The deploys of one app or of all, newest first; at most `limit`.
    pub async fn deploys(&self, app: Option<&AppName>, limit: u32) -> Result<Vec<Deploy>> {
        sqlx::query_as("SELECT * FROM deploys WHERE ?1 IS NULL OR app = ?1 ORDER BY id DESC LIMIT ?2")
            .bind(app.map(AppName::as_str))
            .bind(limit)
            .fetch_all(&self.readers)
            .await
            .during("read the deploys")
    }

    /// The deploy of the app that is under way.
    pub async fn deploy_under_way(&self, app: &AppName) -> Result<Option<Deploy>> {
        sqlx::query_as("SELECT * FROM deploys WHERE app = ?1 AND phase NOT IN ('done', 'failed')")
            .bind(app.as_str())
            .fetch_optional(&self.readers)
            .await
            .during("read the deploy under way")
    }

    /// The newest deploy that is done: its release serves, unless the deploy under way has switched already.
    pub async fn deploy_serving(&self, app: &AppName) -> Result<Option<Deploy>> {
        sqlx::query_as("SELECT * FROM deploys WHERE app = ?1 AND phase = 'done' ORDER BY id DESC LIMIT 1")
            .bind(app.as_str())
            .fetch_optional(&self.readers)
            .await
            .during("read the deploy that serves")
    }

    /// Every deploy that is under way, oldest first: what a brain that starts goes on with.
    pub async fn deploys_unfinished(&self) -> Result<Vec<Deploy>> {
        sqlx::query_as("SELECT * FROM deploys WHERE phase NOT IN ('done', 'failed') ORDER BY id")
            .fetch_all(&self.readers)
            .await
            .during("read the deploys under way")
    }

    /// The steps after sequence number `after`, in order; 0 for all.
    pub async fn deploy_steps(&self, id: DeployId, after: i64) -> Result<Vec<DeployStep>> {
        sqlx::query_as("SELECT * FROM deploy_steps WHERE deploy = ?1 AND sequence > ?2 ORDER BY sequence")
            .bind(id.0)
            .bind(after)
            .fetch_all(&self.readers)
            .await
            .during("read a deploy's steps")
    }
}

const OPERATION_ADVANCE: &str = "advance a deploy";

async fn advance(
    tx: &mut WriteTx,
    id: DeployId,
    from: Phase,
    to: Phase,
    verdict: Option<&Verdict>,
    note: &str,
    now_ms: u64,
) -> Result<()> {
    const OPERATION: &str = OPERATION_ADVANCE;
    let mut deploy = find(tx.db(), id).await.during(OPERATION)?.ok_or(StoreError::NoDeploy(id))?;
    if deploy.phase != from || !from.may_become(to) {
        return Err(StoreError::WrongPhase { deploy: id, from, to, is: deploy.phase });
    }
    sqlx::query("UPDATE deploys SET phase = ?2, verdict = ?3, ended_at_ms = ?4 WHERE id = ?1")
        .bind(id.0)
        .bind(to.as_str())
        .bind(verdict.map(json).transpose().during(OPERATION)?)
        .bind(to.is_over().then(|| signed(now_ms)))
        .execute(tx.db())
        .await
        .during(OPERATION)?;
    if from == Phase::Building && to != Phase::Failed {
        release::built(tx.db(), &deploy.app, deploy.release).await.during(OPERATION)?;
    }
    if to == Phase::Failed {
        release::deploy_failed(tx.db(), &deploy.app, deploy.release).await.during(OPERATION)?;
    }
    deploy.phase = to;
    record_phase(tx, OPERATION, &deploy, note, now_ms).await
}

/// Tells of the phase the deploy has come to, in its history and by an event.
async fn record_phase(
    tx: &mut WriteTx,
    operation: &'static str,
    deploy: &Deploy,
    note: &str,
    now_ms: u64,
) -> Result<()> {
    record_step(tx, operation, deploy, note, now_ms).await?;
    let colon = if note.is_empty() { "" } else { ": " };
    let message =
        format!("{} of {} ({}) is {}{colon}{note}", deploy.id, deploy.app, deploy.release, deploy.phase);
    tx.event(Some(&deploy.app), Some(deploy.id), "deploy.phase", &message, now_ms).await?;
    Ok(())
}

/// Adds a row to the deploy's history in the phase it is in.
async fn record_step(
    tx: &mut WriteTx,
    operation: &'static str,
    deploy: &Deploy,
    note: &str,
    now_ms: u64,
) -> Result<()> {
    let last = last_step(tx.db(), deploy.id).await.during(operation)?;
    sqlx::query(
        "INSERT INTO deploy_steps (deploy, sequence, phase, note, at_ms) VALUES (?1, ?2, ?3, ?4, ?5)",
    )
    .bind(deploy.id.0)
    .bind(last + 1)
    .bind(deploy.phase.as_str())
    .bind(cut(note, NOTE_BYTES_MAX))
    .bind(signed(now_ms))
    .execute(tx.db())
    .await
    .during(operation)?;
    Ok(())
}

async fn find(db: &mut SqliteConnection, id: DeployId) -> sqlx::Result<Option<Deploy>> {
    sqlx::query_as("SELECT * FROM deploys WHERE id = ?1").bind(id.0).fetch_optional(db).await
}

async fn last_step(db: &mut SqliteConnection, id: DeployId) -> sqlx::Result<i64> {
    sqlx::query_scalar("SELECT coalesce(max(sequence), 0) FROM deploy_steps WHERE deploy = ?1")
        .bind(id.0)
        .fetch_one(db)
        .await
}

async fn under_way(db: &mut SqliteConnection, app: &AppName) -> sqlx::Result<Option<DeployId>> {
    let id: Option<i64> =
        sqlx::query_scalar("SELECT id FROM deploys WHERE app = ?1 AND phase NOT IN ('done', 'failed')")
            .bind(app.as_str())
            .fetch_optional(db)
            .await?;
    Ok(id.map(DeployId))
}

/// Removes old deploys and the releases that only they spoke of. The last successful deploy of every release that
/// can still be deployed stays, since what serves and what served before is read from it.
async fn prune(db: &mut SqliteConnection, app: &AppName) -> sqlx::Result<()> {
    sqlx::query(
        "DELETE FROM deploys
         WHERE app = ?1 AND phase IN ('done', 'failed')
           AND id NOT IN (SELECT id FROM deploys WHERE app = ?1 ORDER BY id DESC LIMIT ?2)
           AND id NOT IN (SELECT max(id) FROM deploys JOIN releases USING (app)
                          WHERE app = ?1 AND phase = 'done' AND number = release AND state = 'ready'
                          GROUP BY release)",
    )
    .bind(app.as_str())
    .bind(DEPLOYS_KEPT)
    .execute(&mut *db)
    .await?;
    sqlx::query(
        "DELETE FROM releases
         WHERE app = ?1 AND state IN ('failed', 'removed')
           AND NOT EXISTS (SELECT 1 FROM deploys WHERE deploys.app = ?1 AND deploys.release = releases.number)",
    )
    .bind(app.as_str())
    .execute(db)
    .await?;
    Ok(())
}
