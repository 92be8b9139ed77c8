//! `epagent-runner`: the privileged hands.
//!
//! The one process of epagent that is root, and for that reason small: one thread, one loop, a closed list of
//! requests ([`epagent_wire::runner`]), no async runtime, no network client, no SQL. It decides nothing and believes nothing:
//! what `epagentd` asks for is held against tables of its own, and what it may not choose, the runner chooses.
//!
//! | module | what lives there |
//! |---|---|
//! | [`config`] | `runner.toml`, the operator's word |
//! | [`tables`], [`disk`], [`effects`] | what exists, in memory and durably; what work does to it |
//! | [`requests`] | the pure check: a request, the tables → a plan or a refusal |
//! | [`start`], [`jobs`], [`order`] | what a jail shall be, as data |
//! | [`work`], [`worker`] | what is done on disk, and the forked children that do it |
//! | [`server`], [`connections`], [`peers`], [`packet`] | the loop and its connections |
//! | [`acts`], [`launch`], [`watch`], [`observe`] | carrying plans out, starting and following monitors, telling the world |
//! | [`app_sockets`] | the folders in which apps listen on unix sockets |
//! | [`recover`], [`skeleton`] | before the loop |
//! | [`teardown`], [`probe`], [`hold`] | the other verbs |
//! | [`in_force`] | the configuration by which a teardown goes |
//! | [`sys`] | the door to what the compiler can't check |
//!
//! It may be killed at any moment. Jails outlive it under their monitors; the next runner reads the records,
//! finishes or undoes what was begun and connects to the monitors again.

#![deny(unsafe_code)]

use std::path::Path;
use std::process::ExitCode;

mod activation;
mod acts;
mod app_sockets;
mod config;
mod connections;
mod disk;
mod effects;
mod hold;
mod in_force;
mod jobs;
mod launch;
mod observe;
mod order;
mod packet;
mod peers;
mod probe;
mod recover;
mod requests;
mod server;
mod skeleton;
mod start;
mod sys;
mod tables;
mod teardown;
mod watch;
mod work;
mod worker;

use config::Config;
use epagent_log::Recent;

const NAME: &str = "epagent-runner";

const USAGE: &str = "usage: epagent-runner run|check|config|hold --config FILE
       epagent-runner teardown --config FILE [--grace-ms N | --in-force RUN-DIR]";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    // What the service manager starts logs; the rest talks to whoever started it.
    let recent =
        matches!(words.first(), Some(&("run" | "hold" | "teardown"))).then(|| epagent_log::start(NAME));
    let is_logging = recent.is_some();
    let done = match words.as_slice() {
        ["run", "--config", file] => run(Path::new(file), recent.unwrap_or_else(Recent::new)),
        ["check", "--config", file] => check(Path::new(file)),
        ["config", "--config", file] => show(Path::new(file)),
        ["hold", "--config", file] => read(Path::new(file)).and_then(|config| hold::hold(&config)),
        ["teardown", "--config", file] => teardown(Path::new(file), teardown::GRACE_MS),
        ["teardown", "--config", file, "--in-force", run_dir] => {
            let copy = in_force::file(Path::new(run_dir));
            let file = if read(&copy).is_ok() { copy.as_path() } else { Path::new(file) };
            teardown(file, teardown::GRACE_MS).inspect(|()| in_force::forget(Path::new(run_dir)))
        }
        ["teardown", "--config", file, "--grace-ms", grace] => match grace.parse() {
            Ok(grace_ms) => teardown(Path::new(file), grace_ms),
            Err(_) => Err(format!("--grace-ms {grace:?} is not a number\n{USAGE}")),
        },
        ["version"] => {
            println!("epagent-runner {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) if is_logging => {
            tracing::error!("{why}");
            ExitCode::FAILURE
        }
        Err(why) => {
            eprintln!("{NAME}: {why}");
            ExitCode::FAILURE
        }
    }
}

fn run(file: &Path, recent: Recent) -> Result<(), String> {
    // First of all, since the descriptors are known by their numbers.
    let listener = activation::listener("runner")?;
    let config = read(file)?;
    probe::refuse_without_root()?;
    let parts = recover::recover(config, listener).map_err(|error| work::chain(&error))?;
    let run_dir = &parts.config.run_dir;
    if let Err(error) = in_force::keep(file, run_dir) {
        // Then a teardown goes by the file itself.
        tracing::warn!("keep the configuration in {}: {error}", run_dir.display());
    }
    tracing::info!("serving node {}, which has {} jails", parts.config.node, parts.tables.jails.len());
    let mut server =
        server::Server::new(parts, recent).map_err(|error| format!("set up the loop: {error}"))?;
    server.reattach();
    // Nobody may listen: then nobody waits for it either.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    match server.serve() {
        Ok(never) => match never {},
        Err(error) => Err(format!("wait for events: {error}")),
    }
}

fn check(file: &Path) -> Result<(), String> {
    let config = read(file)?;
    probe::report(&config)
}

/// What is in force, as JSON: `epagent debug config` shows it.
fn show(file: &Path) -> Result<(), String> {
    let loaded = Config::read(file).map_err(|error| work::chain(&error))?;
    let settings = loaded.settings().map_err(|error| format!("show the configuration: {error}"))?;
    println!("{}", serde_json::to_string(&settings).map_err(|error| error.to_string())?);
    Ok(())
}

fn teardown(file: &Path, grace_ms: u64) -> Result<(), String> {
    let config = read(file)?;
    probe::refuse_without_root()?;
    teardown::teardown(&config, grace_ms)
}

fn read(file: &Path) -> Result<Config, String> {
    Config::read(file).map(|loaded| loaded.config).map_err(|error| work::chain(&error))
}

/// Milliseconds since the epoch.
fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// Random bits for names. Names have to differ, not to be secret: the clock would do, were it not for restarts.
fn draw() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}
