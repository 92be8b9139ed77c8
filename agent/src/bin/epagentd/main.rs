//! epagentd, the brain: decides, and does nothing that needs a privilege.
//!
//! ```text
//!  admin.sock, read.sock ─▶ api ─┬─▶ store (SQLite)
//!                                └─▶ apps: one loop per app ─▶ runner (the link to the hands)
//!                                       ▲        └─▶ routing ─▶ balancer (the link to the front)
//!                         world, checks ┘
//! ```
//!
//! Everything here may be killed at any time. Nothing that runs or serves depends on it, and it finds its way back
//! from the store and from what the runner has.

#![forbid(unsafe_code)]

mod api;
mod apps;
mod balancer;
mod clock;
mod config;
mod forward;
mod health;
mod images;
mod logs;
mod routing;
mod runner;
mod supervise;
mod table;
mod uploads;
mod waking;
mod world;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use epagent::activation::{ActivationError, Inherited};
use epagent_conf::ConfError;
use epagent_log::Recent;
use epagent_store::{KeyFile, Store, StoreError};
use epagent_wire::runner::Event;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Mutex, broadcast, mpsc};

use crate::apps::{Apps, Held, Parts};
use crate::balancer::Balancer;
use crate::config::Config;
use crate::forward::Forwarder;
use crate::health::Checks;
use crate::routing::Routing;
use crate::supervise::{Board, chain, keep_running};
use crate::waking::Waking;

/// Health changes that wait for their app's loop to be woken.
const CHANGES_QUEUED_MAX: usize = 1024;

/// The deciding daemon of epagent. It is started by systemd or by `epagent dev`.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[arg(long, value_name = "FILE", default_value = "/etc/epagent/epagentd.toml")]
    config: PathBuf,
    /// Print the configuration in force as JSON, and end
    #[arg(long)]
    show_config: bool,
}

