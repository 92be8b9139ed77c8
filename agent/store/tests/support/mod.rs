//! What the store's tests share: a store in a folder of its own, an app's spec, a deploy taken through its phases.

#![allow(dead_code, reason = "each test program uses its part")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use epagent_core::name::{AppName, DeployId};
use epagent_core::phase::Phase;
use epagent_core::spec::{AppSpec, Check, HealthSpec, Limits, ProcessSpec, StopSpec, Strategy};
use epagent_core::verdict::Verdict;
use epagent_store::{Deploy, DeployKind, KeyFile, NewDeploy, Result, Store, Target};
use serde_json::Value;
use tempfile::TempDir;

/// A store on real files, which go with it.
pub struct Home {
    pub dir: TempDir,
    pub store: Store,
}

impl Home {
    pub async fn new() -> Home {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path()).await.unwrap();
        Home { dir, store }
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("state.db")
    }

    /// Closes the store as a brain that ends does, and opens it again.
    pub async fn reopened(self) -> Home {
        self.store.close().await;
        let store = open(self.dir.path()).await.unwrap();
        Home { dir: self.dir, store }
    }

    /// A connection past the store, to look at and to damage what it wrote.
    pub async fn raw(&self) -> sqlx::SqlitePool {
        sqlx::SqlitePool::connect(self.path().to_str().unwrap()).await.unwrap()
    }
}

pub async fn open(dir: &Path) -> Result<Store> {
    Store::open(&dir.join("state.db"), &KeyFile::Own(dir.join("key"))).await
}

pub fn app(name: &str) -> AppName {
    name.parse().unwrap()
}

pub fn spec(name: &str) -> AppSpec {
    let web = ProcessSpec {
        command: "true".to_owned(),
        instances: 1,
        sleep: None,
        listen: Default::default(),
        deploy: Strategy::Overlap,
        stop: StopSpec::default(),
        health: HealthSpec::new(Check::Tcp),
        limits: Limits::default(),
    };
    AppSpec {
        app: app(name),
        image: "py".parse().unwrap(),
        secrets: BTreeSet::new(),
        build: Vec::new(),
        release: None,
        env: BTreeMap::new(),
        processes: [("web".parse().unwrap(), web)].into(),
        volumes: BTreeMap::new(),
        routes: Vec::new(),
    }
}

pub fn new_deploy(name: &str, kind: DeployKind, target: Target) -> NewDeploy {
    NewDeploy { app: app(name), kind, target, progress: Value::Null, note: "begun".to_owned() }
}

pub async fn begin_build(store: &Store, name: &str) -> Result<Deploy> {
    let target = Target::Build(Box::new(spec(name)));
    store.deploy_begin(new_deploy(name, DeployKind::Deploy, target), 1_000).await
}

/// Takes a deploy from `received` to `done`.
pub async fn finish(store: &Store, deploy: &Deploy) {
    use Phase::*;
    let phases: &[Phase] = match deploy.kind {
        DeployKind::Deploy => &[Received, Building, Releasing, Starting, Checking, Switching, Draining, Done],
        _ => &[Received, Starting, Checking, Switching, Draining, Done],
    };
    for pair in phases.windows(2) {
        store.deploy_advance(deploy.id, pair[0], pair[1], "", 2_000).await.unwrap();
    }
}

pub async fn build(store: &Store, name: &str) -> Deploy {
    let deploy = begin_build(store, name).await.unwrap();
    finish(store, &deploy).await;
    deploy
}

pub async fn fail(store: &Store, id: DeployId, from: Phase) {
    store.deploy_fail(id, from, &verdict(from), 3_000).await.unwrap();
}

pub fn verdict(phase: Phase) -> Verdict {
    Verdict {
        phase,
        code: "exited".to_owned(),
        message: "web.0 ended with exit code 1".to_owned(),
        hint: "mend it".to_owned(),
        log: vec!["boom".to_owned()],
    }
}

/// What must hold of the file at any moment: each deploy is where its last step says, and each phase has its event.
pub async fn check_whole(pool: &sqlx::SqlitePool) {
    let wrong: Vec<i64> = sqlx::query_scalar(
        "SELECT id FROM deploys WHERE phase <> (SELECT phase FROM deploy_steps WHERE deploy = id
                                                ORDER BY sequence DESC LIMIT 1)
             OR (SELECT count(*) FROM deploy_steps WHERE deploy = id)
                <> (SELECT count(*) FROM events WHERE deploy = deploys.id AND kind = 'deploy.phase')
             OR NOT EXISTS (SELECT 1 FROM releases WHERE releases.app = deploys.app AND number = release)
             OR (ended_at_ms IS NULL) <> (phase NOT IN ('done', 'failed'))",
    )
    .fetch_all(pool)
    .await
    .unwrap();
    assert!(wrong.is_empty(), "deploys in half states: {wrong:?}");
    let state: Vec<(i64, String, String)> = sqlx::query_as(
        "SELECT id, phase, state FROM deploys JOIN releases ON releases.app = deploys.app AND number = release
         WHERE (phase IN ('received', 'building')) <> (state = 'building')
            OR (phase = 'failed') <> (state = 'failed')",
    )
    .fetch_all(pool)
    .await
    .unwrap();
    assert!(state.is_empty(), "releases that don't fit their deploy: {state:?}");
    let check: String = sqlx::query_scalar("PRAGMA integrity_check").fetch_one(pool).await.unwrap();
    assert_eq!(check, "ok");
}
