//! What is measured, with which fronts, and how often.

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use epagent_tests::front::load;
use epagent_tests::poll::setting;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::Pid;

use crate::fronts::{Backend, Front, Kind, is_installed};
use crate::report::{Row, summary};

/// One thing to measure.
enum Work {
    /// Small requests in closed loops on so many connections; `fresh`: one connection for each.
    Requests { connections: usize, fresh: bool },
    /// Transfers at a time, and which way.
    Bulk { streams: u64, down: bool },
}

struct Scenario {
    name: &'static str,
    work: Work,
    fronts: &'static [Kind],
    /// What the others are compared with.
    base: Kind,
}

const TCP: &[Kind] = &[
    Kind::Haproxy,
    Kind::Epagent,
    Kind::BareRing,
    Kind::EpagentEpoll,
    Kind::HaproxySplice,
    Kind::Nginx,
    Kind::Tokio,
    Kind::TokioUring,
];
const BULK: &[Kind] = &[
    Kind::Haproxy,
    Kind::Epagent,
    Kind::EpagentEpoll,
    Kind::HaproxySplice,
    Kind::HaproxyTuned,
    Kind::Nginx,
    Kind::Tokio,
    Kind::TokioUring,
];
const UNIX: &[Kind] =
    &[Kind::HaproxyUnix, Kind::EpagentUnix, Kind::BareRingUnix, Kind::Haproxy, Kind::Epagent];
const HTTP: &[Kind] = &[Kind::HaproxyHttp, Kind::EpagentHttp, Kind::NginxHttp];
const IDLE: &[Kind] =
    &[Kind::Haproxy, Kind::Epagent, Kind::EpagentEpoll, Kind::Nginx, Kind::Tokio, Kind::TokioUring];

const fn loops(connections: usize) -> Work {
    Work::Requests { connections, fresh: false }
}

const SCENARIOS: &[Scenario] = &[
    Scenario { name: "tcp, 4 connections", work: loops(4), fronts: TCP, base: Kind::Haproxy },
    Scenario { name: "tcp, 64 connections", work: loops(64), fronts: TCP, base: Kind::Haproxy },
    Scenario { name: "tcp, 512 connections", work: loops(512), fronts: TCP, base: Kind::Haproxy },
    Scenario {
        name: "tcp, new connection each",
        work: Work::Requests { connections: 32, fresh: true },
        fronts: TCP,
        base: Kind::Haproxy,
    },
    Scenario {
        name: "AF_UNIX upstream, 64 connections",
        work: loops(64),
        fronts: UNIX,
        base: Kind::HaproxyUnix,
    },
    Scenario {
        name: "AF_UNIX upstream, new connection each",
        work: Work::Requests { connections: 32, fresh: true },
        fronts: UNIX,
        base: Kind::HaproxyUnix,
    },
    Scenario {
        name: "bulk, 1 down",
        work: Work::Bulk { streams: 1, down: true },
        fronts: BULK,
        base: Kind::Haproxy,
    },
    Scenario {
        name: "bulk, 1 up",
        work: Work::Bulk { streams: 1, down: false },
        fronts: BULK,
        base: Kind::Haproxy,
    },
    Scenario {
        name: "bulk, 16 down",
        work: Work::Bulk { streams: 16, down: true },
        fronts: BULK,
        base: Kind::Haproxy,
    },
    Scenario {
        name: "bulk, 16 up",
        work: Work::Bulk { streams: 16, down: false },
        fronts: BULK,
        base: Kind::Haproxy,
    },
    Scenario { name: "http, 64 connections", work: loops(64), fronts: HTTP, base: Kind::HaproxyHttp },
    Scenario { name: "http, 512 connections", work: loops(512), fronts: HTTP, base: Kind::HaproxyHttp },
];

/// The name under which idle connections are asked for.
const IDLE_NAME: &str = "idle connections";

