//! What goes into a bundle, and where it comes from.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use epagent_conf::{Daemon, Setting};
use epagent_store::Schema;
use epagent_wire::api::{App, Check, ErrorRow, Event, Image, Instance, Route, Status, Version, Volume};
use epagent_wire::table;
use nix::sys::statvfs::statvfs;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::AsyncReadExt;
use tokio::process::Command;

use super::bundle::{Bundle, ENTRY_BYTES_MAX};
use super::{cgroups, config};
use crate::args::SOCKET_DEFAULT;
use crate::client::Client;
use crate::failure::Failure;
use crate::verbs::doctor;

/// How long a command may take.
const COMMAND_PATIENCE: Duration = Duration::from_secs(15);
/// Lines of the journal, the newest first.
const JOURNAL_LINES: &str = "5000";
const KERNEL_LINES: &str = "500";
/// What is asked of each unit. Not its environment or its command line, which an operator may have put a secret in.
const UNIT_FACTS: &str = "Id,LoadState,ActiveState,SubState,UnitFileState,Result,NRestarts,MainPID,ExecMainStatus,\
    ExecMainCode,StateChangeTimestamp,ActiveEnterTimestamp,MemoryCurrent,TasksCurrent,CPUUsageNSec,NeedDaemonReload";
/// What the kernel says of itself and of the machine's load.
const KERNEL_FILES: [&str; 17] = [
    "/proc/version",
    "/etc/os-release",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/pressure/cpu",
    "/proc/pressure/io",
    "/proc/pressure/memory",
    "/proc/filesystems",
    "/proc/sys/fs/file-nr",
    "/proc/sys/kernel/pid_max",
    "/proc/sys/kernel/io_uring_disabled",
    "/proc/sys/kernel/unprivileged_userns_clone",
    "/proc/sys/user/max_user_namespaces",
    "/proc/sys/net/ipv4/ip_forward",
    "/proc/sys/net/ipv6/conf/all/forwarding",
    "/proc/sys/net/core/somaxconn",
];

pub async fn gather(bundle: &mut Bundle, client: &Client, etc: &Path) {
    programs(bundle).await;
    let settings = settings(bundle, etc);
    agent(bundle, client).await;
    let found = schema(&settings, etc).await;
    bundle.add_json("store.json", found);
    logs(bundle, client.socket()).await;
    units(bundle).await;
    machine(bundle, &settings).await;
    match setting(&settings, Daemon::Runner, "cgroup.root") {
        Some(root) => bundle.add("cgroups.txt", cgroups::tree(&root).into_bytes()),
        None => bundle.lack("cgroups.txt", "the configuration does not say where they are".to_owned()),
    }
}

async fn programs(bundle: &mut Bundle) {
    let folder = config::programs();
    let mut text = format!("epagent {}\n", env!("CARGO_PKG_VERSION"));
    for (program, word) in
        [("epagentd", "--version"), ("epagent-runner", "version"), ("epagent-balancer", "--version")]
    {
        match command(&folder.join(program), &[word]).await {
            Ok(said) => text.push_str(&String::from_utf8_lossy(&said)),
            Err(why) => bundle.lack(&format!("version of {program}"), why),
        }
    }
    bundle.add("versions.txt", text.into_bytes());
}

type Settings = BTreeMap<&'static str, Vec<Setting>>;

fn settings(bundle: &mut Bundle, etc: &Path) -> Settings {
    let mut all = Settings::new();
    for daemon in Daemon::ALL {
        match config::settings(daemon, etc) {
            Ok(found) => {
                all.insert(daemon.name(), found);
            }
            Err(failure) => bundle.lack(&format!("configuration of {}", daemon.name()), failure.message),
        }
    }
    bundle.add_json("config.json", Ok(&all));
    all
}

/// A text of the configuration.
fn setting(settings: &Settings, daemon: Daemon, key: &str) -> Option<String> {
    let found = settings.get(daemon.name())?.iter().find(|setting| setting.key == key)?;
    Some(found.value.trim_matches('"').to_owned())
}

async fn agent(bundle: &mut Bundle, client: &Client) {
    answer::<Version>(bundle, client, "version", "/v1/version").await;
    answer::<Status>(bundle, client, "status", "/v1/status").await;
    answer::<Vec<App>>(bundle, client, "apps", "/v1/apps").await;
    answer::<Vec<Instance>>(bundle, client, "instances", "/v1/instances").await;
    answer::<Vec<Route>>(bundle, client, "routes", "/v1/routes").await;
    answer::<table::Status>(bundle, client, "balancer", "/v1/balancer").await;
    answer::<Vec<Volume>>(bundle, client, "volumes", "/v1/volumes").await;
    answer::<Vec<Image>>(bundle, client, "images", "/v1/images").await;
    answer::<Vec<Event>>(bundle, client, "events", "/v1/events").await;
    answer::<Vec<ErrorRow>>(bundle, client, "errors", "/v1/errors").await;
    let checks: Vec<Check> = doctor::checks(client).await.0;
    bundle.add_json("doctor.json", Ok(checks));
}

async fn answer<T: DeserializeOwned + Serialize>(
    bundle: &mut Bundle,
    client: &Client,
    name: &str,
    path: &str,
) {
    let found = client.get::<T>(path).await.map_err(|error| Failure::from(error).message);
    bundle.add_json(&format!("agent/{name}.json"), found);
}

#[derive(Serialize)]
struct SchemaFound {
    found: i64,
    known: i64,
}

