//! `epagent dev` with stand-ins for the parts: what the supervisor itself does.
//!
//! The stand-ins are copies of `examples/fake-part.rs`; each writes what it finds about itself into its folder.

use std::collections::HashMap;
use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const PARTS: [&str; 4] = ["epagentd", "epagent-runner", "epagent-balancer", "epagent-lease"];

/// A supervisor on a folder of its own; ended when it is dropped.
struct Dev {
    folder: tempfile::TempDir,
    child: Child,
    _number: Number,
}

/// A node number that no other test takes until this is dropped. Chosen by themselves, two supervisors of two tests would
/// take the same lowest one whenever the one of them is just being started again.
struct Number {
    _held: UnixListener,
}

impl Number {
    /// The numbers of the end-to-end suites, by the same names.
    const FIRST: u32 = 20;
    const COUNT: u32 = 100;

    /// Takes one and writes it where a supervisor looks for the number it had last.
    fn take(state: &Path) -> Self {
        let first = std::process::id() % Self::COUNT;
        let mut numbers = (0..Self::COUNT).map(|step| Self::FIRST + (first + step) % Self::COUNT);
        let (number, held) = numbers
            .find_map(|number| {
                let name = SocketAddr::from_abstract_name(format!("epagent-e2e-node-{number}")).unwrap();
                Some((number, UnixListener::bind_addr(&name).ok()?))
            })
            .expect("a number is free");
        fs::create_dir_all(state).unwrap();
        // A folder with a lock file is one that a supervisor used before.
        fs::write(state.join("lock"), "").unwrap();
        fs::write(state.join("node"), number.to_string()).unwrap();
        Self { _held: held }
    }
}

impl Dev {
    fn start() -> Self {
        let folder = tempfile::Builder::new().prefix("epagent-dev-").tempdir().unwrap();
        let bin = folder.path().join("bin");
        fs::create_dir(&bin).unwrap();
        let own = PathBuf::from(env!("CARGO_BIN_EXE_epagent"));
        fs::copy(&own, bin.join("epagent")).unwrap();
        let fake = own.with_file_name("examples").join("fake-part");
        assert!(fake.is_file(), "{} is missing: cargo build -p epagent --example fake-part", fake.display());
        for name in PARTS.iter().chain(&["epagent-jail", "epagent-unpack"]) {
            fs::copy(&fake, bin.join(name)).unwrap();
        }
        let number = Number::take(&folder.path().join("state"));
        let child = Self::command(folder.path()).spawn().unwrap();
        let dev = Self { folder, child, _number: number };
        dev.wait_ready();
        dev
    }

    fn command(folder: &Path) -> Command {
        let log = fs::OpenOptions::new().create(true).append(true).open(folder.join("dev.log")).unwrap();
        let mut command = Command::new(folder.join("bin/epagent"));
        command.args(["dev", "--size", "256M", "--http", "127.0.0.1:0", "--state"]).arg(folder.join("state"));
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        command
    }

    fn state(&self, below: &str) -> PathBuf {
        self.folder.path().join("state").join(below)
    }

    fn wait_ready(&self) {
        eventually("it is ready", || self.state("ready").exists().then_some(()), || self.said());
    }

    fn said(&self) -> String {
        fs::read_to_string(self.folder.path().join("dev.log")).unwrap_or_default()
    }

    fn pid_of(&self, part: &str) -> i32 {
        let find = || {
            let list = fs::read_to_string(self.state("processes")).ok()?;
            let line = list.lines().find(|line| line.starts_with(&format!("{part} ")))?;
            line.split(' ').nth(1)?.parse().ok()
        };
        eventually(&format!("{part} runs"), find, || self.said())
    }

