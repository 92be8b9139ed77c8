//! The fronts that are measured beside one another, each a process of its own on its processor.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicU16;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use epagent_tests::host::binary;
use epagent_tests::{eventually, process};

/// USER_HZ, the unit of the times in /proc/PID/stat, on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;

/// A front by what it is and how it is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Epagent,
    EpagentEpoll,
    Haproxy,
    HaproxySplice,
    HaproxyTuned,
    Nginx,
    Tokio,
    TokioUring,
    /// The least a ring can do.
    BareRing,
    BareRingUnix,
    /// The same upstream over a unix socket.
    EpagentUnix,
    HaproxyUnix,
    EpagentHttp,
    HaproxyHttp,
    NginxHttp,
}

/// Where the backend listens.
pub struct Backend {
    pub http: SocketAddr,
    pub unix: PathBuf,
    pub bulk: SocketAddr,
    child: Child,
}

/// A front that listens; ended when dropped.
pub struct Front {
    pub kind: Kind,
    pub address: SocketAddr,
    child: Child,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Epagent => "epagent-balancer",
            Kind::EpagentEpoll => "epagent-balancer --io epoll",
            Kind::Haproxy => "haproxy",
            Kind::HaproxySplice => "haproxy, splice",
            Kind::HaproxyTuned => "haproxy, bufsize 64K",
            Kind::Nginx => "nginx stream",
            Kind::Tokio => "naive tokio",
            Kind::TokioUring => "naive tokio-uring",
            Kind::BareRing => "bare ring",
            Kind::BareRingUnix => "bare ring, AF_UNIX",
            Kind::EpagentUnix => "epagent-balancer, AF_UNIX",
            Kind::HaproxyUnix => "haproxy, AF_UNIX",
            Kind::EpagentHttp => "epagent-balancer, http",
            Kind::HaproxyHttp => "haproxy, mode http",
            Kind::NginxHttp => "nginx proxy_pass",
        }
    }

    /// Starts it in front of `upstream`. `folder` is for its files.
    pub fn start(self, folder: &Path, upstream: SocketAddr, unix: &Path) -> Front {
        let address = free_address();
        let mut command = match self {
            Kind::Epagent => epagent(address, "tcp", &upstream.to_string()),
            Kind::EpagentEpoll => {
                let mut command = epagent(address, "tcp", &upstream.to_string());
                command.args(["--io", "epoll"]);
                command
            }
            Kind::EpagentUnix => epagent(address, "tcp", &format!("unix:{}", unix.display())),
            Kind::EpagentHttp => epagent(address, "http", &upstream.to_string()),
            Kind::Haproxy => haproxy(folder, self, address, "", "tcp", "", &upstream.to_string()),
            Kind::HaproxySplice => {
                haproxy(folder, self, address, "", "tcp", "option splice-auto", &upstream.to_string())
            }
            Kind::HaproxyTuned => {
                haproxy(folder, self, address, "tune.bufsize 65536", "tcp", "", &upstream.to_string())
            }
            Kind::HaproxyUnix => {
                haproxy(folder, self, address, "", "tcp", "", &format!("unix@{}", unix.display()))
            }
            Kind::HaproxyHttp => haproxy(
                folder,
                self,
                address,
                "",
                "http",
                "option http-keep-alive\n http-reuse always",
                &upstream.to_string(),
            ),
            Kind::Nginx => nginx(
                folder,
                self,
                &format!(
                    "stream {{ server {{ listen {address}; proxy_pass {upstream}; proxy_half_close on; \
                     tcp_nodelay on; }} }}"
                ),
            ),
            Kind::NginxHttp => nginx(
                folder,
                self,
                &format!(
                    "http {{ access_log off; keepalive_requests 1000000000; \
                     client_body_temp_path {dir}/b; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f; \
                     uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s; \
                     upstream back {{ server {upstream}; keepalive 1024; keepalive_requests 1000000000; }} \
                     server {{ listen {address}; location / {{ proxy_pass http://back; proxy_http_version 1.1; \
                     proxy_set_header Connection \"\"; }} }} }}",
                    dir = folder.display()
                ),
            ),
            Kind::Tokio => part("naive-tokio", address, &upstream.to_string()),
            Kind::TokioUring => part("naive-tokio-uring", address, &upstream.to_string()),
            Kind::BareRing => part("bare-ring", address, &upstream.to_string()),
            Kind::BareRingUnix => part("bare-ring", address, &format!("unix:{}", unix.display())),
        };
        let log =
            std::fs::File::create(folder.join(format!("{self:?}.log"))).map_or(Stdio::null(), Stdio::from);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().unwrap_or_else(|error| panic!("starting {command:?}: {error}"));
        let front = Front { kind: self, address, child };
        eventually(self.name(), Duration::from_secs(10), || TcpStream::connect(address).ok());
        front
    }
}

impl Front {
    /// User and system time of it and its children so far, proc(5).
    pub fn cpu_seconds(&self) -> f64 {
        self.pids().into_iter().map(cpu_seconds).sum()
    }

