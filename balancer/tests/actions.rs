//! Routes that answer by themselves: every action of the table, and what it leaves of the connection.

mod common;

use std::io::Write;

use common::app::App;
use common::client::Client;
use common::{Balancer, host_route, until};

fn action(host: &str, action: &str) -> String {
    format!(r#"{{"id":"{host}","match":{{"host":"{host}"}},"action":{action}}}"#)
}

const PAGE: &str = r#"{"static":{"status":503,"content_type":"text/plain","body":"closed for today\n"}}"#;

#[test]
fn every_action_answers_as_the_table_says_on_one_connection() {
    let app = App::named("shop");
    let balancer = Balancer::start(&[]);
    balancer.routes(
        &[
            host_route("shop.example", &[("s", app.address, "up")]),
            action("page.example", PAGE),
            action("www.example", r#"{"redirect":{"to":"https://shop.example","status":308}}"#),
            action("old.example", r#"{"redirect":{"to":"https://shop.example/new","keep_path":false}}"#),
            action("gone.example", r#"{"empty":{"status":410}}"#),
            action("quiet.example", r#"{"empty":{"status":204}}"#),
            action("other.example", r#"{"alias":{"host":"SHOP.example"}}"#),
            action("further.example", r#"{"alias":{"host":"other.example"}}"#),
            action("hidden.example", r#"{"unknown_host":{}}"#),
            action("none.example", r#"{"no_hosts":{}}"#),
        ]
        .join(","),
    );
    let mut client = Client::connect(balancer.http);
    for _ in 0..2 {
        let page = client.get("page.example", "/a");
        assert_eq!((page.status, page.text().as_str()), (503, "closed for today\n"));
        assert_eq!(
            (page.field("content-type"), page.field("content-length")),
            (Some("text/plain"), Some("17"))
        );
        let moved = client.get("www.example", "/a?b=c");
        assert_eq!((moved.status, moved.field("location")), (308, Some("https://shop.example/a?b=c")));
        let moved = client.get("old.example", "/a?b=c");
        assert_eq!((moved.status, moved.field("location")), (302, Some("https://shop.example/new")));
        let gone = client.get("gone.example", "/");
        assert_eq!((gone.status, gone.field("content-length"), gone.text().as_str()), (410, Some("0"), ""));
        let quiet = client.get("quiet.example", "/");
        assert_eq!((quiet.status, quiet.field("content-length")), (204, None));
        assert_eq!(client.get("other.example", "/").text(), "shop");
        assert_eq!(client.get("further.example", "/").text(), "shop");
        let hidden = client.get("hidden.example", "/");
        assert_eq!((hidden.status, hidden.field("x-epagent-error")), (404, Some("unknown_host")));
        let none = client.get("none.example", "/");
        assert_eq!((none.status, none.field("x-epagent-error")), (503, Some("no_routes")));
    }
    let head = client.send("HEAD / HTTP/1.1\r\nHost: page.example\r\n\r\n").read_head();
    assert_eq!((head.status, head.field("content-length")), (503, Some("17")));
    assert_eq!(client.get("shop.example", "/").text(), "shop", "the connection goes on after HEAD");
    let status = balancer.status();
    assert_eq!((status.counters.answered_by_action, status.counters.unknown_host), (11, 2));
    let shop = status.routes.iter().find(|route| route.id == "shop.example").unwrap();
    assert_eq!(shop.requests_total, 5, "an alias is another name for its route");
}

#[test]
fn an_unwanted_body_is_dropped_so_that_the_connection_goes_on() {
    let balancer = Balancer::start(&[]);
    balancer.routes(&action("page.example", PAGE));
    let mut client = Client::connect(balancer.http);
    let next = "GET / HTTP/1.1\r\nHost: page.example\r\n\r\n";
    for (framing, body) in [
        ("Content-Length: 60000", "GET / HTTP/1.1\r\n\r\n".repeat(4_000)[..60_000].to_owned()),
        ("Transfer-Encoding: chunked", format!("{:x}\r\n{}\r\n0\r\n\r\n", 50_000, "x".repeat(50_000))),
    ] {
        // Its head and the rest come apart, and the next request right behind it.
        client.send(format!("POST / HTTP/1.1\r\nHost: page.example\r\n{framing}\r\n\r\n"));
        client.send(&body).send(next);
        for _ in 0..2 {
            let answer = client.read();
            assert_eq!((answer.status, answer.field("connection"), answer.body.len()), (503, None, 17));
        }
    }
    assert_eq!(balancer.status().counters.connections_accepted, 1);
}

#[test]
fn a_body_that_is_too_large_to_wait_for_ends_the_connection_politely() {
    let balancer = Balancer::start(&[]);
    balancer.routes(&action("page.example", PAGE));
    let long = "x".repeat(300_000);
    for (fields, body) in [
        ("Content-Length: 300000", long.clone()),
        ("Transfer-Encoding: chunked", format!("{:x}\r\n{long}\r\n0\r\n\r\n", 300_000)),
        ("Content-Length: 5\r\nExpect: 100-continue", String::new()),
    ] {
        let mut client = Client::connect(balancer.http);
        client.send(format!("POST / HTTP/1.1\r\nHost: page.example\r\n{fields}\r\n\r\n{body}"));
        let answer = client.read();
        assert_eq!((answer.status, answer.field("connection")), (503, Some("close")), "{fields}");
        assert!(client.is_closed(), "{fields}");
    }
    let mut client = Client::connect(balancer.http);
    client.send("POST / HTTP/1.1\r\nHost: page.example\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n");
    assert_eq!(client.read().status, 400);
}

#[test]
fn a_body_that_does_not_come_is_not_waited_for_forever() {
    let balancer = Balancer::start(&["--body-timeout-ms", "200"]);
    balancer.routes(&action("page.example", PAGE));
    let mut client = Client::connect(balancer.http);
    client.send("POST / HTTP/1.1\r\nHost: page.example\r\nContent-Length: 5\r\n\r\nab");
    assert_eq!(client.read().field("x-epagent-error"), Some("slow_body"));
}

#[test]
fn held_requests_get_the_page_that_their_route_becomes() {
    let balancer = Balancer::start(&[]);
    balancer.routes(&action("shop.example", r#"{"hold":{}}"#));
    let mut client = Client::connect(balancer.http);
    client.send("POST / HTTP/1.1\r\nHost: shop.example\r\nContent-Length: 5\r\n\r\nhello");
    until("the request is held", || balancer.status().routes[0].held == 1);
    balancer.routes(&action("shop.example", PAGE));
    assert_eq!(client.read().text(), "closed for today\n");
    assert_eq!(client.get("shop.example", "/").text(), "closed for today\n");
}

#[test]
fn held_requests_follow_their_route_when_it_becomes_an_alias() {
    let app = App::named("blog");
    let balancer = Balancer::start(&[]);
    balancer.routes(&action("shop.example", r#"{"hold":{}}"#));
    let mut client = Client::connect(balancer.http);
    client.send("GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n");
    until("the request is held", || balancer.status().routes[0].held == 1);
    balancer.routes(
        &[
            action("shop.example", r#"{"alias":{"host":"blog.example"}}"#),
            host_route("blog.example", &[("b", app.address, "up")]),
        ]
        .join(","),
    );
    assert_eq!(client.read().text(), "blog");
}

#[test]
fn the_balancers_own_answers_may_have_pages_of_the_operators() {
    let balancer = Balancer::start(&[]);
    let table = r#"{"version":1,"routes":[{"id":"a","match":{"host":"a.example"},"action":{"hold":{}}}],
        "pages":{"unknown_host":{"body":"<h1>Nothing here</h1>"},"bad_request":{"content_type":"text/plain","body":"No."}}}"#;
    balancer.control().set_table(&serde_json::from_str(table).unwrap()).unwrap();
    let mut client = Client::connect(balancer.http);
    let unknown = client.get("b.example", "/");
    assert_eq!((unknown.status, unknown.text().as_str()), (404, "<h1>Nothing here</h1>"));
    assert_eq!(unknown.field("content-type"), Some("text/html; charset=utf-8"));
    assert_eq!(unknown.field("x-epagent-error"), Some("unknown_host"));
    assert_eq!(client.send("GET / HTTP/1.1\r\n\r\n").read().text(), "No.");
    let wrong = table.replace("bad_request", "bad_requset").replace("\"version\":1", "\"version\":2");
    let refused = balancer.control().set_table(&serde_json::from_str(&wrong).unwrap()).unwrap_err();
    assert!(refused.to_string().contains("bad_requset"), "{refused}");
}

/// Without a bound on what one client may have pending, this takes over a gigabyte.
#[test]
fn a_client_that_asks_on_and_on_without_reading_costs_a_bounded_amount() {
    let balancer = Balancer::start(&[]);
    let page = format!(r#"{{"static":{{"body":"{}"}}}}"#, "x".repeat(1_500));
    balancer.routes(&action("page.example", &page));
    let before = balancer.resident_kib();
    let mut client = Client::connect(balancer.http);
    let requests = "GET / HTTP/1.1\r\nHost: page.example\r\n\r\n".repeat(20_000);
    let stream = client.stream.get_mut();
    stream.set_write_timeout(Some(std::time::Duration::from_millis(500))).unwrap();
    // Until nothing more is taken.
    while stream.write_all(requests.as_bytes()).is_ok() {
        let grown = balancer.resident_kib().saturating_sub(before);
        assert!(grown < 32 * 1024, "{grown} KiB more than before");
    }
    assert_eq!(client.read().body.len(), 1_500, "what it asked for is still there");
}
