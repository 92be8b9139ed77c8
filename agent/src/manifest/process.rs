//! `[process.NAME]`: the command, how many, how it is stopped, checked and limited.

use epagent_core::spec::{
    Check, HealthSpec, INSTANCES_MAX, Limits, Listen, ProcessSpec, SleepSpec, StopSpec, Strategy,
};

use super::ManifestError;
use super::document::command;
use super::error::{nearest, quoted};
use super::table::{Item, Table, list};

/// Processes of one app.
pub(super) const PROCESSES_MAX: usize = 32;

const SIGNALS: [&str; 6] = ["TERM", "INT", "QUIT", "HUP", "USR1", "USR2"];
const GRACE_MS_MAX: u64 = 600_000;
const CHECK_MS_MIN: u64 = 100;
const CHECK_MS_MAX: u64 = 600_000;
const CHECKS_MAX: u32 = 100;
const DEADLINE_MS_MIN: u64 = 1_000;
const DEADLINE_MS_MAX: u64 = 3_600_000;
const IDLE_MS_MIN: u64 = 1_000;
const IDLE_MS_MAX: u64 = 86_400_000;
const HTTP_PATH_BYTES_MAX: usize = 1024;
const MEMORY_BYTES_MIN: u64 = 4 << 20;
const CPU_PERCENT_MAX: u32 = 6_400;
/// Our init, the shell and the app, and one to spare.
const PIDS_MIN: u32 = 4;
const PIDS_MAX: u32 = 16_384;
const NOFILE_MIN: u32 = 64;
const NOFILE_MAX: u32 = 262_144;
const DISK_BYTES_MIN: u64 = 1 << 20;
/// Slower, and starting takes longer than anybody waits.
const IO_BYTES_PER_S_MIN: u64 = 1 << 20;
/// Memory, disk and quotas: far past any machine, so that sums stay far from overflow.
pub(super) const SIZE_BYTES_MAX: u64 = 1 << 50;

pub(super) fn process(
    table: &Table<'_>,
    is_routed: bool,
    default_strategy: Strategy,
) -> Result<ProcessSpec, ManifestError> {
    table.only(&["command", "instances", "listen", "deploy", "stop", "health", "limits"])?;
    let (instances, sleep) =
        table.get("instances").map_or(Ok((1, None)), |item| instances(&item, is_routed))?;
    Ok(ProcessSpec {
        command: command(&table.require("command", "command = \"…\"")?)?,
        instances,
        sleep,
        listen: table.get("listen").map_or(Ok(Listen::Tcp), |item| listen(&item, is_routed))?,
        deploy: table.get("deploy").map_or(Ok(default_strategy), |item| strategy(&item))?,
        stop: table.get("stop").map_or(Ok(StopSpec::default()), |item| stop(&item.table()?))?,
        health: health(table.get("health").map(|item| item.table()).transpose()?.as_ref(), is_routed)?,
        limits: table.get("limits").map_or(Ok(Limits::default()), |item| limits(&item.table()?))?,
    })
}

/// A number; or `{ min = 0 }`, with which the process sleeps while nobody asks for it and has `max` instances, 1 unless
/// it says otherwise, while somebody does.
fn instances(item: &Item<'_>, is_routed: bool) -> Result<(u32, Option<SleepSpec>), ManifestError> {
    let Ok(table) = item.table() else { return Ok((item.integer(0..=INSTANCES_MAX)?, None)) };
    table.only(&["min", "max", "idle_after"])?;
    let min = table.require("min", "min = 0")?;
    if min.integer(0..=INSTANCES_MAX)? > 0 {
        let error = min.error("`min` can only be 0: a process is there, or it sleeps");
        return Err(error.with_help("write a fixed number as `instances = 2`"));
    }
    if !is_routed {
        let error = item.error("no route leads to this process, so that nothing would ever wake it");
        return Err(error.with_help("add a `[[route]]` to it, or write a fixed number"));
    }
    let max = table.get("max").map_or(Ok(1), |max| max.integer(1..=INSTANCES_MAX))?;
    let mut sleep = SleepSpec::default();
    if let Some(item) = table.get("idle_after") {
        sleep.idle_after_ms = item.duration_ms(IDLE_MS_MIN..=IDLE_MS_MAX)?;
    }
    Ok((max, Some(sleep)))
}

fn listen(item: &Item<'_>, is_routed: bool) -> Result<Listen, ManifestError> {
    match item.string()? {
        "tcp" => Ok(Listen::Tcp),
        "unix" if is_routed => Ok(Listen::Unix),
        "unix" => {
            let error =
                item.error("no route leads to this process, so that nobody would connect to its socket");
            Err(error.with_help("add a `[[route]]` to it, or leave `listen` out"))
        }
        other => Err(one_of(item, other, &["tcp", "unix"])),
    }
}

fn strategy(item: &Item<'_>) -> Result<Strategy, ManifestError> {
    match item.string()? {
        "overlap" => Ok(Strategy::Overlap),
        "replace" => Ok(Strategy::Replace),
        other => Err(one_of(item, other, &["overlap", "replace"])),
    }
}

fn one_of(item: &Item<'_>, found: &str, known: &[&str]) -> ManifestError {
    let error = item.error(format!("`{}` can't be {}", item.path, quoted(found)));
    match nearest(found, known.iter().copied()) {
        Some(meant) => error.with_help(format!("did you mean `{meant}`?")),
        None => error.with_help(format!("it may be {}", list(known).replace(" and ", " or "))),
    }
}

