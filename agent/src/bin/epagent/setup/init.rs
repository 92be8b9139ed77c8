//! `epagent init`: makes an installed machine a node. It is run once, asks nothing, and says what it chose.
//!
//! ```text
//!   check the host ─▶ choose (size of the pool, node number) ─▶ the key of the secrets ─▶ /etc/epagent/epagentd.toml
//!     ─▶ the balancer's addresses ─▶ /etc/epagent/runner.toml ─▶ systemctl enable --now ─▶ all of it answers
//!                                                                         └─ not in time ─▶ taken back
//! ```
//!
//! The units wait for `runner.toml`, which is written last: an init that is cut short has started nothing and can be
//! run again, and so can one whose node did not come up. One that is through refuses to run again, since a second pool
//! or other ids would lose every app.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use epagent_wire::api::Status;
use nix::sys::statvfs::statvfs;
use nix::unistd::{Group, User};

use super::config::{self, Folders, Inputs, Pool};
use super::host;
use crate::dev::checks;
use crate::dev::error::DevError;
use crate::dev::node::{NODE_MAX, Node};
use crate::failure::{Failure, status};

const ETC: &str = "/etc/epagent";
const LIB: &str = "/usr/lib/epagent";
const STATE: &str = "/var/lib/epagent";
const RUN: &str = "/run/epagent";
/// Root's alone; systemd shows it to the agent (LoadCredential= in epagentd.service).
const KEY: &str = "/etc/epagent/credentials/key";
const KEY_BYTES: usize = 32;
/// Takes the place of the addresses in epagent-balancer.socket.
const LISTEN_DROP_IN: &str = "/etc/systemd/system/epagent-balancer.socket.d/50-listen.conf";
/// Of a pool that is mounted somewhere: nothing of the node begins before it is.
const POOL_DROP_IN: &str = "/etc/systemd/system/epagent-instances.service.d/50-pool.conf";
const DROP_IN_HEADER: &str = "# Written by `epagent init`.\n";
/// The delegated cgroup of epagent-instances.service, and the folder in it that is the runner's.
const CGROUP: &str = "epagent.slice/epagent-instances.service/apps";
const UNITS: [&str; 7] = [
    "epagent.target",
    "epagent-runner.socket",
    "epagentd-admin.socket",
    "epagentd-read.socket",
    "epagent-balancer.socket",
    "epagent-balancer-control.socket",
    "epagent-lease.socket",
];
/// What a loop pool takes of the free space where nobody says how much...
const POOL_SHARE_PERCENT: u64 = 60;
/// ...and the least it is of use with.
const POOL_BYTES_MIN: u64 = 2 << 30;
const MIB: u64 = 1 << 20;
/// How long the agent may take to answer: it makes the pool first.
const ANSWER_MAX: Duration = Duration::from_secs(60);
const ANSWER_BYTES_MAX: u64 = 1 << 20;
const LOOK: Duration = Duration::from_millis(100);

#[derive(Debug, clap::Args)]
pub struct InitArgs {
    /// A folder on a btrfs for the apps' files [default: a file of --size in /var/lib/epagent]
    #[arg(long, value_name = "DIR", conflicts_with = "size")]
    pool: Option<PathBuf>,
    /// How large that file is made, like 20G [default: 60 % of what is free]
    #[arg(long, value_name = "SIZE")]
    size: Option<String>,
    /// Where the balancer takes HTTP; repeatable [default: port 80, on all addresses]
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Vec<SocketAddr>,
    /// This machine's number, 1 to 127; two machines of a pair differ in it
    #[arg(long, value_name = "N", default_value_t = 1)]
    node: u8,
}

