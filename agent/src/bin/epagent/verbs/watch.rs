//! Watching a deploy until it is over.
//!
//! ```text
//!   connect ─▶ lines ─▶ over ─▶ summary, or verdict and exit code 3
//!      ▲         │
//!      └─────────┘ the agent went away: again from the last step that was shown, for up to a minute
//! ```
//!
//! Ctrl-C ends the watching and never the deploy.

use std::time::Duration;

use epagent_core::phase::Phase;
use epagent_core::verdict::Verdict;
use epagent_wire::api::{App, Deploy, DeployStep, DeployUpdate, Version};
use hyper::Method;
use jiff::Timestamp;
use tokio::time::Instant;

use super::{Outcome, written};
use crate::args::Watching;
use crate::client::{CallError, Client, RETRY_WAIT, encoded};
use crate::failure::{Failure, status};
use crate::screen::{Screen, Tone};

/// How long the agent may stay away in the middle of a watch.
const AWAY_MAX: Duration = Duration::from_secs(60);

/// How the finished deploy is told on stdout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Text,
    Json,
}

/// Follows a deploy that was begun, unless it is to be left alone.
pub async fn follow(client: &Client, deploy: &Deploy, watching: &Watching, form: Form) -> Outcome {
    if watching.detach {
        Screen::stderr()
            .say(&format!("d{} is under way; watch it: epagent deploy --watch {}", deploy.id, deploy.id));
        return match form {
            Form::Text => written(Screen::stdout().line(&format!("d{}", deploy.id))),
            Form::Json => print_deploy(deploy),
        };
    }
    watch(client, deploy, form).await
}

/// Watches until it is over or somebody presses Ctrl-C.
pub async fn watch(client: &Client, deploy: &Deploy, form: Form) -> Outcome {
    let screen = Screen::stderr();
    screen.say(&format!("{} {} as r{} (d{})", doing(&deploy.kind), deploy.app, deploy.release, deploy.id));
    let over = tokio::select! {
        over = until_over(client, deploy, &screen) => over?,
        _ = tokio::signal::ctrl_c() => {
            screen.say(&format!("\nd{} goes on; watch it again: epagent deploy --watch {}", deploy.id, deploy.id));
            return Ok(status::INTERRUPTED);
        }
    };
    if form == Form::Json {
        print_deploy(&over)?;
    }
    match over.verdict {
        Some(verdict) => Err(tell_verdict(&screen, &over.app, verdict)),
        None if over.phase == Phase::Failed => {
            let message = format!("d{} failed without a verdict", over.id);
            Err(Failure::new(status::DEPLOY_FAILED, "agent_error", message, "see `epagent errors`"))
        }
        None if form == Form::Text => summary(client, &over).await,
        None => Ok(status::OK),
    }
}

async fn until_over(client: &Client, deploy: &Deploy, screen: &Screen) -> Result<Deploy, Failure> {
    let mut shown = Shown { screen, begun: deploy.created_at.parse().ok(), last: 0, printed: 0 };
    let mut away_since: Option<Instant> = None;
    loop {
        let seen = shown.last;
        match shown.follow(client, deploy.id).await {
            Ok(Some(over)) => return Ok(*over),
            // It ended without an end: the agent was stopped.
            Ok(None) => {}
            Err(error) if error.may_pass() => {}
            Err(error) => return Err(error.into()),
        }
        let since = match away_since {
            Some(since) if shown.last == seen => since,
            _ => Instant::now(),
        };
        if away_since.is_none() {
            screen.say(&screen.paint(Tone::Warn, "the agent went away; waiting for it"));
        }
        away_since = Some(since);
        if since.elapsed() > AWAY_MAX {
            let message = format!(
                "the agent has been away for {} s; d{} goes on when it is back",
                AWAY_MAX.as_secs(),
                deploy.id
            );
            let hint = format!("watch it again: epagent deploy --watch {}", deploy.id);
            return Err(Failure::new(status::UNREACHABLE, "agent_unreachable", message, hint));
        }
        tokio::time::sleep(RETRY_WAIT).await;
    }
}

/// What was shown already, so that it is not shown again after the agent was away.
struct Shown<'a> {
    screen: &'a Screen,
    begun: Option<Timestamp>,
    /// The sequence number of the last step.
    last: i64,
    /// Lines of output: a new watcher is told those of all jobs once more.
    printed: usize,
}

