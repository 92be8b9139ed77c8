//! What happened, in order: the lines of `epagent events`.
//!
//! A change and the event that tells of it are one transaction. Followers wait on [`Store::event_signal`] and read
//! on from the last id they saw; nobody polls.

use epagent_core::name::{AppName, DeployId};
use sqlx::sqlite::SqliteRow;
use sqlx::{FromRow, Row, SqliteConnection};
use tokio::sync::watch;

use crate::error::During;
use crate::row::{RowExt, cut, signed};
use crate::{Result, Store};

/// Events that are kept, the newest.
pub const EVENTS_MAX: i64 = 10_000;
/// Events past them are removed in batches of this many.
const PRUNE_EVERY: i64 = 100;
/// Longer messages are cut.
pub const MESSAGE_BYTES_MAX: usize = 4 << 10;
/// The most events of one answer.
pub const EVENTS_AT_ONCE_MAX: u32 = 1_000;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub id: i64,
    pub at_ms: u64,
    pub app: Option<AppName>,
    pub deploy: Option<DeployId>,
    /// `deploy.phase`, `instance.exited`: stable, for programs.
    pub kind: String,
    pub message: String,
}

impl FromRow<'_, SqliteRow> for Event {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        Ok(Event {
            id: row.try_get("id")?,
            at_ms: row.unsigned("at_ms")?,
            app: row.parsed_or_null("app")?,
            deploy: row.try_get::<Option<i64>, _>("deploy")?.map(DeployId),
            kind: row.try_get("kind")?,
            message: row.try_get("message")?,
        })
    }
}

impl Store {
    /// Adds an event of a kind that no other operation of the store writes itself. Those it does write:
    /// `app.created`, `app.destroyed`, `app.config`, `app.secrets`, `app.scaled`, `app.wanted`, `deploy.phase`,
    /// `instance.started`, `instance.exited`, `route.*`.
    pub async fn event_add(
        &self,
        app: Option<&AppName>,
        deploy: Option<DeployId>,
        kind: &str,
        message: &str,
        now_ms: u64,
    ) -> Result<i64> {
        let mut tx = self.write("record an event").await?;
        let id = tx.event(app, deploy, kind, message, now_ms).await?;
        tx.commit().await?;
        Ok(id)
    }

    /// The events after `after`, oldest first, of one app or of all; at most `limit` and [`EVENTS_AT_ONCE_MAX`].
    pub async fn events_after(&self, after: i64, app: Option<&AppName>, limit: u32) -> Result<Vec<Event>> {
        sqlx::query_as("SELECT * FROM events WHERE id > ?1 AND (?2 IS NULL OR app = ?2) ORDER BY id LIMIT ?3")
            .bind(after)
            .bind(app.map(AppName::as_str))
            .bind(limit.min(EVENTS_AT_ONCE_MAX))
            .fetch_all(&self.readers)
            .await
            .during("read events")
    }

    /// The newest events, oldest of them first; at most `limit` and [`EVENTS_AT_ONCE_MAX`].
    pub async fn events_newest(&self, app: Option<&AppName>, limit: u32) -> Result<Vec<Event>> {
        let mut events: Vec<Event> =
            sqlx::query_as("SELECT * FROM events WHERE (?1 IS NULL OR app = ?1) ORDER BY id DESC LIMIT ?2")
                .bind(app.map(AppName::as_str))
                .bind(limit.min(EVENTS_AT_ONCE_MAX))
                .fetch_all(&self.readers)
                .await
                .during("read events")?;
        events.reverse();
        Ok(events)
    }

    /// Holds the id of the newest event and changes with it.
    pub fn event_signal(&self) -> watch::Receiver<i64> {
        self.newest_event.subscribe()
    }
}

pub(crate) async fn insert(
    db: &mut SqliteConnection,
    app: Option<&AppName>,
    deploy: Option<DeployId>,
    kind: &str,
    message: &str,
    now_ms: u64,
) -> sqlx::Result<i64> {
    let id: i64 = sqlx::query_scalar(
        "INSERT INTO events (at_ms, app, deploy, kind, message) VALUES (?1, ?2, ?3, ?4, ?5) RETURNING id",
    )
    .bind(signed(now_ms))
    .bind(app.map(AppName::as_str))
    .bind(deploy.map(|deploy| deploy.0))
    .bind(kind)
    .bind(cut(message, MESSAGE_BYTES_MAX))
    .fetch_one(&mut *db)
    .await?;
    if id % PRUNE_EVERY == 0 {
        sqlx::query("DELETE FROM events WHERE id <= ?1").bind(id - EVENTS_MAX).execute(db).await?;
    }
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn old_events_go() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("state.db"), &crate::KeyFile::Own(dir.path().join("key")))
            .await
            .unwrap();
        // In one transaction, since each of its own would cost a sync.
        let mut tx = store.write("record many events").await.unwrap();
        for n in 0..EVENTS_MAX + 2 * PRUNE_EVERY + 50 {
            tx.event(None, None, "test.event", &n.to_string(), 1).await.unwrap();
        }
        tx.commit().await.unwrap();
        let count: i64 =
            sqlx::query_scalar("SELECT count(*) FROM events").fetch_one(&store.readers).await.unwrap();
        assert_eq!(count, EVENTS_MAX + 50);
        assert_eq!(store.events_after(0, None, u32::MAX).await.unwrap().len(), EVENTS_AT_ONCE_MAX as usize);
    }
}
