//! Health in the balancer itself: who gets traffic, what checks say, and what happens when nobody can have any.

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::app::{App, respond};
use common::client::Client;
use common::{Balancer, free_address, poll, until};
use epagent_balancer::control::protocol::{FleetStatus, HealthStatus, ShownHealth};

const CHECK: &str = r#""health":{"active":{"check":{"http":{"path":"/healthz"}},"interval_ms":50,"timeout_ms":300,"rise":2,"fall":2}}"#;

/// One route for every host, with these settings of its proxy action.
fn route(settings: &str, upstreams: &[(&str, SocketAddr, &str)]) -> String {
    let member = |(id, address, state): &(&str, SocketAddr, &str)| {
        format!(r#"{{"id":"{id}","address":"{address}","state":"{state}"}}"#)
    };
    let members: Vec<String> = upstreams.iter().map(member).collect();
    format!(
        r#"{{"id":"shop","match":{{"host":"*"}},"action":{{"proxy":{{{settings},"upstreams":[{}]}}}}}}"#,
        members.join(",")
    )
}

/// An app whose checks, and whose other requests, are answered with what is set.
struct Patient {
    app: App,
    health: Arc<AtomicU64>,
    status: Arc<AtomicU64>,
    checks: Arc<AtomicU64>,
    served: Arc<AtomicU64>,
}

impl Patient {
    fn new(health: u64) -> Self {
        let (health, status) = (Arc::new(AtomicU64::new(health)), Arc::new(AtomicU64::new(200)));
        let (checks, served) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let shared = (health.clone(), status.clone(), checks.clone(), served.clone());
        let app = App::start(move |request, stream| {
            let (health, status, checks, served) = &shared;
            let is_check = request.path() == "/healthz";
            let (count, status) = if is_check { (checks, health) } else { (served, status) };
            count.fetch_add(1, Ordering::SeqCst);
            match status.load(Ordering::SeqCst) {
                200 => respond(stream, b"all is well"),
                0 => {
                    std::thread::sleep(Duration::from_secs(1));
                    false
                }
                status => {
                    use std::io::Write;
                    let head = format!("HTTP/1.1 {status} Because\r\nContent-Length: 0\r\n\r\n");
                    stream.write_all(head.as_bytes()).is_ok()
                }
            }
        });
        Self { app, health, status, checks, served }
    }

    fn set_health(&self, status: u64) {
        self.health.store(status, Ordering::SeqCst);
    }

    fn served(&self) -> u64 {
        self.served.load(Ordering::SeqCst)
    }
}

fn health(balancer: &Balancer, id: &str) -> HealthStatus {
    balancer.upstream(id).health.expect("it is checked")
}

fn fleet(balancer: &Balancer) -> FleetStatus {
    balancer.status().routes.remove(0).fleet
}

fn get(balancer: &Balancer) -> (u16, Option<String>) {
    let response = Client::connect(balancer.http).get("shop.example", "/");
    (response.status, response.field("x-epagent-error").map(str::to_owned))
}

#[test]
fn a_new_upstream_gets_nothing_until_it_has_proven_itself() {
    let new = Patient::new(503);
    let balancer = Balancer::start(&[]);
    balancer.routes(&route(CHECK, &[("new", new.app.address, "up")]));
    let mut client = Client::connect(balancer.http);
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    until("it has been checked", || health(&balancer, "new").failed_total >= 3);
    let shown = health(&balancer, "new");
    assert_eq!(shown.last, "GET /healthz answered 503, expected 200-399");
    assert_eq!((shown.state, shown.passed_total), (ShownHealth::Failing, 0));
    assert_eq!((new.served(), balancer.status().routes[0].held), (0, 1));
    assert_eq!((fleet(&balancer).up, fleet(&balancer).usable), (1, 0));
    new.set_health(200);
    assert_eq!(client.read().status, 200);
    assert!(health(&balancer, "new").passed_total >= 2);
    assert_eq!(fleet(&balancer).usable, 1);
}

#[test]
fn an_upstream_that_fails_its_checks_is_left_alone_until_it_passes_them() {
    let (sick, well) = (Patient::new(200), Patient::new(200));
    let balancer = Balancer::start(&[]);
    balancer.routes(&route(CHECK, &[("sick", sick.app.address, "up"), ("well", well.app.address, "up")]));
    until("both are proven", || fleet(&balancer).usable == 2);
    sick.set_health(500);
    until("it has failed", || health(&balancer, "sick").state == ShownHealth::Failing);
    let before = sick.served();
    for _ in 0..20 {
        assert_eq!(get(&balancer).0, 200);
    }
    assert_eq!((sick.served(), well.served()), (before, 20));
    sick.set_health(200);
    until("it is back", || fleet(&balancer).usable == 2);
    for _ in 0..20 {
        assert_eq!(get(&balancer).0, 200);
    }
    assert!(sick.served() > before);
}

#[test]
fn checks_go_to_upstreams_that_are_up_and_to_no_others() {
    let patient = Patient::new(200);
    let balancer = Balancer::start(&[]);
    let table = |state| balancer.routes(&route(CHECK, &[("p", patient.app.address, state)]));
    let checks = || patient.checks.load(Ordering::SeqCst);
    for state in ["down", "draining"] {
        table("up");
        until("it is checked", || health(&balancer, "p").passed_total > 0);
        table(state);
        assert_eq!(balancer.upstream("p").health, None);
        let before = checks();
        std::thread::sleep(Duration::from_millis(200));
        // One may have been at work.
        assert!(checks() <= before + 1, "{} checks of one that is {state}", checks() - before);
    }
}

#[test]
fn a_check_that_is_refused_or_late_says_so() {
    let dead = free_address();
    let silent = Patient::new(0);
    let balancer = Balancer::start(&[]);
    balancer.routes(&route(CHECK, &[("dead", dead, "up"), ("silent", silent.app.address, "up")]));
    let last = |id| {
        poll("it is checked", || Some(health(&balancer, id)).filter(|health| health.failed_total > 0)).last
    };
    assert_eq!(last("dead"), "refused");
    assert_eq!(last("silent"), "timed out after 300 ms: no answer");
    let tcp = CHECK.replace(r#"{"http":{"path":"/healthz"}}"#, r#""tcp""#);
    balancer.routes(&route(&tcp, &[("dead", dead, "up"), ("silent", silent.app.address, "up")]));
    until("to accept is enough", || health(&balancer, "silent").state == ShownHealth::Passing);
    assert_eq!(health(&balancer, "silent").last, "passed");
    assert_ne!(health(&balancer, "dead").state, ShownHealth::Passing);
}

#[test]
fn a_check_may_want_words_in_the_body() {
    let patient = Patient::new(200);
    let balancer = Balancer::start(&[]);
    let wanting = |text: &str| CHECK.replace(r#""/healthz""#, &format!(r#""/healthz","body":"{text}""#));
    balancer.routes(&route(&wanting("all is well"), &[("p", patient.app.address, "up")]));
    until("it passes", || health(&balancer, "p").state == ShownHealth::Passing);
    balancer.routes(&route(&wanting("all is lost"), &[("p", patient.app.address, "up")]));
    until("it fails", || health(&balancer, "p").state == ShownHealth::Failing);
    assert_eq!(health(&balancer, "p").last, r#"GET /healthz answered without "all is lost""#);
}

#[test]
fn one_that_serves_is_not_stopped_by_a_check_that_is_new_to_it() {
    let patient = Patient::new(200);
    let balancer = Balancer::start(&[]);
    balancer.routes(&route(r#""algorithm":"round_robin""#, &[("p", patient.app.address, "up")]));
    assert_eq!(get(&balancer).0, 200);
    let slow = CHECK.replace(r#""rise":2"#, r#""rise":1000"#);
    balancer.routes(&route(&slow, &[("p", patient.app.address, "up")]));
    assert_eq!(get(&balancer).0, 200);
    assert_eq!(health(&balancer, "p").state, ShownHealth::Passing);
}

#[test]
fn an_upstream_whose_traffic_fails_is_ejected_for_a_while() {
    let (sick, well) = (Patient::new(200), Patient::new(200));
    sick.status.store(500, Ordering::SeqCst);
    let balancer = Balancer::start(&[]);
    let passive = r#""algorithm":"round_robin","health":{"passive":{"failures":3,"ejection_ms":500}}"#;
    balancer.routes(&route(passive, &[("sick", sick.app.address, "up"), ("well", well.app.address, "up")]));
    while sick.served() < 3 {
        get(&balancer);
    }
    let shown = fleet(&balancer);
    assert_eq!((shown.usable, shown.ejected.len(), shown.ejected[0].upstream.as_str()), (1, 1, "sick"));
    assert!((1..=500).contains(&shown.ejected[0].left_ms));
    assert_eq!(get(&balancer).0, 200);
    // The other one fails too: somebody has to answer.
    well.status.store(500, Ordering::SeqCst);
    until("the bound is met", || {
        assert_eq!(get(&balancer).0, 500);
        balancer.status().counters.ejections_capped > 0
    });
    sick.status.store(200, Ordering::SeqCst);
    until("it is back", || get(&balancer).0 == 200);
    assert!(balancer.status().counters.ejections >= 1);
}

#[test]
fn the_last_one_that_passes_its_checks_is_not_ejected() {
    let patients = [Patient::new(503), Patient::new(503), Patient::new(200)];
    let balancer = Balancer::start(&[]);
    let both = CHECK.replace(r#""health":{"#, r#""health":{"passive":{"failures":3,"ejection_ms":60000},"#);
    let members: Vec<(String, SocketAddr)> =
        patients.iter().enumerate().map(|(n, patient)| (format!("p{n}"), patient.app.address)).collect();
    let members: Vec<(&str, SocketAddr, &str)> =
        members.iter().map(|(id, address)| (id.as_str(), *address, "up")).collect();
    balancer.routes(&route(&format!(r#""all_down":"answer",{both}"#), &members));
    until("the checks are in", || fleet(&balancer).usable == 1 && health(&balancer, "p0").failed_total > 0);
    patients[2].status.store(500, Ordering::SeqCst);
    for _ in 0..10 {
        assert_eq!(get(&balancer), (500, None), "it is the app that answers");
    }
    let counters = balancer.status().counters;
    assert!(counters.ejections == 0 && counters.ejections_capped > 0, "{counters:?}");
}

#[test]
fn what_happens_when_nobody_is_left_is_the_routes_to_say() {
    let app = App::named("shop");
    let balancer = Balancer::start(&[]);
    let with = |policy: &str, upstreams: &[(&str, SocketAddr, &str)]| {
        balancer.routes(&route(&format!(r#""all_down":"{policy}""#), upstreams));
        get(&balancer)
    };
    assert_eq!(with("answer", &[]), (503, Some("no_upstreams".to_owned())));
    assert_eq!((fleet(&balancer).named, fleet(&balancer).up), (0, 0));
    assert_eq!(with("answer", &[("s", app.address, "down")]), (503, Some("all_down".to_owned())));
    assert_eq!((fleet(&balancer).named, fleet(&balancer).up), (1, 0));
    assert_eq!(with("answer", &[("gone", free_address(), "up")]), (503, Some("all_down".to_owned())));
    assert_eq!(with("fail_open", &[("s", app.address, "down")]), (200, None));
    let counters = balancer.status().counters;
    assert_eq!((counters.no_upstreams, counters.all_down), (1, 2));
    // One of many is enough, however many connects are refused before it.
    let mut many: Vec<(String, SocketAddr)> = (0..6).map(|n| (format!("gone-{n}"), free_address())).collect();
    many.push(("s".to_owned(), app.address));
    let many: Vec<(&str, SocketAddr, &str)> = many.iter().map(|(id, at)| (id.as_str(), *at, "up")).collect();
    assert_eq!(with("answer", &many), (200, None));
}

#[test]
fn who_comes_before_the_first_verdict_waits_for_it_whatever_the_policy() {
    let policy = format!(r#""all_down":"answer",{CHECK}"#);
    let well = Patient::new(200);
    let balancer = Balancer::start(&[]);
    balancer.routes(&route(&policy, &[("p", well.app.address, "up")]));
    assert_eq!(get(&balancer), (200, None), "it was not checked yet");
    // What is known to be down is answered for at once, also to who has begun to wait.
    let sick = Patient::new(503);
    balancer.routes(&route(&policy, &[("sick", sick.app.address, "up")]));
    assert_eq!(get(&balancer), (503, Some("all_down".to_owned())));
    assert_eq!(sick.served(), 0);
}

#[test]
fn tables_that_make_no_sense_are_refused() {
    let balancer = Balancer::start(&[]);
    let refused = |routes: &str| {
        let line = format!(r#"{{"set_table":{{"version":9,"routes":[{routes}]}}}}"#);
        match balancer.control().raw(&line).expect("an answer") {
            epagent_balancer::control::protocol::Response::Error(error) => error.message,
            other => panic!("{other:?}"),
        }
    };
    let up = [("a", free_address(), "up")];
    let one = route(CHECK, &up);
    let other = route(r#""algorithm":"two_choices""#, &up)
        .replace(r#""shop""#, r#""blog""#)
        .replace("*", "blog.example");
    assert!(refused(&format!("{one},{other}")).contains("in another way than an earlier route does"));
    for (settings, words) in [
        (CHECK.replace("\"interval_ms\":50", "\"interval_ms\":1"), "interval_ms is 50 to 3,600,000"),
        (CHECK.replace("/healthz", "healthz"), "path begins with /"),
        (CHECK.replace("/healthz", "/a b"), "no blanks"),
        (CHECK.replace("\"rise\":2", "\"rise\":0"), "rise and fall are 1 to 1,000"),
        (r#""health":{"passive":{"ejected_max_percent":101}}"#.to_owned(), "0 to 100"),
        (r#""algorithm":{"hash":{"by":{"header":"a b"}}}"#.to_owned(), "no header's name"),
    ] {
        let message = refused(&route(&settings, &up));
        assert!(message.contains(words), "{message}");
    }
    let heavy = route(CHECK, &up).replace(r#""state":"up""#, r#""state":"up","weight":257"#);
    assert!(refused(&heavy).contains("the weight 257: it is 1 to 256"));
}
