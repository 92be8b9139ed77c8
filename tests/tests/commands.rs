//! The commands an operator lives with, and the same through plain HTTP on the socket.

use std::process::Command;
use std::time::Duration;

use epagent_tests::command::{run, run_with_input};
use epagent_tests::host::{DevHost, is_live};
use epagent_tests::{AppDir, eventually, process};
use serde_json::Value;

#[test]
fn every_read_command_speaks_json() {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "[volume.data]\npath = \"/data\"\nquota = \"64M\"")).ok();
    for words in [
        "ps",
        "apps",
        "status",
        "releases shop",
        "config shop",
        "secrets ls shop",
        "volume ls",
        "image ls",
        "events",
        "errors",
        "doctor",
        "version",
        "debug config",
    ] {
        let mut arguments: Vec<&str> = words.split(' ').collect();
        let plain = host.cli(&arguments);
        assert_eq!(plain.code, Some(0), "{plain}");
        arguments.push("--json");
        let text = host.cli(&arguments).ok();
        let value: Result<Value, _> = serde_json::from_str(&text);
        assert!(value.is_ok(), "{words} --json: {value:?}\n{text}");
    }
    let row = serde_json::from_str::<Value>(&host.cli(&["ps", "--json"]).ok()).unwrap()[0].clone();
    for key in ["app", "process", "index", "release", "state", "pid", "restarts", "started_at"] {
        assert!(row.get(key).is_some(), "no {key} in {row}");
    }
    let pid = row["pid"].as_i64().unwrap() as i32;
    assert!(process::is_alive(pid), "{pid} is not the pid of a process of the host");
    host.stop();
}

#[test]
fn the_api_is_plain_http_on_a_unix_socket() {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "")).ok();
    let curl = |socket: &str, more: &[&str]| {
        let mut command = Command::new("curl");
        command
            .args(["-sS", "-i", "--max-time", "20", "--unix-socket"])
            .arg(host.state.join(socket))
            .args(more);
        run(&mut command).ok()
    };
    let apps = curl("admin.sock", &["http://epagent/v1/apps"]);
    assert!(apps.starts_with("HTTP/1.1 200") && apps.contains("\"shop\""), "{apps}");
    let apps = curl("read.sock", &["http://epagent/v1/apps"]);
    assert!(apps.starts_with("HTTP/1.1 200"), "{apps}");
    for more in [
        &["-X", "POST", "http://epagent/v1/apps/shop/stop"][..],
        &["-X", "DELETE", "http://epagent/v1/apps/shop"],
    ] {
        let refused = curl("read.sock", more);
        assert!(refused.starts_with("HTTP/1.1 4"), "the socket for reading took {more:?}: {refused}");
    }
    assert!(host.fetch("shop.test", "/").starts_with("hello v1"));
    host.stop();
}

#[test]
fn exec_passes_input_output_and_status_through() {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "")).ok();
    host.inside("shop", "exit 7").fails(7, &[]);
    host.inside("shop", "kill -TERM $$").fails(128 + 15, &[]);
    let ran = host.inside("shop", "echo out; echo err >&2; pwd; echo $VERSION");
    assert_eq!(ran.stdout, "out\n/app\nv1\n");
    assert!(ran.stderr.contains("err"), "{ran}");
    let input: Vec<u8> = (0..3_000_000u32).flat_map(|n| n.to_le_bytes()).collect();
    let ran = run_with_input(&mut host.command(&["exec", "shop", "--", "wc", "-c"]), &input);
    assert_eq!(ran.ok().trim(), input.len().to_string());
    let ran = host.cli(&["exec", "shop", "--", "no-such-program"]);
    assert_eq!(ran.code, Some(127), "{ran}");
    ran.says(&["no-such-program"]);
    host.stop();
}

#[test]
fn run_is_a_jail_of_its_own_on_the_current_release() {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "")).ok();
    host.inside("shop", "echo here > /app/mark").ok();
    let ran = host.cli(&["run", "shop", "--", "/bin/sh", "-c", "ls /app; echo $VERSION; exit 5"]);
    assert_eq!(ran.code, Some(5), "{ran}");
    assert!(ran.stdout.contains("server.py") && ran.stdout.contains("v1"), "{ran}");
    assert!(!ran.stdout.contains("mark"), "it is the instance's own root\n{ran}");
    eventually("its jail is gone", Duration::from_secs(10), || {
        (host.ps().iter().filter(|row| is_live(row)).count() == 1).then_some(())
    });
    host.stop();
}

