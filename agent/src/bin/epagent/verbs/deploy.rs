//! `epagent deploy`: find the manifest, look through the files, announce, stream, watch.
//!
//! Everything that can be wrong with the operator's files is found before the agent is told anything.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use epagent::manifest::DEPENDENCY_FILES;
use epagent_core::name::DeployId;
use epagent_wire::api::{ARCHIVE_BYTES_MAX, Deploy, Manifest, NewDeploy};
use hyper::Method;
use tokio::time::Instant;

use super::watch::{self, Form, follow};
use super::{Outcome, written};
use crate::args::DeployArgs;
use crate::client::{Body, CallError, Client, RETRY_WAIT};
use crate::failure::{Failure, status};
use crate::pack::PackError;
use crate::pack::archive::{self, TEXT_BYTES_MAX};
use crate::pack::stream::{Packing, body_of};
use crate::pack::tree::{Purpose, Tree};
use crate::screen::{Screen, size};

const TOML: &str = "epagent.toml";
const PROCFILE: &str = "Procfile";
/// How often an upload is begun again, and for how long, when the agent goes away in the middle of it.
const UPLOAD_TRIES: u32 = 5;
const UPLOAD_AWAY_MAX: Duration = Duration::from_secs(60);
/// How long a deploy whose upload failed may take to be canceled, before the failure is told all the same.
const CANCEL_WAIT_MAX: Duration = Duration::from_secs(5);

pub async fn deploy(client: &Client, args: DeployArgs) -> Outcome {
    let form = if args.json { Form::Json } else { Form::Text };
    if let Some(id) = args.watch {
        let deploy: Deploy = client.get(&format!("/v1/deploys/{}", id.0)).await?;
        return watch::watch(client, &deploy, form).await;
    }
    if let Some(id) = args.cancel {
        let deploy = cancel(client, id).await?;
        return written(Screen::stdout().line(&format!("{id} of {} is canceled", deploy.app)));
    }
    let Some(path) = args.source else {
        return Err(Failure::usage("nothing to deploy was named", "epagent deploy DIR"));
    };
    let source = Source::open(&path)?;
    let new = NewDeploy {
        app: args.app.map(Into::into),
        manifest: source.manifest()?,
        image: args.image.map(Into::into),
    };
    let deploy: Deploy = client.send(Method::POST, "/v1/deploys", Some(&new)).await?;
    let sent = tokio::select! {
        sent = upload(client, &deploy, &source) => sent,
        _ = tokio::signal::ctrl_c() => {
            let message = format!("the upload of d{} was cut short", deploy.id);
            Err(Failure::new(status::INTERRUPTED, "interrupted", message, "nothing was changed"))
        }
    };
    match sent {
        Ok(deploy) => follow(client, &deploy, &args.watching, form).await,
        Err(failure) => {
            // Without its archive it would stand in the way of the next one until the agent gives it up by itself.
            let canceled = cancel(client, DeployId(deploy.id));
            let _ = tokio::time::timeout(CANCEL_WAIT_MAX, canceled).await;
            Err(failure)
        }
    }
}

async fn cancel(client: &Client, id: DeployId) -> Result<Deploy, Failure> {
    Ok(client.order(Method::DELETE, &format!("/v1/deploys/{}", id.0)).await?)
}

/// What is deployed. Cloned for each try to send it.
#[derive(Debug, Clone)]
enum Source {
    Folder { path: PathBuf, tree: std::sync::Arc<Tree> },
    Archive { path: PathBuf, bytes: u64 },
}

