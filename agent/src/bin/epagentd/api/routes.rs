//! Routes: what is in force, and what operators say over what the apps ask for.
//!
//! A word is recorded first and then waited for until the balancer has taken it. One that the balancer refuses is taken
//! back, so that what is recorded is what is in force, or will be as soon as the balancer can be reached.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::{ConnectInfo, Path, State};
use axum::http::StatusCode;
use epagent_core::route::{BadWord, Word};
use epagent_core::spec::RouteMatch;
use epagent_store::{RouteDrain, RouteWord, Said};
use epagent_wire::api;
use epagent_wire::table::{self, UpstreamState};

use super::Peer;
use super::failure::{Failure, Result};
use crate::apps::{Apps, Parts};
use crate::clock;
use crate::routing::merge::{InForce, Source};
use crate::routing::{Picture, Settled};

pub async fn list(State(apps): State<Apps>) -> Result<Json<Vec<api::Route>>> {
    Ok(Json(rows(apps.parts(), None).await?))
}

pub async fn show(State(apps): State<Apps>, Path(target): Path<String>) -> Result<Json<api::Route>> {
    Ok(Json(row(apps.parts(), &target.parse()?).await?))
}

pub async fn say(
    State(apps): State<Apps>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(target): Path<String>,
    Json(say): Json<api::RouteSay>,
) -> Result<Json<api::Route>> {
    let parts = apps.parts();
    let target: RouteMatch = target.parse()?;
    say.word.check(&target)?;
    let said = said(peer, say.reason);
    let _turn = parts.routing.turn().await;
    let before = parts.store.route_say(&target, &say.word, &said).await?;
    if let Settled::Refused(why) = settle(parts, &target).await? {
        take_back(parts, &target, before, &said).await?;
        let message = format!("the balancer does not take this for {target}: {why}");
        return Err(Failure::conflict("route_refused", message, "nothing was changed; say it another way"));
    }
    Ok(Json(row(parts, &target).await?))
}

pub async fn release(
    State(apps): State<Apps>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(target): Path<String>,
    Json(release): Json<api::RouteRelease>,
) -> Result<Json<serde_json::Value>> {
    let parts = apps.parts();
    let target: RouteMatch = target.parse()?;
    let _turn = parts.routing.turn().await;
    let words = parts.store.route_words().await?;
    match words.iter().find(|word| word.target == target).map(|word| &word.word) {
        Some(Word::Hold { .. }) => {}
        other => {
            let is =
                other.map_or_else(|| "nothing was said about it".to_owned(), |word| format!("it {word}"));
            let message = format!("{target} is not held by an operator: {is}");
            return Err(Failure::conflict("not_held", message, "`epagent route ls` shows what is in force"));
        }
    }
    parts.store.route_unsay(&target, "route.release", &said(peer, release.reason)).await?;
    settle(parts, &target).await?;
    Ok(Json(serde_json::json!({})))
}

pub async fn drain(
    State(apps): State<Apps>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(target): Path<String>,
    Json(drain): Json<api::RouteDrain>,
) -> Result<Json<api::RouteUpstream>> {
    let parts = apps.parts();
    let target: RouteMatch = target.parse()?;
    let _turn = parts.routing.turn().await;
    let upstream = upstream_of(parts, &target, &drain.upstream).await?;
    let drain =
        RouteDrain { upstream: upstream.clone(), target: target.clone(), said: said(peer, drain.reason) };
    parts.store.route_drain(&drain).await?;
    settle(parts, &target).await?;
    let row = row(parts, &target).await?;
    let found = row.upstreams.into_iter().find(|row| row.id == upstream);
    // Between the two looks it may have ended, and then it has nothing any more.
    let gone = api::RouteUpstream {
        id: upstream,
        address: String::new(),
        state: "gone".to_owned(),
        in_flight: Some(0),
        drained: None,
    };
    Ok(Json(found.unwrap_or(gone)))
}

pub async fn clear(
    State(apps): State<Apps>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(target): Path<String>,
    Json(clear): Json<api::RouteClear>,
) -> Result<Json<serde_json::Value>> {
    let parts = apps.parts();
    let target: RouteMatch = target.parse()?;
    let said = said(peer, clear.reason);
    let _turn = parts.routing.turn().await;
    let upstream = match &clear.upstream {
        Some(text) => Some(upstream_of(parts, &target, text).await?),
        None => None,
    };
    let word = match &upstream {
        Some(_) => None,
        None => parts.store.route_unsay(&target, "route.clear", &said).await?,
    };
    let drains = parts.store.route_undrain(&target, upstream.as_deref(), &said).await?;
    if word.is_none() && drains.is_empty() {
        let what = upstream.unwrap_or_else(|| target.to_string());
        let hint = "`epagent route ls` shows what is in force";
        return Err(Failure::not_found(format!("nothing was said about {what}"), hint));
    }
    settle(parts, &target).await?;
    Ok(Json(serde_json::json!({})))
}

/// Has what is recorded now brought into force, and waits for that.
async fn settle(parts: &Parts, target: &RouteMatch) -> Result<Settled> {
    let change = parts.routing.reload(&parts.store).await?;
    match parts.routing.settled(change, &Source::Word(target.clone())).await {
        Settled::NotYet => Err(Failure::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "table_not_taken",
            format!("what was said about {target} is recorded, and the balancer has not taken it yet"),
            "it does as soon as it can; `epagent doctor` shows what keeps it",
        )),
        settled => Ok(settled),
    }
}

