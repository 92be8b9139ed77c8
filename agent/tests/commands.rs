//! The commands against an agent that says what a test has it say: watching over a restart, statuses, streams.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

/// One request as it came.
#[derive(Debug, Clone)]
struct Request {
    line: String,
    body: Vec<u8>,
}

/// What the agent does with a request.
enum Answer {
    Json(u16, Value),
    /// Lines of JSON, chunked; then the proper end, or the connection is cut.
    Lines(Vec<Value>, End),
    /// The connection is cut before an answer.
    Cut,
}

#[derive(PartialEq)]
enum End {
    Proper,
    Cut,
}

/// An agent of one test.
struct Agent {
    folder: tempfile::TempDir,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl Agent {
    /// Answers the n-th request by `answer(n, request)`.
    fn new(answer: impl Fn(usize, &Request) -> Answer + Send + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("admin.sock")).unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let noted = seen.clone();
        std::thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                let stream = stream.unwrap();
                let Some(request) = read_request(&stream) else { continue };
                let answer = answer(number, &request);
                noted.lock().unwrap().push(request);
                write_answer(stream, answer);
            }
        });
        Self { folder, seen }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("admin.sock")
    }

    fn seen(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_epagent"));
        command.args(line.split_whitespace()).env("EPAGENT_SOCKET", self.socket()).stdin(Stdio::null());
        command
    }

    fn run(&self, line: &str) -> Ran {
        Ran::from(self.command(line).output().unwrap())
    }
}

#[derive(Debug)]
struct Ran {
    code: i32,
    stdout: String,
    stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code().unwrap(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

/// Head and body, by length or in chunks.
fn read_request(stream: &UnixStream) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let (mut length, mut chunked) = (0, false);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        let header = header.trim().to_ascii_lowercase();
        if header.is_empty() {
            break;
        }
        if let Some(value) = header.strip_prefix("content-length: ") {
            length = value.parse().unwrap();
        }
        chunked |= header == "transfer-encoding: chunked";
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    while chunked {
        let mut size = String::new();
        reader.read_line(&mut size).ok()?;
        let size = usize::from_str_radix(size.trim(), 16).ok()?;
        let mut chunk = vec![0; size + 2];
        reader.read_exact(&mut chunk).ok()?;
        body.extend_from_slice(&chunk[..size]);
        chunked = size > 0;
    }
    Some(Request { line: line.trim().to_owned(), body })
}

fn write_answer(mut stream: UnixStream, answer: Answer) {
    match answer {
        Answer::Cut => {}
        Answer::Json(status, value) => {
            let body = value.to_string();
            let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n", body.len());
            let _ = stream.write_all(format!("{head}{body}").as_bytes());
        }
        Answer::Lines(lines, end) => {
            let mut text = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_owned();
            for line in lines {
                let line = format!("{line}\n");
                text.push_str(&format!("{:x}\r\n{line}\r\n", line.len()));
            }
            if end == End::Proper {
                text.push_str("0\r\n\r\n");
            }
            let _ = stream.write_all(text.as_bytes());
        }
    }
}

const AT: &str = "2026-01-01T00:00:00Z";

fn deploy(phase: &str, verdict: Value) -> Value {
    json!({ "id": 12, "app": "shop", "kind": "deploy", "release": 7, "phase": phase, "steps": [],
            "verdict": verdict, "created_at": AT, "ended_at": null })
}

fn step(sequence: i64, phase: &str) -> Value {
    json!({ "step": { "sequence": sequence, "phase": phase, "note": format!("note {sequence}"), "at": AT } })
}

fn output(line: &str) -> Value {
    json!({ "output": { "line": line } })
}

/// A folder with an app.
fn app_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("epagent.toml"), "app = \"shop\"\n").unwrap();
    std::fs::write(folder.path().join("big"), vec![b'x'; 3 << 20]).unwrap();
    folder
}

