//! What operators say about routes: it goes before what apps ask for, survives restarts, and loses no request that it
//! does not mean to.

use std::net::{SocketAddr, TcpListener};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use epagent_tests::host::DevHost;
use epagent_tests::{AppDir, eventually};
use epagent_wire::api::Route;

fn rows(host: &DevHost) -> Vec<Route> {
    let text = host.cli(&["route", "ls", "--json"]).ok();
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("route ls --json: {error}\n{text}"))
}

fn row(host: &DevHost, target: &str) -> Route {
    rows(host).into_iter().find(|row| row.target == target).unwrap_or_else(|| panic!("no route {target}"))
}

/// A backend that epagent does not run: answers every connection with its word and closes it.
fn backend(word: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                use std::io::{Read, Write};
                let mut stream = stream;
                let mut head = Vec::new();
                let mut bytes = [0; 1024];
                while !head.ends_with(b"\r\n\r\n") {
                    match stream.read(&mut bytes) {
                        Ok(count @ 1..) => head.extend_from_slice(&bytes[..count]),
                        _ => return,
                    }
                }
                let length = word.len();
                let answer =
                    format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{word}");
                let _ = stream.write_all(answer.as_bytes());
            });
        }
    });
    address
}

#[test]
fn a_hold_keeps_requests_until_they_are_released_and_loses_none() {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "instances = 2")).ok();
    let load = host.load("shop.test", "hello v");
    load.wait_for(50, Duration::from_secs(30));
    host.cli(&["route", "hold", "shop.test", "--max-age", "60s", "--reason", "moving the database"]).ok();
    let held = row(&host, "shop.test");
    assert_eq!((held.action.as_str(), held.app.as_deref()), ("hold", Some("shop")));
    let said = held.word.expect("it was said").said;
    assert_eq!((said.who.as_str(), said.why.as_str()), ("root", "moving the database"));
    std::thread::sleep(Duration::from_millis(500));

    // It holds over a restart of the brain, and a deploy under it goes through.
    let old = host.kill("epagentd");
    host.wait_restarted("epagentd", old);
    host.wait_answering();
    host.deploy(&AppDir::server("shop", "v2", "instances = 2")).ok();
    assert_eq!(row(&host, "shop.test").action, "hold");
    host.cli(&["route", "release", "shop.test"]).ok();
    load.wait_for(50, Duration::from_secs(30));
    let report = load.finish();
    report.assert_none_failed();
    assert!(report.answered_with("hello v2") > 0, "{report}");
    assert!(host.fetch("shop.test", "/").starts_with("hello v2"));
    host.cli(&["route", "release", "shop.test"]).fails(1, &["not_held"]);
    let events = host.cli(&["events"]).ok();
    for word in ["route.hold", "by root: moving the database", "route.release"] {
        assert!(events.contains(word), "{word:?} is not in\n{events}");
    }
    host.stop();
}

#[test]
fn a_page_and_a_redirect_stand_before_the_app_and_survive_every_restart() {
    let host = DevHost::start();
    let app = AppDir::server("shop", "v1", "").with("page.html", "<h1>back soon</h1>");
    host.deploy(&app).ok();
    let page = app.file("page.html");
    host.cli(&["route", "static", "shop.test", "--file", &page.to_string_lossy(), "--status", "503"]).ok();
    let answer = host.http("shop.test", "/any").unwrap();
    assert_eq!((answer.status, answer.text().as_str()), (503, "<h1>back soon</h1>"));
    assert_eq!(answer.header("content-type"), Some("text/html; charset=utf-8"));

    for part in ["epagentd", "epagent-balancer"] {
        let old = host.kill(part);
        host.wait_restarted(part, old);
        host.wait_answering();
        let answer = eventually("the page is served", Duration::from_secs(10), || {
            host.http("shop.test", "/").ok().filter(|answer| answer.status == 503)
        });
        assert_eq!(answer.text(), "<h1>back soon</h1>", "after a restart of {part}");
    }

    host.cli(&["route", "redirect", "shop.test", "https://new.example", "--status", "301", "--keep-path"])
        .ok();
    let answer = host.http("shop.test", "/a?b=c").unwrap();
    assert_eq!((answer.status, answer.header("location")), (301, Some("https://new.example/a?b=c")));
    host.cli(&["route", "clear", "shop.test"]).ok();
    assert!(host.fetch("shop.test", "/").starts_with("hello v1"));
    host.cli(&["route", "clear", "shop.test"]).fails(4, &["nothing was said"]);
    host.cli(&["route", "static", "5432", "--file", &page.to_string_lossy()]).fails(1, &["bad_route"]);
    host.stop();
}

