//! Configuration and secrets. A change to an app that runs is a deploy, and is watched like one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IsTerminal, Read};

use epagent_wire::api::{Deploy, Secret};
use hyper::Method;
use jiff::Timestamp;
use serde::Serialize;
use zeroize::Zeroizing;

use super::apps::app_path;
use super::watch::{Form, follow};
use super::{Outcome, print_json, written};
use crate::args::{AppJson, ConfigArgs, ConfigVerb, SecretsVerb, Watching};
use crate::client::Client;
use crate::failure::{Failure, status};
use crate::screen::{Screen, Table, age, cell};
use crate::terminal;

/// The longest secret.
const SECRET_BYTES_MAX: u64 = 64 << 10;

pub async fn config(client: &Client, args: ConfigArgs) -> Outcome {
    let path = format!("{}/config", app_path(&args.app));
    let (change, watching): (BTreeMap<String, Option<String>>, Watching) = match args.change {
        Some(ConfigVerb::Set { values, watching }) => {
            (values.into_iter().map(|(name, value)| (name, Some(value))).collect(), watching)
        }
        Some(ConfigVerb::Unset { names, watching }) => {
            (names.into_iter().map(|name| (name, None)).collect(), watching)
        }
        Some(ConfigVerb::Ls(json)) => return list_config(client, &path, json.json || args.json.json).await,
        None => return list_config(client, &path, args.json.json).await,
    };
    change_settings(client, &path, &change, &watching).await
}

async fn list_config(client: &Client, path: &str, json: bool) -> Outcome {
    if json {
        return print_json(client, path).await;
    }
    let values: BTreeMap<String, String> = client.get(path).await?;
    if values.is_empty() {
        Screen::stderr().say("nothing is configured");
    }
    let screen = Screen::stdout();
    written(
        values.iter().try_for_each(|(name, value)| screen.line(&screen.foreign(&format!("{name}={value}")))),
    )
}

pub async fn secrets(client: &Client, verb: SecretsVerb) -> Outcome {
    match verb {
        SecretsVerb::Set { app, name, from_file, watching } => {
            if name.contains('=') {
                let hint = "give the value on standard input, or by --from-file";
                let message = "a value on the command line can be read by every user of this machine";
                return Err(Failure::usage(message, hint));
            }
            let value = match from_file {
                Some(path) => {
                    let read = File::open(&path).and_then(read_secret);
                    read.map_err(|error| unreadable(&path.display().to_string(), &error))?
                }
                None if io::stdin().is_terminal() => terminal::ask_secret(&name)?,
                None => read_secret(io::stdin()).map_err(|error| unreadable("standard input", &error))?,
            };
            if value.is_empty() {
                let hint = "an empty value is most often a slip; `epagent secrets unset` removes a secret";
                return Err(Failure::new(
                    status::FAILED,
                    "empty_secret",
                    format!("the value of {name} is empty"),
                    hint,
                ));
            }
            let change = BTreeMap::from([(name, Some(value.as_str()))]);
            change_settings(client, &format!("{}/secrets", app_path(&app)), &change, &watching).await
        }
        SecretsVerb::Unset { app, names, watching } => {
            let change: BTreeMap<String, Option<String>> =
                names.into_iter().map(|name| (name, None)).collect();
            change_settings(client, &format!("{}/secrets", app_path(&app)), &change, &watching).await
        }
        SecretsVerb::Ls(args) => list_secrets(client, &args).await,
    }
}

async fn list_secrets(client: &Client, args: &AppJson) -> Outcome {
    let path = format!("{}/secrets", app_path(&args.app));
    if args.json.json {
        return print_json(client, &path).await;
    }
    let list: Vec<Secret> = client.get(&path).await?;
    let now = Timestamp::now();
    let mut table = Table::new(&["NAME", "VERSION", "SET"]);
    for secret in &list {
        table.row(vec![
            cell(&secret.name),
            cell(format!("v{}", secret.version)),
            cell(format!("{} ago", age(&secret.set_at, now))),
        ]);
    }
    written(table.print("no secrets are set"))
}

async fn change_settings(
    client: &Client,
    path: &str,
    change: &impl Serialize,
    watching: &Watching,
) -> Outcome {
    let deploy: Option<Deploy> = client.send(Method::PATCH, path, Some(change)).await?;
    match deploy {
        Some(deploy) => follow(client, &deploy, watching, Form::Text).await,
        None => written(Screen::stdout().line("set; the app takes it when it is deployed or started next")),
    }
}

/// The value without the newline that `echo` puts behind it.
fn read_secret(from: impl Read) -> io::Result<Zeroizing<String>> {
    let mut value = Zeroizing::new(String::new());
    from.take(SECRET_BYTES_MAX + 1).read_to_string(&mut value)?;
    if value.len() as u64 > SECRET_BYTES_MAX {
        return Err(io::Error::other(format!("it is longer than {SECRET_BYTES_MAX} bytes")));
    }
    let length =
        value.strip_suffix('\n').map_or(value.len(), |text| text.strip_suffix('\r').unwrap_or(text).len());
    value.truncate(length);
    Ok(value)
}

fn unreadable(what: &str, error: &io::Error) -> Failure {
    Failure::new(
        status::FAILED,
        "no_secret",
        format!("reading the value from {what}: {error}"),
        "nothing was changed",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_newline_at_the_end_is_not_the_secrets() {
        for (text, value) in
            [("a", "a"), ("a\n", "a"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("a b\nc", "a b\nc")]
        {
            assert_eq!(read_secret(text.as_bytes()).unwrap().as_str(), value);
        }
        assert!(read_secret(io::repeat(b'x')).is_err());
        assert!(read_secret(&b"\xff"[..]).is_err());
    }
}
