//! Scale to zero, as far as it is the balancer's: it says when an app has been idle, and at once when a stopped
//! one is wanted again.

mod common;

use std::time::{Duration, Instant};

use common::app::App;
use common::client::Client;
use common::{Balancer, host_route, until};
use epagent_balancer::control::protocol::{RouteStatus, WaitQuery};

const GET: &str = "GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n";
const LONG_MS: u64 = 15_000;

fn route(balancer: &Balancer, id: &str) -> RouteStatus {
    balancer.status().routes.into_iter().find(|route| route.id == id).expect("a known route")
}

fn wait(balancer: &Balancer, since: u64, timeout_ms: u64) -> (u64, Vec<String>, Duration) {
    let start = Instant::now();
    let waited = balancer.control().wait(WaitQuery { since, timeout_ms }).expect("an answer");
    (waited.sequence, waited.routes, start.elapsed())
}

#[test]
fn a_wait_is_answered_as_soon_as_a_stopped_app_is_wanted() {
    let balancer = Balancer::start(&["--threads", "2"]);
    let other = App::named("other");
    balancer.routes(&format!(
        "{},{}",
        host_route("shop.example", &[]),
        host_route("other.example", &[("o", other.address, "up")])
    ));
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| wait(&balancer, 0, LONG_MS));
        // What does not starve wakes nobody; and the control socket answers others meanwhile.
        assert_eq!(Client::connect(balancer.http).get("other.example", "/").text(), "other");
        assert_eq!(balancer.status().counters.responses, 1);
        assert!(!waiter.is_finished());
        let asked = Instant::now();
        let mut client = Client::connect(balancer.http);
        client.send(GET);
        let (sequence, routes, _) = waiter.join().expect("the waiter");
        assert!(asked.elapsed() < Duration::from_secs(2), "told after {:?}", asked.elapsed());
        assert_eq!((sequence, routes.as_slice()), (1, &["shop.example".to_owned()][..]));
        // The app is started, and nothing starves any more.
        balancer.route("shop.example", &[("s", other.address, "up")]);
        assert_eq!(client.read().text(), "other");
    });
    let (sequence, routes, took) = wait(&balancer, 1, 200);
    assert_eq!((sequence, routes.len()), (1, 0));
    assert!(took >= Duration::from_millis(200), "answered after {took:?}");
}

#[test]
fn what_began_between_two_questions_is_not_missed() {
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[]);
    let mut client = Client::connect(balancer.http);
    client.send(GET);
    until("it is held", || route(&balancer, "shop.example").held == 1);
    let (sequence, routes, took) = wait(&balancer, 0, LONG_MS);
    assert_eq!((sequence, routes.as_slice()), (1, &["shop.example".to_owned()][..]));
    assert!(took < Duration::from_secs(2), "answered after {took:?}");
    // A number that this process never gave: the asker knew another one.
    let (sequence, _, took) = wait(&balancer, 77, LONG_MS);
    assert_eq!(sequence, 1);
    assert!(took < Duration::from_secs(2), "answered after {took:?}");
}

#[test]
fn an_app_that_loses_its_last_upstream_while_requests_wait_is_told_of() {
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("s", common::free_address(), "up")]);
    let mut client = Client::connect(balancer.http);
    client.send(GET);
    until("it is held", || route(&balancer, "shop.example").held == 1);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| wait(&balancer, 0, LONG_MS));
        balancer.route("shop.example", &[]);
        assert_eq!(waiter.join().expect("the waiter").1, ["shop.example"]);
    });
}

#[test]
fn waiters_that_leave_are_forgotten_and_questions_after_a_wait_are_answered_in_order() {
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[]);
    // More of them than the control socket takes at a time.
    for _ in 0..40 {
        use std::io::Write;
        let mut stream =
            std::os::unix::net::UnixStream::connect(balancer.control_path()).expect("the control socket");
        stream.write_all(b"{\"wait\":{\"since\":0,\"timeout_ms\":60000}}\n").expect("taken");
    }
    until("there is room again", || balancer.control().status().is_ok());
    let mut control = balancer.control();
    let both = "{\"wait\":{\"since\":0,\"timeout_ms\":100}}\n{\"status\":{}}";
    let first = control.raw(both).expect("the first answer");
    assert!(matches!(first, epagent_balancer::control::protocol::Response::Waited(_)), "{first:?}");
    let next = control.raw("{\"status\":{}}").expect("the second answer");
    assert!(matches!(next, epagent_balancer::control::protocol::Response::Status(_)), "{next:?}");
}

#[test]
fn status_says_how_long_an_app_has_been_idle() {
    let app = App::start(|request, stream| {
        if request.path() == "/slow" {
            std::thread::sleep(Duration::from_millis(300));
        }
        common::app::respond(stream, b"done")
    });
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("s", app.address, "up")]);
    until("it has idled since it was made", || route(&balancer, "shop.example").idle_ms >= 50);
    let mut client = Client::connect(balancer.http);
    client.send("GET /slow HTTP/1.1\r\nHost: shop.example\r\n\r\n");
    until("it is at work", || route(&balancer, "shop.example").active == 1);
    assert_eq!(route(&balancer, "shop.example").idle_ms, 0);
    assert_eq!(client.read().text(), "done");
    // The client's connection is kept; only its request counts.
    until("it is idle", || route(&balancer, "shop.example").active == 0);
    until("its idling is counted", || route(&balancer, "shop.example").idle_ms >= 50);
    // A table that keeps the route keeps its count.
    let before = route(&balancer, "shop.example").idle_ms;
    balancer.route("shop.example", &[]);
    assert!(route(&balancer, "shop.example").idle_ms >= before);
}