#[test]
fn a_host_of_no_app_leads_to_the_operators_backends() {
    let host = DevHost::start();
    let (one, two) = (backend("one"), backend("two"));
    host.cli(&["route", "set", "old.test", "--upstream", &one.to_string()]).ok();
    assert_eq!(host.fetch("old.test", "/"), "one");
    host.cli(&["route", "set", "old.test", "--upstream", &one.to_string(), "--upstream", &two.to_string()])
        .ok();
    let seen: std::collections::BTreeSet<String> = (0..20).map(|_| host.fetch("old.test", "/")).collect();
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["one", "two"]);

    host.cli(&["route", "drain", "old.test", &one.to_string(), "--wait"]).ok();
    for _ in 0..10 {
        assert_eq!(host.fetch("old.test", "/"), "two", "a drained backend got a request");
    }
    host.cli(&["route", "clear", "old.test", &one.to_string()]).ok();
    eventually("it gets requests again", Duration::from_secs(5), || {
        (host.fetch("old.test", "/") == "one").then_some(())
    });
    host.cli(&["route", "clear", "old.test"]).ok();
    assert_eq!(host.http("old.test", "/").unwrap().status, 503, "there is no route at all any more");
    host.cli(&["route", "drain", "old.test", "web.0"]).fails(4, &["old.test"]);
    host.stop();
}

#[test]
fn an_instance_that_is_drained_finishes_what_it_has_and_gets_nothing_new() {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "instances = 2")).ok();
    let rows = host.wait_healthy("shop", 2);
    // Slow requests until both instances have one.
    let (sender, answers) = mpsc::channel();
    for _ in 0..4 {
        let (sender, address) = (sender.clone(), host.http);
        std::thread::spawn(move || {
            let answer =
                epagent_tests::http::get(address, "shop.test", "/slow?3000", Duration::from_secs(20));
            let _ = sender.send(answer.map(|answer| answer.status));
        });
    }
    let drained = &rows[0].id;
    eventually("it has a request", Duration::from_secs(5), || {
        let row = row(&host, "shop.test");
        row.upstreams.into_iter().find(|up| up.id == *drained)?.in_flight.filter(|count| *count > 0)
    });
    let since = Instant::now();
    let said = host.cli(&["route", "drain", "shop.test", "web.0", "--wait", "--reason", "a look inside"]);
    assert!(said.ok().contains("has nothing left"));
    assert!(since.elapsed() > Duration::from_millis(500), "it did not wait");
    for _ in 0..4 {
        assert_eq!(answers.recv().unwrap().unwrap(), 200, "a request of the drained instance was lost");
    }
    assert_eq!(host.pids("shop").len(), 2, "a drained instance goes on running");
    let up = row(&host, "shop.test").upstreams.into_iter().find(|up| up.id == *drained).unwrap();
    assert_eq!(
        (up.state.as_str(), up.drained.map(|said| said.why).as_deref()),
        ("draining", Some("a look inside"))
    );

    // The instance's end is the end of what was said about it.
    host.cli(&["restart", "shop"]).ok();
    let row = row(&host, "shop.test");
    assert!(row.upstreams.iter().all(|up| up.state == "up" && up.drained.is_none()), "{row:?}");
    host.stop();
}

#[test]
fn a_port_can_be_held_and_released() {
    let host = DevHost::start();
    let one = backend("one");
    // `epagent dev` binds the ports of routes on the loopback address. This one is none that connections get by themselves.
    let address = SocketAddr::from(([127, 0, 0, 1], 20_000 + (std::process::id() % 9_000) as u16));
    let target = address.port().to_string();
    host.cli(&["route", "set", &target, "--upstream", &one.to_string()]).ok();
    let get =
        || epagent_tests::http::get(address, "any.test", "/", Duration::from_secs(10)).map(|a| a.text());
    assert_eq!(get().unwrap(), "one");
    host.cli(&["route", "hold", &target]).ok();
    let waiting = std::thread::spawn(move || {
        let since = Instant::now();
        let answer = epagent_tests::http::get(address, "any.test", "/", Duration::from_secs(10));
        (answer.map(|answer| answer.text()), since.elapsed())
    });
    std::thread::sleep(Duration::from_millis(400));
    // A word replaces the one before; the backends are said again.
    host.cli(&["route", "set", &target, "--upstream", &one.to_string()]).ok();
    let (answer, waited) = waiting.join().unwrap();
    assert_eq!(answer.unwrap(), "one");
    assert!(waited > Duration::from_millis(300), "it was not held");
    host.cli(&["route", "clear", &target]).ok();
    host.stop();
}