#[test]
fn a_watch_goes_on_where_it_was_when_the_agent_was_away() {
    let over = json!({ "over": deploy("done", Value::Null) });
    let agent = Agent::new(move |number, request| match number {
        0 => Answer::Json(200, deploy("building", Value::Null)),
        1 => Answer::Lines(
            vec![step(1, "received"), step(2, "building"), output("one"), output("two")],
            End::Cut,
        ),
        2 => Answer::Cut,
        3 => {
            let lines =
                vec![output("one"), output("two"), output("three"), step(3, "starting"), over.clone()];
            Answer::Lines(lines, End::Proper)
        }
        _ => Answer::Json(404, json!({ "code": "no_such_app", "message": request.line, "hint": "" })),
    });
    let ran = agent.run("deploy --watch 12");
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "shop r7 is live\n"), "{ran:?}");
    for once in ["note 1", "note 2", "note 3", "| one", "| two", "| three"] {
        assert_eq!(ran.stderr.matches(once).count(), 1, "{once}\n{}", ran.stderr);
    }
    assert!(ran.stderr.contains("the agent went away"), "{}", ran.stderr);
    let lines: Vec<String> = agent.seen().into_iter().map(|request| request.line).collect();
    assert!(lines[3].contains("/watch?from=2 "), "{lines:?}");
}

#[test]
fn a_failed_deploy_prints_its_verdict_and_ends_with_3() {
    let verdict = json!({ "phase": "checking", "code": "wrong_port", "message": "web.0 listens on 0.0.0.0:3000",
                          "hint": "have it read $PORT", "log": ["starting", "listening on 3000"] });
    let over = json!({ "over": deploy("failed", verdict) });
    let agent = Agent::new(move |number, _| match number {
        0 => Answer::Json(200, deploy("building", Value::Null)),
        _ => Answer::Lines(vec![over.clone()], End::Proper),
    });
    let ran = agent.run("deploy --watch d12");
    assert_eq!(ran.code, 3, "{ran:?}");
    assert_eq!(ran.stdout, "");
    let expected = "error[wrong_port]: deploying shop failed while checking: web.0 listens on 0.0.0.0:3000\n  \
                    = help: have it read $PORT\n";
    assert!(ran.stderr.ends_with(expected), "{}", ran.stderr);
    assert!(ran.stderr.contains("  | listening on 3000\n"), "{}", ran.stderr);
}

#[test]
fn an_upload_that_was_cut_is_sent_again_whole() {
    let folder = app_folder();
    let agent = Agent::new(|number, _| match number {
        0 => Answer::Json(202, deploy("received", Value::Null)),
        1 => Answer::Cut,
        _ => Answer::Json(200, deploy("building", Value::Null)),
    });
    let ran = agent.run(&format!("deploy {} --detach", folder.path().display()));
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "d12\n"), "{ran:?}");
    let seen = agent.seen();
    let announced: Value = serde_json::from_slice(&seen[0].body).unwrap();
    assert_eq!(announced["manifest"]["toml"]["text"], "app = \"shop\"\n");
    assert_eq!(seen[1].line, "PUT /v1/deploys/12/archive HTTP/1.1");
    assert!(seen[1].body.len() > 3 << 20);
    assert_eq!(seen[1].body, seen[2].body);
}

#[test]
fn a_deploy_whose_upload_fails_does_not_stand_in_the_way_of_the_next() {
    let folder = app_folder();
    let refused = json!({ "code": "too_large", "message": "the archive is too large", "hint": "" });
    let agent = Agent::new(move |_, request| match request.line.split(' ').next() {
        Some("POST") => Answer::Json(202, deploy("received", Value::Null)),
        Some("PUT") => Answer::Json(413, refused.clone()),
        _ => Answer::Json(200, deploy("failed", Value::Null)),
    });
    let ran = agent.run(&format!("deploy {}", folder.path().display()));
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.stderr.contains("error[too_large]"), "{ran:?}");
    assert_eq!(agent.seen()[2].line, "DELETE /v1/deploys/12 HTTP/1.1");
    assert_eq!(agent.run("deploy --cancel 12").stdout, "d12 of shop is canceled\n");
}

#[test]
fn unreadable_files_are_found_before_the_agent_is_asked() {
    let folder = app_folder();
    let path = folder.path().join("pipe");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let agent = Agent::new(|_, _| Answer::Cut);
    let ran = agent.run(&format!("deploy {}", folder.path().display()));
    assert_eq!(ran.code, 1);
    assert!(
        ran.stderr.contains("error[pack_failed]") && ran.stderr.contains("pipe is a named pipe"),
        "{ran:?}"
    );
    assert!(agent.seen().is_empty());
}

