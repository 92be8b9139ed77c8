//! Manifests that are right, and what is said of those that are not.

mod front;

use epagent_core::spec::{AppSpec, Check, Limits, RouteMatch, SleepSpec, Strategy};

use super::{ManifestError, Overrides, parse_procfile, parse_toml};

/// Every key there is.
const WHOLE: &str = r#"
app = "shop"
image = "py"                        # by name; "host" in dev mode
secrets = ["DATABASE_URL"]          # set by `epagent secrets set`, only in the environment of the app

[build]
run = ["python3 -m venv venv", "venv/bin/pip install -r requirements.txt"]
[release]
run = "venv/bin/python manage.py migrate"   # once per release, before it starts
[env]
DEBUG = "0"

[process.web]
command = "venv/bin/gunicorn -b 0.0.0.0:$PORT shop.wsgi"
instances = 2
deploy = "replace"
stop = { signal = "INT", grace = "20s" }
[process.web.health]
http = "/healthz"
interval = "500ms"
timeout = "3s"
rise = 2
fall = 5
deadline = "2m"
[process.web.limits]
memory = "256M"
cpu = "50%"
pids = 128
nofile = 1024
disk = "1G"
io = "50M"

[process.worker]
command = "venv/bin/python worker.py"

[volume.data]
path = "/data"
quota = "2G"

[[route]]
host = "Shop.example"
process = "web"
[[route]]
port = 5432
process = "worker"

[x-other-tool]
anything = ["goes", 1, 2.5]
"#;

/// The smallest manifest, with a place for more.
fn small(more: &str) -> String {
    format!("app = \"a\"\nimage = \"i\"\n{more}\n[process.web]\ncommand = \"true\"\n")
}

fn parse(text: &str) -> Result<AppSpec, ManifestError> {
    parse_toml("epagent.toml", text, &Overrides::default())
}

fn procfile(text: &str, files: &[&str]) -> Result<AppSpec, ManifestError> {
    let files: Vec<String> = files.iter().map(|&file| file.to_owned()).collect();
    parse_procfile("Procfile", text, "shop".parse().unwrap(), "py".parse().unwrap(), &files)
}

/// The text must be refused at this place (0:0 for none), with a message and a help that contain these words.
#[track_caller]
fn check(text: &str, place: (usize, usize), message: &str, help: &str) {
    check_error(text, parse(text), place, message, help);
}

#[track_caller]
fn check_error(
    text: &str,
    result: Result<AppSpec, ManifestError>,
    place: (usize, usize),
    message: &str,
    help: &str,
) {
    let error = match result {
        Ok(_) => panic!("accepted:\n{text}"),
        Err(error) => error,
    };
    assert!(error.message().contains(message), "{error}\n\nexpected the message {message:?}");
    assert!(error.help().unwrap_or("").contains(help), "{error}\n\nexpected the help {help:?}");
    assert_eq!(error.line_column().unwrap_or((0, 0)), place, "{error}");
}

