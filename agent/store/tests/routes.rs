//! What operators say about routes: the last word stands, and what was said stays to be read.

mod support;

use epagent_core::exit::Exit;
use epagent_core::name::{DeployId, JailId, ReleaseNumber};
use epagent_core::route::Word;
use epagent_core::spec::RouteMatch;
use epagent_store::{NewInstance, RouteDrain, Said, StoreError};
use support::{Home, app};

fn target(text: &str) -> RouteMatch {
    text.parse().unwrap()
}

fn said(why: &str, at_ms: u64) -> Said {
    Said { who: "root".to_owned(), why: why.to_owned(), at_ms }
}

const HOLD: Word = Word::Hold { max_age_ms: 5_000 };

#[tokio::test]
async fn the_last_word_stands_with_who_said_it_and_survives_a_restart() {
    let home = Home::new().await;
    let shop = target("shop.example");
    assert_eq!(home.store.route_say(&shop, &HOLD, &said("move", 10)).await.unwrap(), None);
    let page = Word::Static { status: 503, content_type: "text/html".to_owned(), body: "soon".to_owned() };
    let before = home.store.route_say(&shop, &page, &said("", 20)).await.unwrap().unwrap();
    assert_eq!((before.word, before.said), (HOLD, said("move", 10)));
    home.store.route_say(&target("5432"), &HOLD, &said("", 30)).await.unwrap();

    let home = home.reopened().await;
    let words = home.store.route_words().await.unwrap();
    assert_eq!(words.len(), 2);
    assert_eq!((&words[1].target, &words[1].word), (&shop, &page));
    assert_eq!(words[1].number, before.number, "a route of the operator's keeps its name");
    assert!(home.store.route_unsay(&shop, "route.clear", &said("done", 40)).await.unwrap().is_some());
    assert!(home.store.route_unsay(&shop, "route.clear", &said("", 50)).await.unwrap().is_none());

    let events = home.store.events_newest(None, 10).await.unwrap();
    let told: Vec<(&str, &str)> =
        events.iter().map(|event| (event.kind.as_str(), event.message.as_str())).collect();
    assert_eq!(
        told,
        [
            ("route.hold", "shop.example holds requests, each for 5 s at most, by root: move"),
            ("route.static", "shop.example answers 503 with a page of 4 bytes, by root"),
            ("route.hold", "5432 holds requests, each for 5 s at most, by root"),
            ("route.clear", "shop.example no longer answers 503 with a page of 4 bytes, by root: done"),
        ]
    );
}

#[tokio::test]
async fn words_are_bounded() {
    let home = Home::new().await;
    for port in 1..=epagent_store::route::WORDS_MAX {
        home.store.route_say(&target(&port.to_string()), &HOLD, &said("", 1)).await.unwrap();
    }
    let one_more = home.store.route_say(&target("60000"), &HOLD, &said("", 1)).await;
    assert!(matches!(one_more, Err(StoreError::TooMuch { .. })), "{one_more:?}");
    // Saying another word about one of them is no further word.
    home.store.route_say(&target("7"), &HOLD, &said("again", 2)).await.unwrap();
}

#[tokio::test]
async fn a_drain_of_an_instance_goes_with_the_instance() {
    let home = Home::new().await;
    let store = &home.store;
    store.app_ensure(&app("shop"), 1).await.unwrap();
    let jail = JailId::new(&app("shop"), 1);
    let new = NewInstance {
        jail: jail.clone(),
        app: app("shop"),
        deploy: DeployId(1),
        release: ReleaseNumber(1),
        process: "web".parse().unwrap(),
        index: 0,
        state: "starting".to_owned(),
        restarts: 0,
    };
    store.instance_add(&new, 1).await.unwrap();
    let shop = target("shop.example");
    let drain = |upstream: &str| RouteDrain {
        upstream: upstream.to_owned(),
        target: shop.clone(),
        said: said("", 1),
    };
    assert!(store.route_drain(&drain(jail.as_str())).await.unwrap());
    assert!(!store.route_drain(&drain(jail.as_str())).await.unwrap(), "said twice, it is one");
    assert!(store.route_drain(&drain("10.0.0.1:80")).await.unwrap());
    store.instance_ended(&jail, "exited", &Exit::default(), 2).await.unwrap();
    let left: Vec<String> =
        store.route_drains().await.unwrap().into_iter().map(|drain| drain.upstream).collect();
    assert_eq!(left, ["10.0.0.1:80"]);
    assert_eq!(store.route_undrain(&shop, None, &said("", 3)).await.unwrap(), ["10.0.0.1:80"]);
    assert!(store.route_undrain(&shop, None, &said("", 3)).await.unwrap().is_empty());
}
