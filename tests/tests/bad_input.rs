//! Bad input: each has its own clear error, and nothing is changed by it.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use epagent_tests::archive::Tar;
use epagent_tests::command::Ran;
use epagent_tests::host::{DevHost, Options, binary};
use epagent_tests::{AppDir, app::server_manifest, eventually};
use serde_json::Value;

/// A host with an app that serves and must be untouched by all that follows.
struct Untouched {
    host: DevHost,
    before: String,
}

impl Untouched {
    fn new() -> Self {
        Self::on(DevHost::start())
    }

    fn on(host: DevHost) -> Self {
        host.deploy(&AppDir::server("shop", "v1", "")).ok();
        let before = Self::state(&host);
        Self { host, before }
    }

    /// What the app is, without what changes by itself.
    fn state(host: &DevHost) -> String {
        let pids = host.pids("shop");
        let apps = host.api().get("/v1/apps");
        let apps: Vec<&str> = apps.as_array().unwrap().iter().filter_map(|app| app["app"].as_str()).collect();
        let volumes = host.api().get("/v1/volumes");
        format!("{pids:?} {apps:?} {volumes}")
    }

    /// The command failed with these words, and the app is as it was.
    #[track_caller]
    fn refused(&self, what: &str, ran: Ran, words: &[&str]) {
        println!("--- {what}\n{}", ran.stderr);
        assert!(!matches!(ran.code, Some(0) | None), "{what} was accepted\n{ran}");
        ran.says(words);
        assert_eq!(Self::state(&self.host), self.before, "{what} changed something");
        assert!(self.host.fetch("shop.test", "/").starts_with("hello v1"), "{what}");
    }

    /// A manifest that is refused before anything happens.
    #[track_caller]
    fn manifest(&self, text: &str, words: &[&str]) {
        self.refused(text, self.host.deploy(&AppDir::manifest(text)), words);
    }

    #[track_caller]
    fn archive(&self, what: &str, bytes: &[u8], words: &[&str]) {
        let mut file = tempfile::Builder::new().suffix(".tar").tempfile().unwrap();
        file.write_all(bytes).unwrap();
        let ran = self.host.cli(&["deploy", &file.path().to_string_lossy()]);
        self.refused(what, ran, words);
    }
}

#[test]
fn a_broken_manifest_is_shown_with_its_line_and_a_suggestion() {
    let shop = Untouched::new();
    shop.manifest(
        "app = \"shop\"\nimge = \"host\"\n",
        &["imge", "epagent.toml:2", "^^^^", "did you mean", "image"],
    );
    let process = "[process.web]\ncommand = \"true\"\n";
    let base = format!("app = \"shop\"\nimage = \"host\"\n{process}");
    for (more, words) in [
        ("instnces = 2", &["instnces", "epagent.toml:5", "instances"][..]),
        ("instances = \"two\"", &["instances", "epagent.toml:5"]),
        ("instances = 1000", &["1000", "64"]),
        ("instances = -1", &["-1"]),
        ("deploy = \"rolling\"", &["rolling", "overlap", "replace"]),
        ("stop = { signal = \"BOOM\" }", &["BOOM", "TERM"]),
        ("stop = { grace = \"soon\" }", &["soon"]),
        ("limits = { memory = \"256X\" }", &["256X"]),
        ("limits = { cpu = \"fast\" }", &["fast"]),
        ("[process.web.health]\nhttp = \"/\"\ntcp = true", &["http", "tcp"]),
        ("[[route]]\nhost = \"a.test\"\nprocess = \"wbe\"", &["wbe", "web"]),
        ("[[route]]\nprocess = \"web\"", &["host", "port"]),
        ("[volume.data]\npath = \"data\"", &["data", "absolute"]),
        ("[volume.data]\npath = \"/proc/data\"", &["/proc"]),
        ("[env]\nPORT = \"1\"", &["PORT"]),
        ("[env]\n\"A B\" = \"1\"", &["A B"]),
        ("x = = 1", &["epagent.toml:5"]),
    ] {
        shop.manifest(&format!("{base}{more}\n"), words);
    }
    shop.manifest("app = \"shop\"\nimage = \"host\"\n", &["process"]);
    shop.manifest("", &["app"]);
    shop.host.stop();
}

