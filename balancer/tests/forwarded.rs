//! What an app is told of who asks, and by what name a request can be found again.

mod common;

use common::Balancer;
use common::app::{App, respond};
use common::client::Client;

/// An app that answers with the fields it got about the caller, one on a line.
fn mirror() -> App {
    App::start(|request, stream| {
        let told = |name: &str| {
            let name = name.to_ascii_lowercase().replace('_', "-");
            name.starts_with("x-") || name == "forwarded"
        };
        let lines: Vec<String> = request
            .fields
            .iter()
            .filter(|(name, _)| told(name))
            .map(|(name, value)| format!("{name}: {value}"))
            .collect();
        respond(stream, lines.join("\n").as_bytes())
    })
}

fn start() -> (Balancer, App) {
    let app = mirror();
    let log = ["--listen", "http.trusted=127.0.0.1:0"];
    let balancer = Balancer::start(&log);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    (balancer, app)
}

const CLAIMS: &str = "X-Forwarded-For: 203.0.113.7\r\nX-Forwarded-Proto: https\r\n\
                      X-Forwarded-Host: front.example\r\nX-Forwarded-Port: 444\r\nX-Real-IP: 203.0.113.7\r\n\
                      Forwarded: for=203.0.113.7;proto=https\r\nX_Forwarded_For: 1.1.1.1\r\n\
                      X-Request-Id: outer-7\r\n";

fn ask(address: std::net::SocketAddr, fields: &str) -> Vec<String> {
    let mut client = Client::connect(address);
    client.send(format!("GET / HTTP/1.1\r\nHost: Shop.Example:80\r\n{fields}\r\n"));
    client.read().text().lines().map(str::to_owned).collect()
}

#[test]
fn claims_of_strangers_are_dropped() {
    let (balancer, _app) = start();
    let mut lines = ask(balancer.http, CLAIMS);
    let id = lines.pop().expect("a name");
    let id = id.strip_prefix("X-Request-Id: ").expect("a name");
    assert!(id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()), "{id}");
    assert_eq!(
        lines,
        [
            "X-Forwarded-For: 127.0.0.1",
            "X-Forwarded-Proto: http",
            "X-Forwarded-Host: Shop.Example:80",
            "Forwarded: for=127.0.0.1;host=\"Shop.Example:80\";proto=http",
        ]
    );
}

#[test]
fn claims_of_trusted_proxies_are_kept_and_extended() {
    let (balancer, _app) = start();
    let lines = ask(balancer.listener("http.trusted"), CLAIMS);
    assert_eq!(
        lines,
        [
            "X-Forwarded-Port: 444",
            "X-Real-IP: 203.0.113.7",
            "X-Forwarded-For: 203.0.113.7, 127.0.0.1",
            "X-Forwarded-Proto: https",
            "X-Forwarded-Host: front.example",
            "Forwarded: for=203.0.113.7;proto=https, for=127.0.0.1;host=\"Shop.Example:80\";proto=http",
            "X-Request-Id: outer-7",
        ]
    );
}

#[test]
fn a_client_cannot_have_its_address_removed() {
    let (balancer, _app) = start();
    let nominated =
        format!("Connection: X-Forwarded-For, X-Forwarded-Proto, Forwarded, X-Request-Id\r\n{CLAIMS}");
    for listener in ["http", "http.trusted"] {
        let lines = ask(balancer.listener(listener), &nominated);
        assert!(lines.iter().any(|line| line.starts_with("X-Forwarded-For: ") && line.contains("127.0.0.1")));
        assert!(lines.iter().any(|line| line.starts_with("X-Request-Id: ")));
    }
}

#[test]
fn a_request_has_one_name_for_client_app_and_log() {
    let app = mirror();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("access.log");
    let path = path.to_str().expect("text");
    let balancer = Balancer::start(&["--access-log", path, "--listen", "http.trusted=127.0.0.1:0"]);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    let name_in_log = |path_asked: &str| {
        let logged = common::poll("it is logged", || {
            let text = std::fs::read_to_string(path).ok()?;
            text.lines().find(|line| line.contains(path_asked)).map(str::to_owned)
        });
        let line: serde_json::Value = serde_json::from_str(&logged).expect("JSON");
        line["request_id"].as_str().expect("a name").to_owned()
    };
    let mut client = Client::connect(balancer.http);
    let told = client.get("shop.example", "/passed-on").text();
    assert!(told.ends_with(&format!("X-Request-Id: {}", name_in_log("/passed-on"))));
    // An answer of the balancer's own tells the client.
    let refused = client.get("other.example", "/unknown");
    assert_eq!((refused.status, refused.field("x-request-id")), (404, Some(&*name_in_log("/unknown"))));
    let mut client = Client::connect(balancer.listener("http.trusted"));
    client.send("GET /given HTTP/1.1\r\nHost: other.example\r\nX-Request-Id: outer-8\r\n\r\n");
    assert_eq!(client.read().field("x-request-id"), Some("outer-8"));
    assert_eq!(name_in_log("/given"), "outer-8");
}