#[derive(Debug, thiserror::Error)]
enum InitError {
    #[error(transparent)]
    Host(#[from] DevError),
    #[error("this machine is set up already: {} exists", path.display())]
    Done { path: PathBuf },
    #[error("systemd does not run this machine")]
    NoSystemd,
    #[error("the {kind} {name} does not exist")]
    NoUser { kind: &'static str, name: &'static str },
    #[error("the user epagentd has the number {uid} and its group {gid}; they must have the same")]
    UnequalIds { uid: u32, gid: u32 },
    #[error("the node number {number} is not in 1 to {NODE_MAX}")]
    BadNode { number: u8 },
    #[error("{} can't hold the pool: {why}", path.display())]
    BadPool { path: PathBuf, why: String },
    #[error("{address} can't be listened on")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("{} can't be written", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("the configuration can't be written as TOML")]
    Toml(#[source] toml::ser::Error),
    #[error("`systemctl {arguments}` failed: {why}")]
    Systemctl { arguments: String, why: String },
    #[error("the agent does not answer on {RUN}/admin.sock")]
    Silent,
    #[error("the runner does not come up")]
    NoRunner,
}

pub fn run(args: &InitArgs) -> Result<(), Failure> {
    Ok(init(args)?)
}

fn init(args: &InitArgs) -> Result<(), InitError> {
    let done = Path::new(ETC).join("runner.toml");
    if done.exists() {
        return Err(InitError::Done { path: done });
    }
    checks::host()?;
    if !Path::new("/run/systemd/system").is_dir() {
        return Err(InitError::NoSystemd);
    }
    let node = Node::new(args.node).ok_or(InitError::BadNode { number: args.node })?;
    let (brain_uid, admin_gid, balancer_gid) = users()?;
    let pool = pool(args)?;
    check_addresses(&args.listen)?;
    let http = match args.listen.as_slice() {
        [] => "0.0.0.0:80".to_owned(),
        [first, ..] => first.to_string(),
    };
    let env = host::build_env(|name| std::env::var(name).ok());
    let files = config::files(&Inputs {
        node,
        brain_uid,
        balancer_gid,
        admin_gid,
        binaries: Path::new(LIB),
        runner: Folders { state: Path::new(STATE).join("runner"), run: RUN.into() },
        agent: Folders { state: Path::new(STATE).join("brain"), run: RUN.into() },
        pool: pool.clone(),
        cgroup: CGROUP.to_owned(),
        http: http.clone(),
        build_env: &env.passed,
    })
    .map_err(InitError::Toml)?;
    make_key()?;
    write(&Path::new(ETC).join("epagentd.toml"), &with_header(&files.agent))?;
    remove_drop_ins();
    if !args.listen.is_empty() {
        write(Path::new(LISTEN_DROP_IN), &drop_in(&args.listen))?;
    }
    if let Pool::Path { path } = &pool {
        write(Path::new(POOL_DROP_IN), &pool_drop_in(path))?;
    }
    write(&done, &with_header(&files.runner))?;
    say(&match &pool {
        Pool::Loop { file, size, .. } => format!("pool: {} of {size}", file.display()),
        Pool::Path { path } => format!("pool: {}", path.display()),
    });
    for name in env.left_out {
        say(&format!(
            "{name} is not passed on to builds: its value holds a password that every tenant would see"
        ));
    }
    if let Err(error) = start() {
        take_back(&done);
        return Err(error);
    }
    say(&format!("ready: HTTP on {http}; deploy with `epagent deploy DIR`, look with `epagent status`"));
    Ok(())
}

fn start() -> Result<(), InitError> {
    systemctl(&["daemon-reload"])?;
    systemctl(&[&["enable", "--now", "--quiet"][..], &UNITS].concat())?;
    await_node()
}

/// Stops what was started and leaves no configuration, so that it can be run again. The key stays, and what was made
/// of the pool.
fn take_back(runner_toml: &Path) {
    let stop = [
        "epagentd.service",
        "epagent-runner.service",
        "epagent-balancer.service",
        "epagent-lease.service",
        "epagent-instances.service",
    ];
    let undone = [
        systemctl(&[&["disable", "--now", "--quiet"][..], &UNITS].concat()),
        systemctl(&[&["stop", "--quiet"][..], &stop].concat()),
    ];
    // By then nobody reads it any more.
    let _ = fs::remove_file(runner_toml);
    remove_drop_ins();
    let reloaded = systemctl(&["daemon-reload"]);
    for error in undone.into_iter().chain([reloaded]).filter_map(Result::err) {
        say(&error.to_string());
    }
    say("taken back; nothing runs");
}

/// What an earlier run wrote would be in force beside what this one says.
fn remove_drop_ins() {
    for path in [LISTEN_DROP_IN, POOL_DROP_IN] {
        if fs::read_to_string(path).is_ok_and(|text| text.starts_with(DROP_IN_HEADER)) {
            let _ = fs::remove_file(path);
        }
    }
}

/// Somebody else's server on these addresses would be found out when half of the node runs. An address that is not
/// there yet is fine: a network may come up late.
fn check_addresses(listen: &[SocketAddr]) -> Result<(), InitError> {
    let all = [SocketAddr::from((Ipv6Addr::UNSPECIFIED, 80))];
    let mut held = Vec::new();
    for address in if listen.is_empty() { &all } else { listen } {
        match TcpListener::bind(address) {
            Ok(listener) => held.push(listener),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                return Err(InitError::Listen { address: *address, source: error });
            }
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
                say(&format!(
                    "{address} is no address of this machine now; it is listened on as soon as it is"
                ));
            }
            Err(_) => {}
        }
    }
    Ok(())
}

