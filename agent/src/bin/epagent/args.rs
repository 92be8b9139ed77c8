//! The command line.

mod debug;
mod front;

pub use debug::{DebugVerb, OfNode};
pub use front::{BalancerVerb, ConnectionsArgs, RouteVerb, TopArgs};

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use epagent_core::name::{AppName, DeployId, ImageName, ProcessName, ReleaseNumber, VolumeName};

use crate::dev::DevArgs;
use crate::failure::EXIT_CODES;
use crate::setup::init::InitArgs;

/// Where an installed agent is reached.
pub const SOCKET_DEFAULT: &str = "/run/epagent/admin.sock";

#[derive(Debug, Parser)]
#[command(name = "epagent", version, about = "A small hosting platform on one machine", after_help = EXIT_CODES)]
#[command(disable_help_subcommand = true, max_term_width = 110)]
pub struct Arguments {
    /// The agent's API socket
    #[arg(long, global = true, env = "EPAGENT_SOCKET", default_value = SOCKET_DEFAULT, value_name = "PATH")]
    pub socket: PathBuf,
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Deploy an app from a folder or an archive, or watch a deploy
    Deploy(DeployArgs),
    /// List instances
    Ps(OfApp),
    /// List apps
    Apps(Json),
    /// Show how the agent is, or one app
    Status(OfApp),
    /// Show what an app printed
    Logs(LogsArgs),
    /// Run a command in a running instance
    Exec(ExecArgs),
    /// Run a command in a new jail of the current release
    Run(RunArgs),
    /// Change how many instances run: `epagent scale shop web=3 worker=1`
    Scale(ScaleArgs),
    /// Replace every instance of an app
    Restart(AppWatch),
    /// Stop an app until it is started again
    Stop(AppWatch),
    /// Start an app that was stopped
    Start(AppWatch),
    /// Return to an older release
    Rollback(RollbackArgs),
    /// List the releases of an app
    Releases(AppJson),
    /// Show or change the configuration of an app
    Config(ConfigArgs),
    /// Set, unset or list secrets; their values are never shown
    #[command(subcommand)]
    Secrets(SecretsVerb),
    /// List or remove volumes
    #[command(subcommand)]
    Volume(VolumeVerb),
    /// Make, list or remove images
    #[command(subcommand)]
    Image(ImageVerb),
    /// List routes, or say what is done with a host or a port
    #[command(subcommand)]
    Route(RouteVerb),
    /// Show the balancer or its clients, or hand it over to a newer program
    #[command(subcommand)]
    Balancer(BalancerVerb),
    /// Watch the traffic of all routes, live
    Top(TopArgs),
    /// Show what happened
    Events(EventsArgs),
    /// Show what went wrong, counted
    Errors(Json),
    /// Remove an app with its releases, volumes, secrets and logs
    Destroy(DestroyArgs),
    /// Look for what keeps things from working
    Doctor(Json),
    /// Show what the node is made of, for those who look for a fault
    #[command(subcommand)]
    Debug(DebugVerb),
    /// Show the versions of the command and of the agent
    Version(Json),
    /// Explain an error code, or list all of them
    Explain(ExplainArgs),
    /// Set up this machine, once, after the package is installed
    Init(InitArgs),
    /// Run a whole node in the foreground from one folder
    Dev(DevArgs),
    /// Print the completion script of a shell: bash, zsh, fish
    Completions(CompletionsArgs),
    /// Write the manual pages below a folder
    #[command(hide = true)]
    Manual(ManualArgs),
    /// Explain a topic: exit-codes
    Help(HelpArgs),
}

#[derive(Debug, Args)]
pub struct Json {
    /// Print the agent's answer as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct OfApp {
    /// Of this app only
    pub app: Option<AppName>,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Args)]
pub struct AppJson {
    pub app: AppName,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Args)]
pub struct Watching {
    /// Do not wait until it is over
    #[arg(long)]
    pub detach: bool,
}

#[derive(Debug, Args)]
pub struct AppWatch {
    pub app: AppName,
    #[command(flatten)]
    pub watching: Watching,
}

