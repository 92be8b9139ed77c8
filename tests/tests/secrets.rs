//! A secret is in the environment of the app and nowhere else.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use epagent_tests::command::{run, run_with_input};
use epagent_tests::host::{DevHost, Options};
use epagent_tests::{AppDir, process};
use nix::sys::signal::Signal;

/// A text that exists nowhere by itself, in the forms in which it could be written down.
struct Canary {
    plain: String,
    forms: Vec<Vec<u8>>,
}

impl Canary {
    fn new(word: &str) -> Self {
        let salt = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos();
        let plain = format!("canary-{word}-{salt:x}-{}", std::process::id());
        let hex = plain.bytes().map(|byte| format!("{byte:02x}")).collect::<String>();
        let numbers = plain.bytes().map(|byte| byte.to_string()).collect::<Vec<_>>();
        let forms = vec![
            plain.clone().into_bytes(),
            hex.into_bytes(),
            base64(plain.as_bytes()).into_bytes(),
            numbers.join(",").into_bytes(),
            numbers.join(", ").into_bytes(),
        ];
        Self { plain, forms }
    }

    fn is_in(&self, bytes: &[u8]) -> bool {
        self.forms.iter().any(|form| contains(bytes, form))
    }

    /// Every file below `path` that holds it, the pool and its file included.
    fn files(&self, path: &Path) -> Vec<String> {
        let mut found = Vec::new();
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() {
                found.extend(self.files(&entry.path()));
            } else if kind.is_file() && self.is_in_file(&entry.path()) {
                found.push(entry.path().to_string_lossy().into_owned());
            }
        }
        found
    }

    /// Read in overlapping pieces: the pool's file is larger than memory should hold.
    fn is_in_file(&self, path: &Path) -> bool {
        let Ok(mut file) = fs::File::open(path) else { return false };
        let overlap = self.forms.iter().map(Vec::len).max().unwrap_or(0);
        let mut bytes = vec![0; 4 << 20];
        let mut kept = 0;
        loop {
            let Ok(read) = file.read(&mut bytes[kept..]) else { return false };
            if read == 0 {
                return false;
            }
            let end = kept + read;
            // Most of a pool is empty.
            let empty = bytes[..end].iter().all(|byte| *byte == 0);
            if !empty && self.is_in(&bytes[..end]) {
                return true;
            }
            kept = overlap.min(end);
            bytes.copy_within(end - kept..end, 0);
        }
    }
}

fn contains(bytes: &[u8], form: &[u8]) -> bool {
    let first = form[0];
    let mut from = 0;
    while let Some(offset) = bytes[from..].iter().position(|byte| *byte == first) {
        if bytes[from + offset..].starts_with(form) {
            return true;
        }
        from += offset + 1;
    }
    false
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    // Only whole groups: the last letters differ by what follows.
    bytes
        .chunks_exact(3)
        .flat_map(|group| {
            let bits = u32::from(group[0]) << 16 | u32::from(group[1]) << 8 | u32::from(group[2]);
            [18, 12, 6, 0].map(|shift| char::from(LETTERS[(bits >> shift) as usize & 63]))
        })
        .collect()
}

