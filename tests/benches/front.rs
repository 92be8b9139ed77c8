//! `make bench`: what the balancer costs beside HAProxy, on loopback, one thread each.
//!
//! The upstream and the load are the same for both (HAProxy answering a fixed text, wrk). On few processors the
//! three share them, so requests per second say less than the processor time the front itself used for each.
//! `EPAGENT_BENCH_SECONDS` sets the length of a run, `EPAGENT_BENCH_CONNECTIONS` how many clients there are.

#![forbid(unsafe_code)]

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use epagent_tests::command::run;
use epagent_tests::host::binary;
use epagent_tests::poll::setting;
use epagent_tests::{eventually, process};

/// USER_HZ, the unit of the times in /proc/PID/stat, on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;

fn main() {
    for (program, package) in [("wrk", "wrk"), ("haproxy", "haproxy")] {
        if find(program).is_none() {
            println!(
                "{program} is not installed, so there is nothing to compare with: apt-get install {package}"
            );
            return;
        }
    }
    let folder = tempfile::tempdir().unwrap_or_else(|error| panic!("making a folder: {error}"));
    let upstream = free_address();
    let answer = "http-request return status 200 content-type text/plain string hello";
    let _upstream = Server::haproxy(folder.path(), "upstream", upstream, answer);

    println!("{:<18} {:>12} {:>14} {:>10} {:>8}", "front", "requests/s", "cpu µs/request", "p99", "errors");
    let connections = setting("EPAGENT_BENCH_CONNECTIONS", 64);
    report("none", &measure(upstream, connections), None);

    let address = free_address();
    let rule = format!("server one {upstream}");
    let front = Server::haproxy(folder.path(), "front", address, &rule);
    front.measure("haproxy", address, connections);
    drop(front);

    let address = free_address();
    let mut command = Command::new(binary("epagent-balancer"));
    command.args(["run", "--listen", &address.to_string(), "--upstream", &upstream.to_string()]);
    let front = Server::start(command, address);
    front.measure("epagent-balancer", address, connections);
}

/// A server that listens; ended when dropped.
struct Server {
    child: Child,
}

impl Server {
    fn start(mut command: Command, address: SocketAddr) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().unwrap_or_else(|error| panic!("starting {command:?}: {error}"));
        let server = Self { child };
        eventually("it listens", Duration::from_secs(10), || TcpStream::connect(address).ok());
        server
    }

    fn haproxy(folder: &Path, name: &str, address: SocketAddr, rule: &str) -> Self {
        let config = folder.join(format!("{name}.cfg"));
        let text = format!(
            "global\n nbthread 1\n maxconn 4096\ndefaults\n mode http\n timeout connect 5s\n timeout client 60s\n \
             timeout server 60s\n option http-keep-alive\nlisten main\n bind {address}\n {rule}\n"
        );
        std::fs::write(&config, text).unwrap_or_else(|error| panic!("writing a configuration: {error}"));
        let mut command = Command::new(find("haproxy").unwrap_or_default());
        command.args(["-db", "-f"]).arg(config);
        Self::start(command, address)
    }

    fn measure(&self, name: &str, address: SocketAddr, connections: u64) {
        let before = cpu_seconds(self.child.id());
        let run = measure(address, connections);
        report(name, &run, Some(cpu_seconds(self.child.id()) - before));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        process::terminate_if_alive(self.child.id() as i32);
        let _ = self.child.wait();
    }
}

/// What wrk saw.
struct Run {
    requests: f64,
    per_second: f64,
    p99: String,
    errors: String,
}

fn measure(address: SocketAddr, connections: u64) -> Run {
    let seconds = setting("EPAGENT_BENCH_SECONDS", 5);
    let mut wrk = Command::new("wrk");
    wrk.args([
        "-t1",
        "--latency",
        &format!("-c{connections}"),
        &format!("-d{seconds}s"),
        &format!("http://{address}/"),
    ]);
    let text = run(&mut wrk).ok();
    let after = |word: &str| {
        let line = text.lines().find(|line| line.trim_start().starts_with(word))?;
        line.trim_start()[word.len()..].split_whitespace().next().map(str::to_owned)
    };
    let requests = text.lines().find_map(|line| line.split_once(" requests in ")?.0.trim().parse().ok());
    Run {
        requests: requests.unwrap_or_else(|| panic!("wrk told no number of requests:\n{text}")),
        per_second: after("Requests/sec:").and_then(|text| text.parse().ok()).unwrap_or(0.0),
        p99: after("99%").unwrap_or_default(),
        errors: after("Non-2xx or 3xx responses:").unwrap_or_else(|| "0".to_owned()),
    }
}

fn report(name: &str, run: &Run, cpu_seconds: Option<f64>) {
    let cpu = cpu_seconds.map_or("-".to_owned(), |seconds| format!("{:.2}", seconds * 1e6 / run.requests));
    println!("{name:<18} {:>12.0} {cpu:>14} {:>10} {:>8}", run.per_second, run.p99, run.errors);
}

/// User and system time of a process, proc(5).
fn cpu_seconds(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = text.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let ticks = |field: usize| fields.get(field).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / TICKS_PER_SECOND
}

fn free_address() -> SocketAddr {
    let free = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
    free.unwrap_or_else(|error| panic!("no free port: {error}"))
}

/// A program in PATH or where administration programs lie.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/local/sbin:/usr/sbin:/sbin";
    path.split(':').map(|folder| Path::new(folder).join(program)).find(|path| path.is_file())
}
