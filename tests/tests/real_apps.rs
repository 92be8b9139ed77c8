//! Three apps that nobody here wrote the framework of, deployed by the same command.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use epagent_tests::AppDir;
use epagent_tests::command::run;
use epagent_tests::host::{DevHost, Options};

/// What an operator behind a proxy has in the environment comes to the builds from there.
fn roomy() -> DevHost {
    DevHost::with(Options { size: "4G".to_owned(), ..Options::default() })
}

/// A stock Django project, as `django-admin startproject` makes it, with what a user edits before the first deploy.
fn django_project(app: &AppDir) {
    let tools = tempfile::tempdir().unwrap();
    let venv = tools.path().join("venv");
    run(Command::new("/usr/bin/python3").args(["-m", "venv"]).arg(&venv)).ok();
    run(Command::new(venv.join("bin/pip")).args(["install", "-q", "Django"])).ok();
    run(Command::new(venv.join("bin/django-admin")).args(["startproject", "shop"]).arg(app.path())).ok();
    let settings = app.file("shop/settings.py");
    let text = std::fs::read_to_string(&settings).unwrap();
    assert!(text.contains("ALLOWED_HOSTS = []"), "{text}");
    let text = text
        .replace("ALLOWED_HOSTS = []", "ALLOWED_HOSTS = [\"shop.example\"]")
        .replace("BASE_DIR / 'db.sqlite3'", "'/data/db.sqlite3'");
    std::fs::write(&settings, text).unwrap();
}

#[test]
fn a_stock_django_project_on_a_bootstrapped_debian() {
    let host = roomy();
    let app = AppDir::empty().with("requirements.txt", "Django\ngunicorn\n").with(
        "epagent.toml",
        r#"app = "shop"
image = "py"

[build]
run = ["python3 -m venv venv", "venv/bin/pip install -q -r requirements.txt"]

[release]
run = "venv/bin/python manage.py migrate"

[process.web]
command = "venv/bin/gunicorn -b 0.0.0.0:$PORT shop.wsgi"

[process.web.health]
http = "/admin/login/"

[volume.data]
path = "/data"
quota = "256M"

[[route]]
host = "shop.example"
process = "web"
"#,
    );
    let project = std::thread::scope(|scope| {
        let project = scope.spawn(|| django_project(&app));
        host.cli(&["image", "bootstrap", "py", "--include", "python3,python3-venv,ca-certificates"]).ok();
        project.join()
    });
    project.expect("the project was made");
    assert!(host.cli(&["image", "ls"]).ok().contains("py"));

    let ran = host.deploy(&app);
    println!("{ran}");
    ran.ok();
    let page = host.http("shop.example", "/").unwrap();
    assert!(page.text().contains("The install worked successfully"), "{} {}", page.status, page.text());
    let login = host.fetch("shop.example", "/admin/login/");
    assert!(login.contains("Django administration"), "{login}");
    // The migrations of the release command are in the volume.
    let tables = host.inside("shop", "venv/bin/python manage.py showmigrations auth").ok();
    assert!(tables.contains("[X] 0001_initial"), "{tables}");
    // The image is Debian as bootstrapped, not the host.
    assert!(host.inside("shop", "cat /etc/debian_version").ok().starts_with("12"));
    // A second deploy of the same: the volume changes hands.
    host.deploy(&app).ok();
    assert!(host.fetch("shop.example", "/admin/login/").contains("Django administration"));
    host.stop();
}

#[test]
fn a_node_app_from_npm_described_by_a_procfile_alone() {
    let host = roomy();
    let app = AppDir::empty()
        .with("Procfile", "web: node server.js\n")
        .with(
            "package.json",
            r#"{ "name": "guestbook", "private": true, "dependencies": { "express": "^4.19.2" } }"#,
        )
        .with(
            "server.js",
            "const express = require('express');\n\
             const app = express();\n\
             app.get('/', (request, response) => response.send('hello from express ' + process.version));\n\
             app.listen(process.env.PORT, () => console.log('listening'));\n",
        );
    let ran = host.cli(&["deploy", &app.path().to_string_lossy(), "--app", "guestbook", "--image", "host"]);
    println!("{ran}");
    ran.ok();
    assert!(host.fetch("guestbook.localhost", "/").starts_with("hello from express v"));
    assert!(host.cli(&["logs", "guestbook"]).ok().contains("listening"));
    host.stop();
}

#[test]
fn a_static_binary() {
    let host = DevHost::start();
    let app = AppDir::manifest(
        r#"app = "static"
image = "host"

[process.web]
command = "./server"
instances = 2

[[route]]
host = "static.test"
process = "web"
"#,
    );
    app.write("server.c", SERVER);
    compile(&app.file("server.c"), &app.file("server"));
    host.deploy(&app).ok();
    assert_eq!(host.fetch("static.test", "/"), "hello from C\n");
    let load = host.load("static.test", "hello from C");
    load.wait_for(200, Duration::from_secs(30));
    load.finish().assert_none_failed();
    host.stop();
}

fn compile(source: &Path, target: &Path) {
    run(Command::new("gcc").args(["-static", "-O2", "-o"]).arg(target).arg(source)).ok();
}

/// One connection at a time, one request each: the least a server can be.
const SERVER: &str = r#"
#include <arpa/inet.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static const char answer[] =
    "HTTP/1.1 200 OK\r\nContent-Length: 13\r\nConnection: close\r\n\r\nhello from C\n";

int main(void) {
    int on = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(atoi(getenv("PORT"))) };
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 128)) return 1;
    for (;;) {
        char request[8192];
        size_t length = 0;
        ssize_t got;
        int client = accept(listener, 0, 0);
        if (client < 0) continue;
        while (length < sizeof request - 1 && (got = read(client, request + length, sizeof request - 1 - length)) > 0) {
            length += got;
            request[length] = 0;
            if (strstr(request, "\r\n\r\n")) {
                write(client, answer, sizeof answer - 1);
                break;
            }
        }
        shutdown(client, SHUT_WR);
        while (read(client, request, sizeof request) > 0) {}
        close(client);
    }
}
"#;