#[test]
fn a_name_that_could_be_a_path_is_refused_everywhere() {
    let shop = Untouched::new();
    let app = AppDir::server("shop", "v2", "");
    let folder = app.path().to_string_lossy().into_owned();
    for name in ["a/b", "..", "../etc", "a\nb", "A", "a b", "-a", "", "ä"] {
        let ran = shop.host.cli(&["deploy", &folder, &format!("--app={name}")]);
        shop.refused(&format!("--app={name:?}"), ran, &["name"]);
        let text = server_manifest("NAME", "v2", "").replace("\"NAME\"", &format!("{name:?}"));
        shop.manifest(&text.replace("NAME.test", "name.test"), &["name"]);

        let manifest = serde_json::json!({ "toml": { "text": server_manifest("shop", "v2", "") } });
        let body = serde_json::json!({ "app": name, "manifest": manifest }).to_string();
        let response = shop.host.api().request("POST", "/v1/deploys", &body).unwrap();
        let error: Value = serde_json::from_slice(&response.body).unwrap_or_default();
        assert!((400..500).contains(&response.status), "{name:?}: {} {}", response.status, response.text());
        for key in ["code", "message", "hint"] {
            assert!(error[key].is_string(), "{name:?}: no {key} in {}", response.text());
        }
    }
    for path in ["/v1/apps/..%2f..%2fetc", "/v1/apps/../../etc", "/v1/apps/a%0ab", "/v1/apps/a%00b"] {
        let response = shop.host.api().request("GET", path, "").unwrap();
        assert!((400..500).contains(&response.status), "{path}: {}", response.status);
    }
    shop.host.stop();
}

#[test]
fn what_is_missing_is_named() {
    let shop = Untouched::new();
    let host = &shop.host;
    shop.refused("no such folder", host.cli(&["deploy", "/nonexistent/app"]), &["/nonexistent/app"]);
    shop.refused("an empty folder", host.deploy(&AppDir::empty()), &["epagent.toml", "Procfile"]);
    shop.manifest(&server_manifest("shop", "v2", "").replace("\"host\"", "\"nope\""), &["image", "nope"]);
    let secret = server_manifest("shop", "v2", "").replace("[env]", "secrets = [\"TOKEN\"]\n[env]");
    shop.manifest(&secret, &["secret", "TOKEN"]);
    for words in [["logs", "nope"], ["restart", "nope"], ["releases", "nope"], ["rollback", "nope"]] {
        shop.refused("an unknown app", host.cli(&words), &["nope"]);
    }
    shop.refused("an unknown process", host.cli(&["scale", "shop", "wbe=2"]), &["wbe"]);
    shop.refused("too many instances", host.cli(&["scale", "shop", "web=1000"]), &["1000", "64"]);
    shop.refused("no number", host.cli(&["scale", "shop", "web=many"]), &["many"]);

    let mut command = Command::new(binary("epagent"));
    command.args(["ps"]).env("EPAGENT_SOCKET", "/nonexistent/admin.sock");
    let ran = epagent_tests::command::run(&mut command);
    shop.refused("no agent", ran, &["/nonexistent/admin.sock"]);
    shop.host.stop();
}

#[test]
fn a_hostile_archive_is_refused_by_entry_and_touches_nothing() {
    let shop = Untouched::new();
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().join("written");
    let target = target.to_string_lossy().into_owned();
    let manifest = server_manifest("shop", "evil", "");
    let app = || Tar::of_app(&manifest);
    let up = format!("../../../../../../../../..{target}");

    shop.archive("..", &app().file("a/../../../../../../tmp/evil", b"x").finish(), &[".."]);
    shop.archive(".. to a known place", &app().file(&up, b"x").finish(), &[".."]);
    shop.archive("absolute", &app().file(&target, b"x").finish(), &[&target, "absolute"]);
    shop.archive("symlink out", &app().symlink("out", "/etc").finish(), &["out", "link"]);
    shop.archive("symlink up", &app().symlink("sub/out", "../../../etc").finish(), &["sub/out", "link"]);
    let through = app().symlink("door", &outside.path().to_string_lossy()).file("door/written", b"x");
    shop.archive("through a symlink", &through.finish(), &["door", "link"]);
    shop.archive("hardlink out", &app().hardlink("passwd", "/etc/passwd").finish(), &["passwd", "link"]);
    shop.archive("device", &app().device("mem").finish(), &["mem", "device"]);
    shop.archive("fifo", &app().fifo("pipe").finish(), &["pipe"]);
    let cut = app().entry("big", b'0', "", 1 << 20).unfinished();
    shop.archive("cut short", &cut, &["end"]);
    shop.archive("no archive", b"\x7fELF, and so on and so forth", &["archive"]);
    let claim = app().entry("x", b'0', "", 1 << 60);
    shop.archive("a size beyond all disks", &claim.finish(), &["when unpacked"]);

    assert!(!std::path::Path::new(&target).exists(), "an archive wrote outside");
    assert!(!std::path::Path::new("/tmp/evil").exists(), "an archive wrote outside");
    let response = shop.host.http("shop.test", "/").unwrap();
    assert!(response.text().starts_with("hello v1"));
    shop.host.stop();
}

