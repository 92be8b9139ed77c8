//! One file for a whole balancer: checked, served, and read again.

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::app::App;
use common::client::Client;
use common::{Balancer, until};
use nix::sys::signal::Signal;

const EXAMPLE: &str = include_str!("../examples/balancer.toml");

fn check(path: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_epagent-balancer"));
    command.arg("check").arg("--config").arg(path).output().expect("it runs")
}

/// The example, where the test can listen, with this app as the shop.
fn example(app: &App) -> String {
    let mut text = EXAMPLE.replace("10.90.0.2:8080", &app.address.to_string());
    for address in ["[::]:8080", "127.0.0.1:8081", "[::]:8443"] {
        text = text.replace(address, "127.0.0.1:0");
    }
    // A second app, and a port that may be taken on this machine.
    text = text.replace("    { id = \"shop-1\", address = \"10.90.0.6:8080\" },\n", "");
    let port = common::free_address().port().to_string();
    text.replace("[::]:5432", &format!("127.0.0.1:{port}")).replace("port = 5432", &format!("port = {port}"))
}

fn start(text: &str) -> (Balancer, std::path::PathBuf) {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("balancer.toml");
    std::fs::write(&path, text).expect("written");
    (Balancer::by_file(&path, dir), path)
}

#[test]
fn the_example_is_served_as_it_stands() {
    let app = App::named("shop");
    let (balancer, _path) = start(&example(&app));
    let mut client = Client::connect(balancer.listener("http"));
    assert_eq!(client.get("shop.example", "/").text(), "shop");
    assert_eq!(client.get("www.shop.example", "/x").field("location"), Some("https://shop.example/x"));
    assert_eq!(client.get("a.shop.example", "/").status, 404);
    let mut client = Client::connect(balancer.listener("http.trusted.proxy"));
    client.send("PROXY UNKNOWN\r\nGET / HTTP/1.1\r\nHost: shop.example\r\n\r\n");
    assert_eq!(client.read().text(), "shop");
}

#[test]
fn a_changed_file_takes_effect_whole_or_not_at_all() {
    let (app, other) = (App::named("shop"), App::named("other"));
    let text = example(&app);
    let (balancer, path) = start(&text);
    let mut client = Client::connect(balancer.listener("http"));
    assert_eq!(client.get("shop.example", "/").text(), "shop");
    let changed = text.replace(&app.address.to_string(), &other.address.to_string());
    for bad in
        [changed.replace("id = \"closed\"", "id = \"db\""), changed.replace("[[routes]]", "[[rotues]]")]
    {
        std::fs::write(&path, bad).expect("written");
        balancer.signal(Signal::SIGHUP);
        // A signal is looked at before any question.
        assert_eq!(balancer.status().table_version, 1);
        assert_eq!(client.get("shop.example", "/").text(), "shop");
    }
    std::fs::write(&path, &changed).expect("written");
    balancer.signal(Signal::SIGHUP);
    until("the new table is in force", || balancer.status().table_version == 2);
    assert_eq!(client.get("shop.example", "/").text(), "other");
    // The same again is no change.
    balancer.signal(Signal::SIGHUP);
    assert_eq!(balancer.status().table_version, 2);
}

#[test]
fn a_check_says_where_a_mistake_is() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("balancer.toml");
    std::fs::write(&path, EXAMPLE).expect("written");
    let output = check(&path);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && said.ends_with("4 listeners and 5 routes\n"), "{said}");
    std::fs::write(&path, EXAMPLE.replace("least_connections", "lest_connections")).expect("written");
    let output = check(&path);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("line 42, column 13"), "{said}");
    let output = check(&dir.path().join("nowhere.toml"));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("cannot read"), "{said}");
}
