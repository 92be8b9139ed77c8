//! Routes: what is in force, and what the operator says over it.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use epagent_core::route::{HOLD_MS_DEFAULT, PAGE_BYTES_MAX, Word};
use epagent_core::spec::RouteMatch;
use epagent_wire::api::{Route, RouteClear, RouteDrain, RouteRelease, RouteSay, RouteUpstream};
use hyper::Method;
use jiff::Timestamp;

use super::{Outcome, print_json, written};
use crate::args::{Json, RouteVerb};
use crate::client::{Client, encoded};
use crate::failure::{Failure, status};
use crate::screen::{Screen, Table, Tone, age, cell, state_cell};

/// How often a drain is looked at that is waited for.
const DRAIN_INTERVAL: Duration = Duration::from_millis(250);

pub async fn route(client: &Client, verb: RouteVerb) -> Outcome {
    match verb {
        RouteVerb::Ls { target: None, json } => list(client, &json).await,
        RouteVerb::Ls { target: Some(target), json } => show(client, &target, &json).await,
        RouteVerb::Set { target, upstreams, reason } => {
            say(client, &target, Word::Proxy { backends: upstreams }, reason.reason).await
        }
        RouteVerb::Hold { target, max_age, reason } => {
            let word = Word::Hold { max_age_ms: max_age.unwrap_or(HOLD_MS_DEFAULT) };
            say(client, &target, word, reason.reason).await
        }
        RouteVerb::Static { target, file, status, content_type, reason } => {
            let content_type = content_type.unwrap_or_else(|| content_type_of(&file).to_owned());
            let word = Word::Static { status, content_type, body: page(&file)? };
            say(client, &target, word, reason.reason).await
        }
        RouteVerb::Redirect { target, url, status, keep_path, reason } => {
            say(client, &target, Word::Redirect { to: url, status, keep_path }, reason.reason).await
        }
        RouteVerb::Release { target, reason } => {
            let body = RouteRelease { reason: reason.reason };
            change(client, &target, "release", &body).await?;
            written(Screen::stdout().line(&format!("{target} is released")))
        }
        RouteVerb::Drain { target, upstream, wait, reason } => {
            drain(client, &target, RouteDrain { upstream, reason: reason.reason }, wait).await
        }
        RouteVerb::Clear { target, upstream, reason } => {
            let what = upstream.clone().unwrap_or_else(|| target.to_string());
            change(client, &target, "clear", &RouteClear { upstream, reason: reason.reason }).await?;
            written(Screen::stdout().line(&format!("{what} is as if nothing had been said about it")))
        }
    }
}

fn path(target: &RouteMatch) -> String {
    format!("/v1/routes/{}", encoded(&target.to_string()))
}

async fn say(client: &Client, target: &RouteMatch, word: Word, reason: String) -> Outcome {
    let said = format!("{target} {word}");
    let route: Route = client.send(Method::PUT, &path(target), Some(&RouteSay { word, reason })).await?;
    if let Some(trouble) = &route.trouble {
        let screen = Screen::stderr();
        screen.say(&screen.paint(Tone::Warn, &format!("not wholly in force: {trouble}")));
    }
    written(Screen::stdout().line(&said))
}

async fn change(
    client: &Client,
    target: &RouteMatch,
    verb: &str,
    body: &impl serde::Serialize,
) -> Result<(), Failure> {
    let path = format!("{}/{verb}", path(target));
    let _: serde_json::Value = client.send(Method::POST, &path, Some(body)).await?;
    Ok(())
}

/// Takes an upstream out of the balancer. Ctrl-C ends the waiting and not the drain.
async fn drain(client: &Client, target: &RouteMatch, body: RouteDrain, wait: bool) -> Outcome {
    let drained: RouteUpstream =
        client.send(Method::POST, &format!("{}/drain", path(target)), Some(&body)).await?;
    let screen = Screen::stdout();
    warn_if_last(client, target).await;
    let Some(left) = drained.in_flight.filter(|left| *left > 0) else {
        return written(screen.line(&format!("{} is drained and has nothing left", drained.id)));
    };
    let line = format!("{} is drained; it still has {left} requests or connections", drained.id);
    if !wait {
        return written(screen.line(&line));
    }
    Screen::stderr().say(&line);
    tokio::select! {
        empty = until_empty(client, target, &drained.id) => empty?,
        _ = tokio::signal::ctrl_c() => return Ok(status::INTERRUPTED),
    }
    written(screen.line(&format!("{} has nothing left", drained.id)))
}

async fn until_empty(client: &Client, target: &RouteMatch, id: &str) -> Result<(), Failure> {
    loop {
        tokio::time::sleep(DRAIN_INTERVAL).await;
        let route: Route = client.get(&path(target)).await?;
        match route.upstreams.iter().find(|upstream| upstream.id == id) {
            // Its instance has ended.
            None => return Ok(()),
            Some(upstream) if upstream.in_flight == Some(0) => return Ok(()),
            Some(_) => {}
        }
    }
}

