//! The one way to write: a transaction that takes its events with it.
//!
//! `BEGIN IMMEDIATE` takes SQLite's write lock at once, so that nothing read inside of it can be stale by the time
//! it is written upon. Dropped before `commit`, also by a cancelled future, all of it is undone.

use epagent_core::name::{AppName, DeployId};
use sqlx::{Sqlite, SqliteConnection, Transaction};
use tokio::sync::watch;

use crate::error::During;
use crate::{Result, Store, event};

pub(crate) struct WriteTx<'s> {
    operation: &'static str,
    transaction: Transaction<'static, Sqlite>,
    last_event: Option<i64>,
    newest_event: &'s watch::Sender<i64>,
}

impl Store {
    pub(crate) async fn write(&self, operation: &'static str) -> Result<WriteTx<'_>> {
        let transaction = self.writer.begin_with("BEGIN IMMEDIATE").await.during(operation)?;
        Ok(WriteTx { operation, transaction, last_event: None, newest_event: &self.newest_event })
    }
}

impl WriteTx<'_> {
    pub(crate) fn db(&mut self) -> &mut SqliteConnection {
        &mut self.transaction
    }

    /// Adds an event that becomes visible with the transaction.
    pub(crate) async fn event(
        &mut self,
        app: Option<&AppName>,
        deploy: Option<DeployId>,
        kind: &str,
        message: &str,
        now_ms: u64,
    ) -> Result<i64> {
        let id = event::insert(&mut self.transaction, app, deploy, kind, message, now_ms)
            .await
            .during(self.operation)?;
        self.last_event = Some(id);
        Ok(id)
    }

    /// Makes all of it durable, then wakes those who wait for events.
    pub(crate) async fn commit(self) -> Result<()> {
        self.transaction.commit().await.during(self.operation)?;
        if let Some(id) = self.last_event {
            self.newest_event.send_replace(id);
        }
        Ok(())
    }
}
