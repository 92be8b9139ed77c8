//! Opening: a new file, an old one, one from the future; the key and what becomes of it.

mod support;

use std::os::unix::fs::PermissionsExt;

use epagent_store::{KeyFile, SecretValue, Store, StoreError};
use support::{Home, app, open};

#[tokio::test]
async fn an_empty_folder_becomes_a_private_state() {
    let home = Home::new().await;
    home.store.app_ensure(&app("shop"), 1).await.unwrap();
    for file in ["state.db", "state.db-wal", "state.db-shm", "key"] {
        let mode = std::fs::metadata(home.dir.path().join(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
    assert_eq!(std::fs::metadata(home.dir.path().join("key")).unwrap().len(), 32);
    assert!(!home.dir.path().join("key.new").exists());
    let schema = home.store.schema();
    assert_eq!((schema.found, schema.is_ahead()), (schema.known, false));
    let home = home.reopened().await;
    assert_eq!(home.store.apps().await.unwrap().len(), 1);
}

#[tokio::test]
async fn one_version_ahead_runs_and_says_so() {
    let home = Home::new().await;
    home.store.app_ensure(&app("shop"), 1).await.unwrap();
    pretend_migrated(&home, 1).await;
    let home = home.reopened().await;
    assert!(home.store.schema().is_ahead());
    assert_eq!(home.store.apps().await.unwrap().len(), 1);
    home.store.app_ensure(&app("other"), 2).await.unwrap();
}

#[tokio::test]
async fn two_versions_ahead_is_refused() {
    let home = Home::new().await;
    pretend_migrated(&home, 1).await;
    pretend_migrated(&home, 2).await;
    home.store.close().await;
    let before = std::fs::read(home.path()).unwrap();
    let error = open(home.dir.path()).await.err().unwrap();
    assert!(matches!(error, StoreError::SchemaTooNew { .. }), "{error}");
    assert!(error.to_string().contains("start the newer epagent"), "{error}");
    assert_eq!(std::fs::read(home.path()).unwrap(), before, "refusing changed the file");
}

#[tokio::test]
async fn an_edited_migration_is_refused() {
    let home = Home::new().await;
    let raw = home.raw().await;
    sqlx::query("UPDATE _sqlx_migrations SET checksum = x'00'").execute(&raw).await.unwrap();
    raw.close().await;
    home.store.close().await;
    assert!(matches!(open(home.dir.path()).await, Err(StoreError::Migrate { .. })));
}

#[tokio::test]
async fn state_without_its_key_is_refused_and_no_key_is_made() {
    let home = Home::new().await;
    home.store.close().await;
    let key = home.dir.path().join("key");
    let bytes = std::fs::read(&key).unwrap();
    std::fs::remove_file(&key).unwrap();
    let error = open(home.dir.path()).await.err().unwrap();
    assert!(matches!(error, StoreError::KeyMissing { .. }), "{error}");
    assert!(!key.exists());

    write_key(&key, &[7; 32], 0o600);
    assert!(matches!(open(home.dir.path()).await, Err(StoreError::KeyWrong { .. })));
    for bytes in [&[][..], &[7; 31], &[7; 33]] {
        write_key(&key, bytes, 0o600);
        assert!(matches!(open(home.dir.path()).await, Err(StoreError::KeyFile { .. })), "{}", bytes.len());
    }
    write_key(&key, &bytes, 0o640);
    let error = open(home.dir.path()).await.err().unwrap().to_string();
    assert!(error.contains("can be read by others"), "{error}");
    write_key(&key, &bytes, 0o600);
    open(home.dir.path()).await.unwrap();
}

#[tokio::test]
async fn a_key_that_is_given_is_read_and_never_made() {
    let dir = tempfile::tempdir().unwrap();
    let (state, key) = (dir.path().join("state.db"), dir.path().join("given"));
    let given = KeyFile::Given(key.clone());
    assert!(matches!(Store::open(&state, &given).await, Err(StoreError::KeyMissing { .. })));
    assert!(!key.exists());
    // A credential's mode shows the mask of its access list.
    write_key(&key, &[7; 32], 0o440);
    Store::open(&state, &given).await.unwrap().close().await;
    Store::open(&state, &given).await.unwrap().close().await;
    std::fs::remove_file(&key).unwrap();
    write_key(&key, &[8; 32], 0o440);
    assert!(matches!(Store::open(&state, &given).await, Err(StoreError::KeyWrong { .. })));
}

#[tokio::test]
async fn a_first_start_that_was_cut_is_finished() {
    // Cut while the key was written under its other name.
    let dir = tempfile::tempdir().unwrap();
    write_key(&dir.path().join("key.new"), &[1; 5], 0o600);
    open(dir.path()).await.unwrap().close().await;
    assert!(!dir.path().join("key.new").exists());

    // Cut between the key and the row that knows it.
    let home = Home::new().await;
    let raw = home.raw().await;
    sqlx::query("DELETE FROM key_check").execute(&raw).await.unwrap();
    raw.close().await;
    let home = home.reopened().await;
    home.store.app_ensure(&app("shop"), 1).await.unwrap();
    let changes = [("A".to_owned(), Some(SecretValue::new("1".to_owned())))].into();
    home.store.secrets_change(&app("shop"), &changes, 1).await.unwrap();
    home.reopened().await;

    // Cut after the key got its name and before the other one went.
    let home = Home::new().await;
    std::fs::hard_link(home.dir.path().join("key"), home.dir.path().join("key.new")).unwrap();
    let home = home.reopened().await;
    assert!(!home.dir.path().join("key.new").exists());
}

fn write_key(path: &std::path::Path, bytes: &[u8], mode: u32) {
    std::fs::write(path, bytes).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// Writes down that the epagent `ahead` versions after this one was here.
async fn pretend_migrated(home: &Home, ahead: i64) {
    let raw = home.raw().await;
    sqlx::query(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
         VALUES (?1, 'later', 1, x'00', 0)",
    )
    .bind(home.store.schema().known + ahead)
    .execute(&raw)
    .await
    .unwrap();
    raw.close().await;
}
