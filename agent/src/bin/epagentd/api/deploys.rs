//! Deploys: announced with a manifest, fed with an archive, watched until they are over.

use std::collections::HashSet;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use epagent::manifest::{self, Overrides};
use epagent_core::name::{AppName, DeployId, ImageName, JailId};
use epagent_core::phase::Phase;
use epagent_core::spec::{AppSpec, RouteMatch};
use epagent_store::{Deploy, DeployKind, DeployStep, NewDeploy, StoreError, Target, Wanted};
use epagent_wire::api::{self, DeployUpdate, Manifest};
use epagent_wire::runner::Request;
use epagent_wire::table::Match;
use futures_util::StreamExt;
use serde::Deserialize;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;

use super::failure::{Failure, Result};
use super::lines;
use crate::apps::{Apps, Parts, Progress, missing_secrets};
use crate::clock;
use crate::logs::{self, Follower};
use crate::uploads::Incoming;

/// How often a watched deploy is looked at.
const WATCH_INTERVAL: Duration = Duration::from_millis(100);
/// Updates a slow watcher may be behind.
const UPDATES_QUEUED_MAX: usize = 64;
/// Lines of a job that a watcher who comes late is shown.
const OUTPUT_LINES_MAX: usize = 1_000;
/// Deploys of one answer.
const LISTED_MAX: u32 = 100;

pub async fn begin(
    State(apps): State<Apps>,
    Json(new): Json<api::NewDeploy>,
) -> Result<(StatusCode, Json<api::Deploy>)> {
    let parts = apps.parts();
    let spec = parse(parts, &new)?;
    check(parts, &spec).await?;
    let begun = NewDeploy {
        app: spec.app.clone(),
        kind: DeployKind::Deploy,
        target: Target::Build(Box::new(spec.clone())),
        progress: serde_json::Value::Null,
        note: "waiting for the archive".to_owned(),
    };
    let deploy = begin_deploy(&apps, begun).await?;
    Ok((StatusCode::ACCEPTED, Json(shown(parts, deploy).await?)))
}

/// Begins a deploy of an app that is wanted to run from now on, and wakes the app's loop.
pub async fn begin_deploy(apps: &Apps, new: NewDeploy) -> Result<Deploy> {
    let store = &apps.parts().store;
    let app = new.app.clone();
    let deploy = store.deploy_begin(new, clock::now_ms()).await.map_err(of_begin)?;
    store.app_want(&app, Wanted::Running, clock::now_ms()).await?;
    apps.wake(&app);
    Ok(deploy)
}

fn of_begin(error: StoreError) -> Failure {
    let message = error.to_string();
    match error {
        StoreError::DeployUnderWay { deploy, .. } => {
            let hint =
                format!("watch it with `epagent deploy --watch {}`, or wait until it is over", deploy.0);
            Failure::conflict("deploy_under_way", message, hint)
        }
        StoreError::NoApp(app) => Failure::no_app(app.as_str()),
        StoreError::AppRemoved(_) => Failure::conflict("app_removed", message, "wait until it is gone"),
        StoreError::NothingServes(_) | StoreError::NoRelease { .. } => {
            Failure::conflict("no_release", message, "`epagent releases APP` lists what can be deployed")
        }
        error => error.into(),
    }
}

fn parse(parts: &Parts, new: &api::NewDeploy) -> Result<AppSpec> {
    let app = new.app.as_deref().map(str::parse::<AppName>).transpose()?;
    let image = new.image.as_deref().map(str::parse::<ImageName>).transpose()?;
    let parsed = match &new.manifest {
        Manifest::Toml { text } => manifest::parse_toml("epagent.toml", text, &Overrides { app, image }),
        Manifest::Procfile { text, files } => {
            let hint = "name the app: `epagent deploy DIR --app NAME`";
            let app = app.ok_or_else(|| {
                Failure::new(
                    StatusCode::BAD_REQUEST,
                    "bad_manifest",
                    "a Procfile does not name the app",
                    hint,
                )
            })?;
            let image = image.unwrap_or_else(|| parts.config.default_image.clone());
            manifest::parse_procfile("Procfile", text, app, image, files)
        }
    };
    parsed.map_err(|error| {
        let hint = "nothing was changed";
        Failure::new(StatusCode::BAD_REQUEST, "bad_manifest", error.to_string(), hint)
    })
}