#[test]
fn every_key_is_read() {
    let spec = parse(WHOLE).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(spec.app.as_str(), "shop");
    assert_eq!(spec.image.as_str(), "py");
    assert_eq!(spec.secrets.iter().collect::<Vec<_>>(), ["DATABASE_URL"]);
    assert_eq!(spec.build, ["python3 -m venv venv", "venv/bin/pip install -r requirements.txt"]);
    assert_eq!(spec.release.as_deref(), Some("venv/bin/python manage.py migrate"));
    assert_eq!(spec.env["DEBUG"], "0");
    let web = &spec.processes[&"web".parse().unwrap()];
    assert_eq!(web.command, "venv/bin/gunicorn -b 0.0.0.0:$PORT shop.wsgi");
    assert_eq!((web.instances, web.deploy), (2, Strategy::Replace));
    assert_eq!((web.stop.signal.as_str(), web.stop.grace_ms), ("INT", 20_000));
    assert_eq!(web.health.check, Check::Http("/healthz".to_owned()));
    assert_eq!(
        (web.health.interval_ms, web.health.timeout_ms, web.health.deadline_ms),
        (500, 3_000, 120_000)
    );
    assert_eq!((web.health.rise, web.health.fall), (2, 5));
    let limits = Limits {
        memory_bytes: 256 << 20,
        cpu_percent: 50,
        pids: 128,
        nofile: 1024,
        disk_bytes: 1 << 30,
        io_bytes_per_s: Some(50 << 20),
    };
    assert_eq!(web.limits, limits);
    assert_eq!(spec.volumes[&"data".parse().unwrap()].path, "/data");
    assert_eq!(spec.volumes[&"data".parse().unwrap()].quota_bytes, 2 << 30);
    assert_eq!(spec.routes[0].matches, RouteMatch::Host("shop.example".to_owned()));
    assert_eq!(spec.routes[1].matches, RouteMatch::Port(5432));
}

#[test]
fn what_is_not_said_has_a_default() {
    let spec = parse(WHOLE).unwrap();
    let worker = &spec.processes[&"worker".parse().unwrap()];
    assert_eq!(worker.instances, 1);
    assert_eq!(worker.deploy, Strategy::Replace, "an app with a volume has one writer at a time");
    assert_eq!(worker.health.check, Check::Tcp, "a routed process serves a port");
    assert_eq!((worker.stop.signal.as_str(), worker.stop.grace_ms), ("TERM", 10_000));
    assert_eq!(worker.limits, Limits::default());

    let spec = parse(&small("")).unwrap();
    let web = &spec.processes[&"web".parse().unwrap()];
    assert_eq!(web.deploy, Strategy::Overlap);
    assert_eq!(web.health.check, Check::Running);
    assert!(spec.build.is_empty() && spec.release.is_none() && spec.routes.is_empty());
    let spec = parse(&small("[volume.v]\npath = \"/v\"")).unwrap();
    assert_eq!(spec.volumes[&"v".parse().unwrap()].quota_bytes, 1 << 30);
    assert_eq!(parse(&small("[build]\nrun = \"make\"")).unwrap().build, ["make"]);
    let text = small("").replace("command", "limits = { memory = 67108864 }\ncommand");
    assert_eq!(parse(&text).unwrap().processes[&"web".parse().unwrap()].limits.memory_bytes, 64 << 20);
}

#[test]
fn a_rate_may_be_none_and_its_absence_is_not() {
    let io = |value: &str| {
        let text = small("").replace("command", &format!("limits = {{ {value} }}\ncommand"));
        parse(&text).unwrap().processes[&"web".parse().unwrap()].limits.io_bytes_per_s
    };
    assert_eq!(io("io = \"none\""), None);
    assert_eq!(io("io = 1048576"), Some(1 << 20));
    assert_eq!(io("memory = \"64M\""), Limits::default().io_bytes_per_s);
    assert_eq!(Limits::default().io_bytes_per_s, Some(100 << 20));
}

#[test]
fn the_command_line_goes_before_the_manifest() {
    let given = Overrides { app: Some("other".parse().unwrap()), image: Some("deb".parse().unwrap()) };
    let spec = parse_toml("epagent.toml", WHOLE, &given).unwrap();
    assert_eq!((spec.app.as_str(), spec.image.as_str()), ("other", "deb"));
    let spec = parse_toml("epagent.toml", "[process.web]\ncommand = \"true\"", &given).unwrap();
    assert_eq!((spec.app.as_str(), spec.image.as_str()), ("other", "deb"));
    assert!(parse_toml("epagent.toml", &small("").replace("\"a\"", "\"A\""), &given).is_err());
}

