//! The agent itself: how it is, what happened, what went wrong, which version.

use clap::CommandFactory;
use epagent_wire::api::{App, ErrorRow, Event, Status, Version};
use hyper::Method;
use jiff::Timestamp;

use super::apps::{app_path, processes};
use super::{Outcome, print_json, written};
use crate::args::{Arguments, EventsArgs, HelpArgs, Json, OfApp};
use crate::client::Client;
use crate::failure::{EXIT_CODES, Failure, status};
use crate::screen::{Screen, Table, Tone, age, cell, size, state_cell};

pub async fn status(client: &Client, args: &OfApp) -> Outcome {
    let Some(app) = &args.app else {
        return node_status(client, &args.json).await;
    };
    let path = app_path(app);
    if args.json.json {
        return print_json(client, &path).await;
    }
    let app: App = client.get(&path).await?;
    let screen = Screen::stdout();
    let (state, tone) = state_cell(&app.state);
    let none = || "-".to_owned();
    let facts = [
        ("app", app.app.clone()),
        ("state", screen.paint(tone, &state).into_owned()),
        ("release", app.release.map_or_else(none, |release| format!("r{release}"))),
        ("processes", processes(&app)),
        ("routes", if app.routes.is_empty() { none() } else { app.routes.join(" ") }),
        ("made", format!("{} ago", age(&app.created_at, Timestamp::now()))),
        ("deploy", app.deploy.map_or_else(none, |deploy| format!("d{deploy} is under way"))),
        ("trouble", app.trouble.map_or_else(none, |trouble| screen.foreign(&trouble).into_owned())),
    ];
    written(facts.iter().try_for_each(|(name, value)| screen.line(&format!("{name:<10} {value}"))))
}

async fn node_status(client: &Client, json: &Json) -> Outcome {
    if json.json {
        return print_json(client, "/v1/status").await;
    }
    let node: Status = client.get("/v1/status").await?;
    let screen = Screen::stdout();
    let pool = format!("{} of {} used", size(node.pool_used_bytes), size(node.pool_total_bytes));
    let facts = [
        ("epagent", format!("{}, node {}", node.version, node.node)),
        ("up", format!("{} s", node.uptime_seconds)),
        ("apps", format!("{}, {} instances", node.apps, node.instances)),
        ("pool", pool),
        ("table", format!("version {}", node.table_version)),
    ];
    let parts = node.parts.iter().map(|(name, how)| {
        let tone = if how.starts_with("ok") { Tone::Good } else { Tone::Bad };
        format!("  {name:<14} {}", screen.paint(tone, how))
    });
    let lines = facts.iter().map(|(name, value)| format!("{name:<10} {value}"));
    written(lines.chain(["parts".to_owned()]).chain(parts).try_for_each(|line| screen.line(&line)))
}

pub async fn events(client: &Client, args: &EventsArgs) -> Outcome {
    let mut path = format!("/v1/events?follow={}", args.follow);
    if let Some(app) = &args.app {
        path.push_str(&format!("&app={app}"));
    }
    if let Some(after) = args.after {
        path.push_str(&format!("&after={after}"));
    }
    let screen = Screen::stdout();
    if !args.follow {
        if args.json.json {
            return print_json(client, &path).await;
        }
        let list: Vec<Event> = client.get(&path).await?;
        if list.is_empty() {
            Screen::stderr().say("nothing has happened yet");
        }
        return written(list.iter().try_for_each(|event| screen.line(&event_line(&screen, event))));
    }
    let mut lines = client.lines(Method::GET, &path, None::<&()>).await?;
    while let Some(line) = lines.next_line().await? {
        let text = match args.json.json {
            true => String::from_utf8_lossy(&line).into_owned(),
            false => match serde_json::from_slice::<Event>(&line) {
                Ok(event) => event_line(&screen, &event),
                Err(_) => continue,
            },
        };
        if let Err(error) = screen.line(&text) {
            return written(Err(error));
        }
    }
    let message = "the agent went away while its events were followed";
    Err(Failure::new(
        status::UNREACHABLE,
        "agent_unreachable",
        message,
        "follow again from the last number: --after ID",
    ))
}

fn event_line(screen: &Screen, event: &Event) -> String {
    let subject = match (&event.app, event.deploy) {
        (Some(app), Some(deploy)) => format!("{app} d{deploy}"),
        (Some(app), None) => app.clone(),
        _ => "-".to_owned(),
    };
    let head = format!("{:>5} {} {:<20}", event.id, event.at, event.kind);
    format!("{} {subject}: {}", screen.paint(Tone::Dim, &head), screen.foreign(&event.message))
}

pub async fn errors(client: &Client, json: &Json) -> Outcome {
    if json.json {
        return print_json(client, "/v1/errors").await;
    }
    let list: Vec<ErrorRow> = client.get("/v1/errors").await?;
    let now = Timestamp::now();
    let mut table = Table::new(&["CODE", "SUBJECT", "COUNT", "LAST", "MESSAGE"]);
    for row in &list {
        table.row(vec![
            (row.code.clone(), Tone::Bad),
            cell(&row.subject),
            cell(row.count.to_string()),
            cell(format!("{} ago", age(&row.last_at, now))),
            cell(row.message.lines().next().unwrap_or_default()),
        ]);
    }
    written(table.print("no errors"))
}

pub async fn version(client: &Client, json: &Json) -> Outcome {
    let own = env!("CARGO_PKG_VERSION");
    let agent = client.get::<Version>("/v1/version").await;
    let screen = Screen::stdout();
    if json.json {
        let value = serde_json::json!({ "client": own, "agent": agent.ok() });
        return written(screen.line(&value.to_string()));
    }
    let said = match agent {
        Ok(agent) => {
            let runner = agent.runner.unwrap_or_else(|| "not reached".to_owned());
            format!("agent      {} (node {}), runner {runner}", agent.version, agent.node)
        }
        Err(_) => format!("agent      none answers at {}", client.socket().display()),
    };
    written(screen.line(&format!("epagent    {own}")).and_then(|()| screen.line(&said)))
}

pub fn help(args: &HelpArgs) -> Outcome {
    let screen = Screen::stdout();
    if args.topic == ["exit-codes"] {
        return written(screen.line(EXIT_CODES));
    }
    let mut command = Arguments::command();
    command.build();
    for word in &args.topic {
        let Some(found) = command.find_subcommand(word).cloned() else {
            let message = format!("there is no command or topic {word:?}");
            return Err(Failure::usage(
                message,
                "`epagent help` lists the commands; the one topic is exit-codes",
            ));
        };
        command = found;
    }
    written(screen.line(command.render_long_help().to_string().trim_end()))
}
