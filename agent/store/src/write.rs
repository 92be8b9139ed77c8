//! The one way to write: a transaction that takes its events with it.
//!
//! `BEGIN IMMEDIATE` takes SQLite's write lock at once, so that nothing read inside of it can be stale by the time
//! it is written upon. A future that is dropped before it commits undoes all of it; from there on it takes place, with
//! its announcement, whether or not anybody waits: a client that hangs up can't leave a change nobody hears of.

use epagent_core::name::{AppName, DeployId};
use sqlx::{Sqlite, SqliteConnection, Transaction};
use tokio::sync::watch;

use crate::error::During;
use crate::{Result, Store, event};

pub(crate) struct WriteTx {
    operation: &'static str,
    transaction: Transaction<'static, Sqlite>,
    last_event: Option<i64>,
    newest_event: watch::Sender<i64>,
}

impl Store {
    pub(crate) async fn write(&self, operation: &'static str) -> Result<WriteTx> {
        let transaction = self.writer.begin_with("BEGIN IMMEDIATE").await.during(operation)?;
        Ok(WriteTx { operation, transaction, last_event: None, newest_event: self.newest_event.clone() })
    }
}

impl WriteTx {
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
        let WriteTx { operation, transaction, last_event, newest_event } = self;
        // A task of its own, since the caller's future may be dropped while SQLite is at it already.
        let commit = tokio::spawn(async move {
            transaction.commit().await?;
            if let Some(id) = last_event {
                newest_event.send_replace(id);
            }
            Ok(())
        });
        // It ends early only when the runtime does.
        commit.await.unwrap_or(Err(sqlx::Error::WorkerCrashed)).during(operation)
    }
}