#[test]
fn a_complaint_looks_like_a_compilers() {
    let error =
        parse("# the shop\napp = \"shop\"\nimge = \"py\"\n[process.web]\ncommand = \"true\"\n").unwrap_err();
    let expected = "\
error: unknown key `imge`
 --> epagent.toml:3:1
  |
3 | imge = \"py\"
  | ^^^^
  = help: did you mean `image`?";
    assert_eq!(error.to_string(), expected);

    let text = format!("{}{}", "#\n".repeat(9), small("[env]\n\tA = 1 # ü"));
    let expected = "\
error: `env.A` must be a string, and is a number
  --> epagent.toml:13:6
   |
13 |     A = 1 # ü
   |         ^
   = help: put it in quotes";
    assert_eq!(parse(&text).unwrap_err().to_string(), expected);
    let expected = "\
error: the key `app` is missing
 --> epagent.toml
  = help: add `app = \"shop\"`";
    assert_eq!(parse("image = \"i\"").unwrap_err().to_string(), expected);
}

#[test]
fn a_long_line_is_shown_around_its_fault() {
    let long = "y".repeat(5_000);
    let error =
        parse(&format!("app = \"a\"\nx-long = {{ a = \"{long}\" }}; image\n")).unwrap_err().to_string();
    assert!(error.lines().all(|line| line.chars().count() < 140), "{error}");
    let lines: Vec<&str> = error.lines().collect();
    let fault = lines[4].find('^').unwrap();
    assert_eq!(lines[3].chars().nth(fault), Some(';'), "{error}");
}

#[test]
fn a_terminal_obeys_nothing_in_a_complaint() {
    for text in [
        "\u{1b}]0;owned\u{7} = 1",
        "\"\\u001b[2J\" = 1",
        "app = \"\\u001b[2J\"",
        "app = \"\\u001b\"\nimage = 1",
    ] {
        let shown = parse(text).unwrap_err().to_string();
        assert!(!shown.chars().any(|c| c.is_control() && c != '\n'), "{shown:?}");
    }
}

#[test]
fn bad_names() {
    let whole = |from: &str, to: &str| WHOLE.replacen(from, to, 1);
    check(&whole("\"shop\"", "\"shop/..\""), (2, 7), "only the letters a-z, the digits and the hyphen", "");
    check(&whole("\"shop\"", "\"..\""), (2, 7), "only the letters", "");
    check(&whole("\"shop\"", "\"a\\nb\""), (2, 7), "app name \"a\\nb\" is not valid", "");
    check(&whole("\"shop\"", "\"\""), (2, 7), "it is empty", "");
    check(&whole("\"py\"", "\"Py\""), (3, 9), "image name \"Py\" is not valid", "");
    check(&small("[process.Web]\ncommand = \"true\""), (3, 10), "process name \"Web\" is not valid", "");
    check(&small("[volume.a_b]\npath = \"/a\""), (3, 9), "volume name \"a_b\" is not valid", "");
    check(&whole("app = \"shop\"", "app = [\"shop\"]"), (2, 7), "`app` must be a string, and is a list", "");
    check("image = \"i\"", (0, 0), "the key `app` is missing", "app = \"shop\"");
    check("app = \"a\"", (0, 0), "the key `image` is missing", "image = ");
}

