//! `Procfile`: one process a line, `name: command`. What it can't say has defaults.
//!
//! As elsewhere, `release` names no process but the command that runs once per release. The process `web` gets the
//! host `APP.localhost`. Dependencies are installed by what lies beside the Procfile.

use std::collections::{BTreeMap, BTreeSet};

use epagent_core::name::{AppName, ImageName, NameError, ProcessName};
use epagent_core::spec::{
    AppSpec, Check, HealthSpec, Limits, ProcessSpec, RouteMatch, RouteSpec, StopSpec, Strategy,
};

use super::error::{Source, quoted};
use super::{COMMAND_BYTES_MAX, MANIFEST_BYTES_MAX, ManifestError, process};

/// Files beside a Procfile that say how dependencies are installed.
pub const DEPENDENCY_FILES: [&str; 3] = ["requirements.txt", "package.json", "package-lock.json"];

/// Where Debian finds programs, behind what the app brought.
const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Reads a `Procfile`. `files`: which of [`DEPENDENCY_FILES`] lie beside it; others are ignored.
pub fn parse_procfile(
    file_name: &str,
    text: &str,
    app: AppName,
    image: ImageName,
    files: &[String],
) -> Result<AppSpec, ManifestError> {
    let source = Source { file: file_name, text };
    if text.len() > MANIFEST_BYTES_MAX {
        let message = format!("the Procfile has {} bytes; the most is {MANIFEST_BYTES_MAX}", text.len());
        return Err(source.error_nowhere(message));
    }
    let mut lines: BTreeMap<&str, Line<'_>> = BTreeMap::new();
    for line in lines_of(text) {
        let line = line_parts(source, line)?;
        if let Some(first) = lines.insert(line.name, line.clone()) {
            let error = source.error(line.name_span(), format!("{} is there twice", quoted(line.name)));
            return Err(error.with_help(format!("the first is on line {}", source.line_of(first.start))));
        }
    }
    let release = lines.remove("release").map(|line| line.command.to_owned());
    let mut processes = BTreeMap::new();
    let mut routes = Vec::new();
    for line in lines.values() {
        let name: ProcessName = line
            .name
            .parse()
            .map_err(|error: NameError| source.error(line.name_span(), error.to_string()))?;
        let is_web = line.name == "web";
        if is_web {
            let matches = RouteMatch::Host(format!("{app}.localhost"));
            routes.push(RouteSpec { matches, process: name.clone() });
        }
        processes.insert(name, process_spec(line.command, is_web));
    }
    match processes.len() {
        0 => {
            let error = source.error_nowhere("the Procfile names no process");
            return Err(error.with_help("add a line like `web: python3 app.py`"));
        }
        1..=process::PROCESSES_MAX => {}
        count => {
            let message = format!("there are {count} processes; the most is {}", process::PROCESSES_MAX);
            return Err(source.error_nowhere(message));
        }
    }
    let (build, env) = dependencies(files);
    let (secrets, volumes) = (BTreeSet::new(), BTreeMap::new());
    Ok(AppSpec { app, image, secrets, build, release, env, processes, volumes, routes })
}

#[derive(Debug, Clone)]
struct Line<'t> {
    name: &'t str,
    command: &'t str,
    /// Where the name begins, in bytes from the beginning of the text.
    start: usize,
}

impl Line<'_> {
    fn name_span(&self) -> std::ops::Range<usize> {
        self.start..self.start + self.name.len()
    }
}

/// Lines that say something, each with the place where it begins.
fn lines_of(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut at = 0;
    text.split_inclusive('\n').filter_map(move |line| {
        let start = at + (line.len() - line.trim_start().len());
        at += line.len();
        let line = line.trim();
        (!line.is_empty() && !line.starts_with('#')).then_some((start, line))
    })
}

fn line_parts<'t>(source: Source<'t>, (start, line): (usize, &'t str)) -> Result<Line<'t>, ManifestError> {
    let whole = start..start + line.len();
    const HELP: &str = "a line is a name, a colon and a command: `web: python3 app.py`";
    let Some((name, command)) = line.split_once(':') else {
        return Err(source.error(whole, "there is no colon in this line").with_help(HELP));
    };
    let (name, command) = (name.trim_end(), command.trim());
    if name.is_empty() {
        return Err(source.error(start..start + 1, "there is no name before the colon").with_help(HELP));
    }
    let after_colon = whole.end - command.len()..whole.end;
    if command.is_empty() {
        return Err(source.error(whole, format!("{} has no command", quoted(name))).with_help(HELP));
    }
    if command.contains('\0') {
        return Err(source.error(after_colon, "the command contains a NUL byte"));
    }
    if command.len() > COMMAND_BYTES_MAX {
        let message = format!("the command has {} bytes; the most is {COMMAND_BYTES_MAX}", command.len());
        return Err(source.error(after_colon, message).with_help("put it in a script"));
    }
    Ok(Line { name, command, start })
}

fn process_spec(command: &str, is_web: bool) -> ProcessSpec {
    ProcessSpec {
        command: command.to_owned(),
        instances: 1,
        sleep: None,
        listen: Default::default(),
        deploy: Strategy::Overlap,
        stop: StopSpec::default(),
        health: HealthSpec::new(if is_web { Check::Tcp } else { Check::Running }),
        limits: Limits::default(),
    }
}

/// Build commands, and the environment in which what they install is found.
fn dependencies(files: &[String]) -> (Vec<String>, BTreeMap<String, String>) {
    let has = |name: &str| files.iter().any(|file| file == name);
    let mut build = Vec::new();
    let mut env = BTreeMap::new();
    let mut path = String::new();
    if has("requirements.txt") {
        build.push("python3 -m venv .venv".to_owned());
        build.push(
            ".venv/bin/pip install --no-cache-dir --disable-pip-version-check -r requirements.txt".to_owned(),
        );
        env.insert("VIRTUAL_ENV".to_owned(), "/app/.venv".to_owned());
        path.push_str("/app/.venv/bin:");
    }
    if has("package.json") {
        // `ci` installs exactly what the lock file says, and refuses to run without one.
        let install = if has("package-lock.json") { "ci" } else { "install" };
        build.push(format!("npm {install} --omit=dev"));
        path.push_str("/app/node_modules/.bin:");
    }
    if !path.is_empty() {
        env.insert("PATH".to_owned(), path + SYSTEM_PATH);
    }
    (build, env)
}