#[test]
fn an_archive_that_grows_without_end_is_stopped() {
    let shop = Untouched::new();
    let mut file = tempfile::Builder::new().suffix(".tar.zst").tempfile().unwrap();
    let head =
        Tar::of_app(&server_manifest("shop", "evil", "")).entry("zeros", b'0', "", 40 << 30).unfinished();
    let mut zstd = Command::new("zstd")
        .args(["-1", "-q", "-c"])
        .stdin(Stdio::piped())
        .stdout(file.as_file().try_clone().unwrap())
        .spawn()
        .unwrap();
    let mut input = zstd.stdin.take().unwrap();
    input.write_all(&head).unwrap();
    let zeros = vec![0; 1 << 20];
    for _ in 0..8 << 10 {
        input.write_all(&zeros).unwrap();
    }
    drop(input);
    assert!(zstd.wait().unwrap().success());
    file.flush().unwrap();
    let size = file.as_file().metadata().unwrap().len();
    assert!(size < 10 << 20, "the bomb itself is {size} bytes");
    let ran = shop.host.cli(&["deploy", &file.path().to_string_lossy()]);
    shop.refused("a bomb", ran, &["archive_refused", "when unpacked"]);
    shop.host.deploy(&AppDir::server("after", "v1", "")).ok();
    shop.host.stop();
}

#[test]
fn a_full_pool_fails_the_build_that_filled_it_and_nothing_else() {
    let host = DevHost::with(Options { size: "1G".to_owned(), ..Options::default() });
    let shop = Untouched::on(host);
    let fill = server_manifest("filler", "v1", "")
        .replace("[env]", "[build]\nrun = \"dd if=/dev/urandom of=big bs=1M count=3000 conv=fsync\"\n[env]");
    let app = AppDir::manifest(&fill);
    let ran = shop.host.deploy(&app);
    println!("{ran}");
    assert_eq!(ran.code, Some(3), "{ran}");
    ran.says(&["build_failed"]);
    assert!(shop.host.fetch("shop.test", "/").starts_with("hello v1"));
    // What the build had taken is given back, at the latest with the file system's next commit (30 s).
    eventually("the neighbour can write", Duration::from_secs(40), || {
        let ran = shop.host.inside("shop", "dd if=/dev/zero of=/app/file bs=1M count=4 conv=fsync");
        (ran.code == Some(0)).then_some(())
    });
    shop.host.deploy(&AppDir::server("shop", "v2", "")).ok();
    assert!(shop.host.fetch("shop.test", "/").starts_with("hello v2"));
    shop.host.stop();
}

#[test]
fn a_pool_on_something_that_is_not_btrfs_is_refused() {
    let host = DevHost::start();
    let folder = tempfile::tempdir().unwrap();
    let config = std::fs::read_to_string(host.state.join("etc/runner.toml")).unwrap();
    let other: Vec<String> = config
        .lines()
        .filter(|line| {
            !["mount", "file", "size"].iter().any(|key| line.trim().starts_with(&format!("{key} ")))
        })
        .map(|line| match line.trim() {
            "[pool]" => format!("[pool]\npath = \"{}\"", folder.path().display()),
            _ => line.to_owned(),
        })
        .collect();
    let path = folder.path().join("runner.toml");
    std::fs::write(&path, other.join("\n")).unwrap();
    let mut command = Command::new(binary("epagent-runner"));
    command.args(["check", "--config"]).arg(&path);
    let ran = epagent_tests::command::run(&mut command);
    println!("{ran}");
    assert_ne!(ran.code, Some(0), "{ran}");
    let said = format!("{}{}", ran.stdout, ran.stderr);
    assert!(said.contains("is not on btrfs") && said.contains(&*folder.path().to_string_lossy()), "{ran}");
    host.stop();
}

#[test]
fn what_is_not_a_request_gets_an_error_of_the_api() {
    let shop = Untouched::new();
    let api = shop.host.api();
    for (method, path, body) in [
        ("POST", "/v1/deploys", "{"),
        ("POST", "/v1/deploys", "{\"unknown\": 1}"),
        ("POST", "/v1/apps/shop/scale", "{\"processes\": {\"web\": -1}}"),
        ("POST", "/v1/apps/shop/exec", "{\"argv\": []}"),
        ("GET", "/v1/nothing", ""),
        ("PUT", "/v1/apps", "{}"),
        ("PUT", "/v1/deploys/999/archive", "x"),
        ("GET", "/v1/deploys/not-a-number", ""),
    ] {
        let response = api.request(method, path, body).unwrap();
        assert!((400..500).contains(&response.status), "{method} {path}: {}", response.status);
        let error: Value = serde_json::from_slice(&response.body)
            .unwrap_or_else(|_| panic!("{method} {path}: {}", response.text()));
        assert!(error["code"].is_string() && error["message"].is_string(), "{method} {path}: {error}");
    }
    assert_eq!(Untouched::state(&shop.host), shop.before);
    shop.host.stop();
}