#[test]
fn unknown_keys() {
    check("app_ = 1\n", (1, 1), "unknown key `app_`", "did you mean `app`?");
    check(&small("processes = 1"), (3, 1), "unknown key `processes`", "did you mean `process`?");
    check(&small("environment = 1"), (3, 1), "unknown key `environment`", "did you mean `env`?");
    check(&small("zzz = 1"), (3, 1), "unknown key `zzz`", "the keys at the top are `app`, `image`");
    check(&small("[build]\nruns = \"x\""), (4, 1), "unknown key `runs`", "did you mean `run`?");
    check(&small("build.cmd = \"x\""), (3, 7), "unknown key `cmd`", "the keys in [build] are `run`");
    let web = |more: &str| format!("{}{more}\n", small(""));
    check(&web("instanses = 2"), (6, 1), "unknown key `instanses`", "did you mean `instances`?");
    check(&web("replicas = 2"), (6, 1), "unknown key `replicas`", "did you mean `instances`?");
    check(&web("limits.memmory = \"1M\""), (6, 8), "unknown key `memmory`", "did you mean `memory`?");
    check(&web("limits.iop = 5"), (6, 8), "unknown key `iop`", "did you mean `io`?");
    check(&web("stop = { timeout = \"1s\" }"), (6, 10), "unknown key `timeout`", "`signal` and `grace`");
    check(
        &web("health = { path = \"/\" }"),
        (6, 12),
        "unknown key `path`",
        "the keys in [process.web.health]",
    );
    check(
        &web("[volume.v]\npath = \"/v\"\nsize = \"1G\""),
        (8, 1),
        "unknown key `size`",
        "did you mean `quota`?",
    );
    check(
        &web("[[route]]\nhots = \"a\"\nprocess = \"web\""),
        (7, 1),
        "unknown key `hots`",
        "did you mean `host`?",
    );
    assert!(parse(&web("x-note = 1\nhealth = { x-a = 1 }\n[x-more]\n[process.x-p]\n")).is_ok());
}

#[test]
fn wrong_types() {
    let web = |more: &str| format!("{}{more}\n", small(""));
    check(&web("instances = \"2\""), (6, 13), "`process.web.instances` must be a number", "without quotes");
    check(&web("instances = 1.5"), (6, 13), "is a number with a fraction", "");
    check(&web("limits = 1"), (6, 10), "`process.web.limits` must be a table", "");
    check(&web("deploy = true"), (6, 10), "must be a string, and is true or false", "");
    check(&web("health = { tcp = 1 }"), (6, 18), "must be true, and is a number", "");
    check(&web("health = { tcp = false }"), (6, 18), "can only be true", "leave it out");
    check(&small("secrets = \"A\""), (3, 11), "must be a list of names, and is a string", "");
    check(&small("[secrets]\nA = \"1\""), (3, 1), "must be a list of names", "only names secrets");
    check(&small("build = \"make\""), (3, 9), "`build` must be a table", "");
    check(&small("[build]\nrun = [\"a\", 2]"), (4, 13), "`build.run[1]` must be a string", "quotes");
    check(&small("env = [\"A=1\"]"), (3, 7), "`env` must be a table", "");
    check(&small("[env]\nA = 2026-01-01"), (4, 5), "and is a date", "");
    check(
        "app = \"a\"\nimage = \"i\"\nprocess = \"true\"",
        (3, 11),
        "`process` must be a table",
        "[process.web]",
    );
    check(
        "app = \"a\"\nimage = \"i\"\n[process]\ncommand = \"x\"",
        (4, 11),
        "must be a table",
        "name the process",
    );
    check(
        "app = \"a\"\nimage = \"i\"\n[[process]]\ncommand = \"x\"",
        (3, 1),
        "must be a table",
        "name each process",
    );
    check(&web("[route]\nhost = \"a\"\nprocess = \"web\""), (6, 1), "must be a list of tables", "[[route]]");
    check(&small("[volume]\npath = \"/v\""), (4, 8), "must be a table", "[volume.data]");
}