#[derive(Debug, Args)]
pub struct DeployArgs {
    /// A folder with an epagent.toml or a Procfile, or a tar of one (plain, gzip or zstd)
    #[arg(required_unless_present_any = ["watch", "cancel"], value_name = "DIR|TAR")]
    pub source: Option<PathBuf>,
    /// Deploy as this app, whatever the manifest says
    #[arg(long, value_name = "NAME")]
    pub app: Option<AppName>,
    /// Build on this image, whatever the manifest says
    #[arg(long, value_name = "NAME")]
    pub image: Option<ImageName>,
    /// Watch a deploy that is under way
    #[arg(long, value_name = "N", value_parser = deploy_id)]
    #[arg(conflicts_with_all = ["source", "app", "image", "detach", "cancel"])]
    pub watch: Option<DeployId>,
    /// Cancel a deploy that is under way; what served goes on serving
    #[arg(long, value_name = "N", value_parser = deploy_id)]
    #[arg(conflicts_with_all = ["source", "app", "image", "detach"])]
    pub cancel: Option<DeployId>,
    #[command(flatten)]
    pub watching: Watching,
    /// Print the finished deploy as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct LogsArgs {
    pub app: AppName,
    /// Of this process only
    #[arg(long, short, value_name = "NAME")]
    pub process: Option<ProcessName>,
    /// How many of the last lines
    #[arg(long, short = 'n', value_name = "N")]
    pub lines: Option<u32>,
    /// Go on as lines come
    #[arg(long, short)]
    pub follow: bool,
    /// What a deploy's build and release commands printed
    #[arg(long, value_name = "dN", value_parser = deploy_id, conflicts_with = "process")]
    pub build: Option<DeployId>,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Args)]
pub struct ExecArgs {
    pub app: AppName,
    /// In this instance: its id, or process and index as in `web.0`
    #[arg(long, short, value_name = "ID")]
    pub instance: Option<String>,
    /// In an instance of this process
    #[arg(long, short, value_name = "NAME")]
    pub process: Option<ProcessName>,
    #[command(flatten)]
    pub command: CommandArgs,
}

#[derive(Debug, Args)]
pub struct RunArgs {
    pub app: AppName,
    #[command(flatten)]
    pub command: CommandArgs,
}

#[derive(Debug, Args)]
pub struct CommandArgs {
    /// With a terminal, even when this is none
    #[arg(long, short, conflicts_with = "no_terminal")]
    pub terminal: bool,
    /// Without a terminal, even when this is one
    #[arg(long, short = 'T')]
    pub no_terminal: bool,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub argv: Vec<String>,
}

#[derive(Debug, Args)]
pub struct ScaleArgs {
    pub app: AppName,
    /// How many instances of which process
    #[arg(required = true, value_name = "PROCESS=COUNT", value_parser = process_count)]
    pub counts: Vec<(ProcessName, u32)>,
    #[command(flatten)]
    pub watching: Watching,
}

#[derive(Debug, Args)]
pub struct RollbackArgs {
    pub app: AppName,
    /// The release to return to; without it, the one that served before
    pub release: Option<ReleaseNumber>,
    #[command(flatten)]
    pub watching: Watching,
}

#[derive(Debug, Args)]
pub struct ConfigArgs {
    pub app: AppName,
    #[command(subcommand)]
    pub change: Option<ConfigVerb>,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Subcommand)]
pub enum ConfigVerb {
    /// Set variables; an app that runs is deployed with them
    Set {
        #[arg(required = true, value_name = "NAME=VALUE", value_parser = assignment)]
        values: Vec<(String, String)>,
        #[command(flatten)]
        watching: Watching,
    },
    /// Unset variables
    Unset {
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
        #[command(flatten)]
        watching: Watching,
    },
    /// List variables
    Ls(Json),
}

#[derive(Debug, Subcommand)]
pub enum SecretsVerb {
    /// Set a secret; its value is read from standard input, or asked for on a terminal
    Set {
        app: AppName,
        name: String,
        /// Read the value from a file
        #[arg(long, value_name = "FILE")]
        from_file: Option<PathBuf>,
        #[command(flatten)]
        watching: Watching,
    },
    /// Unset secrets
    Unset {
        app: AppName,
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
        #[command(flatten)]
        watching: Watching,
    },
    /// List names and versions of secrets
    Ls(AppJson),
}

#[derive(Debug, Subcommand)]
pub enum VolumeVerb {
    /// List volumes
    Ls(OfApp),
    /// Remove a volume and what is in it
    Rm {
        app: AppName,
        volume: VolumeName,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum ImageVerb {
    /// List images
    Ls(Json),
    /// Make an image from a folder, a tar (plain, gzip or zstd) or an OCI layout
    Import {
        image: ImageName,
        #[arg(value_name = "DIR|TAR|OCI")]
        source: PathBuf,
    },
    /// Make an image from Debian packages
    Bootstrap {
        image: ImageName,
        /// Debian's release
        #[arg(long, default_value = "bookworm")]
        suite: String,
        /// Packages beside the essential ones
        #[arg(long, value_name = "PKG,…", value_delimiter = ',')]
        include: Vec<String>,
    },
    /// Remove an image that nothing uses
    Rm { image: ImageName },
}

#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Of this app only
    pub app: Option<AppName>,
    /// Only those after this number
    #[arg(long, value_name = "ID")]
    pub after: Option<i64>,
    /// Go on as they happen
    #[arg(long, short)]
    pub follow: bool,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Args)]
