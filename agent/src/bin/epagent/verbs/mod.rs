//! What each command does: one file per subject.

mod apps;
mod balancer;
mod codes;
mod debug;
mod deploy;
mod doctor;
mod exec;
pub mod explain;
mod images;
mod logs;
mod routes;
mod settings;
mod stop;
mod system;
mod top;
mod watch;

use std::io::{self, Write};

use crate::args::{Arguments, Verb};
use crate::client::Client;
use crate::failure::{Failure, status};

/// How a command ends when it does not fail: with this status.
pub type Outcome = Result<u8, Failure>;

/// Runs everything but `dev`, which has no place beside an async runtime.
pub async fn run(arguments: Arguments) -> Outcome {
    let client = Client::new(&arguments.socket);
    match arguments.verb {
        Verb::Deploy(args) => deploy::deploy(&client, args).await,
        Verb::Ps(args) => apps::ps(&client, &args).await,
        Verb::Apps(json) => apps::list(&client, &json).await,
        Verb::Status(args) => system::status(&client, &args).await,
        Verb::Logs(args) => logs::logs(&client, &args).await,
        Verb::Exec(args) => exec::exec(&client, args).await,
        Verb::Run(args) => exec::run(&client, args).await,
        Verb::Scale(args) => apps::scale(&client, &args).await,
        Verb::Restart(args) => apps::restart(&client, &args).await,
        Verb::Stop(args) => stop::stop(&client, &args).await,
        Verb::Start(args) => apps::start(&client, &args).await,
        Verb::Rollback(args) => apps::rollback(&client, &args).await,
        Verb::Releases(args) => apps::releases(&client, &args).await,
        Verb::Config(args) => settings::config(&client, args).await,
        Verb::Secrets(verb) => settings::secrets(&client, verb).await,
        Verb::Volume(verb) => images::volume(&client, verb).await,
        Verb::Image(verb) => images::image(&client, verb).await,
        Verb::Route(verb) => routes::route(&client, verb).await,
        Verb::Balancer(verb) => balancer::balancer(&client, verb).await,
        Verb::Top(args) => top::top(&client, &args).await,
        Verb::Events(args) => system::events(&client, &args).await,
        Verb::Errors(json) => system::errors(&client, &json).await,
        Verb::Destroy(args) => stop::destroy(&client, &args).await,
        Verb::Doctor(json) => doctor::doctor(&client, &json).await,
        Verb::Debug(verb) => debug::debug(&client, verb).await,
        Verb::Version(json) => system::version(&client, &json).await,
        Verb::Explain(args) => explain::explain(&args),
        Verb::Help(args) => system::help(&args),
        // Taken by main before there is a runtime.
        Verb::Dev(_) | Verb::Init(_) | Verb::Completions(_) | Verb::Manual(_) => {
            Err(Failure::usage("this command is started by itself", ""))
        }
    }
}

/// The end of a command whose result could not be written: a reader that had enough is no failure.
pub fn written(result: io::Result<()>) -> Outcome {
    match result {
        Ok(()) => Ok(status::OK),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(status::OK),
        Err(error) => {
            Err(Failure::new(status::FAILED, "output_failed", format!("writing the result: {error}"), ""))
        }
    }
}

/// Prints the agent's answer to a read as it came.
async fn print_json(client: &Client, path: &str) -> Outcome {
    let bytes = client.get_bytes(path).await?;
    let mut out = io::stdout().lock();
    written(out.write_all(&bytes).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()))
}