    /// What a part found about itself.
    fn facts(&self, folder: &str) -> HashMap<String, String> {
        let path = self.state(folder).join("facts");
        let text = eventually("it noted its facts", || fs::read_to_string(&path).ok(), || self.said());
        text.lines()
            .filter_map(|line| line.split_once('='))
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .collect()
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    fn end(mut self) {
        self.signal(Signal::SIGINT);
        let ended = || self.child.try_wait().unwrap();
        let status = eventually("it ended", ended, String::new);
        assert!(status.success(), "{}", self.said());
        for name in ["ready", "unclean", "processes", "admin.sock", "read.sock", "run/runner.sock"] {
            assert!(!self.state(name).exists(), "{name} is left");
        }
        assert!(self.state("runner/torn-down").exists(), "the teardown did not run");
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // What one that did not come to its orderly end leaves mounted.
        let _ = nix::mount::umount2(&self.state("run/apps"), nix::mount::MntFlags::MNT_DETACH);
    }
}

fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>, said: impl Fn() -> String) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within 20 s\n{}", said());
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn is_alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

#[test]
fn each_part_is_its_own_user_and_sees_its_own_folder_only() {
    let dev = Dev::start();
    let mut users = Vec::new();
    for (folder, sockets) in
        [("brain", "admin,read"), ("balancer", "http,control,program"), ("lease", "lease")]
    {
        let facts = dev.facts(folder);
        assert_eq!(facts["sockets"], sockets);
        assert_eq!(facts["Uid"], facts["Gid"]);
        assert_eq!(facts["Groups"], "");
        for set in ["CapEff", "CapPrm", "CapAmb", "SigBlk"] {
            assert_eq!(facts[set], "0000000000000000", "{folder}: {set}");
        }
        assert_eq!(facts["NoNewPrivs"], "1");
        assert_eq!(facts["btrfs_mounts"], "0", "{folder} holds a pool's mount");
        assert_eq!(facts["config_is_readable"], "true");
        for other in ["brain", "balancer", "lease", "runner", "log"] {
            assert_eq!(facts[&format!("reads_{other}")], (other == folder).to_string(), "{folder}: {other}");
        }
        users.push(facts["Uid"].clone());
    }
    users.dedup();
    assert_eq!(users.len(), 3);
    let runner = dev.facts("runner");
    assert_eq!((runner["sockets"].as_str(), runner["Uid"].as_str()), ("runner", "0 0 0 0"));
    dev.end();
}

#[test]
fn a_part_inherits_nothing_but_what_is_its_own() {
    let dev = Dev::start();
    // The balancer has the folder of the programs beside its two sockets, to hand over to the one that lies there.
    for (part, sockets) in
        [("epagentd", 2), ("epagent-runner", 1), ("epagent-balancer", 3), ("epagent-lease", 1)]
    {
        let pid = dev.pid_of(part);
        dev.facts(if part == "epagentd" { "brain" } else { part.trim_start_matches("epagent-") });
        let count = || {
            let open = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count();
            // stdin, stdout and stderr; what the part itself opens for a moment is closed again.
            (open == 3 + sockets).then_some(())
        };
        eventually(&format!("{part} has {sockets} descriptors of its own and nothing else"), count, || {
            dev.said()
        });
    }
    dev.end();
}