#[test]
fn numbers_and_units() {
    let web = |more: &str| format!("{}{more}\n", small(""));
    check(&web("instances = 65"), (6, 13), "is 65; it may be 0 to 64", "");
    check(&web("instances = -1"), (6, 13), "is -1; it may be 0 to 64", "");
    check(&web("instances = 99999999999999999999"), (6, 13), "it may be 0 to 64", "");
    check(&web("limits.memory = \"256X\""), (6, 17), "`256X` is not a size", "\"256M\"");
    check(&web("limits.memory = \"1.5G\""), (6, 17), "`1.5G` is not a size", "one number");
    check(&web("limits.memory = \"1K\""), (6, 17), "is 1K; it may be 4M to 1024T", "");
    check(&web("limits.memory = -5"), (6, 17), "`-5` is not a size", "");
    check(&web("limits.cpu = \"50\""), (6, 14), "`50` is not a share of a processor", "\"50%\"");
    check(&web("limits.cpu = 50"), (6, 14), "has no unit", "\"50%\"");
    check(&web("limits.cpu = \"0%\""), (6, 14), "is 0%; it may be 1%", "");
    check(&web("limits.io = \"50M/s\""), (6, 13), "`50M/s` is not a rate", "\"50M\"; or \"none\"");
    check(&web("limits.io = \"off\""), (6, 13), "`off` is not a rate", "\"none\" for no limit");
    check(&web("limits.io = \"1K\""), (6, 13), "is 1K; it may be 1M to 1024T", "");
    check(&web("limits.io = true"), (6, 13), "must be a string, and is true or false", "");
    check(&web("limits.pids = 1"), (6, 15), "it may be 4 to", "");
    check(&web("limits.nofile = 3"), (6, 17), "it may be 64 to", "");
    check(&web("stop = { grace = 10 }"), (6, 18), "has no unit", "\"10s\"");
    check(&web("stop = { grace = \"10sec\" }"), (6, 18), "`10sec` is not a duration", "\"10s\"");
    check(&web("stop = { grace = \"11m\" }"), (6, 18), "is 11m; it may be 0ms to 10m", "");
    check(&web("health = { interval = \"1ms\" }"), (6, 23), "it may be 100ms to 10m", "");
    check(&web("health = { rise = 0 }"), (6, 19), "it may be 1 to 100", "");
    check(&web("health = { deadline = \"2h\" }"), (6, 23), "it may be 1s to 1h", "");
    check(&web("[volume.v]\npath = \"/v\"\nquota = \"1MB\""), (8, 9), "`1MB` is not a size", "");
}

#[test]
fn processes() {
    check("app = \"a\"\nimage = \"i\"", (0, 0), "the key `process` is missing", "at least one process");
    check("app = \"a\"\nimage = \"i\"\n[process]\n", (3, 1), "there is no process", "[process.web]");
    check(
        "app = \"a\"\nimage = \"i\"\n[process.web]\n",
        (3, 1),
        "`command` is missing in [process.web]",
        "command",
    );
    let web = |more: &str| format!("{}{more}\n", small(""));
    check(&small("").replace("\"true\"", "\"  \""), (5, 11), "`process.web.command` is empty", "");
    check(&small("").replace("\"true\"", "\"a\\u0000b\""), (5, 11), "contains a NUL byte", "");
    check(&small("").replace("true", &"x".repeat(9000)), (5, 11), "has 9000 bytes", "script");
    check(&web("deploy = \"overlapp\""), (6, 10), "can't be `overlapp`", "did you mean `overlap`?");
    check(&web("deploy = \"canary\""), (6, 10), "can't be `canary`", "`overlap` or `replace`");
    check(&web("stop = { signal = \"SIGTERM\" }"), (6, 19), "is not how a signal is written", "write `TERM`");
    check(&web("stop = { signal = \"KILL\" }"), (6, 19), "`KILL` can't be the signal", "grace");
    check(&web("stop = { signal = \"TREM\" }"), (6, 19), "can't be `TREM`", "did you mean `TERM`?");
    check(&web("stop = { signal = \"SEGV\" }"), (6, 19), "can't be `SEGV`", "`USR1` or `USR2`");
    check(&web("health = { http = \"/\", tcp = true }"), (6, 24), "both `http` and `tcp`", "keep one");
    check(&web("health = { http = \"healthz\" }"), (6, 19), "must begin with `/`", "");
    check(&web("health = { http = \"/a b\" }"), (6, 19), "can't be made for this path", "%XX");
    check(&web("health = { http = \"/\\r\\nX: y\" }"), (6, 19), "can't be made for this path", "");
    check(&web("health = { exec = \"\" }"), (6, 19), "is empty", "");
    let many: String = (0..33).map(|n| format!("[process.p{n}]\ncommand = \"x\"\n")).collect();
    check(
        &format!("app = \"a\"\nimage = \"i\"\n{many}"),
        (3, 2),
        "there are 33 processes; the most is 32",
        "",
    );
}

