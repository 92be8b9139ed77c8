//! The agent itself: version, status, events, errors, doctor.

use std::sync::LazyLock;
use std::time::Instant;

use axum::Json;
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use epagent_core::name::AppName;
use epagent_wire::api::{self, Check};
use serde::Deserialize;
use tokio::sync::mpsc;

use super::failure::Result;
use super::lines;
use crate::apps::{Apps, Parts};
use crate::clock;

/// Events of one answer, or behind a slow reader.
const EVENTS_DEFAULT: u32 = 50;
const EVENTS_QUEUED_MAX: usize = 256;
const ERRORS_MAX: u32 = 200;
/// A pool fuller than this is told.
const POOL_WARN_PERCENT: u64 = 85;

static STARTED: LazyLock<Instant> = LazyLock::new(Instant::now);

pub async fn version(State(apps): State<Apps>) -> Json<api::Version> {
    LazyLock::force(&STARTED);
    Json(api::Version {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        node: apps.parts().config.node,
        runner: apps.parts().runner.version(),
        http_address: apps.parts().config.http_address.clone(),
    })
}

pub async fn status(State(apps): State<Apps>) -> Result<Json<api::Status>> {
    let parts = apps.parts();
    let world = parts.worlds.latest();
    let mut loops = parts.board.snapshot();
    let runner =
        parts.runner.version().map_or_else(|| "away".to_owned(), |version| format!("ok ({version})"));
    loops.insert("runner".to_owned(), runner);
    let apps = parts.store.apps().await?;
    let instances = parts.store.instances_live(None).await?;
    let count = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
    Ok(Json(api::Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        node: parts.config.node,
        uptime_seconds: STARTED.elapsed().as_secs(),
        parts: loops,
        apps: count(apps.len()),
        instances: count(instances.len()),
        pool_total_bytes: world.as_ref().map_or(0, |world| world.pool.total_bytes),
        pool_used_bytes: world.as_ref().map_or(0, |world| world.pool.used_bytes),
        table_version: parts.routing.version(),
    }))
}

#[derive(Deserialize)]
pub struct EventQuery {
    app: Option<String>,
    after: Option<i64>,
    #[serde(default)]
    follow: bool,
}

pub async fn events(State(apps): State<Apps>, Query(query): Query<EventQuery>) -> Result<Response> {
    let parts = apps.parts().clone();
    let app = query.app.as_deref().map(str::parse::<AppName>).transpose()?;
    // Before the first look, so that nothing falls in between.
    let mut signal = parts.store.event_signal();
    let first = match query.after {
        Some(after) => parts.store.events_after(after, app.as_ref(), EVENTS_DEFAULT).await?,
        None => parts.store.events_newest(app.as_ref(), EVENTS_DEFAULT).await?,
    };
    if !query.follow {
        let list: Vec<api::Event> = first.into_iter().map(event).collect();
        return Ok(Json(list).into_response());
    }
    let (sender, receiver) = mpsc::channel(EVENTS_QUEUED_MAX);
    tokio::spawn(async move {
        let mut last = query.after.unwrap_or(0);
        let mut next = first;
        loop {
            let full = next.len() == EVENTS_DEFAULT as usize;
            for new in next {
                last = last.max(new.id);
                if sender.send(event(new)).await.is_err() {
                    return;
                }
            }
            if !full {
                tokio::select! {
                changed = signal.changed() => if changed.is_err() { return },
                () = sender.closed() => return,
                }
            }
            match parts.store.events_after(last, app.as_ref(), EVENTS_DEFAULT).await {
                Ok(events) => next = events,
                Err(_) => return,
            }
        }
    });
    lines(receiver)
}

fn event(event: epagent_store::Event) -> api::Event {
    api::Event {
        id: event.id,
        at: clock::rfc3339(event.at_ms),
        app: event.app.map(Into::into),
        deploy: event.deploy.map(|deploy| deploy.0),
        kind: event.kind,
        message: event.message,
    }
}

pub async fn errors(State(apps): State<Apps>) -> Result<Json<Vec<api::ErrorRow>>> {
    let rows = apps.parts().store.errors(ERRORS_MAX).await?.into_iter().map(|row| api::ErrorRow {
        code: row.code,
        subject: row.subject,
        message: row.message,
        count: i64::try_from(row.count).unwrap_or(i64::MAX),
        first_at: clock::rfc3339(row.first_at_ms),
        last_at: clock::rfc3339(row.last_at_ms),
        backtrace: row.backtrace,
    });
    Ok(Json(rows.collect()))
}

pub async fn doctor(State(apps): State<Apps>) -> Json<Vec<Check>> {
    let parts = apps.parts();
    let mut checks = vec![runner_check(parts), balancer_check(parts)];
    if let Some(world) = parts.worlds.latest() {
        let pool = &world.pool;
        let percent = (pool.used_bytes * 100).checked_div(pool.total_bytes).unwrap_or(0);
        let state = if percent >= POOL_WARN_PERCENT { "warn" } else { "ok" };
        let message = format!(
            "{percent} % of {} MiB used, {} MiB of it kept for the agent",
            pool.total_bytes >> 20,
            pool.reserve_bytes >> 20
        );
        checks.push(check("pool", state, message, "remove releases, images or volumes, or enlarge the pool"));
        for feature in &world.features {
            let (state, message) = match feature.present {
                true => ("ok", "present".to_owned()),
                false => ("warn", format!("absent; in its place: {}", feature.fallback)),
            };
            let advice =
                if feature.advice.is_empty() { "a newer kernel has it" } else { feature.advice.as_str() };
            checks.push(check(&format!("kernel: {}", feature.name), state, message, advice));
        }
    }
    for (name, state) in parts.board.snapshot() {
        let shown = if state == "ok" { "ok" } else { "fail" };
        checks.push(check(&format!("loop: {name}"), shown, state, "see `epagent errors`"));
    }
    Json(checks)
}

fn runner_check(parts: &Parts) -> Check {
    match parts.runner.version() {
        Some(version) => check("runner", "ok", format!("version {version}"), ""),
        None => check(
            "runner",
            "fail",
            "it can't be reached".to_owned(),
            "see its log; its supervisor restarts it",
        ),
    }
}

fn balancer_check(parts: &Parts) -> Check {
    let problems = parts.routing.problems();
    match (parts.routing.version(), problems.is_empty()) {
        (0, _) => {
            check("balancer", "warn", "it has taken no table from this agent yet".to_owned(), "see its log")
        }
        (version, true) => check("balancer", "ok", format!("table {version} is in force"), ""),
        (_, false) => check("balancer", "warn", problems.join("; "), "free the port, or choose another"),
    }
}

fn check(name: &str, state: &str, message: String, hint: &str) -> Check {
    let hint = if state == "ok" { "" } else { hint };
    Check { name: name.to_owned(), state: state.to_owned(), message, hint: hint.to_owned() }
}
