//! What the behaviour tests share: a node of their own (cgroup root, addresses, folder), jails on the host's /usr,
//! and guards that leave nothing behind even when a test fails.

#![allow(dead_code)]

pub mod loop_disk;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use epagent_isolation::cgroup::{CgroupRoot, Disk};
use epagent_isolation::id::{IdRange, JailId, JailPath};
use epagent_isolation::launch::{JailExecutable, LaunchConfig, LaunchFds, Launched, launch};
use epagent_isolation::monitor::Client;
use epagent_isolation::monitor::protocol::{Event, State};
use epagent_isolation::monitor::record::ExitRecord;
use epagent_isolation::spec::*;
use epagent_isolation::{net, sweep};

/// Longest wait for anything in a test. `EPAGENT_TEST_SLOWNESS` says how many times longer everything takes where
/// the processor is emulated.
pub fn patience() -> Duration {
    let times = std::env::var("EPAGENT_TEST_SLOWNESS").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    Duration::from_secs(20) * times
}

/// Polls until `condition` gives something.
pub fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited too long for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The jail that was built with the tests, or another: a static release build, to take figures of.
fn jail_executable() -> PathBuf {
    std::env::var_os("EPAGENT_JAIL").map_or_else(|| env!("CARGO_BIN_EXE_epagent-jail").into(), PathBuf::from)
}

/// A node: nextest runs one process per test, so the process id makes every name unique.
pub struct Node {
    pub number: u16,
    pub cgroups: CgroupRoot,
    pub executable: JailExecutable,
    pub dir: PathBuf,
    pub usr: OwnedFd,
    /// On which the traffic of instances is limited: none, unless a test has one.
    pub disks: Vec<Disk>,
}

pub fn path(text: &str) -> JailPath {
    JailPath::new(text).unwrap()
}

impl Node {
    pub fn new() -> Node {
        let number = 10_000 + (std::process::id() % 50_000) as u16;
        let dir = std::env::temp_dir().join(format!("epagent-isolation-{number}"));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        Node {
            number,
            cgroups: CgroupRoot::open(&format!("epagent-test-{number}")).unwrap(),
            executable: JailExecutable::load(&jail_executable()).unwrap(),
            usr: File::open("/usr").unwrap().into(),
            dir,
            disks: Vec::new(),
        }
    }

    /// Addresses of the node: 198.18.0.0/15 is for tests (RFC 2544).
    pub fn network(&self, slot: u32) -> NetSpec {
        let base = u32::from(Ipv4Addr::new(198, 18, 0, 0)) + (u32::from(self.number) % 8192) * 16;
        let v6 = format!("fd18:{:x}::", self.number).parse().unwrap();
        NetSpec::nth(self.number, slot, base.into(), Some(v6))
    }

    /// A jail on the host's /usr that runs `script` in a shell.
    pub fn shell(&self, id: &str, script: &str) -> JailSpec {
        let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
        let env = [("PATH", "/usr/bin:/usr/sbin"), ("PLAIN", "yes")];
        let env = env.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let symlinks = ["bin", "sbin", "lib", "lib64"]
            .map(|name| SymlinkSpec { path: path(&format!("/{name}")), target: format!("usr/{name}") });
        JailSpec {
            id: JailId::new(id).unwrap(),
            ids: IdRange::new((u32::from(self.number) % 1000 + 16) << 16).unwrap(),
            hostname: id.to_owned(),
            profile: Profile::App,
            root: RootSpec::Tmpfs { size_bytes: 1 << 20, symlinks: symlinks.to_vec() },
            mounts: vec![MountSpec {
                target: path("/usr"),
                source: MountSource::Descriptor { index: 0, idmap: true, recursive: false },
                read_only: true,
                no_exec: false,
            }],
            files: Vec::new(),
            resolv_conf: None,
            hosts: None,
            program: Program::Exec { argv, cwd: path("/"), env },
            user: User::default(),
            limits: Limits::default(),
            network: None,
            deadline_ms: None,
            umask: epagent_isolation::spec::UMASK_DEFAULT,
        }
    }

    /// A jail that runs the ignored test `name` of this very test binary, and the descriptor to give as a mount.
    pub fn itself(&self, id: &str, name: &str, env: &[(&str, &str)]) -> (JailSpec, File) {
        let mut spec = self.shell(id, "");
        spec.mounts.push(MountSpec {
            target: path("/itself"),
            source: MountSource::Descriptor { index: 1, idmap: true, recursive: false },
            read_only: true,
            no_exec: false,
        });
        let argv = ["/itself", "--ignored", "--exact", name, "--nocapture"].map(str::to_owned).to_vec();
        spec.program = Program::Exec { argv, cwd: path("/tmp"), env: environment(env) };
        (spec, File::open(std::env::current_exe().unwrap()).unwrap())
    }

