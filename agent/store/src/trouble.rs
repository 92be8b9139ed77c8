//! The shared error table: every failure of the agent, one row per code and subject, counted.

use sqlx::sqlite::SqliteRow;
use sqlx::{FromRow, Row};

use crate::error::During;
use crate::row::{RowExt, cut, signed};
use crate::{Result, Store};

/// Rows that are kept, those seen last.
pub const ERRORS_MAX: i64 = 1_000;
/// Longer messages are cut.
pub const MESSAGE_BYTES_MAX: usize = 4 << 10;
/// Longer backtraces are cut.
pub const BACKTRACE_BYTES_MAX: usize = 16 << 10;
/// Longer codes and subjects are cut.
pub const SUBJECT_BYTES_MAX: usize = 256;

/// A row of the error table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// Stable; `epagent explain CODE` tells more.
    pub code: String,
    /// What it happened to: an app, a loop, a file.
    pub subject: String,
    /// As it was the last time.
    pub message: String,
    pub backtrace: Option<String>,
    pub count: u64,
    pub first_at_ms: u64,
    pub last_at_ms: u64,
}

impl FromRow<'_, SqliteRow> for Trouble {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        Ok(Trouble {
            code: row.try_get("code")?,
            subject: row.try_get("subject")?,
            message: row.try_get("message")?,
            backtrace: row.try_get("backtrace")?,
            count: row.unsigned("count")?,
            first_at_ms: row.unsigned("first_at_ms")?,
            last_at_ms: row.unsigned("last_at_ms")?,
        })
    }
}

impl Store {
    /// Adds a failure, or counts one that is known. The last message and backtrace win.
    pub async fn error_record(
        &self,
        code: &str,
        subject: &str,
        message: &str,
        backtrace: Option<&str>,
        now_ms: u64,
    ) -> Result<()> {
        const OPERATION: &str = "record an error";
        let mut tx = self.write(OPERATION).await?;
        sqlx::query(
            "INSERT INTO errors (code, subject, message, backtrace, count, first_at_ms, last_at_ms)
             VALUES (?1, ?2, ?3, ?4, 1, ?5, ?5)
             ON CONFLICT (code, subject) DO UPDATE SET
                 message = excluded.message, backtrace = coalesce(excluded.backtrace, backtrace),
                 count = count + 1, last_at_ms = max(last_at_ms, excluded.last_at_ms)",
        )
        .bind(cut(code, SUBJECT_BYTES_MAX))
        .bind(cut(subject, SUBJECT_BYTES_MAX))
        .bind(cut(message, MESSAGE_BYTES_MAX))
        .bind(backtrace.map(|text| cut(text, BACKTRACE_BYTES_MAX)))
        .bind(signed(now_ms))
        .execute(tx.db())
        .await
        .during(OPERATION)?;
        sqlx::query(
            "DELETE FROM errors WHERE (code, subject) IN
                 (SELECT code, subject FROM errors ORDER BY last_at_ms DESC LIMIT -1 OFFSET ?1)",
        )
        .bind(ERRORS_MAX)
        .execute(tx.db())
        .await
        .during(OPERATION)?;
        tx.commit().await
    }

    /// The error table, seen last first; at most `limit`.
    pub async fn errors(&self, limit: u32) -> Result<Vec<Trouble>> {
        sqlx::query_as("SELECT * FROM errors ORDER BY last_at_ms DESC, code, subject LIMIT ?1")
            .bind(limit)
            .fetch_all(&self.readers)
            .await
            .during("read the error table")
    }
}