#[test]
fn a_procfile_is_sent_with_the_names_that_matter() {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in [("Procfile", "web: x\n"), ("package.json", "{}"), ("other", "")] {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    let agent = Agent::new(|number, _| match number {
        0 => Answer::Json(202, deploy("received", Value::Null)),
        _ => Answer::Json(200, deploy("building", Value::Null)),
    });
    let line = format!("deploy {} --app shop --image host --detach", folder.path().display());
    assert_eq!(agent.run(&line).code, 0);
    let announced: Value = serde_json::from_slice(&agent.seen()[0].body).unwrap();
    let files = json!({ "procfile": { "text": "web: x\n", "files": ["package.json"] } });
    assert_eq!(announced, json!({ "app": "shop", "manifest": files, "image": "host" }));
}

#[test]
fn statuses_are_as_documented() {
    let error = |code: &str| json!({ "code": code, "message": "the message", "hint": "the hint" });
    let agent = Agent::new(move |_, request| match request.line.as_str() {
        line if line.contains("missing") => Answer::Json(404, error("no_such_app")),
        line if line.contains("busy") => Answer::Json(409, error("deploy_under_way")),
        line if line.contains("plain") => Answer::Json(500, Value::Null),
        _ => Answer::Json(200, json!([])),
    });
    for (line, code) in [
        ("ps", 0),
        ("releases missing", 4),
        ("restart busy", 1),
        ("releases plain", 1),
        ("frobnicate", 2),
        ("secrets set shop A=b", 2),
        ("--socket /nonexistent/admin.sock ps", 69),
        ("explain nonsense", 4),
        ("explain wrong_port", 0),
        ("help exit-codes", 0),
    ] {
        let ran = agent.run(line);
        assert_eq!(ran.code, code, "{line}: {ran:?}");
    }
    let ran = agent.run("restart busy");
    assert_eq!(ran.stderr, "error[deploy_under_way]: the message\n  = help: the hint\n");
    let ran = agent.run("--socket /nonexistent/admin.sock ps");
    assert!(ran.stderr.contains("nothing answers at /nonexistent/admin.sock"), "{ran:?}");
    assert!(ran.stderr.contains("EPAGENT_SOCKET"), "{ran:?}");
}

#[test]
fn nothing_is_destroyed_without_a_word_of_confirmation() {
    let app = json!({ "app": "shop", "state": "running", "release": 1, "processes": {}, "routes": [],
                      "created_at": AT, "deploy": null, "trouble": null });
    let agent = Agent::new(move |number, request| match (number, request.line.starts_with("GET")) {
        (0..3, true) => Answer::Json(200, app.clone()),
        (_, true) => Answer::Json(404, json!({ "code": "no_such_app", "message": "", "hint": "" })),
        (_, false) => Answer::Json(200, json!({})),
    });
    let ran = agent.run("destroy shop");
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("--yes"), "{ran:?}");
    assert_eq!(agent.run("volume rm shop data").code, 2);
    assert!(agent.seen().iter().all(|request| request.line.starts_with("GET")));
    assert_eq!(agent.run("destroy shop --yes").code, 0);
    assert!(agent.seen().iter().any(|request| request.line.starts_with("DELETE /v1/apps/shop ")));
}

#[test]
fn a_secret_comes_from_standard_input_and_goes_nowhere_else() {
    let agent = Agent::new(|_, _| Answer::Json(200, Value::Null));
    let mut child = agent
        .command("secrets set shop TOKEN")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"hunter2\n").unwrap();
    let ran = Ran::from(child.wait_with_output().unwrap());
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(!ran.stdout.contains("hunter2") && !ran.stderr.contains("hunter2"));
    assert_eq!(agent.seen()[0].line, "PATCH /v1/apps/shop/secrets HTTP/1.1");
    assert_eq!(
        serde_json::from_slice::<Value>(&agent.seen()[0].body).unwrap(),
        json!({ "TOKEN": "hunter2" })
    );
}

#[test]
fn json_is_the_agents_answer_to_the_letter() {
    let list = json!([{ "z": 1, "app": "shop", "a": [null] }]);
    let text = list.to_string();
    let agent = Agent::new(move |_, _| Answer::Json(200, list.clone()));
    for line in [
        "ps --json",
        "apps --json",
        "image ls --json",
        "volume ls --json",
        "errors --json",
        "events --json",
        "balancer connections --json",
    ] {
        assert_eq!(agent.run(line).stdout.trim(), text, "{line}");
    }
}