/// The brain, the group of operators, and the balancer's group.
fn users() -> Result<(u32, u32, u32), InitError> {
    let missing = |kind, name| InitError::NoUser { kind, name };
    let brain = User::from_name("epagentd").ok().flatten().ok_or(missing("user", "epagentd"))?;
    let admin = Group::from_name("epagent").ok().flatten().ok_or(missing("group", "epagent"))?;
    let (uid, gid) = (brain.uid.as_raw(), brain.gid.as_raw());
    // The runner lets the group of the brain's number read logs.
    if uid != gid {
        return Err(InitError::UnequalIds { uid, gid });
    }
    let front = "epagent-balancer";
    let balancer = Group::from_name(front).ok().flatten().ok_or(missing("group", front))?;
    Ok((uid, admin.gid.as_raw(), balancer.gid.as_raw()))
}

fn pool(args: &InitArgs) -> Result<Pool, InitError> {
    if let Some(path) = &args.pool {
        let bad = |why: &str| InitError::BadPool { path: path.clone(), why: why.to_owned() };
        if !path.is_absolute() {
            return Err(bad("the path is not absolute"));
        }
        let kind = nix::sys::statfs::statfs(path).map_err(|error| bad(&error.to_string()))?.filesystem_type();
        if kind != nix::sys::statfs::BTRFS_SUPER_MAGIC {
            return Err(bad("it is not on a btrfs"));
        }
        // It is written into a unit's drop-in.
        let is_plain = |byte: &u8| byte.is_ascii_graphic() && !b"%\"'\\".contains(byte);
        if !path.as_os_str().as_encoded_bytes().iter().all(is_plain) {
            return Err(bad("its name has blanks or signs that mean something to systemd"));
        }
        return Ok(Pool::Path { path: path.clone() });
    }
    let folder = Path::new(STATE);
    let mut free_bytes =
        statvfs(folder).map_or(0, |disk| disk.blocks_available().saturating_mul(disk.fragment_size()));
    let file = folder.join("pool.img");
    // One that a purge has left is used again, as it is.
    let kept_bytes = fs::metadata(&file).ok().map(|facts| facts.len());
    free_bytes = free_bytes.saturating_add(kept_bytes.map_or(0, |bytes| bytes + bytes / 8));
    let size_bytes = match (&args.size, kept_bytes) {
        (asked, Some(bytes)) => {
            if asked.is_some() {
                say(&format!("{} is there already and stays as large as it is", file.display()));
            }
            bytes
        }
        (Some(text), None) => checks::parse_size(text)?,
        (None, None) => free_bytes / 100 * POOL_SHARE_PERCENT / MIB * MIB,
    };
    if size_bytes < POOL_BYTES_MIN || size_bytes.saturating_add(POOL_BYTES_MIN / 8) > free_bytes {
        let wanted_bytes = size_bytes.max(POOL_BYTES_MIN);
        return Err(DevError::NoSpace { path: folder.to_owned(), wanted_bytes, free_bytes }.into());
    }
    let size = format!("{}M", size_bytes / MIB);
    Ok(Pool::Loop { mount: folder.join("pool"), file, size })
}

fn with_header(text: &str) -> String {
    format!(
        "# Written by `epagent init`; yours to change, here or by files in conf.d. `systemctl restart epagent-runner epagentd` puts it in force.\n{text}"
    )
}

fn drop_in(listen: &[SocketAddr]) -> String {
    let lines: String = listen.iter().map(|address| format!("ListenStream={address}\n")).collect();
    // The empty one takes away what the unit itself says.
    format!("{DROP_IN_HEADER}[Socket]\nListenStream=\n{lines}")
}

fn pool_drop_in(path: &Path) -> String {
    format!("{DROP_IN_HEADER}[Unit]\nRequiresMountsFor={}\n", path.display())
}

fn write(path: &Path, text: &str) -> Result<(), InitError> {
    let failed = |source| InitError::Write { path: path.to_owned(), source };
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    config::replace(path, text.as_bytes(), 0o644).map_err(failed)
}

/// The key that seals the apps' secrets. One that an earlier life of this machine has left is kept: what was sealed
/// with it may be there too.
fn make_key() -> Result<(), InitError> {
    let path = Path::new(KEY);
    if path.exists() || Path::new(STATE).join("brain/key").exists() {
        return Ok(());
    }
    let failed = |source| InitError::Write { path: path.to_owned(), source };
    let mut key = [0; KEY_BYTES];
    fs::File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut key)).map_err(failed)?;
    if let Some(folder) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    }
    config::replace(path, &key, 0o600).map_err(failed)
}

