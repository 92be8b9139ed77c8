//! What the tests share: a balancer as a child process, little apps on loopback, a raw HTTP client.
//!
//! Every test of behaviour runs twice: as the binary it is in, by io_uring, and as a module of the binary
//! `epoll`, by epoll.

#![allow(dead_code, reason = "each test binary uses its own part of it")]

pub mod app;
pub mod client;
pub mod denied;
pub mod generations;
pub mod heard;
pub mod hello;
pub mod load;
pub mod prometheus;
pub mod recorder;
pub mod secure;
pub mod tls;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use epagent_balancer::control::client::Client as Control;
use epagent_balancer::control::protocol::{Ack, Status, UpstreamStatus};
use epagent_balancer::doors::Io;
use epagent_balancer::table::Table;

use heard::Heard;

/// Longer than anything here takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The door that the tests of this binary go through.
pub const IO: Io = if is_same(env!("CARGO_CRATE_NAME"), "epoll") { Io::Epoll } else { Io::Uring };

/// What asks for that door.
pub const IO_ARGUMENTS: [&str; 2] = ["--io", if matches!(IO, Io::Epoll) { "epoll" } else { "uring" }];

/// A running balancer; killed when dropped.
pub struct Balancer {
    pub child: Child,
    pub dir: tempfile::TempDir,
    version: AtomicU64,
    pub http: SocketAddr,
}

impl Balancer {
    /// With one HTTP listener on a port of the system's choosing.
    pub fn start(arguments: &[&str]) -> Self {
        let arguments = [&IO_ARGUMENTS, arguments].concat();
        let balancer = Self::start_with(&arguments, |mut command| command.spawn());
        assert_eq!(balancer.status().io, IO, "it goes through another door than it was told to");
        balancer
    }

    /// The same, and what it says in its log.
    pub fn start_heard(arguments: &[&str]) -> (Self, Heard) {
        let arguments = [&IO_ARGUMENTS, arguments].concat();
        let mut balancer = Self::start_with(&arguments, |mut command| command.stderr(Stdio::piped()).spawn());
        let heard = Heard::of(&mut balancer.child);
        (balancer, heard)
    }

