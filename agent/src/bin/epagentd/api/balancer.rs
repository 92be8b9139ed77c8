//! The balancer: what it says of itself and of its clients, and its handover to a newer program.

use std::collections::BTreeSet;

use axum::Json;
use axum::extract::{ConnectInfo, Query, State};
use axum::http::StatusCode;
use epagent_core::spec::RouteMatch;
use epagent_wire::table;
use serde::Deserialize;

use super::Peer;
use super::apps::find;
use super::failure::{Failure, Result};
use super::routes::no_route;
use crate::apps::{Apps, Parts};
use crate::balancer::BalancerError;
use crate::clock;
use crate::supervise::chain;

#[derive(Deserialize)]
pub struct StatusQuery {
    #[serde(default)]
    latency: bool,
}

pub async fn status(
    State(apps): State<Apps>,
    Query(query): Query<StatusQuery>,
) -> Result<Json<table::Status>> {
    Ok(Json(apps.parts().routing.balancer().status_with(query.latency).await?))
}

/// Rows of one answer. The balancer gives fewer at a time, so that no other question waits for long.
const ROWS_DEFAULT: usize = 1_000;
const ROWS_MAX: usize = 10_000;

#[derive(Deserialize)]
pub struct ConnectionsQuery {
    app: Option<String>,
    /// What it matches.
    route: Option<String>,
    limit: Option<usize>,
    after: Option<u64>,
}

pub async fn connections(
    State(apps): State<Apps>,
    Query(query): Query<ConnectionsQuery>,
) -> Result<Json<table::Connections>> {
    let parts = apps.parts();
    let limit = query.limit.unwrap_or(ROWS_DEFAULT).clamp(1, ROWS_MAX);
    let routes = match wanted_routes(parts, &query).await? {
        // To the balancer no route means every one.
        Some(routes) if routes.is_empty() => return Ok(Json(table::Connections::default())),
        routes => routes.unwrap_or_default(),
    };
    let mut all = table::Connections { rows: Vec::new(), next: query.after };
    loop {
        let left = limit - all.rows.len();
        let page = table::ConnectionsQuery { limit: left, after: all.next, routes: routes.clone() };
        let page = parts.routing.balancer().connections(page).await?;
        all.rows.extend(page.rows);
        all.next = page.next;
        if all.next.is_none() || all.rows.len() >= limit {
            return Ok(Json(all));
        }
    }
}

/// The ids of the routes that are asked for; none when it is not by routes that is asked.
async fn wanted_routes(parts: &Parts, query: &ConnectionsQuery) -> Result<Option<BTreeSet<String>>> {
    let target: Option<RouteMatch> = query.route.as_deref().map(str::parse).transpose()?;
    let app = match &query.app {
        Some(app) => Some(find(parts, app).await?.app),
        None => None,
    };
    if target.is_none() && app.is_none() {
        return Ok(None);
    }
    let picture = parts.routing.picture();
    let in_force = picture.wanted.in_force();
    if let Some(target) = target.as_ref().filter(|target| !in_force.contains_key(target)) {
        return Err(no_route(target));
    }
    let asked = in_force.iter().filter(|(matches, found)| {
        target.as_ref().is_none_or(|target| target == *matches)
            && (app.is_none() || found.app == app.as_ref())
    });
    Ok(Some(asked.map(|(_, found)| found.route.id.clone()).collect()))
}

pub async fn reload(
    State(apps): State<Apps>,
    ConnectInfo(peer): ConnectInfo<Peer>,
) -> Result<Json<table::Reloaded>> {
    let parts = apps.parts();
    let reloaded = parts.routing.balancer().reload().await?;
    let message = format!("the balancer is process {} now, by {}", reloaded.pid, peer.name());
    parts.store.event_add(None, None, "balancer.reload", &message, clock::now_ms()).await?;
    Ok(Json(reloaded))
}

impl From<BalancerError> for Failure {
    fn from(error: BalancerError) -> Self {
        match &error {
            BalancerError::Refused { .. } => {
                let hint = "see the balancer's log; what it has serves on";
                Failure::conflict("balancer_refused", chain(&error), hint)
            }
            _ => Failure::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "balancer_away",
                chain(&error),
                "its supervisor restarts it; try again in a moment, then see its log",
            ),
        }
    }
}
