//! Images and volumes.

use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use epagent_core::name::{ImageName, JailId, VolumeName};
use epagent_wire::api::{self, ApiError, JobUpdate};
use epagent_wire::runner::{ArchiveFormat, Reply, Request};
use futures_util::StreamExt;
use serde::Deserialize;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;

use super::apps::find;
use super::failure::{Failure, Result};
use super::lines;
use crate::apps::{Apps, HeldGuard, Parts};
use crate::clock;
use crate::images::{ended, remove as remove_job};
use crate::logs;
use crate::runner::CallError;

const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Lines of a job's output in an error.
const ERROR_LINES_MAX: usize = 5;
/// Updates a slow watcher may be behind.
const UPDATES_QUEUED_MAX: usize = 256;

pub async fn list(State(apps): State<Apps>) -> Result<Json<Vec<api::Image>>> {
    let world = apps.parts().worlds.fresh().await.ok_or(CallError::Away)?;
    let images = world.images.iter().map(|image| api::Image {
        image: image.name.to_string(),
        id: image.id.clone(),
        bytes: image.bytes,
        created_at: clock::rfc3339(image.created_at_ms),
    });
    Ok(Json(images.collect()))
}

pub async fn remove(State(apps): State<Apps>, Path(image): Path<String>) -> Result<Json<serde_json::Value>> {
    let image: ImageName = image.parse()?;
    apps.parts().runner.call(Request::ImageRemove { image }).await?;
    Ok(Json(serde_json::json!({})))
}

#[derive(Deserialize)]
pub struct ImportQuery {
    #[serde(default)]
    format: Option<String>,
}

pub async fn import(
    State(apps): State<Apps>,
    Path(image): Path<String>,
    Query(query): Query<ImportQuery>,
    body: Body,
) -> Result<Json<api::ImageJob>> {
    let parts = apps.parts();
    let image: ImageName = image.parse()?;
    let format = match query.format.as_deref() {
        None | Some("tar") => ArchiveFormat::Tar,
        Some("layers") => ArchiveFormat::Layers,
        Some(other) => return Err(Failure::bad_request(format!("{other:?} is not a format: tar or layers"))),
    };
    let failed = |error: std::io::Error| Failure::bad_request(format!("passing the image on: {error}"));
    let (read, write) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
    let request = Request::ImageImport { image: image.clone(), format };
    let started = parts.runner.call_with(request, vec![read]).await?;
    let Reply::Started { jail, .. } = started.reply else { return Err(CallError::Unexpected.into()) };
    let _held = parts.held.hold(jail.clone());
    let mut pipe = pipe::Sender::from_owned_fd(write).map_err(failed)?;
    let mut stream = body.into_data_stream();
    while let Some(chunk) = stream.next().await {
        // A job that ended early says why by its own end; a client that went away leaves a short stream, which the
        // job refuses.
        let Ok(chunk) = chunk else { break };
        if pipe.write_all(&chunk).await.is_err() {
            break;
        }
    }
    drop(pipe);
    let outcome = until_over(parts, &jail, &image).await;
    remove_job(parts, &jail).await;
    outcome.map(Json)
}