    pub fn logs(&self, id: &str) -> PathBuf {
        let dir = self.dir.join(format!("logs-{id}"));
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    pub fn socket(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.sock"))
    }

    pub fn start(&self, spec: &JailSpec) -> Jail {
        self.start_with(spec, LaunchFds::default())
    }

    /// `fds.mounts` without the host's /usr, which is always first; `fds.logs` is set here.
    pub fn start_with<'a>(&'a self, spec: &JailSpec, fds: LaunchFds<'a>) -> Jail {
        let id = spec.id.as_str();
        let logs = File::open(self.logs(id)).unwrap();
        let mounts = [self.usr.as_fd()].into_iter().chain(fds.mounts.iter().copied()).collect();
        let fds = LaunchFds { logs: Some(logs.as_fd()), mounts, ..fds };
        let config = LaunchConfig {
            executable: &self.executable,
            cgroups: &self.cgroups,
            disks: &self.disks,
            control_socket: self.socket(id),
        };
        let launched = launch(&config, spec, &fds).unwrap();
        let mut client = Client::connect(&self.socket(id)).unwrap();
        client.subscribe().unwrap();
        Jail { id: spec.id.clone(), client, launched, logs: self.logs(id) }
    }

    /// Starts and waits until the app runs.
    pub fn running(&self, spec: &JailSpec) -> Jail {
        let mut jail = self.start(spec);
        jail.await_started();
        jail
    }

    /// Starts, waits for the end and gives the record and the output.
    pub fn outcome(&self, spec: &JailSpec) -> (ExitRecord, String) {
        let mut jail = self.start(spec);
        let record = jail.await_exit();
        jail.client.release().unwrap();
        (record, jail.output())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for found in sweep::survey(&self.cgroups).unwrap_or_default() {
            if let Err(e) = sweep::remove(&self.cgroups, &found.id) {
                eprintln!("sweep {}: {}", found.id, e.chain());
            }
        }
        let _ = sweep::remove_links(self.number, &[]);
        let _ = net::remove_firewall(self.number);
        let _ = fs::remove_dir_all(&self.dir);
        if let Ok(cgroups) = CgroupRoot::open(self.cgroups.name()) {
            let _ = cgroups.remove();
        }
    }
}

pub struct Jail {
    pub id: JailId,
    pub client: Client,
    pub launched: Launched,
    pub logs: PathBuf,
}

impl Jail {
    pub fn next_event(&mut self, what: &str) -> Event {
        eventually(what, || self.client.next_event().unwrap())
    }

    pub fn await_started(&mut self) -> i32 {
        match self.next_event("the app's start") {
            Event::Started { pid, .. } => pid,
            other => panic!("{other:?}; output: {}", self.output()),
        }
    }

    pub fn await_exit(&mut self) -> ExitRecord {
        loop {
            if let Event::Exited { record } = self.next_event("the end of the instance") {
                return record;
            }
        }
    }

    pub fn init_pid(&mut self) -> i32 {
        self.client.status().unwrap().pid.unwrap()
    }

    pub fn state(&mut self) -> State {
        self.client.status().unwrap().state
    }

    /// Text of the log, without time and stream. Complete once exit.json is there; partial before.
    pub fn output(&self) -> String {
        let exited = self.logs.join("exit.json");
        let deadline = Instant::now() + Duration::from_secs(5);
        while !exited.exists() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        self.output_now()
    }

    pub fn output_now(&self) -> String {
        let mut text = String::new();
        for name in ["previous.log", "current.log"] {
            if let Ok(mut file) = File::open(self.logs.join(name)) {
                let mut bytes = Vec::new();
                file.read_to_end(&mut bytes).unwrap();
                text.push_str(&String::from_utf8_lossy(&bytes));
            }
        }
        let lines = text.lines().map(|line| line.splitn(3, ' ').nth(2).unwrap_or_default());
        lines.collect::<Vec<_>>().join("\n")
    }
}

pub fn environment(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// Whether a process exists and is no zombie.
pub fn alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z') && !rest.starts_with('X'))
}

/// The first child of a process.
pub fn child_of(pid: i32) -> Option<i32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}
