//! Commands of an operator in an app: beside an instance, or in a new jail of their own.

use std::time::Duration;

use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use epagent_core::exit::Exit;
use epagent_core::name::JailId;
use epagent_core::spec::Limits;
use epagent_wire::api::{self, EXEC_PROTOCOL};
use epagent_wire::runner::{Command, JailState, Request as Order, TerminalSize};
use hyper_util::rt::TokioIo;

use super::apps::{find, nothing_deployed, serving};
use super::failure::{Failure, Result};
use super::instances;
use super::session::Session;
use crate::apps::{Apps, HeldGuard, Job, Parts, environment, start_jail};
use crate::clock;

/// The body of an exec request.
const BODY_BYTES_MAX: usize = 256 << 10;
/// How long `run` waits for its jail.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a `run` may last.
const RUN_MS_MAX: u64 = 24 * 60 * 60_000;
/// What keeps a `run`'s jail alive beside the user's command.
const KEEPER: &str = "while :; do sleep 3600; done";

pub async fn exec(State(apps): State<Apps>, Path(app): Path<String>, request: Request) -> Result<Response> {
    let parts = apps.parts().clone();
    let app = find(&parts, &app).await?.app;
    let (upgrade, query) = take(request).await?;
    let live = instances::of(&parts, Some(&app)).await?;
    let runs =
        |instance: &&api::Instance| ["checking", "healthy", "unhealthy"].contains(&instance.state.as_str());
    let wanted = |instance: &&api::Instance| {
        query.instance.as_ref().is_none_or(|id| instance.id == *id)
            && query.process.as_ref().is_none_or(|process| instance.process == *process)
    };
    let mut found: Vec<_> = live.iter().filter(runs).filter(wanted).collect();
    found.sort_by_key(|instance| (instance.state != "healthy", instance.process != "web", instance.index));
    let Some(instance) = found.first() else {
        let message = match (&query.instance, &query.process) {
            (Some(id), _) => format!("{app} has no running instance {id}"),
            (None, Some(process)) => format!("{app} has no running instance of {process}"),
            (None, None) => format!("{app} has no running instance"),
        };
        return Err(Failure::not_found(
            message,
            "`epagent ps` lists them; `epagent run` starts a jail of its own",
        ));
    };
    let jail: JailId = instance.id.parse()?;
    let session = begin(&parts, &jail, query).await?;
    tokio::spawn(async move {
        if let Ok(client) = upgrade.await {
            session.carry(TokioIo::new(client)).await;
        }
    });
    switching()
}

pub async fn run(State(apps): State<Apps>, Path(app): Path<String>, request: Request) -> Result<Response> {
    let parts = apps.parts().clone();
    let app = find(&parts, &app).await?.app;
    let release = serving(&parts, &app).await?.ok_or_else(|| nothing_deployed(&app))?;
    let (upgrade, query) = take(request).await?;
    let jail = JailId::new(&app, clock::random_u64());
    let held = parts.held.hold(jail.clone());
    let env = environment(&release);
    let keeper = Command::Shell(KEEPER.to_owned());
    let job =
        Job { command: keeper, env, limits: Limits::default(), socket: false, deadline_ms: Some(RUN_MS_MAX) };
    let started = start_jail(&parts, &jail, &release, job).await;
    if let Err(error) = started {
        let message = crate::supervise::chain(&error);
        return Err(Failure::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "start_failed",
            message,
            "see `epagent errors`",
        ));
    }
    let session = match until_running(&parts, &jail).await {
        Ok(()) => begin(&parts, &jail, query).await,
        Err(failure) => Err(failure),
    };
    let session = match session {
        Ok(session) => session,
        Err(failure) => {
            tokio::spawn(end_run(parts, jail, held));
            return Err(failure);
        }
    };
    tokio::spawn(async move {
        if let Ok(client) = upgrade.await {
            session.carry(TokioIo::new(client)).await;
        }
        end_run(parts, jail, held).await;
    });
    switching()
}

async fn until_running(parts: &Parts, jail: &JailId) -> Result<()> {
    let deadline = tokio::time::Instant::now() + START_TIMEOUT;
    let failed = |exit: &Exit| {
        let message = format!("the jail for the command {exit}");
        Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "start_failed", message, "see the release's image")
    };
    while tokio::time::Instant::now() < deadline {
        if let Some(world) = parts.worlds.fresh().await {
            match world.jails.iter().find(|found| found.id == *jail).map(|found| &found.state) {
                Some(JailState::Running) => return Ok(()),
                Some(JailState::Exited(exit)) => return Err(failed(exit)),
                _ => {}
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Err(failed(&Exit { past_deadline: true, ..Exit::default() }))
}

/// Removes the jail of a run. What this can't do any more, the app's sweep does.
async fn end_run(parts: Parts, jail: JailId, held: HeldGuard) {
    let kill = Order::Stop { jail: jail.clone(), signal: "KILL".to_owned(), grace_ms: 0 };
    let _ = parts.runner.call(kill).await;
    drop(held);
}

async fn begin(parts: &Parts, jail: &JailId, query: api::Exec) -> Result<Session> {
    let terminal = query.terminal.map(|(rows, columns)| TerminalSize { rows, columns });
    Ok(Session::start(&parts.runner, jail, query.argv, query.env, terminal).await?)
}

/// The connection to come, and what is asked for.
async fn take(mut request: Request) -> Result<(hyper::upgrade::OnUpgrade, api::Exec)> {
    check_upgrade(request.headers())?;
    let upgrade = hyper::upgrade::on(&mut request);
    let body = axum::body::to_bytes(request.into_body(), BODY_BYTES_MAX).await;
    let body = body.map_err(|error| Failure::bad_request(format!("reading the request: {error}")))?;
    let query: api::Exec = serde_json::from_slice(&body)
        .map_err(|error| Failure::bad_request(format!("the request is not valid: {error}")))?;
    if query.argv.is_empty() {
        return Err(Failure::bad_request("no command was given"));
    }
    Ok((upgrade, query))
}

fn check_upgrade(headers: &HeaderMap) -> Result<()> {
    if headers.get(header::UPGRADE).is_some_and(|value| value == EXEC_PROTOCOL) {
        return Ok(());
    }
    let message = format!("this request wants to be upgraded to {EXEC_PROTOCOL}");
    Err(Failure::new(StatusCode::UPGRADE_REQUIRED, "upgrade_required", message, "use `epagent exec`"))
}

fn switching() -> Result<Response> {
    let built = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, EXEC_PROTOCOL)
        .body(axum::body::Body::empty());
    built.map_err(|error| Failure::bad_request(error.to_string()))
}