/// What was said before is said again, by those who said it.
async fn take_back(parts: &Parts, target: &RouteMatch, before: Option<RouteWord>, said: &Said) -> Result<()> {
    match before {
        Some(before) => drop(parts.store.route_say(target, &before.word, &before.said).await?),
        None => drop(parts.store.route_unsay(target, "route.refused", said).await?),
    }
    parts.routing.reload(&parts.store).await?;
    Ok(())
}

fn said(peer: Peer, why: String) -> Said {
    Said { who: peer.name(), why, at_ms: clock::now_ms() }
}

/// The id of an upstream in force, by its id, address, or an instance's place.
async fn upstream_of(parts: &Parts, target: &RouteMatch, text: &str) -> Result<String> {
    let picture = parts.routing.picture();
    let in_force = picture.wanted.in_force();
    let found = in_force.get(target).ok_or_else(|| no_route(target))?;
    let upstreams = found.route.upstreams();
    if let Some(upstream) = upstreams.iter().find(|upstream| upstream.id == text || upstream.address == text)
    {
        return Ok(upstream.id.clone());
    }
    for row in parts.store.instances_live(found.app).await? {
        let is_meant = format!("{}.{}", row.process, row.index) == text;
        if let Some(upstream) = upstreams.iter().find(|upstream| is_meant && upstream.id == row.jail.as_str())
        {
            return Ok(upstream.id.clone());
        }
    }
    let have: Vec<&str> = upstreams.iter().map(|upstream| upstream.id.as_str()).collect();
    let have = if have.is_empty() { "none".to_owned() } else { have.join(", ") };
    let message = format!("{target} has no upstream {text:?}; it has: {have}");
    Err(Failure::not_found(
        message,
        "name one of these, an instance as in `web.0`, or a backend by its address",
    ))
}

pub fn no_route(target: &RouteMatch) -> Failure {
    let hint = "`epagent route ls` lists what there is";
    Failure::not_found(format!("nothing leads from {target} anywhere"), hint)
}

async fn row(parts: &Parts, target: &RouteMatch) -> Result<api::Route> {
    rows(parts, Some(target)).await?.into_iter().next().ok_or_else(|| no_route(target))
}

/// The rows of all routes, or of one.
async fn rows(parts: &Parts, only: Option<&RouteMatch>) -> Result<Vec<api::Route>> {
    let picture = parts.routing.picture();
    let in_force = picture.wanted.in_force();
    let counts: BTreeMap<String, u64> = match parts.routing.balancer().status().await {
        Ok(status) => {
            let upstreams = status.upstreams.into_iter();
            upstreams.map(|up| (up.id, up.active_requests + up.active_connections)).collect()
        }
        Err(_) => BTreeMap::new(),
    };
    let mut rows = Vec::new();
    for (target, found) in in_force.iter().filter(|(target, _)| only.is_none_or(|only| only == *target)) {
        let since_ms = match (found.word, found.app) {
            (Some(word), _) => Some(word.said.at_ms),
            (None, Some(app)) => {
                let deploy = parts.store.deploy_serving(app).await?;
                deploy.map(|deploy| deploy.ended_at_ms.unwrap_or(deploy.created_at_ms))
            }
            (None, None) => None,
        };
        rows.push(api::Route {
            target: target.to_string(),
            action: kind(&found.route.action).to_owned(),
            route: found.route.id.clone(),
            app: found.app.map(ToString::to_string),
            word: found.word.map(|word| api::SaidWord { word: word.word.clone(), said: shown(&word.said) }),
            since: since_ms.map(clock::rfc3339),
            upstreams: upstreams(&picture, found, &counts),
            trouble: trouble(&picture, target, found),
        });
    }
    Ok(rows)
}

fn upstreams(
    picture: &Picture,
    found: &InForce<'_>,
    counts: &BTreeMap<String, u64>,
) -> Vec<api::RouteUpstream> {
    let shown = found.route.upstreams().iter().map(|upstream| api::RouteUpstream {
        id: upstream.id.clone(),
        address: upstream.address.clone(),
        state: match upstream.state {
            UpstreamState::Up => "up",
            UpstreamState::Draining => "draining",
            UpstreamState::Down => "down",
        }
        .to_owned(),
        in_flight: counts.get(&upstream.id).copied(),
        drained: picture.wanted.drains.get(&upstream.id).map(|drain| shown(&drain.said)),
    });
    shown.collect()
}

fn trouble(picture: &Picture, target: &RouteMatch, found: &InForce<'_>) -> Option<String> {
    let word = picture.why_refused.get(&Source::Word(target.clone()));
    let app = found.app.and_then(|app| picture.why_refused.get(&Source::App(app.clone())));
    let of_route = |problem: &&table::Problem| problem.route.as_ref() == Some(&found.route.id);
    let problem = picture.problems.iter().find(of_route).map(|problem| &problem.message);
    word.or(app).or(problem).cloned()
}

fn kind(action: &table::Action) -> &'static str {
    match action {
        table::Action::Proxy { .. } => "proxy",
        table::Action::Hold {} => "hold",
        table::Action::Static { .. } => "static",
        table::Action::Redirect { .. } => "redirect",
    }
}

fn shown(said: &Said) -> api::Said {
    api::Said { who: said.who.clone(), why: said.why.clone(), at: clock::rfc3339(said.at_ms) }
}

impl From<BadWord> for Failure {
    fn from(error: BadWord) -> Self {
        let hint = "a target is a host like shop.example or *.example, or a port";
        Failure::new(StatusCode::BAD_REQUEST, "bad_route", error.to_string(), hint)
    }
}
