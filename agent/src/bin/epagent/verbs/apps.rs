//! Apps and their instances: listing them, and what is wanted of them.

use std::collections::BTreeMap;
use std::time::Duration;

use epagent_core::name::AppName;
use epagent_wire::api::{App, Deploy, Instance, Release, Rollback, Scale};
use hyper::Method;
use jiff::Timestamp;
use tokio::time::Instant;

use super::watch::{Form, follow};
use super::{Outcome, print_json, written};
use crate::args::{AppJson, AppWatch, Json, OfApp, RollbackArgs, ScaleArgs};
use crate::client::{Client, RETRY_WAIT};
use crate::failure::{Failure, status};
use crate::screen::{Screen, Table, Tone, age, cell, size, state_cell};

/// How long `scale` waits for the instances.
const SCALE_WAIT_MAX: Duration = Duration::from_secs(120);

pub fn app_path(app: &AppName) -> String {
    // A name is a path segment as it is: letters, digits and hyphens.
    format!("/v1/apps/{app}")
}

pub async fn ps(client: &Client, args: &OfApp) -> Outcome {
    let path = match &args.app {
        Some(app) => format!("/v1/instances?app={app}"),
        None => "/v1/instances".to_owned(),
    };
    if args.json.json {
        return print_json(client, &path).await;
    }
    let list: Vec<Instance> = client.get(&path).await?;
    let now = Timestamp::now();
    let mut table = Table::new(&[
        "APP",
        "INSTANCE",
        "RELEASE",
        "STATE",
        "PID",
        "UP",
        "RESTARTS",
        "ADDRESS",
        "ID",
        "LAST EXIT",
    ]);
    for row in &list {
        table.row(vec![
            cell(&row.app),
            cell(format!("{}.{}", row.process, row.index)),
            cell(format!("r{}", row.release)),
            state_cell(&row.state),
            cell(row.pid.map(|pid| pid.to_string()).unwrap_or_else(|| "-".to_owned())),
            cell(row.started_at.as_deref().map_or("-".to_owned(), |at| age(at, now))),
            cell(row.restarts.to_string()),
            cell(row.address.as_deref().unwrap_or("-")),
            cell(&row.id),
            cell(row.last_exit.as_deref().unwrap_or("-")),
        ]);
    }
    written(table.print("no instances; `epagent apps` lists apps, `epagent deploy DIR` makes one"))
}

pub async fn list(client: &Client, json: &Json) -> Outcome {
    if json.json {
        return print_json(client, "/v1/apps").await;
    }
    let list: Vec<App> = client.get("/v1/apps").await?;
    let mut table = Table::new(&["APP", "STATE", "RELEASE", "PROCESSES", "ROUTES", "TROUBLE"]);
    for app in &list {
        table.row(vec![
            cell(&app.app),
            state_cell(&app.state),
            cell(app.release.map_or("-".to_owned(), |release| format!("r{release}"))),
            cell(processes(app)),
            cell(if app.routes.is_empty() { "-".to_owned() } else { app.routes.join(" ") }),
            (trouble(app), Tone::Warn),
        ]);
    }
    written(table.print("no apps yet; `epagent deploy DIR` makes one"))
}

/// `web 2/3 worker 1/1`: healthy of wanted.
pub fn processes(app: &App) -> String {
    let shown =
        app.processes.iter().map(|(name, status)| format!("{name} {}/{}", status.healthy, status.wanted));
    let shown: Vec<String> = shown.collect();
    if shown.is_empty() { "-".to_owned() } else { shown.join(" ") }
}

fn trouble(app: &App) -> String {
    match (&app.trouble, app.deploy) {
        (Some(trouble), _) => trouble.lines().next().unwrap_or_default().to_owned(),
        (None, Some(deploy)) => format!("d{deploy} is under way"),
        (None, None) => String::new(),
    }
}

pub async fn releases(client: &Client, args: &AppJson) -> Outcome {
    let path = format!("{}/releases", app_path(&args.app));
    if args.json.json {
        return print_json(client, &path).await;
    }
    let list: Vec<Release> = client.get(&path).await?;
    let now = Timestamp::now();
    let mut table = Table::new(&["RELEASE", "STATE", "IMAGE", "CONFIG", "AGE", "SIZE"]);
    for release in &list {
        table.row(vec![
            cell(format!("r{}", release.release)),
            state_cell(&release.state),
            cell(&release.image),
            cell(format!("v{}", release.config_version)),
            cell(age(&release.created_at, now)),
            cell(release.bytes.map_or("-".to_owned(), size)),
        ]);
    }
    written(table.print("no releases yet"))
}

pub async fn restart(client: &Client, args: &AppWatch) -> Outcome {
    let deploy: Deploy = client.order(Method::POST, &format!("{}/restart", app_path(&args.app))).await?;
    follow(client, &deploy, &args.watching, Form::Text).await
}

pub async fn start(client: &Client, args: &AppWatch) -> Outcome {
    let deploy: Deploy = client.order(Method::POST, &format!("{}/start", app_path(&args.app))).await?;
    follow(client, &deploy, &args.watching, Form::Text).await
}

pub async fn rollback(client: &Client, args: &RollbackArgs) -> Outcome {
    let body = Rollback { release: args.release.map(|release| release.0) };
    let path = format!("{}/rollback", app_path(&args.app));
    let deploy: Deploy = client.send(Method::POST, &path, Some(&body)).await?;
    follow(client, &deploy, &args.watching, Form::Text).await
}

pub async fn scale(client: &Client, args: &ScaleArgs) -> Outcome {
    let counts: BTreeMap<String, u32> =
        args.counts.iter().map(|(process, count)| (process.to_string(), *count)).collect();
    let path = format!("{}/scale", app_path(&args.app));
    let body = Scale { processes: counts.clone() };
    let app: App = client.send(Method::POST, &path, Some(&body)).await?;
    if args.watching.detach || app.state == "stopped" {
        return written(Screen::stdout().line(&format!("{} is to have: {}", app.app, wanted(&counts))));
    }
    let begun = Instant::now();
    let mut shown = String::new();
    loop {
        let app: App = client.get(&app_path(&args.app)).await?;
        let now = processes(&app);
        if now != shown {
            Screen::stderr().say(&format!("  {now}"));
            shown = now;
        }
        if is_reached(&app, &counts) {
            return written(Screen::stdout().line(&format!("{} has: {}", app.app, wanted(&counts))));
        }
        if begun.elapsed() > SCALE_WAIT_MAX {
            let message = format!("{} is not there after {} s: {shown}", app.app, SCALE_WAIT_MAX.as_secs());
            let hint = "the agent goes on; `epagent ps` and `epagent logs` show why it takes so long";
            return Err(Failure::new(status::FAILED, "not_scaled", message, hint));
        }
        tokio::time::sleep(RETRY_WAIT).await;
    }
}

fn is_reached(app: &App, counts: &BTreeMap<String, u32>) -> bool {
    counts.iter().all(|(process, count)| {
        app.processes.get(process).is_some_and(|status| status.running == *count && status.healthy == *count)
    })
}

fn wanted(counts: &BTreeMap<String, u32>) -> String {
    counts.iter().map(|(process, count)| format!("{process} {count}")).collect::<Vec<_>>().join(", ")
}
