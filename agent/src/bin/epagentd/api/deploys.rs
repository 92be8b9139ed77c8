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
use epagent_core::spec::{AppSpec, Listen, RouteMatch};
use epagent_core::verdict::{Cause, Findings};
use epagent_store::{Deploy, DeployKind, DeployStep, NewDeploy, StoreError, Target};
use epagent_wire::api::{self, DeployUpdate, Manifest};
use epagent_wire::runner::{FEATURE_APP_SOCKETS, Request};
use futures_util::StreamExt;
use serde::Deserialize;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;

use super::failure::{Failure, Result};
use super::lines;
use crate::apps::{Apps, Parts, Progress, missing_secrets};
use crate::clock;
use crate::logs::{self, Follower};
use crate::uploads::{self, Incoming};

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

/// Begins a deploy and wakes the app's loop. One that only waits for its archive makes room for it.
pub async fn begin_deploy(apps: &Apps, new: NewDeploy) -> Result<Deploy> {
    let parts = apps.parts();
    let store = &parts.store;
    let app = new.app.clone();
    // One at a time: whose a route is must not change between the look and the deploy.
    let _turn = parts.begins.lock().await;
    check_routes(parts, &app, &new.target).await?;
    if let Some(waiting) = store.deploy_under_way(&app).await?
        && waiting.phase == Phase::Received
        && waiting.kind == DeployKind::Deploy
        && !progress(&waiting)?.uploaded
    {
        cancel_deploy(apps, &waiting, "a newer deploy took its place").await?;
    }
    let deploy = store.deploy_begin(new, clock::now_ms()).await?;
    apps.wake(&app);
    Ok(deploy)
}

/// No two apps may ask for one host or port: not what serves, and not what is on its way.
async fn check_routes(parts: &Parts, app: &AppName, target: &Target) -> Result<()> {
    let wanted = match target {
        Target::Build(spec) => spec.routes.clone(),
        Target::Release(number) => {
            let release = parts.store.release(app, *number).await?;
            release.map(|release| release.spec.routes).unwrap_or_default()
        }
        // The routes of what serves already.
        Target::Reconfigure { .. } => return Ok(()),
    };
    for other in parts.store.apps().await?.into_iter().filter(|other| other.app != *app) {
        let serving = parts.store.release_serving(&other.app).await?;
        let coming = match parts.store.deploy_under_way(&other.app).await? {
            Some(deploy) => parts.store.release(&other.app, deploy.release).await?,
            None => None,
        };
        let theirs = serving.iter().chain(&coming).flat_map(|release| &release.spec.routes);
        let taken = theirs
            .map(|route| &route.matches)
            .find(|theirs| wanted.iter().any(|route| route.matches == **theirs));
        if let Some(matches) = taken {
            let what = match matches {
                RouteMatch::Host(host) => format!("the host {host}"),
                RouteMatch::Port(port) => format!("the port {port}"),
            };
            let message = format!("{what} belongs to the app {}", other.app);
            let hint = "choose another, or deploy that app without it first";
            return Err(Failure::conflict("route_taken", message, hint));
        }
    }
    Ok(())
}

pub async fn cancel(State(apps): State<Apps>, Path(id): Path<i64>) -> Result<Json<api::Deploy>> {
    let parts = apps.parts();
    let deploy = find(parts, id).await?;
    if deploy.phase.is_over() || deploy.phase.has_switched() {
        let message =
            format!("{} of {} is {}, and can't be canceled any more", deploy.id, deploy.app, deploy.phase);
        return Err(Failure::conflict(
            "too_late",
            message,
            "to return to the release before: `epagent rollback`",
        ));
    }
    cancel_deploy(&apps, &deploy, "the operator canceled it").await?;
    Ok(Json(shown(parts, find(parts, id).await?).await?))
}

/// Ends a deploy that has not switched; what it had made is swept by the app's loop.
async fn cancel_deploy(apps: &Apps, deploy: &Deploy, why: &str) -> Result<()> {
    let parts = apps.parts();
    let cause = Cause::Canceled { why: why.to_owned() };
    let verdict = cause.verdict(deploy.phase, Findings::default());
    let failed = parts.store.deploy_fail(deploy.id, deploy.phase, &verdict, clock::now_ms()).await;
    if let Err(StoreError::WrongPhase { .. }) = failed {
        let message = format!("{} of {} went on meanwhile", deploy.id, deploy.app);
        return Err(Failure::conflict("try_again", message, "try again"));
    }
    failed?;
    uploads::remove(&parts.config, deploy.id);
    apps.wake(&deploy.app);
    Ok(())
}

