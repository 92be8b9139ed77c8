//! Deploys and releases: one at a time, each step durable, and always an answer to what serves.

mod support;

use epagent_core::name::ReleaseNumber;
use epagent_core::phase::Phase;
use epagent_store::{DeployKind, ReleaseState, StoreError, Target, Wanted};
use serde_json::json;
use support::{Home, app, begin_build, build, check_whole, fail, finish, new_deploy, spec, verdict};

#[tokio::test]
async fn a_deploy_goes_through_its_phases_and_tells_of_each() {
    let home = Home::new().await;
    let store = &home.store;
    let mut signal = store.event_signal();
    let deploy = begin_build(store, "shop").await.unwrap();
    assert_eq!(
        (deploy.phase, deploy.release, deploy.kind),
        (Phase::Received, ReleaseNumber(1), DeployKind::Deploy)
    );
    assert!(signal.has_changed().unwrap());
    assert_eq!(store.deploy_under_way(&app("shop")).await.unwrap(), Some(deploy.clone()));
    assert_eq!(store.release_serving(&app("shop")).await.unwrap(), None);
    assert_eq!(
        store.release(&app("shop"), deploy.release).await.unwrap().unwrap().state,
        ReleaseState::Building
    );

    finish(store, &deploy).await;
    let done = store.deploy(deploy.id).await.unwrap().unwrap();
    assert_eq!((done.phase, done.ended_at_ms), (Phase::Done, Some(2_000)));
    let steps = store.deploy_steps(deploy.id, 0).await.unwrap();
    assert_eq!(steps.len(), 8);
    assert!(steps.iter().map(|step| step.sequence).eq(1..=8));
    assert_eq!(store.deploy_steps(deploy.id, 6).await.unwrap().len(), 2);
    let events = store.events_after(0, Some(&app("shop")), 100).await.unwrap();
    let phases = events.iter().filter(|event| event.kind == "deploy.phase").count();
    assert_eq!(phases, 8, "{events:#?}");
    assert_eq!(*signal.borrow_and_update(), events.last().unwrap().id);
    let serving = store.release_serving(&app("shop")).await.unwrap().unwrap();
    assert_eq!(
        (serving.number, serving.state, serving.tree),
        (deploy.release, ReleaseState::Ready, deploy.release)
    );
    assert_eq!(serving.spec, spec("shop"));
    check_whole(&home.raw().await).await;
}

#[tokio::test]
async fn an_app_has_one_deploy_at_a_time() {
    let home = Home::new().await;
    let first = begin_build(&home.store, "shop").await.unwrap();
    match begin_build(&home.store, "shop").await {
        Err(StoreError::DeployUnderWay { deploy, .. }) => assert_eq!(deploy, first.id),
        other => panic!("{other:?}"),
    }
    assert_eq!(
        home.store.releases(&app("shop")).await.unwrap().len(),
        1,
        "the refused deploy left a release"
    );
    begin_build(&home.store, "other").await.unwrap();
    finish(&home.store, &first).await;
    let second = begin_build(&home.store, "shop").await.unwrap();
    assert_eq!(second.release, ReleaseNumber(2));
    // The index holds also against code that does not ask first.
    let raw = home.raw().await;
    let insert = "INSERT INTO deploys (app, kind, release, phase, created_at_ms, progress)
                  VALUES ('shop', 'deploy', 2, 'building', 1, 'null')";
    assert!(sqlx::query(insert).execute(&raw).await.is_err());
}

#[tokio::test]
async fn a_step_the_phases_do_not_allow_changes_nothing() {
    let home = Home::new().await;
    let deploy = begin_build(&home.store, "shop").await.unwrap();
    for (from, to) in [
        (Phase::Received, Phase::Done),
        (Phase::Received, Phase::Received),
        (Phase::Building, Phase::Releasing),
        (Phase::Draining, Phase::Done),
    ] {
        let result = home.store.deploy_advance(deploy.id, from, to, "", 1).await;
        assert!(matches!(result, Err(StoreError::WrongPhase { .. })), "{from} to {to}: {result:?}");
    }
    assert_eq!(home.store.deploy(deploy.id).await.unwrap().unwrap(), deploy);
    assert_eq!(home.store.deploy_steps(deploy.id, 0).await.unwrap().len(), 1);
    finish(&home.store, &deploy).await;
    let result = home.store.deploy_fail(deploy.id, Phase::Done, &verdict(Phase::Done), 1).await;
    assert!(matches!(result, Err(StoreError::WrongPhase { .. })), "a deploy that is done failed");
}