#[test]
fn a_secret_is_found_nowhere_but_in_the_environment_of_its_app() {
    let host = DevHost::with(Options { size: "1G".to_owned(), ..Options::default() });
    let (first, second) = (Canary::new("first"), Canary::new("second"));
    let set = |value: &Canary| {
        run_with_input(&mut host.command(&["secrets", "set", "shop", "TOKEN"]), value.plain.as_bytes())
    };
    let more = "[release]\nrun = \"test -n \\\"$TOKEN\\\"\"";
    let app = AppDir::server("shop", "v1", more);
    let manifest = fs::read_to_string(app.file("epagent.toml")).unwrap();
    app.write(
        "epagent.toml",
        &manifest.replace("image = \"host\"", "image = \"host\"\nsecrets = [\"TOKEN\"]"),
    );

    let mut printed = vec![set(&first).ok()];
    let deployed = host.deploy(&app);
    printed.push(deployed.stderr.clone());
    printed.push(deployed.ok());
    host.deploy(&AppDir::server("other", "v1", "")).ok();
    assert!(app_has(&host, &first), "the app does not have its secret");

    // A second version restarts the app with it; the first one is history.
    printed.push(set(&second).ok());
    epagent_tests::eventually("the app has its new secret", std::time::Duration::from_secs(20), || {
        app_has(&host, &second).then_some(())
    });
    host.cli(&["restart", "shop"]).ok();
    host.cli(&["exec", "shop", "--", "true"]).ok();

    for words in [
        vec!["apps", "--json"],
        vec!["ps", "--json"],
        vec!["status", "--json"],
        vec!["releases", "shop", "--json"],
        vec!["config", "shop", "--json"],
        vec!["secrets", "ls", "shop", "--json"],
        vec!["events", "--json"],
        vec!["errors", "--json"],
        vec!["logs", "shop"],
        vec!["doctor"],
    ] {
        let ran = host.cli(&words);
        printed.push(format!("{}\n{}", ran.stdout, ran.stderr));
    }
    printed.push(host.api().get("/v1/deploys?app=shop").to_string());
    printed.push(host.logs());

    for canary in [&first, &second] {
        for text in &printed {
            assert!(!canary.is_in(text.as_bytes()), "printed:\n{text}");
        }
        let files = canary.files(&host.state);
        assert!(files.is_empty(), "in files: {files:?}");
        for process in process::all() {
            let pid = process.pid;
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            assert!(!canary.is_in(&line), "in the arguments of {process:?}");
        }
    }
    let node = host.node();
    let instances = host.pids("shop");
    for process in node.processes() {
        let environment = fs::read(format!("/proc/{}/environ", process.pid)).unwrap_or_default();
        let of_app = process::descendants(instances[0]).iter().any(|p| p.pid == process.pid);
        assert!(of_app || !second.is_in(&environment), "in the environment of {process:?}");
    }
    host.stop();
}

/// Whether a process of the app has the secret in its environment, as the host's root sees it.
fn app_has(host: &DevHost, canary: &Canary) -> bool {
    host.pids("shop").iter().flat_map(|init| process::descendants(*init)).any(|process| {
        fs::read(format!("/proc/{}/environ", process.pid)).is_ok_and(|bytes| canary.is_in(&bytes))
    })
}

#[test]
fn the_search_finds_what_is_there() {
    let canary = Canary::new("probe");
    let folder = tempfile::tempdir().unwrap();
    assert!(canary.files(folder.path()).is_empty());
    let mut bytes = vec![b'x'; (4 << 20) - 5];
    bytes.extend_from_slice(canary.plain.as_bytes());
    fs::create_dir(folder.path().join("sub")).unwrap();
    fs::write(folder.path().join("sub/file"), &bytes).unwrap();
    assert_eq!(canary.files(folder.path()).len(), 1);
    assert!(canary.is_in(format!("..{}..", base64(canary.plain.as_bytes())).as_bytes()));
}

/// A folder into which the bundle at `path` was unpacked.
fn unpacked(path: &Path) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    run(Command::new("tar").args(["--zstd", "-xf"]).arg(path).arg("-C").arg(folder.path())).ok();
    folder
}

/// The texts of the files of a bundle, by their names.
fn texts(folder: &Path) -> BTreeMap<String, String> {
    let top = fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
    let mut found = BTreeMap::new();
    let mut open = vec![top.clone()];
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let name = path.strip_prefix(&top).unwrap().to_string_lossy().into_owned();
        found.insert(name, String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned());
    }
    found
}

