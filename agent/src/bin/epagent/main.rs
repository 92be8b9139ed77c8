//! The `epagent` command.

#![deny(unsafe_code)]

mod dev;
mod failure;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

#[derive(Debug, Parser)]
#[command(version, about = "A small hosting platform", after_help = failure::EXIT_CODES)]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Run a whole node in the foreground from one folder
    Dev(dev::DevArgs),
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match &args.verb {
        Verb::Dev(args) => dev::run(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let _ = writeln!(std::io::stderr(), "{failure}");
            ExitCode::from(failure.status)
        }
    }
}
