//! `listen = "unix"`: an app and the balancer share a folder, and nobody else reaches what is in it.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use epagent_tests::host::DevHost;
use epagent_tests::{AppDir, eventually};

/// Serves HTTP on `$SOCKET`, and says what it finds in its environment.
const SERVER: &str = r#"
import http.server, os, socketserver

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = f"hello {os.environ.get('VERSION')} port={os.environ.get('PORT')} socket={os.environ['SOCKET']}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def address_string(self):
        return "unix"
    def log_message(self, *args):
        pass

class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 128

Server(os.environ["SOCKET"], Handler).serve_forever()
"#;

fn app(name: &str, version: &str, more: &str) -> AppDir {
    let app = AppDir::server(name, version, &format!("listen = \"unix\"\n{more}"));
    app.write("server.py", SERVER);
    app
}

/// Whether this kernel lets a node have such apps; `epagent doctor` says the same.
fn is_possible(host: &DevHost) -> bool {
    let name = format!("kernel: {}", epagent_wire::runner::FEATURE_APP_SOCKETS);
    eventually("the agent knows its kernel", Duration::from_secs(10), || {
        let said = host.cli(&["doctor", "--json"]).stdout;
        let checks: Vec<epagent_wire::api::Check> = serde_json::from_str(&said).ok()?;
        checks.into_iter().find(|check| check.name == name).map(|check| check.state == "ok")
    })
}

fn folders(host: &DevHost) -> PathBuf {
    host.state.join("run/apps")
}

#[test]
fn an_app_on_a_unix_socket_is_deployed_checked_and_replaced_without_a_loss() {
    let host = DevHost::start();
    if !is_possible(&host) {
        host.deploy(&app("shop", "v1", "")).fails(1, &["no_app_sockets", "6.16"]);
        return host.stop();
    }
    host.deploy(&app("shop", "v1", "instances = 2")).ok();
    assert_eq!(host.fetch("shop.test", "/").trim(), "hello v1 port=None socket=/run/app/app.sock");
    let rows = host.wait_healthy("shop", 2);
    for row in &rows {
        assert_eq!(row.address.as_deref(), Some(format!("unix:{}/app.sock", row.id).as_str()));
        let folder = folders(&host).join(&row.id);
        let facts = folder.symlink_metadata().unwrap();
        assert_eq!(facts.mode() & 0o7777, 0o2770, "{}", folder.display());
        assert_ne!(facts.uid(), 0, "the folder is the app's");
        let socket = folder.join("app.sock").symlink_metadata().unwrap();
        assert!(socket.file_type().is_socket());
        assert_eq!((socket.uid(), socket.gid()), (facts.uid(), facts.gid()), "the balancer's group");
    }
    let load = host.load("shop.test", "hello v");
    load.wait_for(50, Duration::from_secs(30));
    host.deploy(&app("shop", "v2", "instances = 2")).ok();
    for part in ["epagent-runner", "epagentd"] {
        let old = host.kill(part);
        host.wait_restarted(part, old);
    }
    host.wait_answering();
    // From a socket to a port and back: each generation is reached where it listens.
    host.deploy(&AppDir::server("shop", "v3", "")).ok();
    host.deploy(&app("shop", "v4", "")).ok();
    load.wait_for(50, Duration::from_secs(30));
    let report = load.finish();
    report.assert_none_failed();
    assert!(report.answered_with("hello v2") > 0 && report.answered_with("hello v4") > 0, "{report}");
    // With an instance goes its folder.
    eventually("only the folders of what runs are left", Duration::from_secs(10), || {
        let left = std::fs::read_dir(folders(&host)).unwrap().count();
        (left == host.pids("shop").len()).then_some(())
    });
    host.stop();
}