#[test]
fn routes() {
    let route = |more: &str| format!("{}[[route]]\n{more}\n", small(""));
    let host = |host: &str| route(&format!("host = {host:?}\nprocess = \"web\""));
    check(&host("http://shop.example"), (7, 8), "it is a URL", "the name alone");
    check(&host("shop.example:8080"), (7, 8), "it has a port", "");
    check(&host("büro.example"), (7, 8), "letters past ASCII", "xn--");
    check(&host("a..b"), (7, 8), "an empty label", "");
    check(&host("*.*.b"), (7, 8), "a star may only", "");
    check(&host("-a.b"), (7, 8), "begins or ends with a hyphen", "");
    check(&host("a b"), (7, 8), "only letters", "");
    check(&host(""), (7, 8), "it is empty", "");
    check(&host(&"a".repeat(64)), (7, 8), "longer than 63", "");
    check(&route("process = \"web\""), (6, 1), "needs a `host` or a `port`", "host = ");
    check(&route("host = \"a\"\nport = 1\nprocess = \"web\""), (8, 1), "not both", "two routes");
    check(&route("port = 0\nprocess = \"web\""), (7, 8), "it may be 1 to 65535", "");
    check(&route("port = 65536\nprocess = \"web\""), (7, 8), "it may be 1 to 65535", "");
    check(&route("host = \"a\""), (6, 1), "`process` is missing in [route[0]]", "process = ");
    check(
        &route("host = \"a\"\nprocess = \"wep\""),
        (8, 11),
        "there is no process `wep`",
        "did you mean `web`?",
    );
    check(
        &route("host = \"a\"\nprocess = \"db\""),
        (8, 11),
        "there is no process `db`",
        "this app has `web`",
    );
    let twice = "host = \"a.b\"\nprocess = \"web\"\n[[route]]\nhost = \"A.b\"\nprocess = \"web\"";
    check(&route(twice), (10, 8), "this host is routed already", "on line 7");
    let twice = "port = 1\nprocess = \"web\"\n[[route]]\nport = 0x1\nprocess = \"web\"";
    check(&route(twice), (10, 8), "this port is routed already", "on line 7");
    assert!(parse(&host("*.shop.example")).is_ok());
}

#[test]
fn volumes() {
    let volume = |path: &str| small(&format!("[volume.v]\npath = {path:?}"));
    check(&volume("data"), (4, 8), "the path is not absolute", "/data");
    for path in ["/proc", "/proc/1", "/sys/fs", "/dev/shm", "/tmp/x", "/run"] {
        check(&volume(path), (4, 8), "every instance has a", "/data");
    }
    for path in ["/usr", "/usr/share/x", "/etc", "/lib64", "/boot"] {
        check(&volume(path), (4, 8), "is the image's", "/data");
    }
    for path in ["/", "/app", "/var", "/root"] {
        check(&volume(path), (4, 8), "hide what is there", "/app/data");
    }
    for path in ["/a/../proc", "/a/", "//a", "/a/./b", "/.."] {
        check(&volume(path), (4, 8), "an empty part, `.` or `..`", "");
    }
    check(&volume("/a\nb"), (4, 8), "control character", "");
    check(&volume(&"/a".repeat(200)), (4, 8), "too long", "");
    check(&small("[volume.v]"), (3, 1), "`path` is missing in [volume.v]", "/data");
    for (one, other) in [("/a", "/a"), ("/a", "/a/b"), ("/a/b", "/a")] {
        let text = small(&format!("[volume.v]\npath = {one:?}\n[volume.w]\npath = {other:?}"));
        check(&text, (6, 8), "overlaps the volume `v`", "");
    }
    for path in ["/data", "/app/media", "/processes", "/var/lib/x", "/device"] {
        assert!(parse(&volume(path)).is_ok(), "{path}");
    }
    // Releases of one app on one host may share a volume when the app can: its author says so.
    let text = format!("{}deploy = \"overlap\"\n", volume("/data"));
    let spec = parse(&text).expect("an app may overlap on its volume when it says so");
    assert_eq!(spec.processes.values().next().unwrap().deploy, Strategy::Overlap);
}

