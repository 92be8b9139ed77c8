//! Secrets and configuration: nowhere in the clear, bound to their place, there as long as a release needs them.

mod support;

use std::collections::BTreeMap;

use epagent_core::name::ReleaseNumber;
use epagent_store::{DeployKind, SecretChanges, SecretValue, StoreError, Target};
use support::{Home, app, build, finish, new_deploy};

fn set(name: &str, value: &str) -> SecretChanges {
    [(name.to_owned(), Some(SecretValue::new(value.to_owned())))].into()
}

fn exposed(values: &BTreeMap<String, SecretValue>) -> BTreeMap<&str, &str> {
    values.iter().map(|(name, value)| (name.as_str(), value.expose())).collect()
}

#[tokio::test]
async fn a_secret_is_nowhere_in_the_clear() {
    const SECRET: &str = "canary-6f1d0c9e-secret";
    const PLAIN: &str = "canary-6f1d0c9e-plain";
    let home = Home::new().await;
    let store = &home.store;
    let shop = app("shop");
    build(store, "shop").await;
    let changes = set("TOKEN", SECRET);
    let target = Target::Reconfigure {
        config: [("PLAIN".to_owned(), Some(PLAIN.to_owned()))].into(),
        secrets: changes.clone(),
    };
    let new = new_deploy("shop", DeployKind::Config, target);
    let printed = format!("{changes:?} {new:?}");
    assert!(printed.contains(PLAIN) && !printed.contains(SECRET), "{printed}");
    let deploy = store.deploy_begin(new, 1).await.unwrap();
    finish(store, &deploy).await;
    let release = store.release(&shop, deploy.release).await.unwrap().unwrap();
    assert_eq!(exposed(&store.release_secrets(&release).await.unwrap()), [("TOKEN", SECRET)].into());
    let too_long = "canary-6f1d0c9e-secret".repeat(10_000);
    let error = store.secrets_change(&shop, &set("LONG", &too_long), 1).await.unwrap_err();
    assert!(!format!("{error} {error:?}").contains(SECRET));

    // The same search finds what is not a secret, in the log as well as in the file it is folded into.
    let found = |text: &str| -> Vec<String> {
        std::fs::read_dir(home.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap())
            .filter(|entry| {
                std::fs::read(entry.path()).unwrap().windows(text.len()).any(|w| w == text.as_bytes())
            })
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect()
    };
    assert!(found(PLAIN).contains(&"state.db-wal".to_owned()), "{:?}", found(PLAIN));
    assert_eq!(found(SECRET), [""; 0]);
    store.close().await;
    assert_eq!(found(PLAIN), ["state.db"]);
    assert_eq!(found(SECRET), [""; 0]);
}

#[tokio::test]
async fn a_release_keeps_the_versions_it_was_made_with() {
    let home = Home::new().await;
    let store = &home.store;
    let shop = app("shop");
    store.app_ensure(&shop, 1).await.unwrap();
    store.secrets_change(&shop, &set("TOKEN", "one"), 1).await.unwrap();
    build(store, "shop").await;
    store.secrets_change(&shop, &set("TOKEN", "unused"), 2).await.unwrap();
    store.secrets_change(&shop, &set("TOKEN", "three"), 3).await.unwrap();
    build(store, "shop").await;
    store.secrets_change(&shop, &[("TOKEN".to_owned(), None)].into(), 4).await.unwrap();
    assert!(store.secrets(&shop).await.unwrap().is_empty());
    build(store, "shop").await;

    let value = async |number| {
        let release = store.release(&shop, ReleaseNumber(number)).await.unwrap().unwrap();
        let values = store.release_secrets(&release).await?;
        Ok::<_, StoreError>(values.get("TOKEN").map(|value| value.expose().to_owned()))
    };
    assert_eq!(value(1).await.unwrap().as_deref(), Some("one"));
    assert_eq!(value(2).await.unwrap().as_deref(), Some("three"));
    assert_eq!(value(3).await.unwrap(), None);
    let raw = home.raw().await;
    let versions = async || {
        let versions: Vec<i64> =
            sqlx::query_scalar("SELECT version FROM secrets ORDER BY version").fetch_all(&raw).await.unwrap();
        versions
    };
    assert_eq!(versions().await, [1, 3, 4], "what no release uses stays");

    assert!(store.release_remove(&shop, ReleaseNumber(1)).await.unwrap());
    assert_eq!(versions().await, [3, 4]);
    assert!(matches!(value(1).await, Err(StoreError::SecretLost { version: 1, .. })));
    assert!(store.release_remove(&shop, ReleaseNumber(2)).await.unwrap());
    assert_eq!(versions().await, [0; 0], "the mark of a removal hides nothing any more");
}