#[tokio::test]
async fn a_failed_deploy_leaves_what_served() {
    let home = Home::new().await;
    let store = &home.store;
    let first = build(store, "shop").await;
    let second = begin_build(store, "shop").await.unwrap();
    store.deploy_advance(second.id, Phase::Received, Phase::Building, "", 1).await.unwrap();
    fail(store, second.id, Phase::Building).await;
    let failed = store.deploy(second.id).await.unwrap().unwrap();
    assert_eq!(failed.verdict, Some(verdict(Phase::Building)));
    assert_eq!(
        store.release(&app("shop"), second.release).await.unwrap().unwrap().state,
        ReleaseState::Failed
    );
    assert_eq!(store.release_serving(&app("shop")).await.unwrap().unwrap().number, first.release);
    assert_eq!(store.deploy_serving(&app("shop")).await.unwrap().unwrap().id, first.id);
    assert_eq!(store.trees_in_use(&app("shop")).await.unwrap(), [first.release].into());

    // Nor does a restart that fails take away the release it restarts.
    let restart = new_deploy("shop", DeployKind::Restart, Target::Release(first.release));
    let restart = store.deploy_begin(restart, 1).await.unwrap();
    fail(store, restart.id, Phase::Received).await;
    assert_eq!(store.release(&app("shop"), first.release).await.unwrap().unwrap().state, ReleaseState::Ready);

    let target = Target::Release(second.release);
    let result = store.deploy_begin(new_deploy("shop", DeployKind::Rollback, target), 1).await;
    assert!(matches!(result, Err(StoreError::NoRelease { .. })), "a failed release was deployed");
}

#[tokio::test]
async fn a_rollback_goes_to_what_served_before() {
    let home = Home::new().await;
    let store = &home.store;
    let shop = app("shop");
    build(store, "shop").await;
    assert_eq!(store.release_previous(&shop).await.unwrap(), None);
    build(store, "shop").await;
    let failed = begin_build(store, "shop").await.unwrap();
    fail(store, failed.id, Phase::Received).await;
    let previous = store.release_previous(&shop).await.unwrap().unwrap();
    assert_eq!(previous.number, ReleaseNumber(1));
    let rollback = new_deploy("shop", DeployKind::Rollback, Target::Release(previous.number));
    finish(store, &store.deploy_begin(rollback, 1).await.unwrap()).await;
    assert_eq!(store.release_serving(&shop).await.unwrap().unwrap().number, ReleaseNumber(1));
    assert_eq!(store.release_previous(&shop).await.unwrap().unwrap().number, ReleaseNumber(2));
    assert_eq!(build(store, "shop").await.release, ReleaseNumber(4), "a number was given twice");
}

#[tokio::test]
async fn a_change_of_configuration_is_a_release_on_the_same_tree() {
    let home = Home::new().await;
    let store = &home.store;
    let shop = app("shop");
    store.app_ensure(&shop, 1).await.unwrap();
    let nothing = Target::Reconfigure { config: [].into(), secrets: [].into() };
    let result = store.deploy_begin(new_deploy("shop", DeployKind::Config, nothing), 1).await;
    assert!(matches!(result, Err(StoreError::NothingServes(_))), "{result:?}");
    store.config_change(&shop, &[("A".to_owned(), Some("1".to_owned()))].into(), 1).await.unwrap();
    build(store, "shop").await;

    let config = [("A".to_owned(), None), ("B".to_owned(), Some("2".to_owned()))].into();
    let target = Target::Reconfigure { config, secrets: [].into() };
    let deploy = store.deploy_begin(new_deploy("shop", DeployKind::Config, target), 1).await.unwrap();
    let release = store.release(&shop, deploy.release).await.unwrap().unwrap();
    assert_eq!((release.number, release.tree), (ReleaseNumber(2), ReleaseNumber(1)));
    assert_eq!((release.state, release.config_version), (ReleaseState::Ready, 2));
    assert_eq!(release.config, [("B".to_owned(), "2".to_owned())].into());
    let first = store.release(&shop, ReleaseNumber(1)).await.unwrap().unwrap();
    assert_eq!(first.config, [("A".to_owned(), "1".to_owned())].into());

    // A second one is refused as a whole: the configuration stays as it is.
    let config = [("C".to_owned(), Some("3".to_owned()))].into();
    let target = Target::Reconfigure { config, secrets: [].into() };
    let result = store.deploy_begin(new_deploy("shop", DeployKind::Config, target), 1).await;
    assert!(matches!(result, Err(StoreError::DeployUnderWay { .. })));
    assert!(!store.config(&shop).await.unwrap().unwrap().values.contains_key("C"));
    finish(store, &deploy).await;
    assert_eq!(store.trees_in_use(&shop).await.unwrap(), [ReleaseNumber(1)].into());
    assert!(store.release_remove(&shop, ReleaseNumber(1)).await.unwrap());
    assert_eq!(store.trees_in_use(&shop).await.unwrap(), [ReleaseNumber(1)].into(), "release 2 runs on it");
}

