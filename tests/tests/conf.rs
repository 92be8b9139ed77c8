//! The configuration of a node in layers: what files in `conf.d` change, and what becomes of a mistake in one.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use epagent_tests::host::DevHost;
use epagent_tests::{AppDir, eventually, process};
use serde_json::Value;

fn drop_in(host: &DevHost, name: &str, text: &str) -> PathBuf {
    let folder = host.state.join("etc/conf.d");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join(name), text).unwrap();
    folder.join(name)
}

/// The value and the origin of a setting, as `epagent debug config` shows them.
fn setting(host: &DevHost, daemon: &str, key: &str) -> (String, String) {
    let shown: Value = serde_json::from_str(&host.cli(&["debug", "config", "--json"]).ok()).unwrap();
    let found = shown[daemon].as_array().unwrap().iter().find(|row| row["key"] == key);
    let row = found.unwrap_or_else(|| panic!("no {key} in {shown}"));
    let text = |name: &str| row[name].as_str().unwrap().to_owned();
    (text("value"), text("origin"))
}

#[test]
fn a_file_in_conf_d_changes_what_the_daemons_do_and_is_shown_as_the_origin() {
    let host = DevHost::start();
    assert_eq!(setting(&host, "epagentd", "limits.releases_kept"), ("5".to_owned(), "default".to_owned()));
    let (node, origin) = setting(&host, "runner", "node");
    assert!(node.parse::<u32>().is_ok() && origin.contains("etc/runner.toml:"), "{node} {origin}");

    let file = drop_in(
        &host,
        "50-site.toml",
        "[epagentd.limits]\narchive_bytes = 1000\n[runner.build]\ncpu = \"50%\"\n",
    );
    let origin = format!("{}:2", file.display());
    assert_eq!(setting(&host, "epagentd", "limits.archive_bytes"), ("1000".to_owned(), origin));
    assert_eq!(setting(&host, "runner", "build.cpu").0, "\"50%\"");
    let old = host.kill("epagentd");
    host.wait_restarted("epagentd", old);
    host.wait_answering();
    let app = AppDir::server("shop", "v1", "");
    app.write("large", &"0123456789".repeat(1_000));
    let refused = host.deploy(&app);
    assert!(refused.code != Some(0) && refused.stderr.contains("archive"), "{refused}");
    host.stop();
}

#[test]
fn a_mistake_is_told_with_file_and_line_and_stops_no_app() {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "")).ok();
    let pids = host.pids("shop");
    let file = drop_in(&host, "50-site.toml", "[epagentd.limits]\nrelases_kept = 9\n");
    let told = format!("{}:2: unknown field `relases_kept`", file.display());
    host.cli(&["debug", "config"]).fails(1, &["bad_config", &told]);

    host.kill("epagentd");
    eventually("the agent says what it does not take", Duration::from_secs(20), || {
        host.logs().contains("conf.d/50-site.toml:2: unknown field `relases_kept`").then_some(())
    });
    assert!(host.fetch("shop.test", "/").starts_with("hello v1"));
    fs::remove_file(file).unwrap();
    host.wait_answering();
    assert_eq!(host.pids("shop"), pids);
    assert!(pids.iter().all(|pid| process::is_alive(*pid)));
    host.stop();
}