#[test]
fn the_example_serves_on_its_socket_and_stops_in_order() {
    let host = DevHost::start();
    if !is_possible(&host) {
        return host.stop();
    }
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/hello-unix");
    host.cli(&["deploy", example]).ok();
    assert!(
        host.fetch("hello-unix.localhost", "/").starts_with("Hello from a unix socket, version 1, from ")
    );
    for row in host.wait_healthy("hello-unix", 2) {
        assert!(row.address.is_some_and(|address| address.starts_with("unix:")));
    }
    // Its own folder is all it listens in.
    let listening = host.inside("hello-unix", "cat /proc/net/tcp /proc/net/tcp6 | grep -c ' 0A '").stdout;
    assert_eq!(listening.trim(), "0", "it listens on TCP too");
    let load = host.load("hello-unix.localhost", "Hello from a unix socket");
    load.wait_for(50, Duration::from_secs(30));
    host.cli(&["restart", "hello-unix"]).ok();
    load.wait_for(50, Duration::from_secs(30));
    load.finish().assert_none_failed();
    let said = host.cli(&["logs", "hello-unix", "-n", "1000"]).ok();
    assert!(said.contains("version 1 listens on /run/app/app.sock"), "{said}");
    host.stop();
}

#[test]
fn nobody_but_the_app_and_the_balancer_reaches_the_socket() {
    let host = DevHost::start();
    if !is_possible(&host) {
        return host.stop();
    }
    host.deploy(&app("shop", "v1", "")).ok();
    host.deploy(&app("spy", "v1", "")).ok();
    let shop = &host.healthy("shop")[0];
    // Another tenant sees its own folder and nothing of the first one's.
    let seen = host
        .inside("spy", "ls -a /run/app; ls -d /mnt/* /run/*; grep -c epagent-app /proc/self/mounts")
        .stdout;
    assert!(!seen.contains(&shop.id) && seen.contains("app.sock"), "{seen}");
    assert!(seen.trim().ends_with('1'), "more than one such mount\n{seen}");
    // The agent's own users can't: the folder of folders is the balancer's alone.
    let apps = folders(&host).symlink_metadata().unwrap();
    assert_eq!((apps.uid(), apps.mode() & 0o7777), (0, 0o710));
    // What a tenant fills is his own.
    host.inside("spy", "i=0; while [ $i -lt 200 ]; do : > /run/app/f$i || break; i=$((i+1)); done");
    host.inside("spy", "dd if=/dev/zero of=/run/app/big bs=64k count=64");
    let used = std::fs::read_dir(folders(&host).join(&host.healthy("spy")[0].id)).unwrap().count();
    assert!(used < 64, "{used} files in a folder that is to have room for 64");
    host.deploy(&app("third", "v1", "")).ok();
    assert!(host.fetch("shop.test", "/").starts_with("hello v1"));
    host.stop();
}

#[test]
fn a_link_in_place_of_the_socket_leads_nowhere() {
    let host = DevHost::start();
    if !is_possible(&host) {
        return host.stop();
    }
    // A socket of the host's that a tenant would like to be answered from.
    let precious = host.state.join("precious.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&precious).unwrap();
    // Each request has a connection of its own: one that is kept would go on with the app itself.
    let shop = app("shop", "v1", "");
    shop.write("server.py", &SERVER.replace("HTTP/1.1", "HTTP/1.0"));
    host.deploy(&shop).ok();
    host.fetch("shop.test", "/");
    for target in [Path::new("/proc/1/root/run/app/app.sock"), &precious, Path::new("/run/runner.sock")] {
        let script = format!("rm -f /run/app/app.sock; ln -s {} /run/app/app.sock", target.display());
        host.inside("shop", &script).ok();
        let answer = epagent_tests::http::get(host.http, "shop.test", "/", Duration::from_secs(3));
        assert!(
            answer.is_err() || answer.unwrap().status != 200,
            "a link to {} was followed",
            target.display()
        );
    }
    let status = host.cli(&["balancer", "status"]).ok();
    assert!(status.contains("unix symlink"), "{status}");
    // The checks do not follow it either: the instance is found ill, replaced, and well again.
    eventually("the instance is replaced", Duration::from_secs(60), || {
        host.http("shop.test", "/").ok().filter(|answer| answer.status == 200)
    });
    host.stop();
}
