//! Processes that sleep: stopped because nobody asked for them. Kept, so that a restart of the agent wakes nobody.

use std::collections::BTreeMap;

use epagent_core::name::{AppName, ProcessName};
use sqlx::sqlite::SqliteRow;

use crate::error::During;
use crate::row::{RowExt, signed};
use crate::{Result, Store, app};

impl Store {
    /// The processes of the app that sleep, and since when.
    pub async fn asleep(&self, app: &AppName) -> Result<BTreeMap<ProcessName, u64>> {
        const OPERATION: &str = "read what sleeps";
        let rows: Vec<SqliteRow> = sqlx::query("SELECT process, since_ms FROM asleep WHERE app = ?1")
            .bind(app.as_str())
            .fetch_all(&self.readers)
            .await
            .during(OPERATION)?;
        rows.iter()
            .map(|row| Ok((row.parsed("process")?, row.unsigned("since_ms")?)))
            .collect::<sqlx::Result<_>>()
            .during(OPERATION)
    }

    /// Nobody asks for the process. Said again, it changes nothing.
    pub async fn sleep_begin(&self, app: &AppName, process: &ProcessName, now_ms: u64) -> Result<()> {
        const OPERATION: &str = "record what sleeps";
        let mut tx = self.write(OPERATION).await?;
        app::require(&mut tx, OPERATION, app).await?;
        let done = sqlx::query(
            "INSERT INTO asleep (app, process, since_ms) VALUES (?1, ?2, ?3)
             ON CONFLICT (app, process) DO NOTHING",
        )
        .bind(app.as_str())
        .bind(process.as_str())
        .bind(signed(now_ms))
        .execute(tx.db())
        .await
        .during(OPERATION)?;
        if done.rows_affected() == 0 {
            return Ok(());
        }
        let message = format!("{process} of {app} sleeps: nobody asks for it");
        tx.event(Some(app), None, "app.asleep", &message, now_ms).await?;
        tx.commit().await
    }

    /// The process, or all of the app's, are not to sleep any more. `why` follows the process's name.
    pub async fn sleep_end(
        &self,
        app: &AppName,
        process: Option<&ProcessName>,
        why: &str,
        now_ms: u64,
    ) -> Result<()> {
        const OPERATION: &str = "record what sleeps no more";
        let mut tx = self.write(OPERATION).await?;
        let woken: Vec<String> = sqlx::query_scalar(
            "DELETE FROM asleep WHERE app = ?1 AND (?2 IS NULL OR process = ?2) RETURNING process",
        )
        .bind(app.as_str())
        .bind(process.map(ProcessName::as_str))
        .fetch_all(tx.db())
        .await
        .during(OPERATION)?;
        if woken.is_empty() {
            return Ok(());
        }
        for process in woken {
            let message = format!("{process} of {app} is woken: {why}");
            tx.event(Some(app), None, "app.woken", &message, now_ms).await?;
        }
        tx.commit().await
    }
}