/// What can be known to fail before anything is changed.
async fn check(parts: &Parts, spec: &AppSpec) -> Result<()> {
    let missing = missing_secrets(parts, spec).await?;
    if !missing.is_empty() {
        let names = missing.join(", ");
        let hint = format!("set it first: `epagent secrets set {} {}`", spec.app, missing[0]);
        return Err(Failure::conflict(
            "missing_secret",
            format!("the manifest asks for secrets that are not set: {names}"),
            hint,
        ));
    }
    for route in &spec.routes {
        let matches = match &route.matches {
            RouteMatch::Host(host) => Match::Host(host.clone()),
            RouteMatch::Port(port) => Match::Port(*port),
        };
        if let Some(owner) = parts.routing.owner_besides(&spec.app, &matches) {
            let what = match matches {
                Match::Host(host) => format!("the host {host}"),
                Match::Port(port) => format!("the port {port}"),
            };
            let hint = "choose another, or remove that app's route first";
            return Err(Failure::conflict("route_taken", format!("{what} belongs to the app {owner}"), hint));
        }
    }
    let world = parts.worlds.fresh().await.ok_or(crate::runner::CallError::Away)?;
    if spec.image.as_str() != "host" && !world.images.iter().any(|image| image.name == spec.image) {
        let have: Vec<&str> = world.images.iter().map(|image| image.name.as_str()).collect();
        let have = if have.is_empty() { "none".to_owned() } else { have.join(", ") };
        return Err(Failure::new(
            StatusCode::NOT_FOUND,
            "missing_image",
            format!("there is no image {}; there are: {have}", spec.image),
            "make it with `epagent image bootstrap` or `epagent image import`",
        ));
    }
    // An app's range and address block are given here, so that a node that is full says so now.
    parts.runner.call(Request::AppEnsure { app: spec.app.clone() }).await?;
    Ok(())
}

pub async fn archive(State(apps): State<Apps>, Path(id): Path<i64>, body: Body) -> Result<Json<api::Deploy>> {
    let parts = apps.parts();
    let deploy = find(parts, id).await?;
    let mut progress = Progress::of(&deploy).map_err(|error| Failure::bad_request(error.to_string()))?;
    if deploy.phase != Phase::Received || deploy.kind != DeployKind::Deploy || progress.uploaded {
        // Sent again after the answer to the first was lost.
        return Ok(Json(shown(parts, deploy).await?));
    }
    receive(parts, deploy.id, body).await?;
    progress.uploaded = true;
    let value = serde_json::to_value(&progress).map_err(|error| Failure::bad_request(error.to_string()))?;
    parts.store.deploy_progress(deploy.id, &value).await?;
    apps.wake(&deploy.app);
    Ok(Json(shown(parts, deploy).await?))
}

async fn receive(parts: &Parts, id: DeployId, body: Body) -> Result<()> {
    let failed = |error: std::io::Error| {
        let (status, code) = match error.kind() {
            std::io::ErrorKind::StorageFull => (StatusCode::INSUFFICIENT_STORAGE, "no_space"),
            _ => (StatusCode::INTERNAL_SERVER_ERROR, "upload_failed"),
        };
        let message = format!("storing the archive of {id}: {error}");
        Failure::new(status, code, message, "see that the agent's disk has room, and deploy again")
    };
    let limit = parts.config.limits.archive_bytes;
    let mut incoming = Incoming::begin(&parts.config, id).await.map_err(failed)?;
    let mut stream = body.into_data_stream();
    let mut received = 0;
    let outcome = loop {
        match stream.next().await {
            None => break Ok(()),
            Some(Err(error)) => {
                break Err(Failure::bad_request(format!("receiving the archive of {id}: {error}")));
            }
            Some(Ok(chunk)) => {
                received += chunk.len() as u64;
                if received > limit {
                    break Err(Failure::new(
                        StatusCode::PAYLOAD_TOO_LARGE,
                        "too_large",
                        format!("the archive of {id} is larger than {} MiB", limit >> 20),
                        "leave out what the app does not need: name it in .epagentignore",
                    ));
                }
                if let Err(error) = incoming.writer().write_all(&chunk).await {
                    break Err(failed(error));
                }
            }
        }
    };
    match outcome {
        Ok(()) => incoming.finish().await.map_err(failed),
        Err(failure) => {
            incoming.abandon().await;
            Err(failure)
        }
    }
}

#[derive(Deserialize)]
pub struct Filter {
    app: Option<String>,
}

pub async fn list(State(apps): State<Apps>, Query(filter): Query<Filter>) -> Result<Json<Vec<api::Deploy>>> {
    let parts = apps.parts();
    let app = filter.app.as_deref().map(str::parse::<AppName>).transpose()?;
    let mut list = Vec::new();
    for deploy in parts.store.deploys(app.as_ref(), LISTED_MAX).await? {
        list.push(shown(parts, deploy).await?);
    }
    Ok(Json(list))
}

pub async fn show(State(apps): State<Apps>, Path(id): Path<i64>) -> Result<Json<api::Deploy>> {
    let deploy = find(apps.parts(), id).await?;
    Ok(Json(shown(apps.parts(), deploy).await?))
}