impl Source {
    fn open(path: &Path) -> Result<Self, Failure> {
        let unreadable = |source: io::Error| {
            let message = format!("{} can't be deployed: {source}", path.display());
            let hint = "name a folder with an epagent.toml or a Procfile, or a tar of one";
            Failure::new(status::FAILED, "no_source", message, hint)
        };
        let meta = path.metadata().map_err(unreadable)?;
        if meta.is_dir() {
            // Before the look through it, which takes longer.
            if !path.join(TOML).exists() && !path.join(PROCFILE).exists() {
                return Err(no_manifest(path));
            }
            let tree = Tree::look_through(path, Purpose::App)?;
            return Ok(Source::Folder { path: path.to_owned(), tree: tree.into() });
        }
        if !meta.is_file() {
            return Err(unreadable(io::Error::other("it is neither a folder nor a file")));
        }
        if meta.len() > ARCHIVE_BYTES_MAX {
            let message = format!(
                "{} has {}, more than the {} that are taken",
                path.display(),
                size(meta.len()),
                size(ARCHIVE_BYTES_MAX)
            );
            return Err(Failure::new(
                status::FAILED,
                "too_large",
                message,
                "leave out what the app does not need",
            ));
        }
        Ok(Source::Archive { path: path.to_owned(), bytes: meta.len() })
    }

    fn manifest(&self) -> Result<Manifest, Failure> {
        match self {
            Source::Folder { path, tree } => {
                let read = |name: &str| {
                    let path = path.join(name);
                    archive::read_text(&path, TEXT_BYTES_MAX)
                        .map_err(|source| Failure::from(PackError::Read { path, source }))
                };
                if path.join(TOML).exists() {
                    return Ok(Manifest::Toml { text: read(TOML)? });
                }
                let files = DEPENDENCY_FILES.into_iter().filter(|name| tree.has(name));
                Ok(Manifest::Procfile { text: read(PROCFILE)?, files: files.map(str::to_owned).collect() })
            }
            Source::Archive { path, .. } => {
                let root = archive::look_for(path, &[TOML, PROCFILE])?;
                if let Some(text) = root.text(TOML) {
                    return Ok(Manifest::Toml { text: text.to_owned() });
                }
                let Some(text) = root.text(PROCFILE) else {
                    return Err(no_manifest(path));
                };
                let files =
                    DEPENDENCY_FILES.into_iter().filter(|name| root.names.iter().any(|found| found == name));
                Ok(Manifest::Procfile { text: text.to_owned(), files: files.map(str::to_owned).collect() })
            }
        }
    }

    fn body(&self) -> (Body, Packing) {
        let source = self.clone();
        body_of(move |mut pieces| match source {
            Source::Folder { tree, .. } => tree.write(pieces),
            Source::Archive { path, bytes } => {
                let file =
                    File::open(&path).map_err(|source| PackError::Read { path: path.clone(), source })?;
                let copied = io::copy(&mut io::Read::take(file, bytes), &mut pieces)
                    .and_then(|copied| io::Write::flush(&mut pieces).map(|()| copied));
                match copied {
                    Ok(copied) if copied == bytes => Ok(()),
                    Ok(_) => Err(PackError::Changed { path }),
                    Err(source) => Err(PackError::Write { source }),
                }
            }
        })
    }
}

fn no_manifest(path: &Path) -> Failure {
    let message = format!("{} has neither an {TOML} nor a {PROCFILE} at its top", path.display());
    Failure::new(
        status::FAILED,
        "no_manifest",
        message,
        "describe the app in an epagent.toml; `examples/` has some",
    )
}

/// Sends the archive, from its start again when the agent went away in the middle.
async fn upload(client: &Client, deploy: &Deploy, source: &Source) -> Result<Deploy, Failure> {
    let path = format!("/v1/deploys/{}/archive", deploy.id);
    let begun = Instant::now();
    let mut tries = 1;
    loop {
        let (body, packing) = source.body();
        let error = match client.upload::<Deploy>(Method::PUT, &path, body).await {
            Ok(deploy) => return Ok(deploy),
            Err(error) => error,
        };
        // The agent only saw the stream break off; why is known here.
        match packing.failure() {
            None | Some(PackError::Write { .. }) => {}
            Some(failure) => return Err(failure.into()),
        }
        let refused = matches!(error, CallError::Refused(_));
        if refused || !error.may_pass() || tries >= UPLOAD_TRIES || begun.elapsed() > UPLOAD_AWAY_MAX {
            return Err(error.into());
        }
        Screen::stderr().say("the agent went away; sending the archive again");
        tries += 1;
        tokio::time::sleep(RETRY_WAIT * tries).await;
    }
}