#[test]
fn certificates_are_shown_with_what_is_wrong_with_them() {
    let certificate = |id: &str, state: &str, not_after: &str, unix_s: i64| {
        json!({ "id": id, "names": [format!("{id}.example"), "b", "c", "d", "e"], "not_before": AT,
                "not_after": not_after, "not_after_unix_s": unix_s, "state": state, "is_default": id == "shop" })
    };
    let in_force = [
        certificate("later", "valid", "2027-01-01T00:00:00Z", 2),
        certificate("shop", "expires_soon", "2026-12-01T00:00:00Z", 1),
    ];
    let refused = json!([{ "id": "half", "reason": "there is no half.key", "kept": true }]);
    let status = json!({ "certificates": { "in_force": in_force, "refused": refused } });
    let agent = Agent::new(move |_, _| Answer::Json(200, status.clone()));
    let ran = agent.run("balancer status");
    assert_eq!(ran.code, 0, "{ran:?}");
    let line = |word: &str| ran.stdout.lines().position(|line| line.contains(word)).unwrap_or(usize::MAX);
    for words in [
        "certificate half: there is no half.key; the one before stays in force",
        "shop (default)  expires soon  2026-12-01T00:00:00Z  shop.example, b, c and 2 more",
        "later           valid         2027-01-01T00:00:00Z",
    ] {
        assert!(ran.stdout.contains(words), "{words:?} is not in\n{}", ran.stdout);
    }
    assert!(line("shop.example") < line("later.example"), "{}", ran.stdout);
}

#[test]
fn connections_are_shown_by_what_they_were_asked_for() {
    let row = json!({ "client": "192.0.2.7:4711", "listener": "http", "state": "held", "route": "shop/web/0",
                      "age_ms": 180_000, "idle_ms": 900, "requests": 3, "bytes_in": 2048, "bytes_out": 0 });
    let route = json!({ "target": "*.example", "action": "proxy", "route": "shop/web/0", "app": "shop",
                        "word": null, "since": null, "upstreams": [], "trouble": null });
    let agent = Agent::new(move |_, request| match request.line.contains("/v1/routes") {
        true => Answer::Json(200, json!([route])),
        false => Answer::Json(200, json!({ "rows": [row], "next": 17 })),
    });
    let ran = agent.run("balancer connections shop --route *.example -n 1");
    assert_eq!(ran.code, 0, "{ran:?}");
    let asked = "GET /v1/balancer/connections?limit=1&app=shop&route=%2A.example HTTP/1.1";
    assert_eq!(agent.seen()[0].line, asked);
    let words: Vec<&str> = ran.stdout.lines().nth(1).unwrap_or_default().split_whitespace().collect();
    let expected = "192.0.2.7:4711 http held *.example - 3 min 0 s 3 2.0 KiB 0 B";
    assert_eq!(words.join(" "), expected, "{ran:?}");
    assert!(ran.stderr.contains("more than these 1"), "{ran:?}");
    assert_eq!(agent.run("balancer connections --limit 0").code, 2);
}

#[test]
fn followed_logs_go_on_after_the_agent_was_away_and_repeat_nothing() {
    let line = |second: u32, text: &str| {
        json!({ "at": format!("2026-01-01T00:00:0{second}Z"), "process": "web", "index": 0, "instance": "shop-a",
                "stream": "stdout", "line": text })
    };
    let agent = Agent::new(move |number, _| match number {
        0 => Answer::Lines(vec![line(1, "one"), line(2, "two")], End::Cut),
        1 => Answer::Lines(vec![line(2, "two"), line(3, "three")], End::Cut),
        _ => Answer::Json(404, json!({ "code": "no_such_app", "message": "gone", "hint": "" })),
    });
    let ran = agent.run("logs shop -f");
    assert_eq!(ran.code, 4, "{ran:?}");
    let said: Vec<&str> = ran.stdout.lines().filter_map(|line| line.rsplit(' ').next()).collect();
    assert_eq!(said, ["one", "two", "three"]);
}

#[test]
fn doctor_speaks_also_when_no_agent_does() {
    let ran = Command::new(env!("CARGO_BIN_EXE_epagent"))
        .args(["doctor", "--json", "--socket", "/nonexistent/admin.sock"])
        .output()
        .unwrap();
    let ran = Ran::from(ran);
    assert_eq!(ran.code, 69);
    let checks: Value = serde_json::from_str(&ran.stdout).unwrap();
    let names: Vec<&str> =
        checks.as_array().unwrap().iter().filter_map(|check| check["name"].as_str()).collect();
    for name in ["socket", "agent", "kernel", "btrfs"] {
        assert!(names.contains(&name), "{names:?}");
    }
}