#[tokio::test]
async fn a_row_that_was_moved_does_not_open() {
    let home = Home::new().await;
    let store = &home.store;
    let raw = home.raw().await;
    for (name, value) in [("shop", "own"), ("evil", "other")] {
        store.app_ensure(&app(name), 1).await.unwrap();
        store.secrets_change(&app(name), &set("TOKEN", value), 1).await.unwrap();
        build(store, name).await;
    }
    sqlx::query(
        "UPDATE secrets SET (nonce, sealed) = (SELECT nonce, sealed FROM secrets WHERE app = 'shop')
         WHERE app = 'evil'",
    )
    .execute(&raw)
    .await
    .unwrap();
    let release = store.release_serving(&app("evil")).await.unwrap().unwrap();
    assert!(matches!(store.release_secrets(&release).await, Err(StoreError::SecretDamaged { .. })));
    let release = store.release_serving(&app("shop")).await.unwrap().unwrap();
    assert_eq!(exposed(&store.release_secrets(&release).await.unwrap()), [("TOKEN", "own")].into());
}

#[tokio::test]
async fn names_and_versions_are_shown_and_values_are_not() {
    let home = Home::new().await;
    let store = &home.store;
    let shop = app("shop");
    store.app_ensure(&shop, 1).await.unwrap();
    store.secrets_change(&shop, &set("B", "1"), 10).await.unwrap();
    store.secrets_change(&shop, &set("A", "1"), 20).await.unwrap();
    store.secrets_change(&shop, &set("B", "2"), 30).await.unwrap();
    let secrets = store.secrets(&shop).await.unwrap();
    let rows: Vec<_> = secrets.iter().map(|s| (s.name.as_str(), s.version, s.set_at_ms)).collect();
    assert_eq!(rows, [("A", 1, 20), ("B", 2, 30)]);
    let events = store.events_newest(Some(&shop), 10).await.unwrap();
    assert_eq!(events.last().unwrap().message, "secrets of shop change: B");
}

#[tokio::test]
async fn too_much_is_refused_and_nothing_is_changed() {
    let home = Home::new().await;
    let store = &home.store;
    let shop = app("shop");
    assert!(matches!(store.secrets_change(&shop, &set("A", "1"), 1).await, Err(StoreError::NoApp(_))));
    store.app_ensure(&shop, 1).await.unwrap();
    let many: SecretChanges = (0..=epagent_store::secret::SECRETS_MAX)
        .map(|n| (format!("S{n}"), Some(SecretValue::new("x".to_owned()))))
        .collect();
    assert!(matches!(store.secrets_change(&shop, &many, 1).await, Err(StoreError::TooMuch { .. })));
    let long = "x".repeat(epagent_store::secret::SECRET_BYTES_MAX + 1);
    assert!(matches!(
        store.secrets_change(&shop, &set("A", &long), 1).await,
        Err(StoreError::TooMuch { .. })
    ));
    assert!(matches!(
        store.secrets_change(&shop, &set("A", "a\0b"), 1).await,
        Err(StoreError::NulByte { .. })
    ));
    assert!(store.secrets(&shop).await.unwrap().is_empty());

    let config = |value: &str| [("A".to_owned(), Some(value.to_owned()))].into();
    let long = "x".repeat(epagent_store::config::CONFIG_BYTES_MAX);
    assert!(matches!(store.config_change(&shop, &config(&long), 1).await, Err(StoreError::TooMuch { .. })));
    let many = (0..=epagent_store::config::CONFIG_NAMES_MAX).map(|n| (format!("V{n}"), Some(String::new())));
    assert!(matches!(store.config_change(&shop, &many.collect(), 1).await, Err(StoreError::TooMuch { .. })));
    assert!(matches!(store.config_change(&shop, &config("a\0"), 1).await, Err(StoreError::NulByte { .. })));
    assert_eq!(store.config(&shop).await.unwrap().unwrap(), Default::default());
    assert_eq!(store.config(&app("nobody")).await.unwrap(), None);
    assert_eq!(store.config_change(&shop, &config("1"), 1).await.unwrap().version, 1);
    assert_eq!(store.config_change(&shop, &[].into(), 1).await.unwrap().version, 1, "no change, no version");
}
