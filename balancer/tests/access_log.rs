//! The access log: what a line says, where lines go, and that nothing ends without one.

mod common;

use std::os::unix::net::UnixDatagram;
use std::path::Path;

use common::app::App;
use common::client::Client;
use common::{Balancer, PATIENCE, free_address, poll, port_route, until};
use nix::sys::signal::Signal;
use serde_json::Value;

fn lines(path: &Path) -> Vec<String> {
    std::fs::read_to_string(path).unwrap_or_default().lines().map(str::to_owned).collect()
}

fn json(path: &Path, count: usize) -> Vec<Value> {
    poll("the lines are written", || {
        let lines: Vec<Value> =
            lines(path).iter().map_while(|line| serde_json::from_str(line).ok()).collect();
        (lines.len() >= count).then_some(lines)
    })
}

fn start(arguments: &[&str]) -> (Balancer, App, tempfile::TempDir, std::path::PathBuf) {
    let app = App::named("shop");
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("access.log");
    let text = path.to_str().expect("a path in UTF-8").to_owned();
    let balancer = Balancer::start(&[&["--access-log", &text], arguments].concat());
    balancer.route("shop.example", &[("a", app.address, "up")]);
    (balancer, app, dir, path)
}

#[test]
fn a_line_tells_what_became_of_each_request() {
    let (balancer, _app, _dir, path) = start(&[]);
    let mut client = Client::connect(balancer.http);
    let head = "GET /x?y HTTP/1.1\r\nHost: shop.example\r\n\r\n";
    client.send(head).read();
    client.get("other.example", "/");
    client.send("nonsense\r\n\r\n").read();
    let lines = json(&path, 3);
    let fact = |n: usize, key: &str| lines[n][key].as_str().unwrap_or_default().to_owned();
    assert_eq!((fact(0, "outcome"), fact(0, "upstream")), ("answered".into(), "a".into()));
    assert_eq!((fact(0, "method"), fact(0, "target")), ("GET".into(), "/x?y".into()));
    assert_eq!((fact(0, "client"), fact(0, "route")), ("127.0.0.1".into(), "shop.example".into()));
    assert_eq!((fact(0, "protocol"), fact(0, "request_id").len()), ("HTTP/1.1".into(), 32));
    let number = |key: &str| lines[0][key].as_u64().expect("a number");
    assert_eq!((number("status"), number("bytes_in")), (200, head.len() as u64));
    assert!(number("bytes_out") > 4 && number("ttfb_us") > 0 && number("duration_us") >= number("ttfb_us"));
    assert!(lines[0].get("held_us").is_none(), "it was not held");
    assert_eq!((fact(1, "outcome"), lines[1]["status"].as_u64()), ("unknown_host".into(), Some(404)));
    assert_eq!((fact(2, "outcome"), lines[2]["status"].as_u64()), ("bad_request".into(), Some(400)));
}

#[test]
fn a_plain_connection_has_a_line_with_bytes_both_ways_and_why_it_ended() {
    let app = App::start(|_, stream| {
        std::io::Write::write_all(stream, b"answer").expect("the answer is taken");
        false
    });
    let (balancer, _app, _dir, path) = start(&[]);
    let port = free_address().port();
    balancer.routes(&port_route(port, &[("t", app.address, "up")]));
    let mut client = Client::connect(([127, 0, 0, 1], port).into());
    client.send("GET / HTTP/1.0\r\n\r\n");
    let (got, _) = common::read_all(client.stream.get_ref());
    assert_eq!(got, b"answer");
    drop(client);
    let line = &json(&path, 1)[0];
    assert_eq!((line["outcome"].as_str(), line["protocol"].as_str()), (Some("closed"), Some("tcp")));
    assert_eq!((line["bytes_in"].as_u64(), line["bytes_out"].as_u64()), (Some(18), Some(6)));
    assert_eq!(
        (line["route"].as_str(), line["upstream"].as_str()),
        (Some(&*format!("port-{port}")), Some("t"))
    );
    assert!(line.get("status").is_none());
}

#[test]
fn common_and_combined_are_as_web_servers_write_them() {
    let (balancer, _app, _dir, path) = start(&["--access-log-format", "combined"]);
    let mut client = Client::connect(balancer.http);
    let fields = "Host: shop.example\r\nUser-Agent: tests \"1\"\r\nReferer: http://a.example/\r\n";
    client.send(format!("GET /x HTTP/1.1\r\n{fields}\r\n")).read();
    let line = poll("the line is written", || lines(&path).pop());
    assert!(line.starts_with("127.0.0.1 - - ["), "{line}");
    assert!(line.contains("\"GET /x HTTP/1.1\" 200 "), "{line}");
    assert!(line.ends_with("\"http://a.example/\" \"tests \\\"1\\\"\""), "{line}");
}

#[test]
fn a_sample_leaves_out_only_what_went_well() {
    let (balancer, _app, _dir, path) = start(&["--access-log-sample", "10"]);
    let mut client = Client::connect(balancer.http);
    for _ in 0..100 {
        client.get("shop.example", "/");
        client.get("other.example", "/");
    }
    balancer.signal(Signal::SIGTERM);
    until("it has written everything and ended", || Client::try_connect(balancer.http).is_err());
    let lines = json(&path, 110);
    assert_eq!(lines.len(), 110);
    let sampled: Vec<&Value> = lines.iter().filter(|line| line["outcome"] == "answered").collect();
    assert!(sampled.len() == 10 && sampled.iter().all(|line| line["sample"] == 10));
    assert!(lines.iter().all(|line| line["outcome"] != "unknown_host" || line.get("sample").is_none()));
}

#[test]
fn a_rotated_file_is_followed_without_being_told() {
    let (balancer, _app, dir, path) = start(&[]);
    let mut client = Client::connect(balancer.http);
    client.get("shop.example", "/before");
    json(&path, 1);
    let rotated = dir.path().join("access.log.1");
    std::fs::rename(&path, &rotated).expect("it is moved away");
    let mut asked = 1;
    until("a new file is begun", || {
        client.get("shop.example", "/after");
        asked += 1;
        path.exists()
    });
    until("no line is lost between the two", || lines(&path).len() + lines(&rotated).len() == asked);
    assert_eq!(balancer.status().counters.access_log_dropped, 0);
}

#[test]
fn the_journal_gets_a_field_for_each_fact_and_is_never_waited_for() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("journal.sock");
    let journal = UnixDatagram::bind(&path).expect("a socket");
    journal.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let app = App::named("shop");
    let balancer = Balancer::start(&["--access-log", &format!("journald:{}", path.display())]);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    let mut client = Client::connect(balancer.http);
    client.get("shop.example", "/x");
    let mut datagram = [0; 8192];
    let count = journal.recv(&mut datagram).expect("an entry");
    let text = String::from_utf8_lossy(&datagram[..count]).into_owned();
    for field in [
        "MESSAGE=GET /x HTTP/1.1 200 answered",
        "PRIORITY=6",
        "SYSLOG_IDENTIFIER=epagent-balancer",
        "EPAGENT_ROUTE=shop.example",
        "EPAGENT_UPSTREAM=a",
        "EPAGENT_STATUS=200",
    ] {
        assert!(text.lines().any(|line| line == field), "{field} in {text}");
    }
    // Nobody reads any more: its queue is full soon, and then lines are dropped.
    until("lines are dropped and counted", || {
        client.get("shop.example", "/x");
        balancer.status().counters.access_log_dropped > 0
    });
}