/// Nobody is left to take requests: they are held. A courtesy only.
async fn warn_if_last(client: &Client, target: &RouteMatch) {
    if let Ok(route) = client.get::<Route>(&path(target)).await
        && !route.upstreams.iter().any(|upstream| upstream.state == "up")
    {
        let screen = Screen::stderr();
        let text = format!("nothing else of {target} is up: its requests are held");
        screen.say(&screen.paint(Tone::Warn, &text));
    }
}

async fn list(client: &Client, json: &Json) -> Outcome {
    if json.json {
        return print_json(client, "/v1/routes").await;
    }
    let list: Vec<Route> = client.get("/v1/routes").await?;
    let now = Timestamp::now();
    let mut table = Table::new(&["ROUTE", "ACTION", "TO", "APP", "SINCE", "BY", "WHY"]);
    for route in &list {
        let said = route.word.as_ref().map(|word| &word.said);
        let drained = route.upstreams.iter().find_map(|upstream| upstream.drained.as_ref());
        let by = said.or(drained);
        let why = match &route.trouble {
            Some(trouble) => (trouble.clone(), Tone::Warn),
            None => cell(by.map_or("", |said| &said.why)),
        };
        table.row(vec![
            cell(&route.target),
            (route.action.clone(), if route.word.is_some() { Tone::Bold } else { Tone::Plain }),
            cell(leads_to(route)),
            cell(route.app.as_deref().unwrap_or("-")),
            cell(route.since.as_deref().map_or("-".to_owned(), |at| age(at, now))),
            cell(by.map_or("-", |said| &said.who)),
            why,
        ]);
    }
    written(table.print("no routes; an app's manifest makes one, and so does `epagent route set`"))
}

async fn show(client: &Client, target: &RouteMatch, json: &Json) -> Outcome {
    if json.json {
        return print_json(client, &path(target)).await;
    }
    let route: Route = client.get(&path(target)).await?;
    let screen = Screen::stdout();
    let none = || "-".to_owned();
    let now = Timestamp::now();
    let in_force = match &route.word {
        Some(word) => format!("{target} {}", word.word),
        None => format!("the app's own route: {}", leads_to(&route)),
    };
    let said = |said: &epagent_wire::api::Said| match said.why.as_str() {
        "" => format!("{} ago by {}", age(&said.at, now), said.who),
        why => format!("{} ago by {}: {why}", age(&said.at, now), said.who),
    };
    let facts = [
        ("route", format!("{} ({})", route.target, route.route)),
        ("in force", in_force),
        ("app", route.app.clone().unwrap_or_else(none)),
        ("since", route.since.as_deref().map_or_else(none, |at| format!("{} ago", age(at, now)))),
        ("said", route.word.as_ref().map_or_else(none, |word| said(&word.said))),
        ("trouble", route.trouble.clone().unwrap_or_else(none)),
    ];
    let lines = facts.iter().map(|(name, value)| format!("{name:<10} {}", screen.foreign(value)));
    written(lines.into_iter().try_for_each(|line| screen.line(&line)))?;
    if route.upstreams.is_empty() {
        return Ok(status::OK);
    }
    let mut table = Table::new(&["UPSTREAM", "ADDRESS", "STATE", "IN FLIGHT", "DRAINED"]);
    for upstream in &route.upstreams {
        table.row(vec![
            cell(&upstream.id),
            cell(&upstream.address),
            state_cell(&upstream.state),
            cell(upstream.in_flight.map_or_else(none, |count| count.to_string())),
            cell(upstream.drained.as_ref().map_or_else(none, said)),
        ]);
    }
    written(table.print(""))
}

/// `2 up, 1 draining`; what a word says, for one that leads nowhere.
fn leads_to(route: &Route) -> String {
    match &route.word {
        Some(word) if !matches!(word.word, Word::Proxy { .. }) => return word.word.to_string(),
        _ => {}
    }
    let count = |state| route.upstreams.iter().filter(|upstream| upstream.state == state).count();
    let shown: Vec<String> = ["up", "draining", "down"]
        .into_iter()
        .map(|state| (count(state), state))
        .filter(|(count, _)| *count > 0)
        .map(|(count, state)| format!("{count} {state}"))
        .collect();
    if shown.is_empty() { "nothing is up".to_owned() } else { shown.join(", ") }
}

/// The page's text. What is no text can't be a page.
fn page(file: &Path) -> Result<String, Failure> {
    let mut text = String::new();
    let read =
        File::open(file).and_then(|file| file.take(PAGE_BYTES_MAX as u64 + 1).read_to_string(&mut text));
    match read {
        Ok(_) if text.len() <= PAGE_BYTES_MAX => Ok(text),
        Ok(_) => {
            let message = format!("{} is longer than {} KiB", file.display(), PAGE_BYTES_MAX >> 10);
            Err(Failure::new(status::FAILED, "no_page", message, "serve larger pages by an app"))
        }
        Err(error) => {
            let message = format!("reading the page {}: {error}", file.display());
            Err(Failure::new(status::FAILED, "no_page", message, "nothing was changed"))
        }
    }
}

fn content_type_of(file: &Path) -> &'static str {
    match file.extension().and_then(|ending| ending.to_str()) {
        Some("txt") => "text/plain; charset=utf-8",
        Some("json") => "application/json",
        Some("xml") => "application/xml",
        Some("svg") => "image/svg+xml",
        _ => "text/html; charset=utf-8",
    }
}
