//! One `epagent dev`, all parts of it, on a state folder of its own.
//!
//! ```text
//!  start ─▶ ready ─▶ stop() ─▶ nothing left (asserted)
//!             │  └─▶ killed: kill -9 of `epagent dev` itself ─▶ start_again()
//!             └─▶ drop, also by a panic: ended, what is left removed, the logs shown
//! ```

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as SocketAddrUnix, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use epagent_wire::api::{Deploy, Instance};
use nix::sys::signal::Signal;

use crate::api::Api;
use crate::command::{self, Ran};
use crate::http::{self, Response};
use crate::leftovers::Node;
use crate::{AppDir, Load, Shape, eventually, process, until};

/// A start makes a pool and a file system; under the load of other suites it takes its time.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// The end includes the grace of all instances.
const STOP_DEADLINE: Duration = Duration::from_secs(60);
/// Node numbers of the suites: 20 to 119. Agents started by hand take the lowest free one.
const FIRST_NODE: u32 = 20;
const NODES: u32 = 100;
/// Lines of each part's log that a failed test shows.
const LOG_LINES_SHOWN: usize = 40;

/// A running agent.
pub struct DevHost {
    pub state: PathBuf,
    pub http: SocketAddr,
    options: Options,
    child: Option<Child>,
    /// None when the agent chooses its number itself.
    _number: Option<NodeNumber>,
    /// Removed last; none when the caller keeps the folder.
    _folder: Option<tempfile::TempDir>,
}

/// What may differ between hosts.
#[derive(Debug, Clone)]
pub struct Options {
    /// The pool's size, as `--size` takes it.
    pub size: String,
    pub env: Vec<(String, String)>,
    /// In a process group of its own, so that a terminal's Ctrl-C reaches only the caller.
    pub own_group: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { size: "2G".to_owned(), env: Vec::new(), own_group: false }
    }
}

/// The folder with the binaries to test: `EPAGENT_BIN_DIR`, else where `make build` puts them.
pub fn binaries() -> PathBuf {
    match std::env::var_os("EPAGENT_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/dist"),
    }
}

#[track_caller]
pub fn binary(name: &str) -> PathBuf {
    let path = binaries().join(name);
    assert!(path.is_file(), "{} is missing; `make build` makes it", path.display());
    path
}

/// An address that no other host of these suites has: all of 127.0.0.0/8 is this machine's.
fn own_address() -> SocketAddr {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = std::process::id() * 16 + COUNT.fetch_add(1, Ordering::Relaxed) % 16;
    let [_, a, b, c] = number.to_be_bytes();
    SocketAddr::from((Ipv4Addr::new(127, a | 0x40, b, c | 1), 8080 + (number % 16) as u16))
}

/// A node number that no other suite uses until this is dropped. Agents give their number back at their end, so
/// without this the next suite's agent could be taken for what the one before left.
struct NodeNumber {
    _held: UnixListener,
}

impl NodeNumber {
    /// Takes a number and writes it where an agent on `state` looks for its last one.
    fn take(state: &Path) -> Self {
        let first = std::process::id() % NODES;
        let (number, held) = (0..NODES)
            .map(|step| FIRST_NODE + (first + step) % NODES)
            .find_map(|number| {
                let name = SocketAddrUnix::from_abstract_name(format!("epagent-e2e-node-{number}")).ok()?;
                Some((number, UnixListener::bind_addr(&name).ok()?))
            })
            .unwrap_or_else(|| panic!("all node numbers are taken"));
        // A folder with a lock file is one that an agent used before.
        let written = fs::create_dir_all(state)
            .and_then(|()| fs::write(state.join("lock"), ""))
            .and_then(|()| fs::write(state.join("node"), number.to_string()));
        written.unwrap_or_else(|error| panic!("writing the node number: {error}"));
        Self { _held: held }
    }
}

impl DevHost {
    /// Starts an agent and waits until it is ready.
    #[track_caller]
    pub fn start() -> Self {
        Self::with(Options::default())
    }