#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(transparent)]
    Config(#[from] ConfError),
    #[error("showing the configuration")]
    Show(#[source] std::io::Error),
    #[error(transparent)]
    Sockets(#[from] ActivationError),
    #[error("opening the agent's state")]
    Store(#[from] StoreError),
    #[error("{attempted}")]
    Io {
        attempted: &'static str,
        #[source]
        source: std::io::Error,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let recent = epagent_log::start("epagentd");
    supervise::keep_backtraces();
    let done = if arguments.show_config { show_config(&arguments) } else { start(arguments, recent) };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn show_config(arguments: &Arguments) -> Result<(), StartError> {
    let loaded = Config::read(&arguments.config)?;
    let settings = loaded.settings().map_err(|error| StartError::Show(std::io::Error::other(error)))?;
    serde_json::to_writer(std::io::stdout(), &settings).map_err(|error| StartError::Show(error.into()))
}

fn start(arguments: Arguments, recent: Recent) -> Result<(), StartError> {
    let config = Config::read(&arguments.config)?.config;
    let mut inherited = Inherited::from_env()?;
    let admin = inherited.take_unix("admin")?;
    let read = inherited.take_unix("read")?;
    let failed = |attempted| move |source| StartError::Io { attempted, source };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(failed("starting the runtime"))?;
    runtime.block_on(async {
        let apps = assemble(config, recent).await?;
        let admin = api::listener(admin).map_err(failed("listening on the admin socket"))?;
        let read = api::listener(read).map_err(failed("listening on the read socket"))?;
        let (parts, board) = (apps.parts().clone(), apps.parts().board.clone());
        let apps_of_read = apps.clone();
        tokio::spawn(keep_running("api-admin", parts.store.clone(), board.clone(), move || {
            api::serve(admin.clone(), apps.clone(), api::Access::Admin)
        }));
        tokio::spawn(keep_running("api-read", parts.store.clone(), board, move || {
            api::serve(read.clone(), apps_of_read.clone(), api::Access::Read)
        }));
        // Nobody may listen: then nobody waits for it either.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        if let Some(interval) = sd_notify::watchdog_enabled() {
            tokio::spawn(supervise::show_alive(parts.store.clone(), parts.worlds.clone(), interval / 3));
        }
        let mut terminate = signal(SignalKind::terminate()).map_err(failed("watching for SIGTERM"))?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed("watching for SIGINT"))?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        // The loops end with the runtime, wherever they wait. The store is not closed before: a loop that still turns
        // would take that for trouble, and what is committed is as safe as after a kill.
        Ok(())
    })
}

/// The name of the key among the credentials: `ID_FILE` of a folder, systemd.exec(5).
const KEY_CREDENTIAL: &str = "epagent_key";

/// The key that seals secrets: systemd's to hand over where `epagent init` made it, else one of our own.
fn key_file(config: &Config) -> KeyFile {
    let given =
        std::env::var_os("CREDENTIALS_DIRECTORY").map(|folder| Path::new(&folder).join(KEY_CREDENTIAL));
    match given.filter(|path| path.exists()) {
        Some(path) => KeyFile::Given(path),
        None => KeyFile::Own(config.state_dir.join("key")),
    }
}

/// Opens the state, links to runner and balancer, and starts every loop.
async fn assemble(config: Config, recent: Recent) -> Result<Apps, StartError> {
    let config = Arc::new(config);
    let store = Store::open(&config.state_dir.join("state.db"), &key_file(&config)).await?;
    let unfinished: Vec<_> = store.deploys_unfinished().await?.into_iter().map(|deploy| deploy.id).collect();
    uploads::sweep(&config, &unfinished)
        .map_err(|source| StartError::Io { attempted: "clearing old uploads", source })?;
    let known: BTreeSet<_> = store.apps().await?.into_iter().map(|app| app.app).collect();

    let board = Board::default();
    let (runner, link) = runner::link(&config.run_dir.join("runner.sock"));
    let (worlds, watcher) = world::watcher(runner.clone());
    let (changed, mut changes) = mpsc::channel(CHANGES_QUEUED_MAX);
    let checks = Checks::new(runner.clone(), changed);
    let balancer = Balancer::new(&config.run_dir.join("balancer.sock"));
    let waking = Waking::new(balancer.clone());
    let routing = Routing::new(balancer, known.clone(), &store).await?;
    let parts = Parts {
        config,
        store: store.clone(),
        runner: runner.clone(),
        worlds,
        checks,
        routing: routing.clone(),
        waking: waking.clone(),
        board: board.clone(),
        held: Held::default(),
        begins: Arc::default(),
    };
    let apps = Apps::new(parts.clone());

    let link = Arc::new(Mutex::new(link));
    spawn("runner-link", &parts, move || {
        let link = link.clone();
        async move { link.lock().await.run().await }
    });
    let watcher = Arc::new(Mutex::new(watcher));
    spawn("world", &parts, move || {
        let watcher = watcher.clone();
        async move { watcher.lock().await.run().await }
    });
    let stored = store.clone();
    spawn("routing", &parts, move || {
        let (routing, store) = (routing.clone(), stored.clone());
        async move { routing.run(store).await }
    });
    let woken = apps.clone();
    spawn("waking", &parts, move || {
        let (waking, apps) = (waking.clone(), woken.clone());
        async move { waking.keep_asking(apps).await }
    });
    if let Some(forwarder) = Forwarder::new(&parts, recent, &parts.config.log) {
        let forwarder = Arc::new(Mutex::new(forwarder));
        spawn(forward::NAME, &parts, move || {
            let forwarder = forwarder.clone();
            async move { forwarder.lock().await.run().await }
        });
    }
    let image_parts = parts.clone();
    spawn("images", &parts, move || images::keep_clean(image_parts.clone()));
    let woken = apps.clone();
    tokio::spawn(async move {
        while let Some(app) = changes.recv().await {
            woken.wake(&app);
        }
    });
    let woken = apps.clone();
    tokio::spawn(async move {
        let mut events = runner.events();
        loop {
            match events.recv().await {
                Ok(Event::Exited { jail, .. }) => {
                    if let Some(app) = jail.app()
                        && matches!(woken.parts().store.app(&app).await, Ok(Some(_)))
                    {
                        woken.wake(&app);
                    }
                }
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    });
    for app in &known {
        apps.wake(app);
    }
    Ok(apps)
}

fn spawn<F, E>(name: &'static str, parts: &Parts, body: impl FnMut() -> F + Send + 'static)
where
    F: Future<Output = Result<(), E>> + Send + 'static,
    E: std::error::Error + 'static,
{
    let (store, board) = (parts.store.clone(), parts.board.clone());
    tokio::spawn(async move { keep_running(name, store, board, body).await });
}