#[test]
fn variables() {
    check(&small("[env]\nPORT = \"1\""), (4, 1), "`PORT` can't be set: the agent sets it itself", "");
    check(&small("[env]\nEPAGENT_APP = \"1\""), (4, 1), "the agent sets it itself", "");
    check(&small("[env]\n\"A-B\" = \"1\""), (4, 1), "only letters, digits and `_`", "");
    check(&small("[env]\nA = \"a\\u0000\""), (4, 5), "NUL byte", "");
    check(&small("secrets = [\"1A\"]"), (3, 12), "can't be a secret's name", "");
    check(&small("secrets = [\"A\", \"A\"]"), (3, 17), "named twice", "");
    check(&small("secrets = [\"A\"]\n[env]\nA = \"\""), (5, 1), "is a secret as well", "");
    check(&small(&format!("[env]\nA = {:?}", "x".repeat(40_000))), (4, 1), "more than 32768 bytes", "");
    let many: String = (0..257).map(|n| format!("V{n} = \"\"\n")).collect();
    check(&small(&format!("[env]\n{many}")), (3, 1), "has 257 variables; the most is 256", "");
}

#[test]
fn broken_toml() {
    check("app = \"a", (1, 9), "expected `\"`", "");
    check("app = ", (1, 7), "must be quoted", "");
    check("app = shop", (1, 7), "must be quoted", "");
    check("app = \"a\" image = \"i\"", (1, 11), "expected newline", "");
    check("app = \"a\"\napp = \"b\"", (2, 1), "duplicate key", "");
    check("[process.web\n", (1, 13), "unclosed table", "");
    check("\u{0}", (1, 2), "key with no value", "");
    check(&"[".repeat(1000), (1, 3), "keys cannot be empty", "");
    check(&"#".repeat(300_000), (0, 0), "has 300000 bytes; the most is", "");
    assert!(parse(&format!("a = {}1{}", "[".repeat(5000), "]".repeat(5000))).is_err());
}

#[test]
fn a_procfile_is_read() {
    let text = "# comment\n\nweb: node server.js --port $PORT\nworker:  python3 -c 'print(\"a: b\")'  \r\nrelease: ./migrate\n";
    let spec = procfile(text, &["package.json"]).unwrap();
    assert_eq!((spec.app.as_str(), spec.image.as_str()), ("shop", "py"));
    let web = &spec.processes[&"web".parse().unwrap()];
    assert_eq!(web.command, "node server.js --port $PORT");
    assert_eq!((web.instances, web.deploy, &web.health.check), (1, Strategy::Overlap, &Check::Tcp));
    let worker = &spec.processes[&"worker".parse().unwrap()];
    assert_eq!(worker.command, "python3 -c 'print(\"a: b\")'");
    assert_eq!(worker.health.check, Check::Running);
    assert_eq!(spec.release.as_deref(), Some("./migrate"));
    assert_eq!(spec.processes.len(), 2);
    assert_eq!(spec.routes.len(), 1);
    assert_eq!(spec.routes[0].matches, RouteMatch::Host("shop.localhost".to_owned()));
    assert!(procfile("worker: x", &[]).unwrap().routes.is_empty());
}

