//! Instances, volumes, scale, counters, events and errors: what is written is read, and nothing grows without end.

mod support;

use epagent_core::exit::Exit;
use epagent_core::name::{DeployId, JailId, ReleaseNumber};
use epagent_store::{NewInstance, StoreError, Volume, Wanted};
use support::{Home, app};

fn jail(name: &str, n: u64) -> JailId {
    JailId::new(&app(name), n)
}

fn new_instance(name: &str, n: u64) -> NewInstance {
    NewInstance {
        jail: jail(name, n),
        app: app(name),
        deploy: DeployId(1),
        release: ReleaseNumber(1),
        process: "web".parse().unwrap(),
        index: 0,
        state: "starting".to_owned(),
        restarts: 2,
    }
}

#[tokio::test]
async fn an_instance_lives_until_it_ends_and_ends_once() {
    let home = Home::new().await;
    let store = &home.store;
    let result = store.instance_add(&new_instance("shop", 1), 10).await;
    assert!(matches!(result, Err(StoreError::NoApp(_))), "{result:?}");
    store.app_ensure(&app("shop"), 1).await.unwrap();
    store.instance_add(&new_instance("shop", 1), 10).await.unwrap();
    assert!(store.instance_started(&jail("shop", 1), "checking", Some("100.96.0.2"), 20).await.unwrap());
    assert!(store.instance_state(&jail("shop", 1), "healthy").await.unwrap());
    let live = store.instances_live(Some(&app("shop"))).await.unwrap();
    assert_eq!(live.len(), 1);
    assert_eq!((live[0].state.as_str(), live[0].address.as_deref()), ("healthy", Some("100.96.0.2")));
    assert_eq!((live[0].created_at_ms, live[0].started_at_ms, live[0].restarts), (10, Some(20), 2));
    assert!(store.instances_live(Some(&app("other"))).await.unwrap().is_empty());

    let exit = Exit { code: Some(1), at_ms: 30, ..Exit::default() };
    assert!(store.instance_ended(&jail("shop", 1), "exited", &exit, 30).await.unwrap());
    let again = Exit { code: Some(2), ..Exit::default() };
    assert!(!store.instance_ended(&jail("shop", 1), "exited", &again, 40).await.unwrap());
    assert!(!store.instance_state(&jail("shop", 1), "healthy").await.unwrap());
    assert!(!store.instance_started(&jail("shop", 1), "checking", None, 50).await.unwrap());
    assert!(store.instances_live(None).await.unwrap().is_empty());
    let ended = store.instance(&jail("shop", 1)).await.unwrap().unwrap();
    assert_eq!((ended.exit, ended.ended_at_ms), (Some(exit), Some(30)));
    let kinds: Vec<String> =
        store.events_newest(None, 2).await.unwrap().into_iter().map(|event| event.kind).collect();
    assert_eq!(kinds, ["instance.started", "instance.exited"]);
    assert_eq!(store.instance(&jail("shop", 2)).await.unwrap(), None);
}

#[tokio::test]
async fn the_last_ended_instances_of_each_app_are_kept() {
    let home = Home::new().await;
    let store = &home.store;
    let exit = Exit { code: Some(0), ..Exit::default() };
    let kept = u64::try_from(epagent_store::instance::ENDED_KEPT).unwrap();
    for name in ["shop", "other"] {
        store.app_ensure(&app(name), 1).await.unwrap();
        store.instance_add(&new_instance(name, 0), 1).await.unwrap();
        for n in 1..=kept + 5 {
            store.instance_add(&new_instance(name, n), n).await.unwrap();
            store.instance_ended(&jail(name, n), "exited", &exit, n).await.unwrap();
        }
    }
    let ended = store.instances_ended(Some(&app("shop"))).await.unwrap();
    assert_eq!(ended.len() as u64, kept);
    assert_eq!(ended[0].jail, jail("shop", kept + 5));
    assert_eq!(store.instances_ended(None).await.unwrap().len() as u64, 2 * kept);
    assert_eq!(store.instances_live(None).await.unwrap().len(), 2, "a live one was pruned");
}

