//! A release that never becomes healthy: the old one serves on, and the verdict names the cause.

use epagent_tests::command::Ran;
use epagent_tests::host::DevHost;
use epagent_tests::{AppDir, app::server_manifest};

/// Exit code of `epagent deploy` for a deploy that failed, with its verdict printed.
const DEPLOY_FAILED: i32 = 3;

/// A broken second version of the app: what to replace in a good manifest by what.
fn broken(from: &str, to: &str) -> AppDir {
    let manifest = server_manifest("shop", "v2", "").replace("deadline = \"20s\"", "deadline = \"3s\"");
    let app = AppDir::server("shop", "v2", "");
    let changed = manifest.replace(from, to);
    assert_ne!(manifest, changed, "{from:?} is not in the manifest");
    app.write("epagent.toml", &changed);
    app
}

fn command(line: &str) -> AppDir {
    broken("command = \"python3 server.py\"", &format!("command = {line:?}"))
}

/// Deploys each broken version over a good one under load, and looks for the code and the words of the verdict.
fn check(cases: Vec<(&str, AppDir, &[&str])>) {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "")).ok();
    let pids = host.pids("shop");
    let load = host.load("shop.test", "hello v1");
    for (code, app, words) in cases {
        let ran: Ran = host.deploy(&app);
        println!("--- {code}\n{}", ran.stderr);
        assert_eq!(ran.code, Some(DEPLOY_FAILED), "{ran}");
        ran.clone().says(&[code]);
        ran.says(words);
        let verdict = host.last_deploy("shop").verdict.expect("the deploy has a verdict");
        assert_eq!(verdict.code, code, "{verdict:?}");
        assert!(!verdict.hint.is_empty(), "{verdict:?}");
        assert_eq!(host.pids("shop"), pids, "what served is not what serves");
    }
    let report = load.finish();
    report.assert_none_failed();
    assert_eq!(report.answered_with("hello v2"), 0, "a broken release answered\n{report}");
    host.stop();
}

#[test]
fn an_app_that_ends_is_told_with_its_exit_code_and_last_lines() {
    check(vec![
        ("exited", command("EXIT=3 python3 server.py"), &["exit code 3", "cannot find the settings file"]),
        ("exited", command("sleep 0.3; kill -SEGV $$"), &["SEGV"]),
        ("command_not_found", command("gunicorm -b 0.0.0.0:8000"), &["gunicorm"]),
        (
            "out_of_memory",
            broken(
                "command = \"python3 server.py\"",
                "command = \"python3 -c 'b = bytearray(300 << 20)'\"\nlimits = { memory = \"64M\" }",
            ),
            &["memory"],
        ),
    ]);
}

#[test]
fn an_app_that_cannot_be_reached_is_told_what_it_listens_on() {
    check(vec![
        (
            "wrong_port",
            command("LISTEN=other python3 server.py"),
            &["listening on 0.0.0.0:3999", "expected 0.0.0.0:8000"],
        ),
        ("wrong_port", command("LISTEN=none python3 server.py"), &["listening on nothing"]),
        ("unhealthy", command("HEALTH=bad python3 server.py"), &["/healthz", "500"]),
    ]);
}

#[test]
fn a_failing_build_or_release_command_is_told_with_what_it_printed() {
    check(vec![
        (
            "build_failed",
            broken("[env]", "[build]\nrun = [\"echo ready\", \"echo missing header; exit 2\"]\n[env]"),
            &["exit code 2", "missing header"],
        ),
        (
            "build_failed",
            broken("[env]", "[build]\nrun = \"no-such-compiler main.c\"\n[env]"),
            &["no-such-compiler"],
        ),
        (
            "release_failed",
            broken("[env]", "[release]\nrun = \"echo table is locked; exit 4\"\n[env]"),
            &["exit code 4", "table is locked"],
        ),
    ]);
}

#[test]
fn a_failed_replacement_brings_the_old_release_back_and_loses_no_request() {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "deploy = \"replace\"")).ok();
    let load = host.load("shop.test", "hello v1");
    let app = AppDir::server("shop", "v2", "deploy = \"replace\"");
    let manifest = std::fs::read_to_string(app.file("epagent.toml")).unwrap();
    app.write("epagent.toml", &manifest.replace("python3 server.py", "EXIT=3 python3 server.py"));
    host.deploy(&app).fails(DEPLOY_FAILED, &["exited", "exit code 3"]);
    assert!(host.fetch("shop.test", "/").starts_with("hello v1"));
    host.wait_healthy("shop", 1);
    load.finish().assert_none_failed();
    host.stop();
}

#[test]
fn a_first_release_that_fails_leaves_nothing_running() {
    let host = DevHost::start();
    let app = AppDir::server("shop", "v1", "");
    let manifest = std::fs::read_to_string(app.file("epagent.toml")).unwrap();
    app.write("epagent.toml", &manifest.replace("python3 server.py", "EXIT=3 python3 server.py"));
    host.deploy(&app).fails(DEPLOY_FAILED, &["exit code 3"]);
    assert!(host.healthy("shop").is_empty());
    host.deploy(&AppDir::server("shop", "v2", "")).ok();
    assert!(host.fetch("shop.test", "/").starts_with("hello v2"));
    host.stop();
}