pub fn run_all() -> ExitCode {
    for (program, package) in
        [("haproxy", "haproxy"), ("nginx", "nginx libnginx-mod-stream"), ("taskset", "util-linux")]
    {
        if !is_installed(program) {
            eprintln!(
                "{program} is not installed, so there is nothing to compare with: apt-get install {package}"
            );
            return ExitCode::FAILURE;
        }
    }
    // Everything started from here inherits the limit; what is not started here asks for it itself.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    let mut own = CpuSet::new();
    if own.set(super::LOAD_CPU).is_ok() {
        let _ = sched_setaffinity(Pid::from_raw(0), &own);
    }
    let only = std::env::var("EPAGENT_BENCH_ONLY").unwrap_or_default();
    let folder = tempfile::tempdir().unwrap_or_else(|error| panic!("making a folder: {error}"));
    let backend = Backend::start(folder.path());
    println!("row\tscenario\tfront\tcost\tunit\trate\tp50 µs\tp99 µs\tfailed");
    for scenario in SCENARIOS.iter().filter(|scenario| scenario.name.contains(&only)) {
        scenario.run(folder.path(), &backend);
    }
    if IDLE_NAME.contains(&only) {
        idle(folder.path(), &backend);
    }
    ExitCode::SUCCESS
}

impl Scenario {
    fn run(&self, folder: &Path, backend: &Backend) {
        let upstream = match self.work {
            Work::Requests { .. } => backend.http,
            Work::Bulk { .. } => backend.bulk,
        };
        let fronts: Vec<Front> =
            self.fronts.iter().map(|kind| kind.start(folder, upstream, &backend.unix)).collect();
        let rounds = setting("EPAGENT_BENCH_ROUNDS", 5);
        let mut rows = Vec::new();
        for round in 0..=rounds {
            let mut order: Vec<Option<&Front>> =
                std::iter::once(None).chain(fronts.iter().map(Some)).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for front in order {
                let row = self.measure(front, upstream);
                // The first round warms up.
                if round > 0 {
                    row.print();
                    rows.push(row);
                }
            }
        }
        summary(&rows, self.base);
    }

    fn measure(&self, front: Option<&Front>, upstream: SocketAddr) -> Row {
        let to = front.map_or(upstream, |front| front.address);
        let before = front.map_or(0.0, Front::cpu_seconds);
        let mut row = Row {
            scenario: self.name.to_owned(),
            front: front.map(|front| front.kind),
            unit: "µs/request",
            cpu: 0.0,
            rate: 0.0,
            p50_us: 0.0,
            p99_us: 0.0,
            failed: 0,
        };
        match self.work {
            Work::Requests { connections, fresh } => {
                let time = Duration::from_secs(setting("EPAGENT_BENCH_SECONDS", 2));
                let seen = load::requests(to, connections, fresh, time);
                let spent = front.map_or(0.0, Front::cpu_seconds) - before;
                row.unit = if fresh { "µs/connection" } else { "µs/request" };
                row.cpu = spent * 1e6 / seen.done.max(1) as f64;
                row.rate = seen.done as f64 / seen.seconds;
                (row.p50_us, row.p99_us, row.failed) = (seen.p50_us, seen.p99_us, seen.failed);
            }
            Work::Bulk { streams, down } => {
                let seconds = load::bulk(to, down, streams, 1 << 30);
                let spent = front.map_or(0.0, Front::cpu_seconds) - before;
                row.unit = "s/GiB";
                row.cpu = spent;
                match seconds {
                    Ok(seconds) => row.rate = 1.0 / seconds,
                    Err(error) => {
                        eprintln!("{}: {error}", row.scenario);
                        row.failed = 1;
                    }
                }
            }
        }
        row
    }
}

/// What an idle connection costs of the front's memory: its upstream connection included, the kernel's part not.
fn idle(folder: &Path, backend: &Backend) {
    let count = setting("EPAGENT_BENCH_IDLE", 9_000);
    let mut rows = Vec::new();
    for kind in IDLE {
        let front = kind.start(folder, backend.http, &backend.unix);
        // What is touched only under load is not what a connection costs.
        load::requests(front.address, 64, false, Duration::from_secs(1));
        let before = front.pss_kib();
        let clients = load::idle(front.address, count);
        let held = front.pss_kib();
        let seen = load::requests(front.address, 1, false, Duration::from_millis(500));
        let row = Row {
            scenario: format!("{IDLE_NAME}: {count}"),
            front: Some(*kind),
            unit: "KiB/connection",
            cpu: (held - before) / clients.len().max(1) as f64,
            rate: clients.len() as f64,
            p50_us: seen.p50_us,
            p99_us: seen.p99_us,
            failed: count - clients.len() as u64,
        };
        println!("pss\t{}\t{:.0} KiB\twith {} idle: {:.0} KiB", kind.name(), before, clients.len(), held);
        row.print();
        rows.push(row);
    }
    summary(&rows, Kind::Haproxy);
}