async fn find(parts: &Parts, id: i64) -> Result<Deploy> {
    let deploy = parts.store.deploy(DeployId(id)).await?;
    deploy.ok_or_else(|| {
        Failure::not_found(format!("there is no deploy {id}"), "`epagent events` tells of deploys")
    })
}

/// A deploy as the API shows it.
pub async fn shown(parts: &Parts, deploy: Deploy) -> Result<api::Deploy> {
    let steps = parts.store.deploy_steps(deploy.id, 0).await?;
    Ok(api::Deploy {
        id: deploy.id.0,
        app: deploy.app.to_string(),
        kind: deploy.kind.as_str().to_owned(),
        release: deploy.release.0,
        phase: deploy.phase,
        steps: steps.into_iter().map(step).collect(),
        verdict: deploy.verdict,
        created_at: clock::rfc3339(deploy.created_at_ms),
        ended_at: deploy.ended_at_ms.map(clock::rfc3339),
    })
}

fn step(step: DeployStep) -> api::DeployStep {
    api::DeployStep {
        sequence: step.sequence,
        phase: step.phase,
        note: step.note,
        at: clock::rfc3339(step.at_ms),
    }
}

#[derive(Deserialize)]
pub struct Watch {
    #[serde(default)]
    from: i64,
}

pub async fn watch(
    State(apps): State<Apps>,
    Path(id): Path<i64>,
    Query(query): Query<Watch>,
) -> Result<Response> {
    let parts = apps.parts().clone();
    let deploy = find(&parts, id).await?;
    let (updates, receiver) = mpsc::channel(UPDATES_QUEUED_MAX);
    let watcher = Watcher { parts, updates, last: query.from, followed: HashSet::new(), follower: None };
    tokio::spawn(watcher.run(deploy.id));
    Ok(lines(receiver)?.into_response())
}

/// Somebody who watches a deploy: its steps, and what its jobs print.
struct Watcher {
    parts: Parts,
    updates: mpsc::Sender<DeployUpdate>,
    last: i64,
    followed: HashSet<JailId>,
    follower: Option<Follower>,
}

/// The watcher has gone, or nothing can be read for it.
struct Gone;

impl Watcher {
    async fn run(mut self, id: DeployId) {
        loop {
            match self.look(id).await {
                Ok(false) => tokio::time::sleep(WATCH_INTERVAL).await,
                Ok(true) | Err(Gone) => return,
            }
        }
    }

    /// Passes on what is new; true when the deploy is over.
    async fn look(&mut self, id: DeployId) -> std::result::Result<bool, Gone> {
        // The deploy is read before its steps and output: when it is over, all of them are there.
        let store = &self.parts.store;
        let deploy = store.deploy(id).await.map_err(|_| Gone)?.ok_or(Gone)?;
        let steps = store.deploy_steps(id, self.last).await.map_err(|_| Gone)?;
        self.pass_output(&deploy).await?;
        for new in steps {
            self.last = new.sequence;
            self.updates.send(DeployUpdate::Step(step(new))).await.map_err(|_| Gone)?;
        }
        if !deploy.phase.is_over() {
            return Ok(false);
        }
        let shown = shown(&self.parts, deploy).await.map_err(|_| Gone)?;
        self.updates.send(DeployUpdate::Over(Box::new(shown))).await.map_err(|_| Gone)?;
        Ok(true)
    }

    async fn pass_output(&mut self, deploy: &Deploy) -> std::result::Result<(), Gone> {
        for jail in Progress::of(deploy).map_err(|_| Gone)?.logs {
            if !self.followed.contains(&jail) {
                // The one before has ended: what it printed last is passed on before it is let go.
                self.pass_more().await?;
                let Ok(answer) =
                    self.parts.runner.call_with(Request::LogOpen { jail: jail.clone() }, Vec::new()).await
                else {
                    continue;
                };
                let Some(folder) = answer.fds.into_iter().next() else { continue };
                let Ok((lines, follower)) = logs::tail(folder, OUTPUT_LINES_MAX) else { continue };
                self.followed.insert(jail);
                self.follower = Some(follower);
                self.pass(lines).await?;
            }
        }
        self.pass_more().await
    }

    async fn pass_more(&mut self) -> std::result::Result<(), Gone> {
        if let Some(follower) = &mut self.follower {
            let lines = follower.more().unwrap_or_default();
            self.pass(lines).await?;
        }
        Ok(())
    }

    async fn pass(&self, lines: Vec<logs::Line>) -> std::result::Result<(), Gone> {
        for line in lines {
            self.updates.send(DeployUpdate::Output { line: line.text }).await.map_err(|_| Gone)?;
        }
        Ok(())
    }
}