impl Shown<'_> {
    async fn follow(&mut self, client: &Client, id: i64) -> Result<Option<Box<Deploy>>, CallError> {
        let path = format!("/v1/deploys/{id}/watch?from={}", self.last);
        let mut lines = client.lines(Method::GET, &path, None::<&()>).await?;
        let mut skip = std::mem::take(&mut self.printed);
        while let Some(update) = lines.next().await? {
            match update {
                DeployUpdate::Step(step) => {
                    self.last = step.sequence;
                    self.step(&step);
                }
                DeployUpdate::Output { line } => {
                    self.printed += 1;
                    if skip > 0 {
                        skip -= 1;
                        continue;
                    }
                    let line = self.screen.foreign(&line).into_owned();
                    self.screen.say(&self.screen.paint(Tone::Dim, &format!("           | {line}")));
                }
                DeployUpdate::Over(deploy) => return Ok(Some(deploy)),
            }
        }
        Ok(None)
    }

    fn step(&self, step: &DeployStep) {
        let passed = match (self.begun, step.at.parse::<Timestamp>()) {
            (Some(begun), Ok(at)) => at.as_millisecond() - begun.as_millisecond(),
            _ => 0,
        };
        let tone = match step.phase {
            Phase::Done => Tone::Good,
            Phase::Failed => Tone::Bad,
            _ => Tone::Bold,
        };
        let phase = format!("{:<10}", step.phase.as_str());
        let time = format!("{:>3}.{} s", passed / 1000, (passed % 1000) / 100);
        let note = self.screen.foreign(&step.note);
        self.screen.say(format!("  {time}  {} {note}", self.screen.paint(tone, &phase)).trim_end());
    }
}

fn doing(kind: &str) -> &'static str {
    match kind {
        "rollback" => "rolling back",
        "restart" => "restarting",
        "start" => "starting",
        "config" => "reconfiguring",
        _ => "deploying",
    }
}

/// What failed, in the shape of every other error, with the last lines the failed part printed.
fn tell_verdict(screen: &Screen, app: &str, verdict: Verdict) -> Failure {
    if !verdict.log.is_empty() {
        screen.say("");
        screen.say(&screen.paint(Tone::Bold, "the last lines it printed:"));
        for line in &verdict.log {
            screen.say(&format!("  | {}", screen.foreign(line)));
        }
        screen.say("");
    }
    let message = format!("deploying {app} failed while {}: {}", verdict.phase, verdict.message);
    let message = screen.foreign(&message).into_owned();
    Failure::new(status::DEPLOY_FAILED, verdict.code, message, verdict.hint)
}

/// The one line of a result: what serves now, and where.
async fn summary(client: &Client, deploy: &Deploy) -> Outcome {
    let mut line = format!("{} r{} is live", deploy.app, deploy.release);
    // Only a courtesy: the deploy is done, whoever answers.
    let app = client.get::<App>(&format!("/v1/apps/{}", encoded(&deploy.app))).await;
    let version = client.get::<Version>("/v1/version").await;
    if let (Ok(app), Ok(version)) = (app, version) {
        let addresses: Vec<String> =
            app.routes.iter().map(|route| address(route, &version.http_address)).collect();
        if !addresses.is_empty() {
            line.push_str(&format!(": {}", addresses.join(" ")));
        }
    }
    written(Screen::stdout().line(&line))
}

/// `http://shop.localhost:8080` for a route by host, `port 5432` as it is.
fn address(route: &str, http_address: &str) -> String {
    if route.starts_with("port ") {
        return route.to_owned();
    }
    match http_address.rsplit_once(':') {
        Some((_, "80")) | None => format!("http://{route}"),
        Some((_, port)) => format!("http://{route}:{port}"),
    }
}

fn print_deploy(deploy: &Deploy) -> Outcome {
    match serde_json::to_string(deploy) {
        Ok(text) => written(Screen::stdout().line(&text)),
        Err(error) => Err(Failure::new(status::FAILED, "output_failed", error.to_string(), "")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_can_be_clicked() {
        assert_eq!(address("shop.localhost", "127.0.0.1:8080"), "http://shop.localhost:8080");
        assert_eq!(address("shop.example", "0.0.0.0:80"), "http://shop.example");
        assert_eq!(address("port 5432", "127.0.0.1:8080"), "port 5432");
    }
}