pub struct DestroyArgs {
    pub app: AppName,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
}

#[derive(Debug, Args)]
pub struct ExplainArgs {
    pub code: Option<String>,
}

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    pub shell: String,
}

#[derive(Debug, Args)]
pub struct ManualArgs {
    pub folder: PathBuf,
}

#[derive(Debug, Args)]
pub struct HelpArgs {
    /// A topic (`exit-codes`) or a command
    pub topic: Vec<String>,
}

/// `d12` and `12`.
fn deploy_id(text: &str) -> Result<DeployId, String> {
    let digits = text.strip_prefix('d').unwrap_or(text);
    match digits.parse() {
        Ok(number @ 1..) => Ok(DeployId(number)),
        _ => Err("a deploy is written d12 or 12".to_owned()),
    }
}

fn process_count(text: &str) -> Result<(ProcessName, u32), String> {
    let (process, count) = text.split_once('=').ok_or("it is written PROCESS=COUNT, as in web=3")?;
    let process = process.parse::<ProcessName>().map_err(|error| error.to_string())?;
    let count = count.parse().map_err(|_| format!("{count:?} is not a number of instances"))?;
    Ok((process, count))
}

fn assignment(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("it is written NAME=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(std::iter::once("epagent").chain(line.split_whitespace()))
    }

    #[test]
    fn the_definition_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn documented_lines_are_understood() {
        for line in [
            "deploy ./app",
            "deploy app.tar.zst --app shop --image py --detach",
            "deploy --watch 12",
            "deploy --watch d12",
            "deploy --cancel d12",
            "ps",
            "ps --json",
            "ps shop --json",
            "logs shop -f -n 20 --process web",
            "logs shop --build d3",
            "exec shop -- /bin/sh -c true",
            "exec shop --instance web.0 -T -- ls",
            "run shop -- python3 -V",
            "scale shop web=3 worker=1",
            "rollback shop",
            "rollback shop r7",
            "config shop",
            "config shop --json",
            "config shop set A=1 B=x=y",
            "config shop unset A B",
            "config shop ls --json",
            "secrets set shop TOKEN --from-file x",
            "secrets ls shop --json",
            "secrets unset shop A",
            "volume ls",
            "volume rm shop data --yes",
            "image ls --json",
            "image import tiny ./root",
            "image bootstrap py --include python3,python3-venv",
            "events shop -f",
            "destroy shop --yes",
            "balancer status --json",
            "balancer connections",
            "balancer connections shop --route shop.example -n 20 --json",
            "debug bundle --output x.tar.zst --etc /x",
            "debug config --etc /x --json",
            "balancer reload",
            "top --once",
            "top shop",
            "route ls --json",
            "route ls shop.example",
            "route set old.example --upstream 10.0.0.5:80 --upstream [fd00::5]:80",
            "route hold shop.example --max-age 5m --reason upgrade",
            "route release 5432",
            "route drain shop.example web.0 --wait",
            "route static *.example --file page.html --status 503",
            "route redirect old.example https://shop.example --status 301 --keep-path",
            "route clear shop.example",
            "route clear shop.example web.0",
            "explain wrong_port",
            "help exit-codes",
            "--socket /x/admin.sock status",
            "status --socket /x/admin.sock",
            "dev --state /x --http 127.0.0.1:0",
        ] {
            assert!(parse(line).is_ok(), "{line}: {:?}", parse(line).err().map(|error| error.to_string()));
        }
    }

    #[test]
    fn nonsense_is_refused_and_repeated() {
        for (line, word) in [
            ("scale shop web=many", "many"),
            ("scale shop web", "PROCESS=COUNT"),
            ("scale shop", "PROCESS=COUNT"),
            ("deploy", "DIR|TAR"),
            ("deploy x --watch 3", "--watch"),
            ("deploy --watch 3 --cancel 3", "--cancel"),
            ("deploy x --app=../etc", "app name \"../etc\" is not valid"),
            ("rollback shop r0", "r0"),
            ("config shop set =x", "NAME=VALUE"),
            ("exec shop", "COMMAND"),
            ("logs shop --build x", "d12"),
            ("frobnicate", "frobnicate"),
            ("route hold", "HOST|PORT"),
            ("route hold shop_:80", "shop_:80"),
            ("route hold shop.example --max-age soon", "30s"),
            ("route set shop.example", "--upstream"),
            ("route set shop.example --upstream example:80", "example:80"),
        ] {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.contains(word), "{line}: {error}");
        }
    }
}
