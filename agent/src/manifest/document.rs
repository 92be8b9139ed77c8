//! The whole of `epagent.toml`.

use std::collections::{BTreeMap, BTreeSet};

use epagent_core::name::{NameError, ProcessName};
use epagent_core::spec::{AppSpec, Strategy};
use toml::de::DeTable;

use super::error::{Source, quoted};
use super::table::{Item, Table};
use super::variable::check_variable;
use super::{COMMAND_BYTES_MAX, MANIFEST_BYTES_MAX, ManifestError, Overrides, process, route, volume};

/// Commands of one build.
const BUILD_COMMANDS_MAX: usize = 64;
/// Secrets an app may name.
const SECRETS_MAX: usize = 128;
/// Variables in `[env]`; with the configuration and what the agent sets, the runner takes 512.
const ENV_MAX: usize = 256;
/// Names and values of `[env]` together; all of it travels in one packet to the runner.
const ENV_BYTES_MAX: usize = 32 << 10;

/// Reads `epagent.toml`. `file_name` is what messages call it.
pub fn parse_toml(file_name: &str, text: &str, overrides: &Overrides) -> Result<AppSpec, ManifestError> {
    let source = Source { file: file_name, text };
    if text.len() > MANIFEST_BYTES_MAX {
        let message = format!("the manifest has {} bytes; the most is {MANIFEST_BYTES_MAX}", text.len());
        return Err(source.error_nowhere(message));
    }
    let document = DeTable::parse(text).map_err(|error| syntax(source, &error))?;
    let top = Table::of_document(source, document.get_ref());
    top.only(&["app", "image", "secrets", "build", "release", "env", "process", "volume", "route"])?;

    let app = named(&top, "app", "app = \"shop\"", &overrides.app)?;
    let image = named(&top, "image", "image = \"NAME\"", &overrides.image)?;
    let secrets = secrets(&top)?;
    let env = env(&top, &secrets)?;
    let volumes = volume::volumes(&top)?;
    let names = process_names(&top)?;
    let routes = route::routes(&top, &names)?;
    let mut processes = BTreeMap::new();
    for (name, table) in names {
        let is_routed = routes.iter().any(|route| route.process == name);
        let process = process::process(&table, is_routed, default_strategy(volumes.is_empty()))?;
        processes.insert(name, process);
    }
    let build = build(&top)?;
    let release = release(&top)?;
    Ok(AppSpec { app, image, secrets, build, release, env, processes, volumes, routes })
}

fn syntax(source: Source<'_>, error: &toml::de::Error) -> ManifestError {
    let message = error.message().lines().collect::<Vec<_>>().join(", ");
    match error.span() {
        Some(span) => source.error(span, message),
        None => source.error_nowhere(message),
    }
}

