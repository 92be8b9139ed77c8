//! Instances as `epagent ps` shows them, and their logs.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::response::Response;
use epagent_core::health::Health;
use epagent_core::name::{AppName, DeployId, JailId};
use epagent_store::Instance as Row;
use epagent_wire::api::{self, LogLine};
use epagent_wire::table::SOCKET_PREFIX;
use serde::Deserialize;
use tokio::sync::mpsc;

use super::apps::find;
use super::failure::{Failure, Result};
use super::lines;
use crate::apps::{Apps, Parts, Progress, state};
use crate::clock;
use crate::logs::{self, Follower};

/// How often followed logs are looked at.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(200);
/// How long the first picture of the world is waited for.
const FIRST_PICTURE: Duration = Duration::from_secs(2);
/// Lines of one answer.
const LINES_DEFAULT: usize = 100;
const LINES_MAX: usize = 10_000;
/// Lines a slow reader may be behind.
const LINES_QUEUED_MAX: usize = 256;

#[derive(Deserialize)]
pub struct Filter {
    app: Option<String>,
}

pub async fn list(
    State(apps): State<Apps>,
    Query(filter): Query<Filter>,
) -> Result<Json<Vec<api::Instance>>> {
    let app = match &filter.app {
        Some(app) => Some(find(apps.parts(), app).await?.app),
        None => None,
    };
    Ok(Json(of(apps.parts(), app.as_ref()).await?))
}

/// The live instances of one app or of all, as the API shows them.
pub async fn of(parts: &Parts, app: Option<&AppName>) -> Result<Vec<api::Instance>> {
    let live = parts.store.instances_live(app).await?;
    let ended = parts.store.instances_ended(app).await?;
    // Just after the agent's start there is no picture yet; one is waited for, unless the runner is away.
    let world = match parts.worlds.latest() {
        Some(world) => Some(world),
        None => tokio::time::timeout(FIRST_PICTURE, parts.worlds.fresh()).await.ok().flatten(),
    };
    let jails: HashMap<&JailId, _> =
        world.iter().flat_map(|world| &world.jails).map(|jail| (&jail.id, jail)).collect();
    let mut sleeping = Vec::new();
    for app in asked_apps(parts, app).await? {
        sleeping.extend(asleep(parts, &app).await?);
    }
    let shown = live.into_iter().map(|row| {
        let jail = jails.get(&row.jail);
        let before = ended.iter().find(|old| {
            old.app == row.app
                && old.process == row.process
                && old.index == row.index
                && old.deploy == row.deploy
        });
        api::Instance {
            app: row.app.to_string(),
            process: row.process.to_string(),
            index: row.index,
            release: row.release.0,
            state: shown_state(parts, &row).to_owned(),
            pid: jail.and_then(|jail| jail.pid),
            restarts: row.restarts,
            started_at: row.started_at_ms.map(clock::rfc3339),
            id: row.jail.to_string(),
            // Where it takes requests; it may have a network all the same.
            address: match row.address {
                Some(socket) if socket.starts_with(SOCKET_PREFIX) => Some(socket),
                recorded => jail.and_then(|jail| jail.address.clone()).or(recorded),
            },
            last_exit: before.and_then(|old| old.exit.as_ref()).map(ToString::to_string),
        }
    });
    Ok(shown.chain(sleeping).collect())
}

async fn asked_apps(parts: &Parts, app: Option<&AppName>) -> Result<Vec<AppName>> {
    match app {
        Some(app) => Ok(vec![app.clone()]),
        None => Ok(parts.store.apps().await?.into_iter().map(|app| app.app).collect()),
    }
}

/// A row for each process of the app that sleeps: nothing of it runs, and the next request starts it.
async fn asleep(parts: &Parts, app: &AppName) -> Result<Vec<api::Instance>> {
    let asleep = parts.store.asleep(app).await?;
    let release = match asleep.is_empty() {
        true => None,
        false => parts.store.release_serving(app).await?,
    };
    let rows = asleep.into_iter().map(|(process, since_ms)| api::Instance {
        app: app.to_string(),
        process: process.to_string(),
        index: 0,
        release: release.as_ref().map_or(0, |release| release.number.0),
        state: "idle".to_owned(),
        pid: None,
        restarts: 0,
        started_at: None,
        id: "-".to_owned(),
        address: None,
        last_exit: Some(format!("nobody has asked for it since {}", clock::rfc3339(since_ms))),
    });
    Ok(rows.collect())
}

fn shown_state<'a>(parts: &Parts, row: &'a Row) -> &'a str {
    let health = parts.checks.finding(&row.jail).map(|finding| finding.health);
    match (row.state.as_str(), health) {
        (state::RUNNING, Some(Health::Healthy)) => state::HEALTHY,
        (state::RUNNING, _) => "checking",
        (state::HEALTHY, Some(Health::Unhealthy)) => "unhealthy",
        (other, _) => other,
    }
}

#[derive(Deserialize)]
pub struct LogQuery {
    process: Option<String>,
    lines: Option<usize>,
    #[serde(default)]
    follow: bool,
    /// `dN`: the build and release jobs of that deploy instead of instances.
    build: Option<String>,
}

