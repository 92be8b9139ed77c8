//! An app changes under load and no request is lost: redeploy, rollback, scale, restart, configuration.
//!
//! Half of the clients keep their connections, half open one per request; nothing is retried.
//! `EPAGENT_TEST_LOAD_SECONDS` sets how long the load goes on between the changes.

use std::time::Duration;

use epagent_tests::host::{DevHost, is_live};
use epagent_tests::poll::setting;
use epagent_tests::{AppDir, Load, eventually};

/// Lets the load go on between two changes.
fn breathe(load: &Load) {
    std::thread::sleep(Duration::from_secs(setting("EPAGENT_TEST_LOAD_SECONDS", 1)));
    load.wait_for(20, Duration::from_secs(40));
}

#[test]
fn an_overlapping_redeploy_loses_no_request() {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "instances = 2")).ok();
    let load = host.load("shop.test", "hello v");
    breathe(&load);
    for version in ["v2", "v3"] {
        host.deploy(&AppDir::server("shop", version, "instances = 2")).ok();
        assert!(host.fetch("shop.test", "/").starts_with(&format!("hello {version}")));
        breathe(&load);
    }
    let report = load.finish();
    report.assert_none_failed();
    for version in ["v1", "v2", "v3"] {
        assert!(report.answered_with(&format!("hello {version}")) > 0, "{version} never answered\n{report}");
    }
    host.wait_healthy("shop", 2);
    host.stop();
}

#[test]
fn a_replacing_redeploy_holds_requests_and_never_runs_two() {
    let host = DevHost::start();
    // The lock is on the volume: a second instance beside the first would end at once and fail the deploy.
    let version = |version: &str| {
        let more = "deploy = \"replace\"\n[volume.data]\npath = \"/data\"\nquota = \"64M\"";
        let app = AppDir::server("shop", version, more);
        let manifest = std::fs::read_to_string(app.file("epagent.toml")).unwrap();
        app.write(
            "epagent.toml",
            &manifest.replace("python3 server.py", "flock -n /data/lock python3 server.py"),
        );
        app
    };
    host.deploy(&version("v1")).ok();
    let load = host.load("shop.test", "hello v");
    breathe(&load);
    for next in ["v2", "v3"] {
        host.deploy(&version(next)).ok();
        assert!(host.fetch("shop.test", "/").starts_with(&format!("hello {next}")));
        breathe(&load);
    }
    let report = load.finish();
    report.assert_none_failed();
    assert!(report.answered_with("hello v1") > 0 && report.answered_with("hello v3") > 0, "{report}");
    host.stop();
}

#[test]
fn a_rollback_is_a_deploy_that_loses_no_request() {
    let host = DevHost::start();
    for version in ["v1", "v2", "v3"] {
        host.deploy(&AppDir::server("shop", version, "")).ok();
    }
    let load = host.load("shop.test", "hello v");
    breathe(&load);
    host.cli(&["rollback", "shop"]).ok();
    assert!(host.fetch("shop.test", "/").starts_with("hello v2"), "not the release before");
    breathe(&load);
    host.cli(&["rollback", "shop", "r1"]).ok();
    assert!(host.fetch("shop.test", "/").starts_with("hello v1"), "not the release that was named");
    breathe(&load);
    load.finish().assert_none_failed();
    let refused = host.cli(&["rollback", "shop", "r99"]);
    assert_ne!(refused.code, Some(0));
    refused.says(&["r99"]);
    assert!(host.fetch("shop.test", "/").starts_with("hello v1"));
    host.stop();
}

#[test]
fn scaling_up_and_down_loses_no_request() {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "")).ok();
    let load = host.load("shop.test", "hello v1");
    breathe(&load);
    for count in [5, 2] {
        host.cli(&["scale", "shop", &format!("web={count}")]).ok();
        host.wait_healthy("shop", count);
        breathe(&load);
    }
    load.finish().assert_none_failed();
    host.stop();
}

#[test]
fn a_restart_replaces_every_instance_and_loses_no_request() {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "instances = 2")).ok();
    let before = host.pids("shop");
    let load = host.load("shop.test", "hello v1");
    breathe(&load);
    host.cli(&["restart", "shop"]).ok();
    let after = host.wait_healthy("shop", 2);
    assert!(after.iter().all(|row| !before.contains(&row.pid.unwrap())), "an instance was not restarted");
    breathe(&load);
    load.finish().assert_none_failed();
    host.stop();
}

#[test]
fn a_change_of_configuration_reaches_the_app_and_loses_no_request() {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "")).ok();
    let load = host.load("shop.test", "hello ");
    breathe(&load);
    host.cli(&["config", "shop", "set", "VERSION=configured"]).ok();
    eventually("the app sees its new configuration", Duration::from_secs(20), || {
        host.fetch("shop.test", "/").starts_with("hello configured").then_some(())
    });
    breathe(&load);
    load.finish().assert_none_failed();
    host.stop();
}

#[test]
fn slow_requests_are_finished_by_the_release_that_began_them() {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "")).ok();
    let address = host.http;
    let slow = std::thread::spawn(move || {
        epagent_tests::http::get(address, "shop.test", "/slow?3000", Duration::from_secs(20))
    });
    std::thread::sleep(Duration::from_millis(300));
    host.deploy(&AppDir::server("shop", "v2", "")).ok();
    assert!(host.fetch("shop.test", "/").starts_with("hello v2"));
    let response = slow.join().unwrap().expect("the slow request was answered");
    assert!(response.text().starts_with("hello v1"), "{}", response.text());
    host.stop();
}

#[test]
fn a_port_route_passes_plain_tcp_through_a_redeploy() {
    let host = DevHost::start();
    let port = 20_000 + (std::process::id() % 10_000) as u16;
    let version = |version: &str| {
        let app = AppDir::server("shop", version, "");
        let manifest = std::fs::read_to_string(app.file("epagent.toml")).unwrap();
        app.write("epagent.toml", &manifest.replace("host = \"shop.test\"", &format!("port = {port}")));
        app
    };
    host.deploy(&version("v1")).ok();
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));
    let shape = epagent_tests::Shape { keep_alive_threads: 0, ..Default::default() };
    let load = Load::start(address, "any", "hello v", shape);
    breathe(&load);
    host.deploy(&version("v2")).ok();
    breathe(&load);
    let report = load.finish();
    report.assert_none_failed();
    assert!(report.answered_with("hello v2") > 0, "{report}");
    host.stop();
}

#[test]
fn the_old_instances_are_gone_when_a_deploy_is_done() {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "instances = 3")).ok();
    let old = host.pids("shop");
    host.deploy(&AppDir::server("shop", "v2", "instances = 1")).ok();
    let live: Vec<_> = host.ps().into_iter().filter(is_live).collect();
    assert_eq!(live.len(), 1, "{live:?}");
    for pid in old {
        assert!(!epagent_tests::process::is_alive(pid), "instance {pid} of the old release still runs");
    }
    host.stop();
}