fn stop(table: &Table<'_>) -> Result<StopSpec, ManifestError> {
    table.only(&["signal", "grace"])?;
    let mut stop = StopSpec::default();
    if let Some(item) = table.get("signal") {
        stop.signal = signal(&item)?;
    }
    if let Some(item) = table.get("grace") {
        stop.grace_ms = item.duration_ms(0..=GRACE_MS_MAX)?;
    }
    Ok(stop)
}

/// A signal that asks; KILL comes by itself when the grace is over.
fn signal(item: &Item<'_>) -> Result<String, ManifestError> {
    let found = item.string()?;
    if SIGNALS.contains(&found) {
        return Ok(found.to_owned());
    }
    let upper = found.to_ascii_uppercase();
    let bare = upper.strip_prefix("SIG").unwrap_or(&upper);
    if bare == "KILL" {
        let error = item.error("`KILL` can't be the signal that asks the app to stop");
        return Err(
            error.with_help("it is sent by itself when `grace` is over; `grace = \"0s\"` sends it at once")
        );
    }
    match SIGNALS.iter().find(|&&known| known == bare) {
        Some(known) => {
            let error = item.error(format!("{} is not how a signal is written", quoted(found)));
            Err(error.with_help(format!("write `{known}`")))
        }
        None => Err(one_of(item, found, &SIGNALS)),
    }
}

fn health(table: Option<&Table<'_>>, is_routed: bool) -> Result<HealthSpec, ManifestError> {
    let default = if is_routed { Check::Tcp } else { Check::Running };
    let Some(table) = table else { return Ok(HealthSpec::new(default)) };
    table.only(&["http", "tcp", "exec", "interval", "timeout", "rise", "fall", "deadline"])?;
    let mut health = HealthSpec::new(check(table)?.unwrap_or(default));
    if let Some(item) = table.get("interval") {
        health.interval_ms = item.duration_ms(CHECK_MS_MIN..=CHECK_MS_MAX)?;
    }
    if let Some(item) = table.get("timeout") {
        health.timeout_ms = item.duration_ms(CHECK_MS_MIN..=CHECK_MS_MAX)?;
    }
    if let Some(item) = table.get("rise") {
        health.rise = item.integer(1..=CHECKS_MAX)?;
    }
    if let Some(item) = table.get("fall") {
        health.fall = item.integer(1..=CHECKS_MAX)?;
    }
    if let Some(item) = table.get("deadline") {
        health.deadline_ms = item.duration_ms(DEADLINE_MS_MIN..=DEADLINE_MS_MAX)?;
    }
    Ok(health)
}

/// The one check that is named, if one is.
fn check(table: &Table<'_>) -> Result<Option<Check>, ManifestError> {
    let mut named: Vec<Item<'_>> = ["http", "tcp", "exec"].iter().filter_map(|key| table.get(key)).collect();
    named.sort_by_key(|item| item.key_span.start);
    if let [first, second, ..] = &named[..] {
        let error =
            second.error_at_key(format!("both `{}` and `{}` say how to check", first.key, second.key));
        return Err(error.with_help("keep one of them"));
    }
    let Some(item) = named.first() else { return Ok(None) };
    Ok(Some(match item.key {
        "http" => Check::Http(http_path(item)?),
        "tcp" => {
            item.only_true()?;
            Check::Tcp
        }
        _ => Check::Exec(command(item)?),
    }))
}

/// The target of a request line: RFC 9112 §3.2.1, origin form.
fn http_path(item: &Item<'_>) -> Result<String, ManifestError> {
    let path = item.string()?;
    let error = if !path.starts_with('/') {
        item.error(format!("{} is not a path: it must begin with `/`", quoted(path)))
    } else if !path.bytes().all(|b| b.is_ascii_graphic() && b != b'#') {
        item.error("a request can't be made for this path")
            .with_help("write blanks and letters past ASCII as %XX")
    } else if path.len() > HTTP_PATH_BYTES_MAX {
        item.error(format!("the path has {} bytes; the most is {HTTP_PATH_BYTES_MAX}", path.len()))
    } else {
        return Ok(path.to_owned());
    };
    Err(error)
}

fn limits(table: &Table<'_>) -> Result<Limits, ManifestError> {
    table.only(&["memory", "cpu", "pids", "nofile", "disk", "io"])?;
    let mut limits = Limits::default();
    if let Some(item) = table.get("memory") {
        limits.memory_bytes = item.size_bytes(MEMORY_BYTES_MIN..=SIZE_BYTES_MAX)?;
    }
    if let Some(item) = table.get("cpu") {
        limits.cpu_percent = item.percent(1..=CPU_PERCENT_MAX)?;
    }
    if let Some(item) = table.get("pids") {
        limits.pids = item.integer(PIDS_MIN..=PIDS_MAX)?;
    }
    if let Some(item) = table.get("nofile") {
        limits.nofile = item.integer(NOFILE_MIN..=NOFILE_MAX)?;
    }
    if let Some(item) = table.get("disk") {
        limits.disk_bytes = item.size_bytes(DISK_BYTES_MIN..=SIZE_BYTES_MAX)?;
    }
    if let Some(item) = table.get("io") {
        limits.io_bytes_per_s = item.rate(IO_BYTES_PER_S_MIN..=SIZE_BYTES_MAX)?;
    }
    Ok(limits)
}