/// A name the command line may give in the manifest's place. One that is in the manifest is checked all the same.
fn named<T>(top: &Table<'_>, key: &str, example: &str, given: &Option<T>) -> Result<T, ManifestError>
where
    T: std::str::FromStr<Err = NameError> + Clone,
{
    let item = match (top.get(key), given) {
        (None, Some(given)) => return Ok(given.clone()),
        (Some(item), _) => item,
        (None, None) => top.require(key, example)?,
    };
    let name = item.string()?.parse().map_err(|error: NameError| item.error(error.to_string()))?;
    Ok(given.clone().unwrap_or(name))
}

fn secrets(top: &Table<'_>) -> Result<BTreeSet<String>, ManifestError> {
    let mut secrets = BTreeSet::new();
    let Some(list) = top.get("secrets") else { return Ok(secrets) };
    for item in list.elements("a list of names").map_err(|error| match list.table() {
        Ok(_) => error.with_help("the manifest only names secrets; `epagent secrets set` gives them values"),
        Err(_) => error,
    })? {
        let name = item.string()?;
        check_variable(name)
            .map_err(|reason| item.error(format!("{} can't be a secret's name: {reason}", quoted(name))))?;
        if !secrets.insert(name.to_owned()) {
            return Err(item.error(format!("the secret {} is named twice", quoted(name))));
        }
    }
    if secrets.len() > SECRETS_MAX {
        return Err(list.error(format!("there are {} secrets; the most is {SECRETS_MAX}", secrets.len())));
    }
    Ok(secrets)
}

fn env(top: &Table<'_>, secrets: &BTreeSet<String>) -> Result<BTreeMap<String, String>, ManifestError> {
    let mut env = BTreeMap::new();
    let Some(table) = top.get("env") else { return Ok(env) };
    let items = table.table()?.named();
    if items.len() > ENV_MAX {
        return Err(table.error(format!("`[env]` has {} variables; the most is {ENV_MAX}", items.len())));
    }
    let mut bytes = 0;
    for item in items {
        check_variable(item.key)
            .map_err(|reason| item.error_at_key(format!("{} can't be set: {reason}", quoted(item.key))))?;
        if secrets.contains(item.key) {
            let error = item.error_at_key(format!("{} is a secret as well", quoted(item.key)));
            return Err(error.with_help("leave it in `secrets` or in `[env]`"));
        }
        let value = item.string()?;
        bytes += item.key.len() + value.len();
        if bytes > ENV_BYTES_MAX {
            return Err(item.error_at_key(format!("`[env]` has more than {ENV_BYTES_MAX} bytes up to here")));
        }
        env.insert(item.key.to_owned(), value.to_owned());
    }
    Ok(env)
}

fn build(top: &Table<'_>) -> Result<Vec<String>, ManifestError> {
    let Some(item) = top.get("build") else { return Ok(Vec::new()) };
    let table = item.table()?;
    table.only(&["run"])?;
    let Some(run) = table.get("run") else { return Ok(Vec::new()) };
    let commands: Vec<String> = run.strings()?.iter().map(command).collect::<Result<_, _>>()?;
    if commands.len() > BUILD_COMMANDS_MAX {
        return Err(
            run.error(format!("there are {} commands; the most is {BUILD_COMMANDS_MAX}", commands.len()))
        );
    }
    Ok(commands)
}

fn release(top: &Table<'_>) -> Result<Option<String>, ManifestError> {
    let Some(item) = top.get("release") else { return Ok(None) };
    let table = item.table()?;
    table.only(&["run"])?;
    table.get("run").map(|run| command(&run)).transpose()
}

/// A shell command.
pub(super) fn command(item: &Item<'_>) -> Result<String, ManifestError> {
    let text = item.string()?;
    if text.trim().is_empty() {
        return Err(item.error(format!("`{}` is empty", item.path)));
    }
    if text.len() > COMMAND_BYTES_MAX {
        let message = format!("`{}` has {} bytes; the most is {COMMAND_BYTES_MAX}", item.path, text.len());
        return Err(item.error(message).with_help("put it in a script"));
    }
    Ok(text.to_owned())
}

fn process_names<'d>(top: &Table<'d>) -> Result<Vec<(ProcessName, Table<'d>)>, ManifestError> {
    const EXAMPLE: &str = "[process.web]";
    let all = top.require("process", EXAMPLE).map_err(|error| {
        error.with_help("an app has at least one process: add `[process.web]` with its `command`")
    })?;
    let table = all.table().map_err(|error| error.with_help(format!("name each process: `{EXAMPLE}`")))?;
    let mut processes = Vec::new();
    for item in table.named() {
        let fields =
            item.table().map_err(|error| error.with_help(format!("name the process: `{EXAMPLE}`")))?;
        let name = item.key.parse().map_err(|error: NameError| item.error_at_key(error.to_string()))?;
        processes.push((name, fields));
    }
    match processes.len() {
        0 => Err(table.error("there is no process").with_help("add `[process.web]` with its `command`")),
        1..=process::PROCESSES_MAX => Ok(processes),
        count => {
            Err(table.error(format!("there are {count} processes; the most is {}", process::PROCESSES_MAX)))
        }
    }
}

fn default_strategy(without_volumes: bool) -> Strategy {
    if without_volumes { Strategy::Overlap } else { Strategy::Replace }
}
