//! Opening the file: connections, migrations, and what to do about a schema from the future.
//!
//! ```text
//!   found < known      migrate, each migration in a transaction of its own
//!   found = known      nothing to do
//!   found = known + 1  run on it: every migration leaves the binary before it able to run (`migrations/0001…`)
//!   found > known + 1  refuse
//! ```

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sqlx::migrate::Migrator;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{ConnectOptions, SqlitePool};
use tokio::sync::watch;

use crate::error::During;
use crate::key::{Key, KeyFile};
use crate::{Result, Store, StoreError};

/// Connections that read while the writer writes.
const READERS: u32 = 4;
/// How long an operation waits for a connection, and a connection for another process that holds a lock: an
/// operator's `sqlite3`, a backup.
const WAIT: Duration = Duration::from_secs(10);
/// The write-ahead log is cut back to this after a checkpoint.
const WAL_BYTES_KEPT: &str = "16777216";

/// The version of the schema in the file, and the newest this binary knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schema {
    pub found: i64,
    pub known: i64,
}

impl Schema {
    /// The file was migrated by the epagent after this one. It runs, and the operator should be told.
    pub fn is_ahead(self) -> bool {
        self.found > self.known
    }

    /// Looks at a file that may be in use, or whose agent is gone; changes nothing.
    pub async fn of(path: &Path) -> Result<Schema> {
        let options = SqliteConnectOptions::new().filename(path).read_only(true).busy_timeout(WAIT);
        let reader =
            pool(options.disable_statement_logging(), 1).await.during("open the state for reading")?;
        let found = applied(&reader).await.during("read the version of the schema")?;
        reader.close().await;
        Ok(Schema { found, known: known() })
    }
}

impl Store {
    /// Opens the state, makes it on the first call, migrates it when it is older.
    ///
    /// A key file of our own is made on the first call as well, and never again: state whose key is gone is refused,
    /// since a new key would lose every secret without a word.
    pub async fn open(path: &Path, key: &KeyFile) -> Result<Store> {
        create_private(path)?;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .journal_mode(SqliteJournalMode::Wal)
            // A step that was answered must survive a power cut; with WAL that is one fsync per transaction.
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(WAIT)
            // What is removed is overwritten: sealed values don't stay in free pages.
            .pragma("secure_delete", "ON")
            .pragma("journal_size_limit", WAL_BYTES_KEPT)
            .disable_statement_logging();
        let writer = pool(options.clone(), 1).await.during("open the state for writing")?;
        let schema = migrate(path, &writer).await?;
        let key = Arc::new(Key::open(key, &writer).await?);
        let readers = pool(options.read_only(true), READERS).await.during("open the state for reading")?;
        let newest: Option<i64> = sqlx::query_scalar("SELECT max(id) FROM events")
            .fetch_one(&readers)
            .await
            .during("read the newest event")?;
        Ok(Store { writer, readers, key, newest_event: watch::Sender::new(newest.unwrap_or(0)), schema })
    }

    pub fn schema(&self) -> Schema {
        self.schema
    }

    /// Waits for running operations and closes the file; SQLite then folds the log into it.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }
}

/// SQLite gives its log and index the mode of the file itself, which must therefore exist first.
fn create_private(path: &Path) -> Result<()> {
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(source) => Err(StoreError::File { operation: "create", path: path.to_owned(), source }),
    }
}

async fn pool(options: SqliteConnectOptions, connections: u32) -> sqlx::Result<SqlitePool> {
    SqlitePoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(WAIT)
        .idle_timeout(None)
        .max_lifetime(None)
        .test_before_acquire(false)
        .connect_with(options)
        .await
}

async fn migrate(path: &Path, writer: &SqlitePool) -> Result<Schema> {
    let mut migrator = migrations();
    let known = known();
    let found = applied(writer).await.during("read the version of the schema")?;
    if found > known + 1 {
        return Err(StoreError::SchemaTooNew { path: path.to_owned(), found, known });
    }
    migrator
        .set_ignore_missing(found > known)
        .run(writer)
        .await
        .map_err(|source| StoreError::Migrate { path: path.to_owned(), source })?;
    Ok(Schema { found: found.max(known), known })
}

fn migrations() -> Migrator {
    sqlx::migrate!()
}

/// The newest migration that this binary has.
fn known() -> i64 {
    migrations().iter().map(|migration| migration.version).max().unwrap_or(0)
}

/// The newest migration in the file; 0 for an empty one.
async fn applied(writer: &SqlitePool) -> sqlx::Result<i64> {
    let tables: i64 =
        sqlx::query_scalar("SELECT count(*) FROM sqlite_schema WHERE name = '_sqlx_migrations'")
            .fetch_one(writer)
            .await?;
    if tables == 0 {
        return Ok(0);
    }
    let newest: Option<i64> =
        sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations").fetch_one(writer).await?;
    Ok(newest.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use sqlx::Row;

    use super::*;

    #[tokio::test]
    async fn every_connection_is_as_durable_and_strict_as_promised() {
        let dir = tempfile::tempdir().unwrap();
        let store =
            Store::open(&dir.path().join("state.db"), &KeyFile::Own(dir.path().join("key"))).await.unwrap();
        // The numbers of SQLite's documentation: synchronous 2 is FULL.
        for (pragma, value) in [
            ("PRAGMA synchronous", "2"),
            ("PRAGMA journal_mode", "wal"),
            ("PRAGMA foreign_keys", "1"),
            ("PRAGMA secure_delete", "1"),
            ("PRAGMA busy_timeout", "10000"),
        ] {
            let row = sqlx::query(pragma).fetch_one(&store.writer).await.unwrap();
            let found = row.try_get_unchecked::<String, _>(0).unwrap();
            assert_eq!(found, value, "{pragma}");
        }
        assert!(sqlx::query("DELETE FROM apps").execute(&store.readers).await.is_err(), "a reader wrote");
    }
}
