//! Apps: what there is, and what the operator wants of it.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use epagent_core::name::{AppName, ProcessName, ReleaseNumber};
use epagent_core::spec::{INSTANCES_MAX, RouteMatch};
use epagent_store::{App, Deploy, DeployKind, NewDeploy, Release, ReleaseState, Target, Wanted};
use epagent_wire::api::{self, ProcessStatus};

use super::deploys::{begin_deploy, shown};
use super::failure::{Failure, Result};
use super::instances;
use crate::apps::{Apps, Parts};
use crate::clock;

pub async fn list(State(apps): State<Apps>) -> Result<Json<Vec<api::App>>> {
    let mut list = Vec::new();
    for app in apps.parts().store.apps().await? {
        list.push(describe(apps.parts(), app).await?);
    }
    Ok(Json(list))
}

pub async fn show(State(apps): State<Apps>, Path(app): Path<String>) -> Result<Json<api::App>> {
    let app = find(apps.parts(), &app).await?;
    Ok(Json(describe(apps.parts(), app).await?))
}

/// The app of this name. A name that no app could have is refused as such.
pub async fn find(parts: &Parts, app: &str) -> Result<App> {
    let name: AppName = app.parse()?;
    parts.store.app(&name).await?.ok_or_else(|| Failure::no_app(app))
}

/// The release that serves, or is about to.
pub async fn serving(parts: &Parts, app: &AppName) -> Result<Option<Release>> {
    if let Some(deploy) = parts.store.deploy_under_way(app).await?
        && deploy.phase.has_switched()
    {
        return Ok(parts.store.release(app, deploy.release).await?);
    }
    Ok(parts.store.release_serving(app).await?)
}

async fn describe(parts: &Parts, app: App) -> Result<api::App> {
    let serving = serving(parts, &app.app).await?;
    let deploy = parts.store.deploy_under_way(&app.app).await?;
    let instances = instances::of(parts, Some(&app.app)).await?;
    let scale = parts.store.scale(&app.app).await?;
    let asleep = parts.store.asleep(&app.app).await?;
    let mut processes = BTreeMap::new();
    let mut routes = Vec::new();
    if let Some(release) = &serving {
        for (name, spec) in &release.spec.processes {
            let wanted = match app.wanted {
                Wanted::Running if asleep.contains_key(name) => 0,
                Wanted::Running => scale.get(name).copied().unwrap_or(spec.instances),
                _ => 0,
            };
            let of = |states: &[&str]| {
                let found = instances
                    .iter()
                    .filter(|i| i.process == name.as_str() && states.contains(&i.state.as_str()));
                u32::try_from(found.count()).unwrap_or(u32::MAX)
            };
            let status = ProcessStatus {
                wanted,
                running: of(&["checking", "healthy", "unhealthy"]),
                healthy: of(&["healthy"]),
            };
            processes.insert(name.to_string(), status);
        }
        routes.extend(release.spec.routes.iter().map(|route| match &route.matches {
            RouteMatch::Host(host) => host.clone(),
            RouteMatch::Port(port) => format!("port {port}"),
        }));
    }
    let short = processes.values().any(|process| process.healthy < process.wanted);
    let state = match (app.wanted, &serving) {
        (Wanted::Removed, _) => "removing",
        (_, None) => "new",
        (Wanted::Stopped, _) => "stopped",
        (Wanted::Running, _) if short => "degraded",
        (Wanted::Running, _) if !asleep.is_empty() && processes.values().all(|p| p.wanted == 0) => "idle",
        (Wanted::Running, _) => "running",
    };
    let subject = format!("app {}", app.app);
    let trouble = match short {
        true => parts.store.errors(100).await?.into_iter().find(|error| error.subject == subject),
        false => None,
    };
    Ok(api::App {
        app: app.app.to_string(),
        state: state.to_owned(),
        release: serving.map(|release| release.number.0),
        processes,
        routes,
        created_at: clock::rfc3339(app.created_at_ms),
        deploy: deploy.map(|deploy| deploy.id.0),
        trouble: trouble.map(|error| error.message),
    })
}

pub async fn destroy(State(apps): State<Apps>, Path(app): Path<String>) -> Result<Json<serde_json::Value>> {
    let app = find(apps.parts(), &app).await?.app;
    apps.parts().store.app_want(&app, Wanted::Removed, clock::now_ms()).await?;
    apps.wake(&app);
    Ok(Json(serde_json::json!({})))
}

pub async fn stop(State(apps): State<Apps>, Path(app): Path<String>) -> Result<Json<api::App>> {
    let parts = apps.parts();
    let app = find(parts, &app).await?;
    if let Some(deploy) = parts.store.deploy_under_way(&app.app).await? {
        let hint = format!("watch it with `epagent deploy --watch {}`, then stop the app", deploy.id.0);
        return Err(Failure::conflict(
            "deploy_under_way",
            format!("{} of {} is still under way", deploy.id, app.app),
            hint,
        ));
    }
    parts.store.app_want(&app.app, Wanted::Stopped, clock::now_ms()).await?;
    apps.wake(&app.app);
    let app = find(parts, app.app.as_str()).await?;
    Ok(Json(describe(parts, app).await?))
}