#[test]
fn dependencies_are_installed_where_they_are_found() {
    let build = |files: &[&str]| procfile("web: x", files).unwrap().build;
    let path =
        |files: &[&str]| procfile("web: x", files).unwrap().env.get("PATH").cloned().unwrap_or_default();
    assert!(build(&[]).is_empty() && path(&[]).is_empty());
    assert!(build(&["package-lock.json", "Makefile"]).is_empty());
    assert_eq!(build(&["package.json"]), ["npm install --omit=dev"]);
    assert_eq!(build(&["package.json", "package-lock.json"]), ["npm ci --omit=dev"]);
    assert!(path(&["package.json"]).starts_with("/app/node_modules/.bin:/usr/local/sbin:"));
    let python = build(&["requirements.txt"]);
    assert_eq!(python[0], "python3 -m venv .venv");
    assert!(python[1].starts_with(".venv/bin/pip install ") && python[1].ends_with(" -r requirements.txt"));
    assert!(path(&["requirements.txt"]).starts_with("/app/.venv/bin:"));
    assert!(
        path(&["requirements.txt", "package.json"]).starts_with("/app/.venv/bin:/app/node_modules/.bin:/")
    );
    assert_eq!(build(&["requirements.txt", "package.json"]).len(), 3);
}

#[test]
fn bad_procfiles() {
    let check = |text: &str, place, message: &str, help: &str| {
        check_error(text, procfile(text, &[]), place, message, help);
    };
    check("", (0, 0), "names no process", "web: python3 app.py");
    check("release: x", (0, 0), "names no process", "");
    check("web python app.py", (1, 1), "there is no colon", "web: ");
    check("# x\n  : app", (2, 3), "no name before the colon", "");
    check("web:\n", (1, 1), "`web` has no command", "");
    check("web: a\nWorker: b", (2, 1), "process name \"Worker\" is not valid", "");
    check("web: a\n web : b", (2, 2), "`web` is there twice", "on line 1");
    check("web: a\0b", (1, 6), "NUL byte", "");
    check(&format!("web: {}", "x".repeat(9_000)), (1, 6), "has 9000 bytes", "script");
    check(&"p: x\n".repeat(100_000), (0, 0), "the most is", "");
    let error = procfile("web python app.py", &[]).unwrap_err().to_string();
    assert!(
        error.contains(" --> Procfile:1:1\n  |\n1 | web python app.py\n  | ^^^^^^^^^^^^^^^^^\n"),
        "{error}"
    );
}

/// Every text gets an answer, and every answer can be shown. Deterministic: the same texts in each run.
#[test]
fn no_text_makes_it_panic() {
    const PIECES: [&str; 22] = [
        "=",
        "\"",
        "\n",
        "[",
        "]",
        "[[",
        "]]",
        ".",
        "{",
        "}",
        ",",
        "'''",
        "\"\"\"",
        "\\u0000",
        "\\",
        "ü",
        "\u{1f980}",
        "\r\n",
        "\t",
        "-1",
        "process",
        "\u{0}",
    ];
    // xorshift64*, Vigna 2016.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut draw = move |below: usize| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % below
    };
    let mut refused = 0;
    for _ in 0..20_000 {
        let mut text = WHOLE.to_owned();
        for _ in 0..=draw(4) {
            let at = text.floor_char_boundary(draw(text.len()));
            let end = text.ceil_char_boundary((at + draw(12)).min(text.len()));
            text.replace_range(at..end, PIECES[draw(PIECES.len())]);
        }
        if let Err(error) = parse(&text) {
            refused += 1;
            let shown = error.to_string();
            assert!(shown.starts_with("error: ") && shown.contains("epagent.toml"), "{shown}");
        }
        let _ = procfile(&text, &["package.json"]).map_err(|error| error.to_string());
    }
    assert!(refused > 10_000, "only {refused} texts were refused");
}