#[tokio::test]
async fn what_serves_or_is_deployed_is_not_removed() {
    let home = Home::new().await;
    let store = &home.store;
    let shop = app("shop");
    build(store, "shop").await;
    build(store, "shop").await;
    assert!(!store.release_remove(&shop, ReleaseNumber(2)).await.unwrap());
    let rollback = new_deploy("shop", DeployKind::Rollback, Target::Release(ReleaseNumber(1)));
    let rollback = store.deploy_begin(rollback, 1).await.unwrap();
    assert!(!store.release_remove(&shop, ReleaseNumber(1)).await.unwrap());
    fail(store, rollback.id, Phase::Received).await;
    assert!(store.release_remove(&shop, ReleaseNumber(1)).await.unwrap());
    assert!(!store.release_remove(&shop, ReleaseNumber(1)).await.unwrap());
    assert_eq!(store.release_previous(&shop).await.unwrap(), None);
}

#[tokio::test]
async fn a_release_is_immutable() {
    let home = Home::new().await;
    build(&home.store, "shop").await;
    let raw = home.raw().await;
    for change in ["spec = '{}'", "config = '{}'", "secrets = '{}'", "image = 'x'", "tree = 9", "number = 9"]
    {
        let update = sqlx::AssertSqlSafe(format!("UPDATE releases SET {change}"));
        let error = sqlx::query(update).execute(&raw).await.unwrap_err().to_string();
        assert!(error.contains("a release is immutable"), "{change}: {error}");
    }
}

#[tokio::test]
async fn a_brain_that_starts_again_knows_where_it_was() {
    let home = Home::new().await;
    let deploy = begin_build(&home.store, "shop").await.unwrap();
    home.store.deploy_advance(deploy.id, Phase::Received, Phase::Building, "2 commands", 5).await.unwrap();
    home.store.deploy_progress(deploy.id, &json!({"command": 1, "jail": "shop-abcdefgh"})).await.unwrap();
    home.store.deploy_note(deploy.id, "pip install", 6).await.unwrap();
    build(&home.store, "other").await;
    let home = home.reopened().await;
    let unfinished = home.store.deploys_unfinished().await.unwrap();
    assert_eq!(unfinished.len(), 1);
    assert_eq!((unfinished[0].id, unfinished[0].phase), (deploy.id, Phase::Building));
    assert_eq!(unfinished[0].progress["command"], 1);
    let steps = home.store.deploy_steps(deploy.id, 1).await.unwrap();
    assert_eq!((steps[1].note.as_str(), steps[1].phase), ("pip install", Phase::Building));
}

#[tokio::test]
async fn a_removed_app_leaves_its_events_and_nothing_else() {
    let home = Home::new().await;
    let store = &home.store;
    let shop = app("shop");
    let deploy = build(store, "shop").await;
    store.config_change(&shop, &[("A".to_owned(), Some("1".to_owned()))].into(), 1).await.unwrap();
    store.scale_set(&shop, &[("web".parse().unwrap(), 3)].into(), 1).await.unwrap();

    assert!(store.app_want(&shop, Wanted::Removed, 1).await.unwrap());
    assert!(!store.app_want(&shop, Wanted::Removed, 1).await.unwrap());
    assert!(matches!(store.app_want(&shop, Wanted::Running, 1).await, Err(StoreError::AppRemoved(_))));
    assert!(matches!(begin_build(store, "shop").await, Err(StoreError::AppRemoved(_))));
    assert!(store.app_remove(&shop, 1).await.unwrap());
    assert!(!store.app_remove(&shop, 1).await.unwrap());

    let raw = home.raw().await;
    for table in
        ["apps", "releases", "config", "secrets", "deploys", "deploy_steps", "instances", "scale", "volumes"]
    {
        let count = sqlx::AssertSqlSafe(format!("SELECT count(*) FROM {table}"));
        let count: i64 = sqlx::query_scalar(count).fetch_one(&raw).await.unwrap();
        assert_eq!(count, 0, "{table}");
    }
    let events = store.events_newest(Some(&shop), 100).await.unwrap();
    assert_eq!(events.last().unwrap().kind, "app.destroyed");
    let again = begin_build(store, "shop").await.unwrap();
    assert!(again.id > deploy.id, "the number of a deploy was given twice");
}

#[tokio::test]
async fn old_deploys_go_but_what_serves_is_never_forgotten() {
    let home = Home::new().await;
    let store = &home.store;
    let shop = app("shop");
    build(store, "shop").await;
    build(store, "shop").await;
    for _ in 0..epagent_store::deploy::DEPLOYS_KEPT + 20 {
        let deploy = begin_build(store, "shop").await.unwrap();
        fail(store, deploy.id, Phase::Received).await;
    }
    assert_eq!(store.release_serving(&shop).await.unwrap().unwrap().number, ReleaseNumber(2));
    assert_eq!(store.release_previous(&shop).await.unwrap().unwrap().number, ReleaseNumber(1));
    let kept = usize::try_from(epagent_store::deploy::DEPLOYS_KEPT).unwrap() + 2;
    assert_eq!(store.deploys(Some(&shop), 1_000).await.unwrap().len(), kept);
    assert_eq!(store.releases(&shop).await.unwrap().len(), kept);
    check_whole(&home.raw().await).await;
}