/// Waits for the job's end and gives the image it made.
async fn until_over(parts: &Parts, jail: &JailId, image: &ImageName) -> Result<api::ImageJob> {
    loop {
        if let Some(world) = parts.worlds.fresh().await
            && let Some(exit) = ended(&world, jail)
        {
            let made = world.images.iter().find(|made| made.name == *image);
            return match made.filter(|_| exit.success()) {
                Some(made) => Ok(api::ImageJob { image: image.to_string(), id: made.id.clone() }),
                None => Err(job_failed(parts, jail, image, &exit.to_string()).await),
            };
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

async fn job_failed(parts: &Parts, jail: &JailId, image: &ImageName, how: &str) -> Failure {
    let said = last_lines(parts, jail).await.join("\n");
    let message = match said.is_empty() {
        true => format!("making the image {image} {how}"),
        false => format!("making the image {image} {how}:\n{said}"),
    };
    Failure::new(StatusCode::UNPROCESSABLE_ENTITY, "image_failed", message, "nothing was changed")
}

async fn last_lines(parts: &Parts, jail: &JailId) -> Vec<String> {
    match logs::last_lines(&parts.runner, jail, ERROR_LINES_MAX).await {
        Ok(lines) => lines.into_iter().map(|line| line.text).collect(),
        Err(_) => Vec::new(),
    }
}

pub async fn bootstrap(
    State(apps): State<Apps>,
    Path(image): Path<String>,
    Json(query): Json<api::Bootstrap>,
) -> Result<Response> {
    let parts = apps.parts().clone();
    let image: ImageName = image.parse()?;
    let include = query.include.into_iter().collect();
    let request = Request::ImageBootstrap { image: image.clone(), suite: query.suite, include };
    let Reply::Started { jail, .. } = parts.runner.call(request).await? else {
        return Err(CallError::Unexpected.into());
    };
    let held = parts.held.hold(jail.clone());
    let (updates, receiver) = mpsc::channel(UPDATES_QUEUED_MAX);
    tokio::spawn(watch_job(parts, jail, image, updates, held));
    lines(receiver)
}

/// Passes on what the job prints until it is over. The job goes on when nobody watches any more.
async fn watch_job(
    parts: Parts,
    jail: JailId,
    image: ImageName,
    updates: mpsc::Sender<JobUpdate>,
    _held: HeldGuard,
) {
    let mut follower = None;
    let outcome = loop {
        let over = match parts.worlds.fresh().await {
            Some(world) => ended(&world, &jail),
            None => None,
        };
        let mut lines = Vec::new();
        match &mut follower {
            None => {
                if let Ok((first, found)) = logs::open(&parts.runner, &jail, usize::MAX).await {
                    lines = first;
                    follower = Some(found);
                }
            }
            Some(follower) => lines = follower.more().await,
        }
        for line in lines {
            // A watcher that has gone is no reason to stop.
            let _ = updates.send(JobUpdate::Output { line: line.text }).await;
        }
        if let Some(exit) = over {
            break exit;
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    };
    let error: Option<ApiError> = match outcome.success() {
        true => None,
        false => Some(job_failed(&parts, &jail, &image, &outcome.to_string()).await.error),
    };
    remove_job(&parts, &jail).await;
    let _ = updates.send(JobUpdate::Over { error }).await;
}

#[derive(Deserialize)]
pub struct Filter {
    app: Option<String>,
}

pub async fn volumes(
    State(apps): State<Apps>,
    Query(filter): Query<Filter>,
) -> Result<Json<Vec<api::Volume>>> {
    let parts = apps.parts();
    let app = match &filter.app {
        Some(app) => Some(find(parts, app).await?.app),
        None => None,
    };
    let rows = parts.store.volumes(app.as_ref()).await?;
    let world = parts.worlds.fresh().await.ok_or(CallError::Away)?;
    let found = world.volumes.iter().filter(|volume| app.as_ref().is_none_or(|app| volume.app == *app));
    let volumes = found.map(|volume| {
        let row = rows.iter().find(|row| row.app == volume.app && row.volume == volume.volume);
        api::Volume {
            app: volume.app.to_string(),
            volume: volume.volume.to_string(),
            path: row.map(|row| row.path.clone()),
            quota_bytes: volume.quota_bytes,
            used_bytes: volume.used_bytes,
        }
    });
    Ok(Json(volumes.collect()))
}

pub async fn volume_remove(
    State(apps): State<Apps>,
    Path((app, volume)): Path<(String, String)>,
) -> Result<Json<serde_json::Value>> {
    let parts = apps.parts();
    let app = find(parts, &app).await?.app;
    let volume: VolumeName = volume.parse()?;
    parts.runner.call(Request::VolumeRemove { app: app.clone(), volume: volume.clone() }).await?;
    parts.store.volume_remove(&app, &volume).await?;
    Ok(Json(serde_json::json!({})))
}
