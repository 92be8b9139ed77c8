//! `epagent logs`: what an app printed, and goes on printing.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use epagent_wire::api::LogLine;
use hyper::Method;
use tokio::time::Instant;

use super::apps::app_path;
use super::{Outcome, written};
use crate::args::LogsArgs;
use crate::client::{CallError, Client, RETRY_WAIT};
use crate::failure::{Failure, status};
use crate::screen::{Screen, Tone};

/// How long the agent may stay away while logs are followed.
const AWAY_MAX: Duration = Duration::from_secs(60);
/// Lines that are asked for after the agent was away; those shown before are left out.
const LINES_AFTER_BREAK: u32 = 1_000;

pub async fn logs(client: &Client, args: &LogsArgs) -> Outcome {
    let mut printed = Printed { screen: Screen::stdout(), json: args.json.json, last: HashMap::new() };
    let mut lines = args.lines;
    let mut away_since: Option<Instant> = None;
    loop {
        match printed.pass(client, &path(args, lines)).await {
            Ok(()) if !args.follow => return Ok(status::OK),
            Ok(()) => away_since = None,
            Err(Stop::Output(error)) => return written(Err(error)),
            Err(Stop::Call(error)) if args.follow && error.may_pass() => {}
            Err(Stop::Call(error)) => return Err(error.into()),
        }
        let since = *away_since.get_or_insert_with(Instant::now);
        if since.elapsed() > AWAY_MAX {
            let message = format!("the agent has been away for {} s", AWAY_MAX.as_secs());
            return Err(Failure::new(
                status::UNREACHABLE,
                "agent_unreachable",
                message,
                "apps run on; follow again",
            ));
        }
        lines = Some(LINES_AFTER_BREAK);
        tokio::time::sleep(RETRY_WAIT).await;
    }
}

fn path(args: &LogsArgs, lines: Option<u32>) -> String {
    let mut path = format!("{}/logs?follow={}", app_path(&args.app), args.follow);
    if let Some(process) = &args.process {
        path.push_str(&format!("&process={process}"));
    }
    if let Some(lines) = lines {
        path.push_str(&format!("&lines={lines}"));
    }
    if let Some(build) = args.build {
        path.push_str(&format!("&build={build}"));
    }
    path
}

enum Stop {
    Output(io::Error),
    Call(CallError),
}

struct Printed {
    screen: Screen,
    json: bool,
    /// The time of the last line of each instance.
    last: HashMap<String, String>,
}

impl Printed {
    async fn pass(&mut self, client: &Client, path: &str) -> Result<(), Stop> {
        let mut lines = client.lines(Method::GET, path, None::<&()>).await.map_err(Stop::Call)?;
        // Only what was shown before this connection is left out: two lines may have one time.
        let before = self.last.clone();
        while let Some(raw) = lines.next_line().await.map_err(Stop::Call)? {
            let Ok(line) = serde_json::from_slice::<LogLine>(&raw) else {
                continue;
            };
            if before.get(&line.instance).is_some_and(|last| line.at <= *last) {
                continue;
            }
            self.print(&line, &raw).map_err(Stop::Output)?;
            self.last.insert(line.instance, line.at);
        }
        Ok(())
    }

    fn print(&self, line: &LogLine, raw: &Bytes) -> io::Result<()> {
        if self.json {
            return self.screen.line(&String::from_utf8_lossy(raw));
        }
        let head = format!("{} {}.{}", line.at, line.process, line.index);
        let tone = if line.stream == "stderr" { Tone::Warn } else { Tone::Dim };
        self.screen.line(&format!("{} {}", self.screen.paint(tone, &head), self.screen.foreign(&line.line)))
    }
}