#[test]
fn a_support_bundle_tells_of_the_node_and_nothing_of_what_its_apps_hold() {
    let mut host = DevHost::with(Options { size: "1G".to_owned(), ..Options::default() });
    let words = ["secret", "configured", "manifest", "build", "printed"].map(Canary::new);
    let [secret, configured, manifest, build, printed] = &words;
    let conf = host.state.join("etc/conf.d");
    fs::create_dir_all(&conf).unwrap();
    fs::write(conf.join("50-build.toml"), format!("[runner.build.env]\nTOKEN = \"{}\"\n", build.plain))
        .unwrap();
    let old = host.kill("epagent-runner");
    host.wait_restarted("epagent-runner", old);
    host.wait_answering();

    run_with_input(&mut host.command(&["secrets", "set", "shop", "TOKEN"]), secret.plain.as_bytes()).ok();
    // It prints all that it holds, and then it ends: this is what a verdict shows of it.
    let app = AppDir::server("shop", "v1", "");
    let good = fs::read_to_string(app.file("epagent.toml")).unwrap();
    let with = |text: &str| {
        let env = format!("[env]\nSHAPE = \"{}\"", manifest.plain);
        text.replace("[env]", &env).replace("image = \"host\"", "image = \"host\"\nsecrets = [\"TOKEN\"]")
    };
    app.write("noise.sh", &format!("env; env >&2; echo {}; echo \"$TOKEN\"\n", printed.plain));
    let talking = |then: &str| with(&good).replace("python3 server.py", &format!("sh noise.sh; {then}"));
    app.write("epagent.toml", &talking("exec python3 server.py"));
    host.deploy(&app).ok();
    host.cli(&["config", "shop", "set", &format!("COLOUR={}", configured.plain)]).ok();
    app.write("epagent.toml", &talking("exit 3"));
    let failed = host.deploy(&app);
    assert!(printed.is_in(failed.stderr.as_bytes()), "the verdict shows what was printed: {failed}");

    let path = host.state.parent().unwrap().join("bundle.tar.zst");
    let output = path.to_str().unwrap();
    let made = host.cli(&["debug", "bundle", "--output", output]);
    assert_eq!(made.clone().ok().trim(), output);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    host.cli(&["debug", "bundle", "--output", output]).fails(1, &["output_failed"]);
    let folder = unpacked(&path);
    for canary in &words {
        let files = canary.files(folder.path());
        assert!(files.is_empty(), "{} is in {files:?}", canary.plain);
    }
    let texts_up = texts(folder.path());
    for (name, word) in [
        ("versions.txt", "epagent-runner 0."),
        ("config.json", "\"build.env.TOKEN\""),
        ("doctor.json", "\"runner\""),
        ("store.json", "\"found\": "),
        ("agent/status.json", "\"table_version\""),
        ("agent/instances.json", "\"shop\""),
        ("agent/routes.json", "shop.test"),
        ("agent/balancer.json", "\"upstreams\""),
        ("agent/events.json", "deploy"),
        ("logs/epagentd.log", "a deploy failed"),
        ("kernel.txt", "Linux version"),
        ("mounts.txt", "btrfs"),
        ("disks.txt", "MiB free"),
        ("cgroups.txt", "pids.current"),
    ] {
        assert!(texts_up.get(name).is_some_and(|text| text.contains(word)), "no {word:?} in {name}");
    }

    // The node is down: what is on disk is told, and what is not.
    host.end(Signal::SIGTERM);
    fs::remove_file(&path).unwrap();
    let made = host.cli(&["debug", "bundle", "--output", output]);
    assert!(made.stderr.contains("missing: agent/status.json: nothing answers at"), "{made}");
    made.ok();
    let folder = unpacked(&path);
    let texts_down = texts(folder.path());
    assert!(texts_down["about.json"].contains("agent/status.json"), "{}", texts_down["about.json"]);
    assert_eq!(texts_down["store.json"], texts_up["store.json"]);
    assert!(texts_down["logs/epagentd.log"].contains("a deploy failed"));
    assert!(words.iter().all(|canary| canary.files(folder.path()).is_empty()));
}