    /// Proportional set size of it and its children, smaps_rollup in proc(5), in KiB.
    pub fn pss_kib(&self) -> f64 {
        let pss = |pid: i32| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
            let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
            line.split_whitespace().next()?.parse::<f64>().ok()
        };
        self.pids().into_iter().filter_map(pss).sum()
    }

    fn pids(&self) -> Vec<i32> {
        let own = self.child.id() as i32;
        std::iter::once(own).chain(process::descendants(own).into_iter().map(|child| child.pid)).collect()
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

impl Backend {
    pub fn start(folder: &Path) -> Self {
        let (http, bulk) = (free_address(), free_address());
        let unix = folder.join("backend.sock");
        let mut command = pinned(super::LOAD_CPU, &load_program());
        command.args(["backend", &http.to_string(), &unix.display().to_string(), &bulk.to_string()]);
        let child = command.spawn().unwrap_or_else(|error| panic!("starting the backend: {error}"));
        let backend = Self { http, unix, bulk, child };
        eventually("the backend", Duration::from_secs(10), || TcpStream::connect(http).ok());
        backend
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

fn end(child: &mut Child) {
    process::terminate_if_alive(child.id() as i32);
    let _ = child.wait();
}

fn cpu_seconds(pid: i32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = text.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let ticks = |field: usize| fields.get(field).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / TICKS_PER_SECOND
}

/// A command bound to one processor.
fn pinned(cpu: usize, program: &Path) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", &cpu.to_string()]).arg(program);
    command
}

/// This program again, as one of its parts.
fn own_program() -> PathBuf {
    std::env::current_exe().unwrap_or_else(|error| panic!("finding this program: {error}"))
}

/// `epagent-load`, as cargo built it for this bench.
fn load_program() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_epagent-load"))
}

/// A front that is a part of this program.
fn part(name: &str, address: SocketAddr, upstream: &str) -> Command {
    let mut command = pinned(super::FRONT_CPU, &own_program());
    command.args([name, &address.to_string(), upstream]);
    command
}

fn epagent(address: SocketAddr, mode: &str, upstream: &str) -> Command {
    let mut command = pinned(super::FRONT_CPU, &binary("epagent-balancer"));
    command.args(["run", "--listen", &address.to_string(), "--upstream", upstream, "--mode", mode]);
    command
}

fn haproxy(
    folder: &Path,
    kind: Kind,
    address: SocketAddr,
    global: &str,
    mode: &str,
    options: &str,
    upstream: &str,
) -> Command {
    let config = folder.join(format!("{kind:?}.cfg"));
    // Its pipes are descriptors too, and so many it must be able to have.
    let maxconn = if kind == Kind::HaproxySplice { 7_900 } else { 9_900 };
    let text = format!(
        "global\n nbthread 1\n maxconn {maxconn}\n {global}\ndefaults\n mode {mode}\n timeout connect 5s\n \
         timeout client 600s\n timeout server 600s\n {options}\nlisten main\n bind {address}\n server one {upstream}\n"
    );
    write(&config, &text);
    let mut command = pinned(super::FRONT_CPU, &find("haproxy"));
    command.args(["-db", "-f"]).arg(config);
    command
}

fn nginx(folder: &Path, kind: Kind, block: &str) -> Command {
    let config = folder.join(format!("{kind:?}.conf"));
    let module = "/usr/lib/nginx/modules/ngx_stream_module.so";
    let load = if Path::new(module).exists() { format!("load_module {module};") } else { String::new() };
    let text = format!(
        "{load} worker_processes 1; daemon off; user root; pid {dir}/{kind:?}.pid; error_log {dir}/{kind:?}.err; \
         worker_rlimit_nofile 20000; events {{ worker_connections 19900; }} {block}",
        dir = folder.display()
    );
    write(&config, &text);
    let mut command = pinned(super::FRONT_CPU, &find("nginx"));
    command.arg("-c").arg(config);
    command
}

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap_or_else(|error| panic!("writing {}: {error}", path.display()));
}

/// Below the ports that the kernel gives to connections, which would take one away before its front listens.
fn free_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    let mut addresses = std::iter::repeat_with(|| (Ipv4Addr::LOCALHOST, NEXT.fetch_add(1, Relaxed)).into());
    let free = addresses.by_ref().take(5_000).find(|address: &SocketAddr| TcpListener::bind(address).is_ok());
    free.unwrap_or_else(|| panic!("no free port"))
}

/// Whether a program is installed.
pub fn is_installed(program: &str) -> bool {
    find(program).is_file()
}

/// A program in PATH or where administration programs lie.
fn find(program: &str) -> PathBuf {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/local/sbin:/usr/sbin:/sbin";
    let found = path.split(':').map(|folder| Path::new(folder).join(program)).find(|path| path.is_file());
    found.unwrap_or_else(|| PathBuf::from(program))
}