#[test]
fn what_dies_is_restarted_at_once_and_its_connections_wait() {
    let dev = Dev::start();
    for part in PARTS {
        let old = dev.pid_of(part);
        let since = Instant::now();
        kill(Pid::from_raw(old), Signal::SIGKILL).unwrap();
        let new =
            eventually("it runs again", || Some(dev.pid_of(part)).filter(|pid| *pid != old), || dev.said());
        assert!(since.elapsed() < Duration::from_secs(1), "{part} took {:?}", since.elapsed());
        assert!(is_alive(new));
    }
    assert!(dev.said().contains("epagentd ended: killed by SIGKILL; restarting it now"), "{}", dev.said());
    // Asked while nobody is there to answer, answered by the next one.
    fs::write(dev.state("brain/crash"), "").unwrap();
    let old = dev.pid_of("epagentd");
    kill(Pid::from_raw(old), Signal::SIGKILL).unwrap();
    eventually("it is gone", || (!is_alive(old)).then_some(()), || dev.said());
    let mut stream = std::os::unix::net::UnixStream::connect(dev.state("admin.sock")).unwrap();
    std::io::Write::write_all(&mut stream, b"GET / HTTP/1.1\r\n\r\n").unwrap();
    fs::remove_file(dev.state("brain/crash")).unwrap();
    let mut answer = String::new();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    std::io::Read::read_to_string(&mut stream, &mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    dev.end();
}

#[test]
fn what_keeps_dying_waits_longer_each_time_and_is_explained() {
    let dev = Dev::start();
    fs::write(dev.state("lease/crash"), "").unwrap();
    kill(Pid::from_raw(dev.pid_of("epagent-lease")), Signal::SIGKILL).unwrap();
    let waits =
        || dev.said().contains("epagent-lease ended: exit code 3; restarting it in 400 ms").then_some(());
    eventually("it waits", waits, || dev.said());
    assert!(dev.said().contains("its last words: told to crash"), "{}", dev.said());
    fs::remove_file(dev.state("lease/crash")).unwrap();
    eventually("it runs again", || is_alive(dev.pid_of("epagent-lease")).then_some(()), || dev.said());
    dev.end();
}

#[test]
fn killed_it_takes_its_parts_along_and_a_new_start_has_the_same_number() {
    let mut dev = Dev::start();
    let parts = PARTS.map(|part| dev.pid_of(part));
    let number = fs::read_to_string(dev.state("node")).unwrap();
    dev.signal(Signal::SIGKILL);
    dev.child.wait().unwrap();
    eventually("its parts are gone", || parts.iter().all(|pid| !is_alive(*pid)).then_some(()), || dev.said());
    dev.child = Dev::command(dev.folder.path()).spawn().unwrap();
    eventually(
        "the mark of the old one is gone",
        || (dev.pid_of("epagentd") != parts[0]).then_some(()),
        || dev.said(),
    );
    dev.wait_ready();
    assert_eq!(fs::read_to_string(dev.state("node")).unwrap(), number);
    dev.end();
}

#[test]
fn at_the_end_nobody_waits_for_an_answer() {
    let dev = Dev::start();
    // The agent is gone for good, and a connection waits for it.
    fs::write(dev.state("brain/crash"), "").unwrap();
    let old = dev.pid_of("epagentd");
    kill(Pid::from_raw(old), Signal::SIGKILL).unwrap();
    eventually("it is gone", || (!is_alive(old)).then_some(()), || dev.said());
    let mut waiting = std::os::unix::net::UnixStream::connect(dev.state("admin.sock")).unwrap();
    waiting.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let since = Instant::now();
    dev.signal(Signal::SIGINT);
    // Cut or ended, but told.
    let told = std::io::Read::read(&mut waiting, &mut [0; 1]);
    assert!(since.elapsed() < Duration::from_secs(5), "{told:?} after {:?}", since.elapsed());
    dev.end();
}

#[test]
fn a_second_one_on_the_folder_is_refused() {
    let dev = Dev::start();
    let second = Dev::command(dev.folder.path()).stderr(Stdio::piped()).output().unwrap();
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(1));
    assert!(said.contains("error[already_running]") && said.contains(&dev.child.id().to_string()), "{said}");
    assert!(is_alive(dev.pid_of("epagentd")));
    dev.end();
}

#[test]
fn two_beside_each_other_have_two_numbers() {
    let (one, two) = (Dev::start(), Dev::start());
    let number = |dev: &Dev| fs::read_to_string(dev.state("node")).unwrap();
    assert_ne!(number(&one), number(&two));
    one.end();
    assert!(is_alive(two.pid_of("epagentd")));
    two.end();
}

#[test]
fn a_missing_part_is_named_before_anything_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let bin = folder.path().join("bin");
    fs::create_dir(&bin).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_epagent"), bin.join("epagent")).unwrap();
    let ran = Dev::command(folder.path()).stderr(Stdio::piped()).output().unwrap();
    let said = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(said.contains("error[no_binary]: epagentd is missing") && said.contains("make build"), "{said}");
    assert!(!folder.path().join("state").exists());
}