#[tokio::test]
async fn what_the_operator_said_is_kept() {
    let home = Home::new().await;
    let store = &home.store;
    let shop = app("shop");
    assert!(store.app_ensure(&shop, 5).await.unwrap());
    assert!(!store.app_ensure(&shop, 6).await.unwrap());
    assert_eq!(store.app(&shop).await.unwrap().unwrap().created_at_ms, 5);
    assert_eq!(store.app(&app("nobody")).await.unwrap(), None);
    assert!(store.app_want(&shop, Wanted::Stopped, 7).await.unwrap());
    assert!(matches!(store.app_want(&app("nobody"), Wanted::Stopped, 7).await, Err(StoreError::NoApp(_))));

    store
        .scale_set(&shop, &[("web".parse().unwrap(), 3), ("worker".parse().unwrap(), 0)].into(), 7)
        .await
        .unwrap();
    store.scale_set(&shop, &[("web".parse().unwrap(), 5)].into(), 7).await.unwrap();
    let mut volume = Volume {
        app: shop.clone(),
        volume: "data".parse().unwrap(),
        quota_bytes: 1 << 40,
        path: "/data".into(),
    };
    store.volume_ensure(&volume).await.unwrap();
    volume.quota_bytes = 1 << 30;
    store.volume_ensure(&volume).await.unwrap();

    let home = home.reopened().await;
    let store = &home.store;
    assert_eq!(store.app(&shop).await.unwrap().unwrap().wanted, Wanted::Stopped);
    let scale = store.scale(&shop).await.unwrap();
    assert_eq!(scale, [("web".parse().unwrap(), 5), ("worker".parse().unwrap(), 0)].into());
    assert_eq!(store.volumes(None).await.unwrap(), [volume.clone()]);
    assert!(store.volume_remove(&shop, &volume.volume).await.unwrap());
    assert!(!store.volume_remove(&shop, &volume.volume).await.unwrap());
}

#[tokio::test]
async fn counters_only_rise() {
    let home = Home::new().await;
    assert_eq!(home.store.counter("table").await.unwrap(), 0);
    assert_eq!(home.store.counter_next("table", 0).await.unwrap(), 1);
    assert_eq!(home.store.counter_next("table", 0).await.unwrap(), 2);
    assert_eq!(home.store.counter_next("table", 9).await.unwrap(), 9);
    assert_eq!(home.store.counter_next("table", 3).await.unwrap(), 10);
    let home = home.reopened().await;
    assert_eq!(home.store.counter("table").await.unwrap(), 10);
}

#[tokio::test]
async fn events_are_read_on_from_where_one_stopped() {
    let home = Home::new().await;
    let store = &home.store;
    for n in 0..10 {
        let app = app(if n % 2 == 0 { "even" } else { "odd" });
        store.event_add(Some(&app), Some(DeployId(n)), "test.event", &format!("event {n}"), 1).await.unwrap();
    }
    store.event_add(None, None, "test.event", &"ü".repeat(10_000), 1).await.unwrap();
    let first = store.events_after(0, None, 4).await.unwrap();
    let rest = store.events_after(first[3].id, None, 100).await.unwrap();
    assert_eq!((first.len(), rest.len()), (4, 7));
    assert!(first.iter().chain(&rest).map(|event| event.id).is_sorted());
    assert_eq!(rest[6].message.len(), epagent_store::event::MESSAGE_BYTES_MAX);
    assert_eq!(store.events_after(0, Some(&app("odd")), 100).await.unwrap().len(), 5);
    let newest = store.events_newest(Some(&app("even")), 2).await.unwrap();
    assert_eq!([newest[0].message.as_str(), newest[1].message.as_str()], ["event 6", "event 8"]);
}

#[tokio::test]
async fn equal_errors_are_counted_and_the_oldest_go() {
    let home = Home::new().await;
    let store = &home.store;
    store.error_record("loop_failed", "reconcile", "first", Some("at a"), 10).await.unwrap();
    store.error_record("loop_failed", "reconcile", "second", None, 20).await.unwrap();
    let errors = store.errors(10).await.unwrap();
    assert_eq!(errors.len(), 1);
    assert_eq!((errors[0].count, errors[0].first_at_ms, errors[0].last_at_ms), (2, 10, 20));
    assert_eq!((errors[0].message.as_str(), errors[0].backtrace.as_deref()), ("second", Some("at a")));
    let max = u64::try_from(epagent_store::trouble::ERRORS_MAX).unwrap();
    for n in 0..max + 10 {
        store.error_record("code", &n.to_string(), "message", None, 100 + n).await.unwrap();
    }
    let errors = store.errors(10_000).await.unwrap();
    assert_eq!(errors.len() as u64, max);
    assert_eq!(errors[0].subject, (max + 9).to_string());
    assert!(!errors.iter().any(|error| error.code == "loop_failed"));
}
