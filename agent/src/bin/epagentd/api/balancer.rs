//! The balancer: what it says of itself, and its handover to a newer program.

use axum::Json;
use axum::extract::{ConnectInfo, Query, State};
use axum::http::StatusCode;
use epagent_wire::table;
use serde::Deserialize;

use super::Peer;
use super::failure::{Failure, Result};
use crate::apps::Apps;
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
