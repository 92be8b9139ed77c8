//! The table's loop against a balancer that takes what a test lets it take.

use std::path::Path;

use epagent_core::route::Word;
use epagent_core::spec::RouteMatch;
use epagent_store::{KeyFile, Said};
use epagent_wire::table::{self, Action, Hold, Match, Request, Response, Status};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;

use super::*;

/// A table with a route for this host is refused as a whole.
const BAD_HOST: &str = "bad.example";

/// A balancer that keeps the last table it took.
#[derive(Clone, Default)]
struct Front(Arc<Mutex<Table>>);

impl Front {
    fn listen(path: &Path) -> Self {
        let front = Self::default();
        let listener = UnixListener::bind(path).unwrap();
        let serving = front.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let mut stream = BufReader::new(stream);
                let mut line = String::new();
                stream.read_line(&mut line).await.unwrap();
                let answer = serving.answer(serde_json::from_str(&line).unwrap());
                let line = serde_json::to_string(&answer).unwrap() + "\n";
                stream.write_all(line.as_bytes()).await.unwrap();
            }
        });
        front
    }

    fn answer(&self, request: Request) -> Response {
        let mut taken = self.0.lock().unwrap();
        match request {
            Request::SetTable(table) => {
                let bad = Match::Host(BAD_HOST.to_owned());
                if table.routes.iter().any(|route| route.matches == bad) {
                    let message = "this host will not do".to_owned();
                    return Response::Error(table::Refused { code: BAD_TABLE.to_owned(), message });
                }
                *taken = table;
                Response::Ack(table::Ack { version: taken.version, problems: Vec::new() })
            }
            _ => Response::Status(Box::new(Status { table_version: taken.version, ..Status::default() })),
        }
    }

    fn hosts(&self) -> Vec<String> {
        let routes = &self.0.lock().unwrap().routes;
        routes.iter().map(|route| route.id.clone()).collect()
    }
}

struct World {
    folder: tempfile::TempDir,
    store: Store,
    front: Front,
}

impl World {
    async fn new(apps: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("state.db"), &KeyFile::Own(folder.path().join("key")))
            .await
            .unwrap();
        for name in apps {
            store.app_ensure(&app(name), 1).await.unwrap();
        }
        let front = Front::listen(&folder.path().join("balancer.sock"));
        Self { folder, store, front }
    }

    /// The loop of an agent that was just started.
    async fn routing(&self) -> Routing {
        let apps = self.store.apps().await.unwrap().into_iter().map(|app| app.app).collect();
        let balancer = Balancer::new(&self.folder.path().join("balancer.sock"));
        let routing = Routing::new(balancer, apps, &self.store).await.unwrap();
        let (running, store) = (routing.clone(), self.store.clone());
        tokio::spawn(async move { running.run(store).await });
        routing
    }

    async fn eventually(&self, hosts: &[&str]) {
        let looking = async {
            while self.front.hosts() != hosts {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let found = tokio::time::timeout(Duration::from_secs(10), looking).await;
        assert!(found.is_ok(), "{:?} and not {hosts:?}", self.front.hosts());
    }
}

fn app(name: &str) -> AppName {
    name.parse().unwrap()
}

fn route(id: &str, host: &str) -> Vec<Route> {
    vec![Route {
        id: id.to_owned(),
        matches: Match::Host(host.to_owned()),
        action: Action::Hold {},
        hold: Hold { max_requests: 1, max_age_ms: 1 },
    }]
}

fn by_root() -> Said {
    Said { who: "root".to_owned(), why: String::new(), at_ms: 1 }
}

#[tokio::test]
async fn an_app_whose_routes_are_refused_keeps_its_old_ones_and_holds_back_nobody() {
    let world = World::new(&["a", "b"]).await;
    let routing = world.routing().await;
    routing.hand_in(&app("a"), route("a/1", "a.example"));
    routing.hand_in(&app("b"), route("b/1", "b.example"));
    world.eventually(&["a/1", "b/1"]).await;

    assert!(!routing.hand_in(&app("a"), route("a/2", BAD_HOST)));
    routing.hand_in(&app("b"), route("b/2", "b2.example"));
    world.eventually(&["a/1", "b/2"]).await;
    let told = || routing.hand_in(&app("b"), route("b/2", "b2.example"));
    tokio::time::timeout(Duration::from_secs(10), async {
        while !told() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("the other app's routes are known to be in force");
    assert!(!routing.hand_in(&app("a"), route("a/2", BAD_HOST)), "it is said to be in force");
    let errors = world.store.errors(10).await.unwrap();
    assert_eq!((errors[0].code.as_str(), errors[0].subject.as_str()), ("route_refused", "app a"));

    routing.hand_in(&app("a"), route("a/3", "a3.example"));
    world.eventually(&["a/3", "b/2"]).await;
    assert!(routing.problems().is_empty());
}

#[tokio::test]
async fn an_app_that_cant_be_looked_at_is_stood_in_for_by_what_was_taken() {
    let world = World::new(&["a", "b"]).await;
    let before = world.routing().await;
    before.hand_in(&app("a"), route("a/1", "a.example"));
    before.hand_in(&app("b"), route("b/1", "b.example"));
    world.eventually(&["a/1", "b/1"]).await;
    let recorded = async {
        while world.store.routes_taken().await.unwrap().len() < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), recorded).await.unwrap();

    // The agent is another one from here on, and finds that it can't read `a`.
    let after = world.routing().await;
    after.hand_in(&app("b"), route("b/2", "b2.example"));
    after.stand_in(&app("a"));
    world.eventually(&["a/1", "b/2"]).await;
}

#[tokio::test]
async fn a_word_the_balancer_refuses_is_told_to_who_said_it() {
    let world = World::new(&[]).await;
    let routing = world.routing().await;
    let target: RouteMatch = BAD_HOST.parse().unwrap();
    let source = Source::Word(target.clone());
    let word = Word::Hold { max_age_ms: 1_000 };
    world.store.route_say(&target, &word, &by_root()).await.unwrap();
    let change = routing.reload(&world.store).await.unwrap();
    match routing.settled(change, &source).await {
        Settled::Refused(why) => assert_eq!(why, "this host will not do"),
        _ => panic!("it is not refused"),
    }
    let good: RouteMatch = "good.example".parse().unwrap();
    world.store.route_say(&good, &word, &by_root()).await.unwrap();
    let change = routing.reload(&world.store).await.unwrap();
    assert!(matches!(routing.settled(change, &Source::Word(good)).await, Settled::InForce));
    assert_eq!(world.front.hosts(), ["operator/2"]);
}
