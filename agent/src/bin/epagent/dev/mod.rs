//! `epagent dev`: a whole node in the foreground, from one state folder.
//!
//! It is what systemd is on an installed host: it binds the sockets, starts the parts as their users, restarts
//! what dies, and at the end takes everything down again. One thread, no async runtime, and nothing of the data
//! path: apps run on while it is dead.
//!
//! ```text
//!   check host ─▶ lock DIR ─▶ await the end of a killed predecessor's parts ─▶ claim a node number
//!     ─▶ folders, sockets, configuration ─▶ start parts ─▶ supervise ──signal──▶ stop parts ─▶ teardown
//!                                             ▲     │
//!                                             └─────┘ one died: restart, later and later while it keeps dying
//! ```
//!
//! | module | |
//! |---|---|
//! | [`checks`] | what must be there before anything is made |
//! | [`layout`], [`node`], [`sockets`] | the state folder, the node's number, and what follows from them |
//! | [`part`], [`spawn`], [`view`], [`sys`] | the programs and how they are started |
//! | [`supervise`], [`restart`], [`probe`], [`logs`] | keeping them alive |
//! | [`keeper`] | what the balancer needs to hand over and to outlive its crashes |
//! | [`ending`], [`leftovers`], [`stale`] | leaving nothing behind, also after `kill -9` |

pub mod checks;
mod ending;
pub mod error;
mod keeper;
mod layout;
mod leftovers;
mod logs;
pub mod node;
mod part;
mod probe;
mod restart;
mod sockets;
mod spawn;
mod stale;
mod supervise;
#[allow(unsafe_code)]
mod sys;
mod view;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::failure::Failure;
use crate::setup::config::{self, Folders, Pool};
use crate::setup::host;
use error::DevError;
use layout::{Layout, Users, VIEW};
use sockets::Sockets;
use supervise::{Node, Supervisor};

#[derive(Debug, clap::Args)]
pub struct DevArgs {
    /// The folder that holds everything; made if it is not there
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// Where the balancer listens; port 0 takes a free one
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:8080")]
    http: SocketAddr,
    /// How large the pool is made, the first time
    #[arg(long, value_name = "SIZE", default_value = "6G")]
    size: String,
}

/// Returns after an orderly end that left nothing behind.
pub fn run(args: &DevArgs) -> Result<(), Failure> {
    checks::host()?;
    let binaries = checks::binaries()?;
    let size_bytes = checks::parse_size(&args.size)?;
    let layout = Layout::open(&args.state)?;
    // Blocked from here on and looked at in the loop: no Ctrl-C in the middle of the preparations.
    let signals = supervise::catch_signals()?;
    let _lock = lock(&layout)?;
    checks::space_for_pool(&layout, size_bytes)?;
    stale::await_end(&layout);
    // A mark that a killed predecessor left says nothing about us.
    let _ = fs::remove_file(layout.path("ready"));
    let claim = node::claim(&layout)?;
    let users = Users::of(claim.node);
    layout.make_folders(users)?;
    view::share_apps(layout.root())
        .map_err(|error| DevError::Folder { path: layout.path(layout::APPS), source: error.source })?;
    let sockets = Sockets::make(&layout, users, args.http)?;
    let env = host::build_env(|name| std::env::var(name).ok());
    for name in &env.left_out {
        say(&format!(
            "{name} is not passed on to builds: its value holds a password that every tenant would see"
        ));
    }
    write_configuration(
        &layout,
        claim.node,
        users,
        &binaries,
        &args.size,
        sockets.http_address(),
        &env.passed,
    )?;
    let node = Node { layout: &layout, node: claim.node, users, binaries: &binaries, sockets: &sockets };
    Supervisor::start(node, signals)?.run()?;
    Ok(())
}

/// Both files, from what this host offers now.
fn write_configuration(
    layout: &Layout,
    node: node::Node,
    users: Users,
    binaries: &Path,
    pool_size: &str,
    http: SocketAddr,
    build_env: &BTreeMap<String, String>,
) -> Result<(), DevError> {
    let files = config::files(&config::Inputs {
        node,
        brain_uid: users.brain,
        balancer_gid: users.balancer,
        admin_gid: 0,
        binaries,
        runner: Folders { state: layout.path("runner"), run: layout.path("run") },
        agent: Folders { state: Path::new(VIEW).join("brain"), run: Path::new(VIEW).join("run") },
        pool: Pool::Loop { mount: layout.pool_mount(), file: layout.pool_file(), size: pool_size.to_owned() },
        cgroup: node.cgroup(),
        http: http.to_string(),
        build_env,
    })
    .map_err(|source| DevError::Toml { source })?;
    for (name, text) in [("etc/runner.toml", files.runner), ("etc/epagentd.toml", files.agent)] {
        let path = layout.path(name);
        let text = format!("# Written by `epagent dev` at each start; changes here are lost.\n{text}");
        config::replace(&path, text.as_bytes(), 0o644).map_err(|source| DevError::Folder { path, source })?;
    }
    Ok(())
}

/// What can be said of this host without starting anything, for `epagent doctor`.
pub fn host_checks() -> impl Iterator<Item = (&'static str, Result<String, Failure>)> {
    checks::HOST.iter().map(|(name, look)| (*name, look().map_err(Failure::from)))
}

/// Keeps a second supervisor from this folder, for as long as the answer lives.
fn lock(layout: &Layout) -> Result<Flock<File>, DevError> {
    let path = layout.path("lock");
    let opened =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
    let mut file = opened.map_err(|source| DevError::Folder { path: path.clone(), source })?;
    let mut holder = String::new();
    let _ = file.read_to_string(&mut holder);
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            // Only for the message of the one who comes second.
            let _ = lock.set_len(0).and_then(|()| std::io::Seek::rewind(&mut *lock));
            let _ = writeln!(*lock, "{}", std::process::id());
            Ok(lock)
        }
        Err(_) => Err(DevError::Locked { path: layout.root().to_owned(), pid: holder.trim().parse().ok() }),
    }
}

/// A line for the operator. The terminal may be gone, which ends nothing.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "epagent dev: {line}");
}