fn progress(deploy: &Deploy) -> Result<Progress> {
    Progress::of(deploy).map_err(|error| Failure::bad_request(error.to_string()))
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
    let listens = spec.processes.iter().find(|(_, process)| process.listen == Listen::Unix);
    let feature = world.features.iter().find(|feature| feature.name == FEATURE_APP_SOCKETS);
    if let Some((process, _)) = listens
        && !feature.is_some_and(|feature| feature.present)
    {
        let message = format!(
            "{process} listens on a unix socket, which can't be made safe on this node: it needs Linux 6.16 \
             (SO_PASSRIGHTS) and a balancer_gid in the runner's configuration"
        );
        let hint = "leave `listen` out, so that it listens at $PORT";
        return Err(Failure::conflict("no_app_sockets", message, hint));
    }
    // An app's range and address block are given here, so that a node that is full says so now.
    parts.runner.call(Request::AppEnsure { app: spec.app.clone() }).await?;
    Ok(())
}

pub async fn archive(State(apps): State<Apps>, Path(id): Path<i64>, body: Body) -> Result<Json<api::Deploy>> {
    let parts = apps.parts();
    let deploy = find(parts, id).await?;
    if !waits_for_archive(&deploy)? {
        // Sent again after the answer to the first was lost.
        return Ok(Json(shown(parts, deploy).await?));
    }
    let incoming = receive(parts, deploy.id, body).await?;
    // It may have been canceled meanwhile, or the same archive may have come another way.
    let deploy = find(parts, id).await?;
    if !waits_for_archive(&deploy)? {
        incoming.abandon().await;
        return Ok(Json(shown(parts, deploy).await?));
    }
    incoming.finish().await.map_err(|error| upload_failed(deploy.id, &error))?;
    let progress = Progress { uploaded: true, ..Progress::default() };
    let value = serde_json::to_value(&progress).map_err(|error| Failure::bad_request(error.to_string()))?;
    parts.store.deploy_progress(deploy.id, &value).await?;
    apps.wake(&deploy.app);
    Ok(Json(shown(parts, deploy).await?))
}

fn waits_for_archive(deploy: &Deploy) -> Result<bool> {
    Ok(deploy.phase == Phase::Received && deploy.kind == DeployKind::Deploy && !progress(deploy)?.uploaded)
}

fn upload_failed(id: DeployId, error: &std::io::Error) -> Failure {
    let (status, code) = match error.kind() {
        std::io::ErrorKind::StorageFull => (StatusCode::INSUFFICIENT_STORAGE, "no_space"),
        _ => (StatusCode::INTERNAL_SERVER_ERROR, "upload_failed"),
    };
    let message = format!("storing the archive of {id}: {error}");
    Failure::new(status, code, message, "see that the agent's disk has room, and deploy again")
}

/// Takes the whole archive; the caller puts it in its place.
async fn receive(parts: &Parts, id: DeployId, body: Body) -> Result<Incoming> {
    let failed = |error: std::io::Error| upload_failed(id, &error);
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
        Ok(()) => Ok(incoming),
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
                Ok(false) => tokio::select! {
                    () = tokio::time::sleep(WATCH_INTERVAL) => {}
                    () = self.updates.closed() => return,
                },
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
        // The first job unpacks the archive: what it says matters when it fails, and then it is in the verdict.
        for jail in Progress::of(deploy).map_err(|_| Gone)?.logs.into_iter().skip(1) {
            if !self.followed.contains(&jail) {
                // The one before has ended: what it printed last is passed on before it is let go.
                self.pass_more().await?;
                let opened = logs::open(&self.parts.runner, &jail, OUTPUT_LINES_MAX).await;
                let Ok((lines, follower)) = opened else { continue };
                self.followed.insert(jail);
                self.follower = Some(follower);
                self.pass(lines).await?;
            }
        }
        self.pass_more().await
    }

    async fn pass_more(&mut self) -> std::result::Result<(), Gone> {
        if let Some(follower) = &mut self.follower {
            let lines = follower.more().await;
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