fn systemctl(arguments: &[&str]) -> Result<(), InitError> {
    let failed = |why| InitError::Systemctl { arguments: arguments.join(" "), why };
    let ran =
        Command::new("systemctl").args(arguments).output().map_err(|error| failed(error.to_string()))?;
    match ran.status.success() {
        true => Ok(()),
        false => Err(failed(String::from_utf8_lossy(&ran.stderr).trim().replace('\n', "; "))),
    }
}

/// The socket is systemd's and takes connections at once; the agent speaks when it is up, and says when the runner is.
fn await_node() -> Result<(), InitError> {
    let deadline = Instant::now() + ANSWER_MAX;
    let mut missing = InitError::Silent;
    while Instant::now() < deadline {
        match status(deadline.saturating_duration_since(Instant::now()).max(LOOK)) {
            Ok(status) if status.parts.get("runner").is_some_and(|runner| runner.starts_with("ok")) => {
                return Ok(());
            }
            Ok(_) => missing = InitError::NoRunner,
            Err(_) => {}
        }
        std::thread::sleep(LOOK);
    }
    Err(missing)
}

fn status(wait: Duration) -> io::Result<Status> {
    let mut stream = UnixStream::connect(Path::new(RUN).join("admin.sock"))?;
    stream.set_read_timeout(Some(wait))?;
    stream.write_all(b"GET /v1/status HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer)?;
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").ok_or(io::ErrorKind::InvalidData)?;
    Ok(serde_json::from_slice(&answer[end + 4..])?)
}

fn say(line: &str) {
    let _ = writeln!(io::stderr(), "epagent init: {line}");
}

impl From<InitError> for Failure {
    fn from(error: InitError) -> Failure {
        let (code, hint) = match error {
            InitError::Host(error) => return error.into(),
            InitError::Done { .. } => (
                "already_set_up",
                "`epagent status` shows how it is; change the files in /etc/epagent instead",
            ),
            InitError::NoSystemd => ("no_systemd", "`epagent dev --state DIR` runs a node without systemd"),
            InitError::NoUser { .. } => ("no_user", "run `systemd-sysusers`, or install the package again"),
            InitError::UnequalIds { .. } => {
                ("unequal_ids", "give both one number with usermod and groupmod, and run it again")
            }
            InitError::BadNode { .. } => ("bad_node", "give each machine a number of its own with --node"),
            InitError::BadPool { .. } => ("bad_pool", "name a folder on a btrfs, or leave --pool out"),
            InitError::Systemctl { .. } => {
                ("systemctl_failed", "`systemctl status 'epagent*'` and the journal say more")
            }
            InitError::Listen { .. } => (
                "port_taken",
                "`ss -ltnp` shows whose it is; stop that server, or name other addresses with --listen ([::] takes IPv4 \
                 too)",
            ),
            InitError::NoRunner => ("runner_away", "`journalctl -u epagent-runner` says why"),
            InitError::Silent => ("agent_unreachable", "`journalctl -u 'epagent*'` says why"),
            InitError::Write { .. } | InitError::Toml(_) => ("system_error", ""),
        };
        let mut text = error.to_string();
        if let Some(cause) = std::error::Error::source(&error) {
            text.push_str(&format!(": {cause}"));
        }
        Failure::new(status::FAILED, code, text, hint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drop_in_replaces_what_the_unit_says() {
        let text = drop_in(&["[::]:80".parse().unwrap(), "127.0.0.1:8080".parse().unwrap()]);
        assert!(
            text.ends_with("[Socket]\nListenStream=\nListenStream=[::]:80\nListenStream=127.0.0.1:8080\n"),
            "{text}"
        );
    }

    #[test]
    fn a_pool_must_be_on_a_btrfs() {
        let args = |pool: &str| InitArgs { pool: Some(pool.into()), size: None, listen: Vec::new(), node: 1 };
        for path in ["/proc", "relative", "/no/such/folder"] {
            assert!(matches!(pool(&args(path)), Err(InitError::BadPool { .. })), "{path}");
        }
    }

    #[test]
    fn the_cgroup_of_the_unit_is_the_one_the_holder_expects() {
        let unit = include_str!("../../../../../systemd/epagent-instances.service");
        assert!(unit.contains("Slice=epagent.slice") && unit.contains("Delegate="));
        assert_eq!(Path::new(CGROUP).parent(), Some(Path::new("epagent.slice/epagent-instances.service")));
    }
}
