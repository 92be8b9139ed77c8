//! Counters that survive a restart, like the version of the balancer's table.

use crate::error::During;
use crate::row::signed;
use crate::{Result, Store};

impl Store {
    /// The counter's value; 0 when it was never raised.
    pub async fn counter(&self, name: &str) -> Result<u64> {
        let value: Option<i64> = sqlx::query_scalar("SELECT value FROM settings WHERE key = ?1")
            .bind(name)
            .fetch_optional(&self.readers)
            .await
            .during("read a counter")?;
        Ok(value.unwrap_or(0).max(0).unsigned_abs())
    }

    /// Raises the counter by one, and to `least` at least, durably; returns its new value.
    pub async fn counter_next(&self, name: &str, least: u64) -> Result<u64> {
        const OPERATION: &str = "raise a counter";
        let mut tx = self.write(OPERATION).await?;
        let value: i64 = sqlx::query_scalar(
            "INSERT INTO settings (key, value) VALUES (?1, max(1, ?2))
             ON CONFLICT (key) DO UPDATE SET value = max(value + 1, ?2) RETURNING value",
        )
        .bind(name)
        .bind(signed(least))
        .fetch_one(tx.db())
        .await
        .during(OPERATION)?;
        tx.commit().await?;
        Ok(value.max(0).unsigned_abs())
    }
}
