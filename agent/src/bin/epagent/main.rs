//! The `epagent` command: what an operator has in hand.
//!
//! Two programs in one. `epagent dev` supervises a whole node and is single-threaded and synchronous, because it
//! forks ([`dev`]); `epagent init` sets up an installed one ([`setup`]). Every other command is a client of the agent's API ([`verbs`]), on a runtime with one thread.
//!
//! | module | |
//! |---|---|
//! | [`args`] | the command line |
//! | [`verbs`] | what each command does |
//! | [`client`] | the API over its unix socket |
//! | [`pack`] | the operator's files as streams |
//! | [`screen`], [`terminal`] | what people see and type |
//! | [`failure`] | how every command fails: one shape, documented statuses |
//! | [`shell`] | completions and manual pages |
//! | [`setup`] | `epagent init`, and what a node's configuration is made of |
//! | [`dev`] | a whole node in the foreground |

#![deny(unsafe_code)]

mod args;
mod client;
mod dev;
mod failure;
mod pack;
mod screen;
mod setup;
mod shell;
mod terminal;
mod verbs;

use std::process::ExitCode;

use clap::Parser;

use args::{Arguments, Verb};
use failure::{Failure, status};
use screen::Screen;

fn main() -> ExitCode {
    shell::complete();
    let arguments = Arguments::parse();
    let done = match &arguments.verb {
        Verb::Dev(args) => dev::run(args).map(|()| status::OK),
        Verb::Init(args) => setup::init::run(args).map(|()| status::OK),
        Verb::Completions(args) => shell::completions(&args.shell).map(|()| status::OK),
        Verb::Manual(args) => shell::manual(&args.folder).map(|()| status::OK),
        _ => run(arguments),
    };
    let status = done.unwrap_or_else(|failure| {
        Screen::stderr().say(&failure.to_string());
        failure.status
    });
    ExitCode::from(status)
}

fn run(arguments: Arguments) -> Result<u8, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| {
        Failure::new(status::FAILED, "system_error", format!("starting the runtime: {error}"), "")
    })?;
    runtime.block_on(verbs::run(arguments))
}
