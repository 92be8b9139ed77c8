//! Stopping an app, and destroying it: both wait until it is so.

use std::time::Duration;

use epagent_wire::api::{App, Instance};
use hyper::Method;
use tokio::time::Instant;

use super::apps::app_path;
use super::{Outcome, written};
use crate::args::{AppWatch, DestroyArgs};
use crate::client::{CallError, Client, RETRY_WAIT};
use crate::failure::{Failure, status};
use crate::screen::Screen;
use crate::terminal;

/// How long instances may take to end: the longest grace there is, ten minutes, and a little.
const WAIT_MAX: Duration = Duration::from_secs(620);

pub async fn stop(client: &Client, args: &AppWatch) -> Outcome {
    let app: App = client.order(Method::POST, &format!("{}/stop", app_path(&args.app))).await?;
    if args.watching.detach {
        return written(Screen::stdout().line(&format!("{} is stopping", app.app)));
    }
    let path = format!("/v1/instances?app={}", args.app);
    let what = format!("{} is not stopped", args.app);
    until(&what, async || {
        let list: Vec<Instance> = client.get(&path).await?;
        Ok(list.iter().all(|instance| instance.state == "exited"))
    })
    .await?;
    written(
        Screen::stdout()
            .line(&format!("{} is stopped; `epagent start {}` starts it again", app.app, app.app)),
    )
}

pub async fn destroy(client: &Client, args: &DestroyArgs) -> Outcome {
    let path = app_path(&args.app);
    // Also so that nobody is asked about an app that does not exist.
    let app: App = client.get(&path).await?;
    let what = format!("destroying {} removes its instances, releases, volumes, secrets and logs", app.app);
    terminal::confirm(&what, args.app.as_str(), args.yes)?;
    let _: serde_json::Value = client.order(Method::DELETE, &path).await?;
    let what = format!("{} is not gone", args.app);
    until(&what, async || match client.get_bytes(&path).await {
        Ok(_) => Ok(false),
        Err(error) if error.is_not_found() => Ok(true),
        Err(error) => Err(error),
    })
    .await?;
    written(Screen::stdout().line(&format!("{} is destroyed", app.app)))
}

/// Asks until the answer is yes. An agent that goes away for a moment comes back to its work.
async fn until(what: &str, mut is_so: impl AsyncFnMut() -> Result<bool, CallError>) -> Result<(), Failure> {
    let begun = Instant::now();
    loop {
        match is_so().await {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(error) if error.may_pass() => {}
            Err(error) => return Err(error.into()),
        }
        if begun.elapsed() > WAIT_MAX {
            let message = format!("{what} after {} s", WAIT_MAX.as_secs());
            return Err(Failure::new(
                status::FAILED,
                "takes_long",
                message,
                "`epagent ps` shows what is left",
            ));
        }
        tokio::time::sleep(RETRY_WAIT).await;
    }
}