/// Starts what was stopped. What was set while it was stopped is taken now, in a release of its own.
pub async fn start(
    State(apps): State<Apps>,
    Path(app): Path<String>,
) -> Result<(StatusCode, Json<api::Deploy>)> {
    let parts = apps.parts();
    let name = find(parts, &app).await?.app;
    let serving = parts.store.release_serving(&name).await?.ok_or_else(|| nothing_deployed(&name))?;
    let config = parts.store.config(&name).await?.unwrap_or_default();
    let secrets = parts.store.secrets(&name).await?;
    let same_secrets = secrets.len() == serving.secrets.len()
        && secrets.iter().all(|secret| serving.secrets.get(&secret.name) == Some(&secret.version));
    if config.version == serving.config_version && same_secrets {
        return again(&apps, &app, DeployKind::Start, "starting the app").await;
    }
    let new = NewDeploy {
        app: name,
        kind: DeployKind::Start,
        target: Target::Reconfigure { config: Default::default(), secrets: Default::default() },
        progress: serde_json::Value::Null,
        note: "starting the app with its new configuration".to_owned(),
    };
    let deploy = begin_deploy(&apps, new).await?;
    Ok((StatusCode::ACCEPTED, Json(shown(parts, deploy).await?)))
}

pub async fn restart(
    State(apps): State<Apps>,
    Path(app): Path<String>,
) -> Result<(StatusCode, Json<api::Deploy>)> {
    again(&apps, &app, DeployKind::Restart, "replacing every instance").await
}

/// A deploy of the release that serves.
async fn again(
    apps: &Apps,
    app: &str,
    kind: DeployKind,
    note: &str,
) -> Result<(StatusCode, Json<api::Deploy>)> {
    let parts = apps.parts();
    let app = find(parts, app).await?.app;
    let serving = parts.store.release_serving(&app).await?.ok_or_else(|| nothing_deployed(&app))?;
    let deploy = release_deploy(apps, app, kind, serving.number, note).await?;
    Ok((StatusCode::ACCEPTED, Json(shown(parts, deploy).await?)))
}

async fn release_deploy(
    apps: &Apps,
    app: AppName,
    kind: DeployKind,
    number: ReleaseNumber,
    note: &str,
) -> Result<Deploy> {
    let new = NewDeploy {
        app,
        kind,
        target: Target::Release(number),
        progress: serde_json::Value::Null,
        note: note.to_owned(),
    };
    begin_deploy(apps, new).await
}

pub async fn rollback(
    State(apps): State<Apps>,
    Path(app): Path<String>,
    Json(query): Json<api::Rollback>,
) -> Result<(StatusCode, Json<api::Deploy>)> {
    let parts = apps.parts();
    let app = find(parts, &app).await?.app;
    let number = match query.release {
        Some(number) => ReleaseNumber(number),
        None => {
            let previous = parts.store.release_previous(&app).await?;
            let none = || {
                let message = format!("{app} has no release before the one that serves");
                Failure::conflict("no_release", message, "`epagent releases APP` lists what can be deployed")
            };
            previous.ok_or_else(none)?.number
        }
    };
    let note = format!("back to {number}");
    let deploy = release_deploy(&apps, app, DeployKind::Rollback, number, &note).await?;
    Ok((StatusCode::ACCEPTED, Json(shown(parts, deploy).await?)))
}

pub async fn scale(
    State(apps): State<Apps>,
    Path(app): Path<String>,
    Json(scale): Json<api::Scale>,
) -> Result<Json<api::App>> {
    let parts = apps.parts();
    let app = find(parts, &app).await?.app;
    let serving = serving(parts, &app).await?.ok_or_else(|| nothing_deployed(&app))?;
    let mut wanted = BTreeMap::new();
    for (name, count) in scale.processes {
        let process: ProcessName = name.parse()?;
        if !serving.spec.processes.contains_key(&process) {
            let have: Vec<&str> = serving.spec.processes.keys().map(ProcessName::as_str).collect();
            let message = format!("{app} has no process {process}; it has: {}", have.join(", "));
            return Err(Failure::not_found(message, "name one of these"));
        }
        if count > INSTANCES_MAX {
            return Err(Failure::bad_request(format!(
                "{count} instances are more than {INSTANCES_MAX}, the most of one process"
            )));
        }
        wanted.insert(process, count);
    }
    parts.store.scale_set(&app, &wanted, clock::now_ms()).await?;
    apps.wake(&app);
    let app = find(parts, app.as_str()).await?;
    Ok(Json(describe(parts, app).await?))
}

pub fn nothing_deployed(app: &AppName) -> Failure {
    let message = format!("nothing of {app} has been deployed yet");
    Failure::conflict("no_release", message, "deploy it first: `epagent deploy DIR`")
}

pub async fn releases(State(apps): State<Apps>, Path(app): Path<String>) -> Result<Json<Vec<api::Release>>> {
    let parts = apps.parts();
    let app = find(parts, &app).await?.app;
    let serving = serving(parts, &app).await?.map(|release| release.number);
    let trees = parts.worlds.latest().map(|world| world.releases.clone()).unwrap_or_default();
    let list = parts.store.releases(&app).await?.into_iter().map(|release| api::Release {
        release: release.number.0,
        image: release.image.to_string(),
        state: match release.state {
            ReleaseState::Ready if serving == Some(release.number) => "serving".to_owned(),
            state => state.as_str().to_owned(),
        },
        config_version: release.config_version,
        created_at: clock::rfc3339(release.created_at_ms),
        bytes: trees
            .iter()
            .find(|tree| tree.app == app && tree.release == release.tree)
            .map(|tree| tree.bytes),
    });
    Ok(Json(list.collect()))
}