#[test]
fn an_operator_sees_what_the_balancer_does() {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "instances = 2")).ok();
    let load = host.load("shop.test", "hello v1");
    load.wait_for(50, Duration::from_secs(30));
    let top = host.cli(&["top", "--once"]).ok();
    let line = top.lines().find(|line| line.starts_with("shop.test")).unwrap_or_else(|| panic!("{top}"));
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!((words[1], words.last()), ("shop", Some(&"up")), "{top}");
    assert!(words[2].parse::<f64>().unwrap() > 1.0, "no requests per second\n{top}");
    assert!(line.contains("ms") || line.contains("µs"), "no times\n{top}");
    load.finish().assert_none_failed();

    let status = host.cli(&["balancer", "status"]).ok();
    for word in ["listeners", "http", "shop-", "table"] {
        assert!(status.contains(word), "{word:?} is not in\n{status}");
    }
    let json: serde_json::Value =
        serde_json::from_str(&host.cli(&["balancer", "status", "--json"]).ok()).unwrap();
    assert!(json["counters"]["requests"].as_u64().unwrap() >= 50, "{json}");
    let old = host.kill("epagent-balancer");
    host.wait_restarted("epagent-balancer", old);
    eventually("it says so itself", Duration::from_secs(10), || {
        let status = host.cli(&["balancer", "status"]);
        (status.code == Some(0) && !status.stdout.contains(&format!("process      {old},"))).then_some(())
    });
    host.stop();
}

#[test]
fn an_operator_sees_who_is_connected_and_what_to() {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "")).ok();
    host.deploy(&AppDir::server("other", "v1", "")).ok();
    host.cli(&["route", "hold", "other.test", "--max-age", "60s"]).ok();
    let ask = |target: &'static str, path: &'static str| {
        let address = host.http;
        std::thread::spawn(move || {
            epagent_tests::http::get(address, target, path, Duration::from_secs(30))
                .map(|answer| answer.status)
        })
    };
    let (slow, held) = (ask("shop.test", "/slow?5000"), ask("other.test", "/"));
    let listed = |filter: &[&str]| {
        let text = host.cli(&[&["balancer", "connections", "--json"], filter].concat()).ok();
        let page: serde_json::Value =
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let state = |row: &serde_json::Value| row["state"].as_str().unwrap_or_default().to_owned();
        page["rows"].as_array().unwrap().iter().map(state).collect::<Vec<_>>()
    };
    eventually("both are listed", Duration::from_secs(10), || {
        (listed(&["shop"]) == ["exchange"] && listed(&["other"]) == ["held"]).then_some(())
    });
    assert_eq!(listed(&["--route", "shop.test"]), ["exchange"]);
    assert_eq!(listed(&["other", "--route", "shop.test"]), [""; 0], "a route that is not the app's");
    assert_eq!(listed(&["-n", "1"]).len(), 1);
    let shown = host.cli(&["balancer", "connections", "shop"]).ok();
    let rows: Vec<&str> = shown.lines().collect();
    assert!(rows[0].starts_with("CLIENT") && rows.len() == 2, "{shown}");
    for word in ["127.0.0.1:", "http", "exchange", "shop.test", "shop-"] {
        assert!(rows[1].contains(word), "{word:?} is not in\n{shown}");
    }
    host.cli(&["balancer", "connections", "none"]).fails(4, &["none"]);
    host.cli(&["balancer", "connections", "--route", "none.test"]).fails(4, &["none.test"]);
    host.cli(&["route", "release", "other.test"]).ok();
    assert_eq!((slow.join().unwrap().unwrap(), held.join().unwrap().unwrap()), (200, 200));
    host.stop();
}