    #[track_caller]
    pub fn with(options: Options) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("epagent-e2e-")
            .tempdir()
            .unwrap_or_else(|error| panic!("making a state folder: {error}"));
        let state = folder.path().join("state");
        let number = NodeNumber::take(&state);
        let mut host = Self {
            state,
            http: own_address(),
            options,
            child: None,
            _number: Some(number),
            _folder: Some(folder),
        };
        host.start_again();
        host
    }

    /// Starts an agent on a folder and an address of the caller's choice.
    #[track_caller]
    pub fn at(state: PathBuf, http: SocketAddr, options: Options) -> Self {
        let mut host = Self { state, http, options, child: None, _number: None, _folder: None };
        host.start_again();
        host
    }

    /// Starts `epagent dev` on the same state folder and waits until it is ready.
    #[track_caller]
    pub fn start_again(&mut self) {
        assert!(self.child.is_none(), "it runs already");
        self.spawn();
        self.wait_ready();
    }

    fn spawn(&mut self) {
        let mut command = self.dev_command();
        let log = fs::File::create(self.state.with_extension("dev.log"))
            .unwrap_or_else(|error| panic!("making the log of epagent dev: {error}"));
        let twin = log.try_clone().unwrap_or_else(|error| panic!("duplicating a descriptor: {error}"));
        command.stdin(Stdio::null()).stdout(log).stderr(twin);
        let child = command.spawn().unwrap_or_else(|error| panic!("starting epagent dev: {error}"));
        self.child = Some(child);
    }

    /// The command that starts an agent on this state folder.
    pub fn dev_command(&self) -> Command {
        let mut command = Command::new(binary("epagent"));
        command.arg("dev").arg("--state").arg(&self.state);
        command.args(["--http", &self.http.to_string(), "--size", &self.options.size]);
        command.envs(self.options.env.iter().map(|(name, value)| (name, value)));
        if self.options.own_group {
            std::os::unix::process::CommandExt::process_group(&mut command, 0);
        }
        command
    }

    #[track_caller]
    fn wait_ready(&mut self) {
        let end = Instant::now() + START_DEADLINE;
        while !self.state.join("ready").exists() {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            if let Some(status) = ended {
                self.child = None;
                panic!("epagent dev ended with {status} before it was ready\n{}", self.logs());
            }
            assert!(Instant::now() < end, "not ready within {START_DEADLINE:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The pid of `epagent dev`.
    #[track_caller]
    pub fn pid(&self) -> i32 {
        self.child.as_ref().map(|child| child.id() as i32).unwrap_or_else(|| panic!("it does not run"))
    }

    pub fn node(&self) -> Node {
        Node::of(&self.state).unwrap_or_else(|| panic!("no node number in {}", self.state.display()))
    }

    pub fn socket(&self) -> PathBuf {
        self.state.join("admin.sock")
    }

    pub fn api(&self) -> Api {
        Api::at(&self.socket())
    }

    /// The pid of one of the parts: `epagentd`, `epagent-runner`, `epagent-balancer`, `epagent-lease`.
    #[track_caller]
    pub fn pid_of(&self, part: &str) -> i32 {
        eventually(&format!("{part} runs"), Duration::from_secs(10), || self.find(part))
    }

    fn find(&self, part: &str) -> Option<i32> {
        process::descendants(self.pid())
            .into_iter()
            .find(|p| p.executable() == part && p.state != 'Z')
            .map(|p| p.pid)
    }

    /// `kill -9` of a part; returns the pid it had.
    #[track_caller]
    pub fn kill(&self, part: &str) -> i32 {
        let pid = self.pid_of(part);
        process::kill_hard(pid);
        pid
    }

    /// Waits until a part runs again under another pid.
    #[track_caller]
    pub fn wait_restarted(&self, part: &str, old: i32) -> i32 {
        eventually(&format!("{part} is restarted"), Duration::from_secs(15), || {
            self.find(part).filter(|pid| *pid != old)
        })
    }

    /// Waits until the agent answers and has its runner.
    #[track_caller]
    pub fn wait_answering(&self) {
        eventually("the agent answers and has its runner", Duration::from_secs(20), || {
            let version = self.api().try_get("/v1/version").ok()?;
            version.get("runner")?.as_str().map(drop)
        });
    }

    /// The `epagent` command on this host.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary("epagent"));
        command.args(arguments).env("EPAGENT_SOCKET", self.socket()).env("NO_COLOR", "1");
        command
    }

    #[track_caller]
    pub fn cli(&self, arguments: &[&str]) -> Ran {
        command::run(&mut self.command(arguments))
    }

    #[track_caller]
    pub fn deploy(&self, app: &AppDir) -> Ran {
        self.cli(&["deploy", &app.path().to_string_lossy()])
    }

    /// Runs a shell script in an instance of the app, as `epagent exec`.
    #[track_caller]
    pub fn inside(&self, app: &str, script: &str) -> Ran {
        self.cli(&["exec", app, "--", "/bin/sh", "-c", script])
    }

    /// `epagent ps --json`.
    #[track_caller]
    pub fn ps(&self) -> Vec<Instance> {
        let text = self.cli(&["ps", "--json"]).ok();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("ps --json: {error}\n{text}"))
    }

    /// The healthy instances of an app that have a process, by index.
    #[track_caller]
    pub fn healthy(&self, app: &str) -> Vec<Instance> {
        let mut rows: Vec<Instance> = self
            .ps()
            .into_iter()
            .filter(|row| row.app == app && row.state == "healthy" && row.pid.is_some())
            .collect();
        rows.sort_by_key(|row| (row.process.clone(), row.index));
        rows
    }

    /// Pids of the healthy instances of an app.
    #[track_caller]
    pub fn pids(&self, app: &str) -> Vec<i32> {
        self.healthy(app).into_iter().filter_map(|row| row.pid).collect()
    }

    /// Waits until the app has exactly `count` instances, all healthy.
    #[track_caller]
    pub fn wait_healthy(&self, app: &str, count: usize) -> Vec<Instance> {
        eventually(&format!("{count} healthy instances of {app}"), Duration::from_secs(30), || {
            let rows = self.healthy(app);
            let others = self.ps().iter().filter(|row| row.app == app && is_live(row)).count();
            (rows.len() == count && others == count).then_some(rows)
        })
    }

    /// The newest deploy of the app.
    #[track_caller]
    pub fn last_deploy(&self, app: &str) -> Deploy {
        self.api().deploys(app).into_iter().next().unwrap_or_else(|| panic!("{app} was never deployed"))
    }

    /// GET through the balancer.
    pub fn http(&self, host: &str, path: &str) -> std::io::Result<Response> {
        http::get(self.http, host, path, Duration::from_secs(40))
    }

    /// The text that a GET through the balancer answers with 200.
    #[track_caller]
    pub fn fetch(&self, host: &str, path: &str) -> String {
        let response = self.http(host, path).unwrap_or_else(|error| panic!("GET {host}{path}: {error}"));
        assert_eq!(response.status, 200, "GET {host}{path}: {}", response.text());
        response.text()
    }

    /// Starts the ordinary load on a host name; every answer must contain `word`.
    pub fn load(&self, host: &str, word: &str) -> Load {
        Load::start(self.http, host, word, Shape::default())
    }

    /// The orderly end, by SIGINT as Ctrl-C would; nothing may be left.
    #[track_caller]
    pub fn stop(mut self) {
        self.end(Signal::SIGINT);
        self.assert_nothing_left();
    }

    /// Ends it by `signal` and waits; it must report success.
    #[track_caller]
    pub fn end(&mut self, signal: Signal) {
        process::signal(self.pid(), signal);
        let status = until(STOP_DEADLINE, || self.child.as_mut()?.try_wait().ok().flatten());
        let status =
            status.unwrap_or_else(|| panic!("not ended within {STOP_DEADLINE:?}\n{}", self.leftovers()));
        self.child = None;
        assert!(status.success(), "epagent dev ended with {status}");
    }

    /// `kill -9` of `epagent dev` itself.
    #[track_caller]
    pub fn kill_dev(&mut self) {
        process::kill_hard(self.pid());
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
        }
    }

    #[track_caller]
    pub fn assert_nothing_left(&self) {
        assert!(self.child.is_none(), "it still runs");
        let left = self.leftovers();
        assert!(left.is_empty(), "left behind:\n{left}");
    }

    /// What of its node exists; empty after an orderly end.
    pub fn leftovers(&self) -> String {
        Node::of(&self.state).map(|node| node.leftovers().join("\n")).unwrap_or_default()
    }

    /// The end of each part's log, and of what `epagent dev` itself printed.
    pub fn logs(&self) -> String {
        let mut files: Vec<PathBuf> = fs::read_dir(self.state.join("log"))
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .collect();
        files.push(self.state.with_extension("dev.log"));
        files.sort();
        files.iter().map(|path| tail(path)).collect()
    }
}

impl Drop for DevHost {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        let node = Node::of(&self.state);
        if let Some(mut child) = self.child.take() {
            process::terminate_if_alive(child.id() as i32);
            if until(Duration::from_secs(20), || child.try_wait().ok().flatten()).is_none() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
        if let Some(node) = node {
            node.remove();
        }
    }
}

/// Whether the row is of an instance that exists, as opposed to one that ended.
pub fn is_live(row: &Instance) -> bool {
    !matches!(row.state.as_str(), "exited" | "waiting")
}

fn tail(path: &Path) -> String {
    let text = fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let shown = lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n");
    format!("--- {}\n{shown}\n", path.display())
}