/// Read from the file itself, which is there when the agent is not.
async fn schema(settings: &Settings, etc: &Path) -> Result<SchemaFound, String> {
    // `epagent dev` shows the agent its state in another place than it is in.
    let configured = setting(settings, Daemon::Agent, "state_dir").map(PathBuf::from);
    let beside = etc.parent().map(|state| state.join("brain"));
    let places = [configured, beside].into_iter().flatten().map(|folder| folder.join("state.db"));
    let path = places.into_iter().find(|path| path.exists()).ok_or("the agent's state was not found")?;
    let failed = |error| format!("reading {}: {error}", path.display());
    let schema = Schema::of(&path).await.map_err(failed)?;
    Ok(SchemaFound { found: schema.found, known: schema.known })
}

/// What the agent's own processes logged: in the journal, or in the files of `epagent dev`.
async fn logs(bundle: &mut Bundle, socket: &Path) {
    if socket == Path::new(SOCKET_DEFAULT) {
        let journal = ["--no-pager", "--reverse", "--output=short-iso-precise"];
        let own = [&journal[..], &["--lines", JOURNAL_LINES, "--unit=epagent*"]].concat();
        said(bundle, "logs/journal.txt", "journalctl", &own).await;
        let kernel = [&journal[..], &["--lines", KERNEL_LINES, "--dmesg"]].concat();
        said(bundle, "logs/kernel.txt", "journalctl", &kernel).await;
        return;
    }
    let folder = socket.parent().unwrap_or(Path::new("/")).join("log");
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) => return bundle.lack("logs", format!("reading {}: {error}", folder.display())),
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match fs::read(&path) {
            Ok(bytes) => {
                let begin = bytes.len().saturating_sub(ENTRY_BYTES_MAX);
                bundle.add(&format!("logs/{name}"), bytes[begin..].to_vec());
            }
            Err(error) => bundle.lack(&format!("logs/{name}"), error.to_string()),
        }
    }
}

async fn units(bundle: &mut Bundle) {
    if !Path::new("/run/systemd/system").is_dir() {
        return bundle.lack("units", "systemd does not run this machine".to_owned());
    }
    let facts = format!("--property={UNIT_FACTS}");
    said(bundle, "units/epagent.txt", "systemctl", &["show", "--no-pager", &facts, "epagent*"]).await;
    said(bundle, "units/failed.txt", "systemctl", &["list-units", "--no-pager", "--failed"]).await;
}

async fn machine(bundle: &mut Bundle, settings: &Settings) {
    let mut text = String::new();
    for path in KERNEL_FILES {
        let found = fs::read_to_string(path).unwrap_or_else(|error| format!("({error})\n"));
        text.push_str(&format!("== {path}\n{found}"));
    }
    bundle.add("kernel.txt", text.into_bytes());
    match fs::read("/proc/self/mountinfo") {
        Ok(bytes) => bundle.add("mounts.txt", bytes),
        Err(error) => bundle.lack("mounts.txt", error.to_string()),
    }
    let pool = ["pool.mount", "pool.path"].iter().find_map(|key| setting(settings, Daemon::Runner, key));
    let places = ["/".to_owned(), "/var/lib/epagent".to_owned()].into_iter().chain(pool);
    let disks: Vec<String> = places.map(|place| disk(Path::new(&place))).collect();
    bundle.add("disks.txt", disks.concat().into_bytes());
    said(bundle, "network/addresses.txt", "ip", &["-brief", "address"]).await;
    said(bundle, "network/routes.txt", "ip", &["route", "show", "table", "all"]).await;
}

fn disk(path: &Path) -> String {
    match statvfs(path) {
        Ok(disk) => {
            let mib = |blocks: u64| (u128::from(blocks) * u128::from(disk.fragment_size())) >> 20;
            let (total, free) = (mib(disk.blocks()), mib(disk.blocks_available()));
            format!(
                "{}: {free} of {total} MiB free, {} inodes free\n",
                path.display(),
                disk.files_available()
            )
        }
        Err(error) => format!("{}: {error}\n", path.display()),
    }
}

/// Adds what a command prints.
async fn said(bundle: &mut Bundle, name: &str, program: &str, words: &[&str]) {
    match command(Path::new(program), words).await {
        Ok(bytes) => bundle.add(name, bytes),
        Err(why) => bundle.lack(name, why),
    }
}

/// What a command prints, up to a bound of bytes and time.
async fn command(program: &Path, words: &[&str]) -> Result<Vec<u8>, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", program.display());
    let mut command = Command::new(program);
    command.args(words).env("LC_ALL", "C.UTF-8").stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::null()).kill_on_drop(true).spawn().map_err(failed)?;
    let Some(out) = child.stdout.take() else { return Err("it has no output".to_owned()) };
    let ran = tokio::time::timeout(COMMAND_PATIENCE, async {
        let mut bytes = Vec::new();
        out.take(ENTRY_BYTES_MAX as u64).read_to_end(&mut bytes).await?;
        match bytes.len() == ENTRY_BYTES_MAX {
            // It has more to say than is taken.
            true => child.kill().await.map(|()| (bytes, true)),
            false => child.wait().await.map(|ended| (bytes, ended.success())),
        }
    });
    match ran.await {
        Ok(Ok((bytes, true))) => Ok(bytes),
        Ok(Ok((_, false))) => Err(format!("{} failed", program.display())),
        Ok(Err(error)) => Err(failed(error)),
        Err(_) => Err(format!("{} took longer than {} s", program.display(), COMMAND_PATIENCE.as_secs())),
    }
}