#[test]
fn logs_show_what_the_app_printed_also_before_a_restart() {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "")).ok();
    let text = host.cli(&["logs", "shop"]).ok();
    assert!(text.contains("version v1 starts") && text.contains("listens on"), "{text}");
    host.deploy(&AppDir::server("shop", "v2", "[build]\nrun = \"echo compiling\"")).ok();
    let text = host.cli(&["logs", "shop"]).ok();
    assert!(text.contains("version v2 starts"), "{text}");
    let id = host.last_deploy("shop").id;
    let text = host.cli(&["logs", "shop", "--build", &format!("d{id}")]).ok();
    assert!(text.contains("compiling"), "{text}");
    host.stop();
}

#[test]
fn a_stopped_app_stays_stopped_until_it_is_started() {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "instances = 2")).ok();
    let pids = host.pids("shop");
    host.cli(&["stop", "shop"]).ok();
    eventually("its instances are gone", Duration::from_secs(20), || {
        pids.iter().all(|pid| !process::is_alive(*pid)).then_some(())
    });
    let agent = host.kill("epagentd");
    host.wait_restarted("epagentd", agent);
    host.wait_answering();
    assert!(host.healthy("shop").is_empty(), "it came back by itself");
    host.cli(&["start", "shop"]).ok();
    host.wait_healthy("shop", 2);
    assert!(host.fetch("shop.test", "/").starts_with("hello v1"));
    host.stop();
}

#[test]
fn a_volume_outlives_releases_and_restarts_and_goes_with_its_app() {
    let host = DevHost::start();
    let version =
        |version: &str| AppDir::server("shop", version, "[volume.data]\npath = \"/data\"\nquota = \"64M\"");
    host.deploy(&version("v1")).ok();
    host.inside("shop", "echo kept > /data/file").ok();
    host.deploy(&version("v2")).ok();
    assert_eq!(host.inside("shop", "cat /data/file").ok(), "kept\n");
    host.cli(&["restart", "shop"]).ok();
    assert_eq!(host.inside("shop", "cat /data/file").ok(), "kept\n");

    let refused = host.cli(&["destroy", "shop"]);
    assert_ne!(refused.code, Some(0), "destroyed without a word of confirmation");
    refused.says(&["--yes"]);
    host.cli(&["destroy", "shop", "--yes"]).ok();
    assert!(host.ps().iter().all(|row| row.app != "shop"), "{:?}", host.ps());
    assert_eq!(host.api().get("/v1/volumes"), serde_json::json!([]));
    let response = host.http("shop.test", "/").unwrap();
    assert!(matches!(response.status, 404 | 503), "{} {}", response.status, response.text());
    host.deploy(&version("v3")).ok();
    assert_ne!(host.inside("shop", "cat /data/file").code, Some(0), "the volume of a destroyed app is back");
    host.stop();
}

#[test]
fn an_imported_tree_is_an_image() {
    let host = DevHost::start();
    let tree = tempfile::tempdir().unwrap();
    let root = tree.path();
    for folder in ["bin", "etc", "tmp"] {
        std::fs::create_dir(root.join(folder)).unwrap();
    }
    std::fs::write(root.join("etc/flavour"), "tiny\n").unwrap();
    let source = root.with_extension("c");
    std::fs::write(&source, SHELL).unwrap();
    run(Command::new("gcc").args(["-static", "-O1", "-o"]).arg(root.join("bin/sh")).arg(&source)).ok();
    std::fs::remove_file(&source).unwrap();
    host.cli(&["image", "import", "tiny", &root.to_string_lossy()]).ok();
    let images = host.cli(&["image", "ls"]).ok();
    assert!(images.contains("tiny"), "{images}");

    let app = AppDir::manifest("app = \"tiny\"\nimage = \"tiny\"\n[process.main]\ncommand = \"anything\"\n");
    host.deploy(&app).ok();
    let ran = host.cli(&["run", "tiny", "--", "/bin/sh", "/etc/flavour"]);
    assert_eq!(ran.code, Some(0), "{ran}");
    assert_eq!(ran.stdout, "tiny\n");
    let refused = host.cli(&["image", "rm", "tiny"]);
    assert_ne!(refused.code, Some(0), "an image in use was removed");
    refused.says(&["tiny"]);
    host.cli(&["destroy", "tiny", "--yes"]).ok();
    host.cli(&["image", "rm", "tiny"]).ok();
    host.stop();
}

/// A whole userland: prints the file that is its first argument, or waits.
const SHELL: &str = r#"
#include <stdio.h>
#include <string.h>
#include <unistd.h>
int main(int argc, char **argv) {
    if (argc < 2 || strcmp(argv[1], "-c") == 0) { for (;;) pause(); }
    FILE *file = fopen(argv[1], "r");
    int c;
    if (!file) return 1;
    while ((c = getc(file)) != EOF) putchar(c);
    return 0;
}
"#;