/// A log that is read: whose it is, and where it is read on.
struct Source {
    process: String,
    index: u32,
    instance: JailId,
    follower: Follower,
}

pub async fn logs(
    State(apps): State<Apps>,
    Path(app): Path<String>,
    Query(query): Query<LogQuery>,
) -> Result<Response> {
    let parts = apps.parts().clone();
    let app = find(&parts, &app).await?.app;
    let count = query.lines.unwrap_or(LINES_DEFAULT).min(LINES_MAX);
    let mut wanted = subjects(&parts, &app, &query).await?;
    let mut sources = Vec::new();
    let mut found = Vec::new();
    for (process, index, jail) in wanted.drain(..) {
        if let Some((lines, source)) = open(&parts, process, index, jail, count).await {
            found.extend(lines);
            sources.push(source);
        }
    }
    // Times of one machine, all written alike: their order as text is their order in time.
    found.sort_by(|a, b| a.at.cmp(&b.at));
    found.drain(..found.len().saturating_sub(count));
    let (sender, receiver) = mpsc::channel(LINES_QUEUED_MAX);
    tokio::spawn(async move {
        for line in found {
            if sender.send(line).await.is_err() {
                return;
            }
        }
        if query.follow {
            follow(parts, app, query, sources, sender).await;
        }
    });
    lines(receiver)
}

/// Passes on new lines until the reader goes, of instances that come later as well.
async fn follow(
    parts: Parts,
    app: AppName,
    query: LogQuery,
    mut sources: Vec<Source>,
    sender: mpsc::Sender<LogLine>,
) {
    // Logs that can't be opened, which are not asked for again and again.
    let mut gone = HashSet::new();
    while !sender.is_closed() {
        let mut new = Vec::new();
        for source in &mut sources {
            let lines = source.follower.more().await;
            new.extend(
                lines.into_iter().map(|line| shown(&source.process, source.index, &source.instance, line)),
            );
        }
        if let Ok(wanted) = subjects(&parts, &app, &query).await {
            // Instances that are forgotten were read to their end just now.
            sources.retain(|source| wanted.iter().any(|(_, _, jail)| *jail == source.instance));
            gone.retain(|gone| wanted.iter().any(|(_, _, jail)| jail == gone));
            for (process, index, jail) in wanted {
                if gone.contains(&jail) || sources.iter().any(|source| source.instance == jail) {
                    continue;
                }
                match open(&parts, process, index, jail.clone(), LINES_MAX).await {
                    Some((lines, source)) => {
                        new.extend(lines);
                        sources.push(source);
                    }
                    None => drop(gone.insert(jail)),
                }
            }
        }
        new.sort_by(|a, b| a.at.cmp(&b.at));
        for line in new {
            if sender.send(line).await.is_err() {
                return;
            }
        }
        tokio::time::sleep(FOLLOW_INTERVAL).await;
    }
}

async fn subjects(parts: &Parts, app: &AppName, query: &LogQuery) -> Result<Vec<(String, u32, JailId)>> {
    if let Some(deploy) = &query.build {
        let number = deploy.strip_prefix('d').unwrap_or(deploy).parse();
        let id = DeployId(
            number.map_err(|_| Failure::bad_request(format!("{deploy:?} is not a deploy, like d12")))?,
        );
        let deploy = parts.store.deploy(id).await?.filter(|deploy| deploy.app == *app);
        let deploy = deploy
            .ok_or_else(|| Failure::not_found(format!("{app} has no deploy {id}"), "see `epagent events`"))?;
        let progress = Progress::of(&deploy).map_err(|error| Failure::bad_request(error.to_string()))?;
        let jobs = progress.logs.into_iter().enumerate();
        return Ok(jobs.map(|(step, jail)| ("build".to_owned(), step as u32, jail)).collect());
    }
    let mut rows = parts.store.instances_live(Some(app)).await?;
    rows.extend(
        parts.store.instances_ended(Some(app)).await?.into_iter().take(parts.config.limits.logs_kept),
    );
    let wanted = |row: &Row| query.process.as_ref().is_none_or(|process| row.process.as_str() == process);
    Ok(rows.into_iter().filter(wanted).map(|row| (row.process.to_string(), row.index, row.jail)).collect())
}

/// None when the log is gone or the runner away; the others are shown all the same.
async fn open(
    parts: &Parts,
    process: String,
    index: u32,
    jail: JailId,
    count: usize,
) -> Option<(Vec<LogLine>, Source)> {
    let (lines, follower) = logs::open(&parts.runner, &jail, count).await.ok()?;
    let lines = lines.into_iter().map(|line| shown(&process, index, &jail, line)).collect();
    Some((lines, Source { process, index, instance: jail, follower }))
}

fn shown(process: &str, index: u32, instance: &JailId, line: logs::Line) -> LogLine {
    LogLine {
        at: line.at,
        process: process.to_owned(),
        index,
        instance: instance.to_string(),
        stream: if line.stderr { "stderr" } else { "stdout" }.to_owned(),
        line: line.text,
    }
}