    /// Through the door it chooses by itself (or as told by `arguments`), started by `spawn`.
    pub fn start_with(arguments: &[&str], spawn: impl FnOnce(Command) -> std::io::Result<Child>) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let command = Command::new(env!("CARGO_BIN_EXE_epagent-balancer"));
        Self::start_in(dir, command, arguments, spawn)
    }

    /// From a copy of the program in its folder, `balancer`, which a test may replace.
    pub fn start_copy(arguments: &[&str], set: impl FnOnce(&mut Command)) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let program = dir.path().join("balancer");
        std::fs::copy(env!("CARGO_BIN_EXE_epagent-balancer"), &program).expect("a copy");
        let arguments = [&IO_ARGUMENTS, arguments].concat();
        Self::start_in(dir, Command::new(program), &arguments, |mut command| {
            set(&mut command);
            command.spawn()
        })
    }

    fn start_in(
        dir: tempfile::TempDir,
        mut command: Command,
        arguments: &[&str],
        spawn: impl FnOnce(Command) -> std::io::Result<Child>,
    ) -> Self {
        command.args(["--http", "127.0.0.1:0"]).arg("--control").arg(dir.path().join("control.sock"));
        command.arg("--state").arg(dir.path()).args(arguments).stderr(Stdio::inherit());
        Self::spawned(spawn(command).expect("the balancer starts"), dir)
    }

    /// Going by a configuration file.
    pub fn by_file(file: &std::path::Path, dir: tempfile::TempDir) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_epagent-balancer"));
        command.args(IO_ARGUMENTS).arg("--config").arg(file);
        command.arg("--control").arg(dir.path().join("control.sock"));
        Self::spawned(command.spawn().expect("the balancer starts"), dir)
    }

    /// With inherited sockets, as systemd would hand them over, the control socket among them.
    pub fn inheriting(http: &TcpListener, dir: tempfile::TempDir) -> Self {
        Self::inheriting_all(&[("http", http.as_fd())], dir, |_| {})
    }

    /// The same with any sockets, and with what `set` makes of the command.
    pub fn inheriting_all(
        listeners: &[(&str, BorrowedFd<'_>)],
        dir: tempfile::TempDir,
        set: impl FnOnce(&mut Command),
    ) -> Self {
        let path = dir.path().join("control.sock");
        let _ = std::fs::remove_file(&path);
        let control = UnixListener::bind(path).expect("a control socket");
        let listeners = [listeners, &[("control", control.as_fd())]].concat();
        let mut script = String::new();
        let mut copies = Vec::new();
        for (index, (_, listener)) in listeners.iter().enumerate() {
            let copy = nix::unistd::dup(listener).expect("a copy without close-on-exec");
            let (source, target) = (copy.as_raw_fd(), 3 + index);
            script.push_str(&format!("exec {target}<&{source} {source}<&-; "));
            // Open until the child has been spawned.
            copies.push(copy);
        }
        let names: Vec<&str> = listeners.iter().map(|(name, _)| *name).collect();
        script.push_str("export LISTEN_PID=$$; exec \"$@\"");
        let mut command = Command::new("bash");
        command.args(["-c", &script, "bash", env!("CARGO_BIN_EXE_epagent-balancer")]);
        command.args(IO_ARGUMENTS);
        command.arg("--state").arg(dir.path());
        command.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        set(&mut command);
        let child = command.spawn().expect("the balancer starts");
        drop(copies);
        Self::spawned(child, dir)
    }

    fn spawned(child: Child, dir: tempfile::TempDir) -> Self {
        let none = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut balancer = Self { child, dir, version: AtomicU64::new(0), http: none };
        let status = poll("the balancer answers on its control socket", || balancer.try_status());
        balancer.version.store(status.table_version, Ordering::Relaxed);
        if let Some(listener) = status.listeners.iter().find(|listener| listener.name == "http") {
            balancer.http = listener.address.parse().expect("an address");
        }
        balancer
    }

    pub fn control_path(&self) -> PathBuf {
        self.dir.path().join("control.sock")
    }

    pub fn control(&self) -> Control {
        Control::connect(&self.control_path(), PATIENCE).expect("the control socket")
    }

    fn try_status(&self) -> Option<Status> {
        Control::connect(&self.control_path(), PATIENCE).ok()?.status().ok()
    }

    pub fn status(&self) -> Status {
        self.control().status().expect("a status")
    }

    /// Where the one listener of this name listens.
    pub fn listener(&self, name: &str) -> SocketAddr {
        self.listeners(name)[0]
    }

    /// Where the listeners of this name listen.
    pub fn listeners(&self, name: &str) -> Vec<SocketAddr> {
        let status = self.status();
        let named = status.listeners.iter().filter(|listener| listener.name == name);
        named.map(|listener| listener.address.parse().expect("an address")).collect()
    }

    pub fn upstream(&self, id: &str) -> UpstreamStatus {
        let status = self.status();
        status.upstreams.into_iter().find(|upstream| upstream.id == id).expect("a known upstream")
    }

    /// Pushes a table with these routes (JSON), under the next version.
    pub fn routes(&self, routes: &str) -> Ack {
        let version = self.version.fetch_add(1, Ordering::Relaxed) + 1;
        let text = format!(r#"{{"version":{version},"routes":[{routes}]}}"#);
        let table: Table = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        self.control().set_table(&table).expect("the table is taken")
    }

    /// One HTTP host, and its upstreams with their states.
    pub fn route(&self, host: &str, upstreams: &[(&str, SocketAddr, &str)]) -> Ack {
        self.routes(&host_route(host, upstreams))
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Open descriptors of the process.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("its descriptors").count()
    }

    /// Resident memory of the process, in KiB.
    pub fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("its status");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
        line.split_whitespace().nth(1).expect("a size").parse().expect("a number")
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.pid() as i32);
        nix::sys::signal::kill(pid, signal).expect("it can be signalled");
    }

    /// Kills it, and returns its folder for the next one.
    pub fn kill(mut self) -> tempfile::TempDir {
        let _ = self.child.kill();
        let _ = self.child.wait();
        std::mem::replace(&mut self.dir, tempfile::tempdir().expect("a folder"))
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn host_route(host: &str, upstreams: &[(&str, SocketAddr, &str)]) -> String {
    format!(r#"{{"id":"{host}","match":{{"host":"{host}"}},"action":{}}}"#, proxy(upstreams))
}

pub fn port_route(port: u16, upstreams: &[(&str, SocketAddr, &str)]) -> String {
    format!(r#"{{"id":"port-{port}","match":{{"port":{port}}},"action":{}}}"#, proxy(upstreams))
}

pub fn proxy(upstreams: &[(&str, SocketAddr, &str)]) -> String {
    let upstream = |(id, address, state): &(&str, SocketAddr, &str)| {
        format!(r#"{{"id":"{id}","address":"{address}","state":"{state}"}}"#)
    };
    let upstreams: Vec<String> = upstreams.iter().map(upstream).collect();
    format!(r#"{{"proxy":{{"upstreams":[{}]}}}}"#, upstreams.join(","))
}

const fn is_same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut same = a.len() == b.len();
    let mut at = 0;
    while same && at < a.len() {
        same = a[at] == b[at];
        at += 1;
    }
    same
}

/// User and system time that a process has had, in ticks of 10 ms.
pub fn cpu_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("its stat");
    let after = stat.rsplit_once(')').expect("a name").1;
    let fields: Vec<&str> = after.split_whitespace().collect();
    fields[11].parse::<u64>().expect("utime") + fields[12].parse::<u64>().expect("stime")
}

/// Waits until `attempt` has something to give.
pub fn poll<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        assert!(Instant::now() < deadline, "gave up waiting until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until something holds.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    poll(what, || holds().then_some(()));
}

/// An address that nobody listens on: it was the system's choice a moment ago.
pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port")
}

/// FNV-1a, enough to tell two streams apart.
pub fn checksum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// Bytes that repeat nowhere soon.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend_from_slice(&next().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Reads whatever comes until the end or an error; the error, if that was the end.
pub fn read_all(mut stream: impl Read) -> (Vec<u8>, Option<std::io::ErrorKind>) {
    let mut bytes = Vec::new();
    let end = stream.read_to_end(&mut bytes).err().map(|error| error.kind());
    (bytes, end)
}

pub fn write_all(mut stream: impl Write, bytes: &[u8]) {
    stream.write_all(bytes).expect("the bytes are taken");
}
