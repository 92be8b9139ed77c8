//! `make demo`: the whole path on one machine, as a newcomer would walk it.
//!
//! ```text
//!  start `epagent dev` ─▶ deploy ─▶ ask ─▶ redeploy under load, count ─▶ stay until Ctrl-C (or --once) ─▶ end
//! ```
//!
//! Each command is shown before it is run, so that all of it can be repeated by hand.

#![forbid(unsafe_code)]

use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use epagent_tests::host::{DevHost, Options, binary};
use epagent_tests::load::{Load, Shape};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

const HOST: &str = "hello.localhost";
/// How long the load goes on before and after the redeploy.
const MARGIN: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("error: the demo needs root: it makes namespaces, cgroups, mounts and a loop device");
        eprintln!("  = help: sudo make demo");
        return ExitCode::FAILURE;
    }
    let once = std::env::args().any(|argument| argument == "--once");
    // What goes wrong in a step is a panic of the harness; a reader of the demo needs its message alone.
    std::panic::set_hook(Box::new(|info| {
        let text = info.payload().downcast_ref::<String>().map(String::as_str);
        eprintln!("\nthe demo failed: {}", text.or(info.payload().downcast_ref().copied()).unwrap_or("?"));
    }));
    match std::panic::catch_unwind(|| show(once)) {
        Ok(code) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

fn show(once: bool) -> ExitCode {
    let interrupts = Interrupts::block();
    let begin = Instant::now();
    say("epagent: a small hosting platform on this machine, in the foreground, from the folder ./state.");
    say("Nothing of it stays when it ends.\n");

    let state = std::env::current_dir().unwrap_or_else(|error| panic!("the current folder: {error}"));
    let state = state.join("state");
    let made = !state.exists();
    let http = address();
    command(&format!("epagent dev --state state --http {http} --size 2G"));
    let options = Options { own_group: true, ..Options::default() };
    let mut host = DevHost::at(state.clone(), http, options);
    say(&format!("Ready after {:.1} s.\n", begin.elapsed().as_secs_f64()));

    let failed = walk(&host, &interrupts);
    if failed == 0 && !once && !interrupts.arrived() {
        what_next(&host);
        interrupts.wait_for_one_or(|| epagent_tests::process::is_alive(host.pid()));
    }

    say("\nEnding it: the apps get their grace, then all of it goes.");
    host.end(Signal::SIGINT);
    let left = host.leftovers();
    if made {
        let _ = std::fs::remove_dir_all(&state);
    }
    if !left.is_empty() {
        say(&format!("Left behind, which is a bug:\n{left}"));
        return ExitCode::FAILURE;
    }
    say("Nothing left: no process, mount, cgroup, loop device, interface, nft table.");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The steps; returns how many requests failed.
fn walk(host: &DevHost, interrupts: &Interrupts) -> u64 {
    let hello = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/hello");
    command("epagent deploy examples/hello");
    epagent(host, &["deploy", &hello.to_string_lossy()]);
    ask(host);
    if interrupts.arrived() {
        return 0;
    }

    say("A second version, while eight clients keep asking for the page:");
    let second = second_version(&hello);
    command("cp -r examples/hello hello2; echo 'version 2' > hello2/version.txt; epagent deploy hello2");
    let load = Load::start(host.http, HOST, "Hello from epagent", Shape::default());
    std::thread::sleep(MARGIN);
    epagent(host, &["deploy", &second.path().to_string_lossy()]);
    std::thread::sleep(MARGIN);
    let report = load.finish();
    let (one, two) = (count(&report, "version 1"), count(&report, "version 2"));
    say(&format!(
        "\n  {} requests: {one} answered by version 1, {two} by version 2; {} failed; the slowest took {} ms\n",
        report.ok + report.failed,
        report.failed,
        report.slowest.as_millis()
    ));
    for failure in &report.failures {
        say(&format!("  failed {failure}"));
    }
    ask(host);
    command("epagent ps");
    epagent(host, &["ps"]);
    report.failed
}

fn what_next(host: &DevHost) {
    let epagent = binary("epagent");
    let epagent = epagent.canonicalize().unwrap_or(epagent);
    let port = host.http.port();
    say(&format!(
        "
It stays up until Ctrl-C. What to try, in another terminal:

  export EPAGENT_SOCKET={socket}
  alias epagent={epagent}

  curl http://{HOST}:{port}/                  or open it in a browser
  epagent logs hello -f                       what the app prints
  epagent exec hello -- /bin/sh               a shell inside an instance
  epagent scale hello web=4                   more instances; requests spread at once
  epagent rollback hello                      back to version 1
  epagent deploy examples/counter             an app with a volume, then: curl http://counter.localhost:{port}/
  epagent status                              the agent itself
  kill -9 the epagentd process                nothing stops; it finds its world again",
        socket = host.socket().display(),
        epagent = epagent.display(),
    ));
}

fn ask(host: &DevHost) {
    command(&format!("curl http://{HOST}:{}/", host.http.port()));
    say(&host.fetch(HOST, "/"));
}

fn epagent(host: &DevHost, arguments: &[&str]) {
    let status = host.command(arguments).status();
    let fine = status.as_ref().is_ok_and(|status| status.success());
    assert!(fine, "`epagent {}` ended with {status:?}\n{}", arguments.join(" "), host.logs());
    say("");
}

/// A copy of the app that says it is version 2.
fn second_version(hello: &Path) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap_or_else(|error| panic!("making a folder: {error}"));
    for name in ["epagent.toml", "server.py"] {
        let copied = std::fs::copy(hello.join(name), folder.path().join(name));
        copied.unwrap_or_else(|error| panic!("copying {name}: {error}"));
    }
    let written = std::fs::write(folder.path().join("version.txt"), "version 2\n");
    written.unwrap_or_else(|error| panic!("writing version.txt: {error}"));
    folder
}

fn count(report: &epagent_tests::load::Report, word: &str) -> u64 {
    report.answers.iter().filter(|(answer, _)| answer.contains(word)).map(|(_, count)| count).sum()
}

/// Port 8080 when it is free.
fn address() -> SocketAddr {
    let free = |port: u16| TcpListener::bind(("127.0.0.1", port)).and_then(|socket| socket.local_addr());
    free(8080).or_else(|_| free(0)).unwrap_or_else(|error| panic!("no free port on 127.0.0.1: {error}"))
}

fn command(text: &str) {
    say(&format!("$ {text}"));
}

fn say(text: &str) {
    println!("{text}");
    let _ = std::io::stdout().flush();
}

/// Ctrl-C and its like, taken when the demo is ready for them: `epagent dev` is in a group of its own and is
/// ended in order.
struct Interrupts {
    descriptor: SignalFd,
}

impl Interrupts {
    fn block() -> Self {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            set.add(signal);
        }
        set.thread_block().unwrap_or_else(|error| panic!("blocking signals: {error}"));
        let descriptor = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC);
        Self { descriptor: descriptor.unwrap_or_else(|error| panic!("signalfd: {error}")) }
    }

    fn arrived(&self) -> bool {
        matches!(self.descriptor.read_signal(), Ok(Some(_)))
    }

    /// Waits for one, or until the agent is gone.
    fn wait_for_one_or(&self, runs: impl Fn() -> bool) {
        while !self.arrived() && runs() {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
