//! Images and volumes.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use epagent_core::name::ImageName;
use epagent_wire::api::{Bootstrap, Image, ImageJob, JobUpdate, Volume};
use hyper::Method;
use jiff::Timestamp;

use super::apps::app_path;
use super::{Outcome, print_json, written};
use crate::args::{ImageVerb, VolumeVerb};
use crate::client::Client;
use crate::failure::{Failure, status};
use crate::pack::oci::{self, Layout};
use crate::pack::stream::{Pieces, body_of};
use crate::pack::tree::{Purpose, Tree};
use crate::pack::{PackError, archive};
use crate::screen::{Screen, Table, Tone, age, cell, size};
use crate::terminal;

pub async fn image(client: &Client, verb: ImageVerb) -> Outcome {
    match verb {
        ImageVerb::Ls(json) if json.json => print_json(client, "/v1/images").await,
        ImageVerb::Ls(_) => list_images(client).await,
        ImageVerb::Import { image, source } => import(client, &image, &source).await,
        ImageVerb::Bootstrap { image, suite, include } => {
            bootstrap(client, &image, Bootstrap { suite, include }).await
        }
        ImageVerb::Rm { image } => {
            let _: serde_json::Value = client.order(Method::DELETE, &format!("/v1/images/{image}")).await?;
            written(Screen::stdout().line(&format!("the image {image} is removed")))
        }
    }
}

pub async fn volume(client: &Client, verb: VolumeVerb) -> Outcome {
    match verb {
        VolumeVerb::Ls(args) => {
            let path = match &args.app {
                Some(app) => format!("/v1/volumes?app={app}"),
                None => "/v1/volumes".to_owned(),
            };
            if args.json.json {
                return print_json(client, &path).await;
            }
            list_volumes(client, &path).await
        }
        VolumeVerb::Rm { app, volume, yes } => {
            let what = format!("removing the volume {volume} of {app} removes all that is in it");
            terminal::confirm(&what, volume.as_str(), yes)?;
            let path = format!("{}/volumes/{volume}", app_path(&app));
            let _: serde_json::Value = client.order(Method::DELETE, &path).await?;
            written(Screen::stdout().line(&format!("the volume {volume} of {app} is removed")))
        }
    }
}

async fn list_images(client: &Client) -> Outcome {
    let list: Vec<Image> = client.get("/v1/images").await?;
    let now = Timestamp::now();
    let mut table = Table::new(&["IMAGE", "SIZE", "AGE", "ID"]);
    for image in &list {
        table.row(vec![
            cell(&image.image),
            cell(size(image.bytes)),
            cell(age(&image.created_at, now)),
            cell(&image.id),
        ]);
    }
    written(table.print("no images; `epagent image bootstrap` or `epagent image import` makes one"))
}

async fn list_volumes(client: &Client, path: &str) -> Outcome {
    let list: Vec<Volume> = client.get(path).await?;
    let mut table = Table::new(&["APP", "VOLUME", "MOUNTED ON", "USED", "QUOTA"]);
    for volume in &list {
        let is_full = volume.used_bytes >= volume.quota_bytes / 10 * 9;
        table.row(vec![
            cell(&volume.app),
            cell(&volume.volume),
            cell(volume.path.as_deref().unwrap_or("-")),
            (size(volume.used_bytes), if is_full { Tone::Warn } else { Tone::Plain }),
            cell(size(volume.quota_bytes)),
        ]);
    }
    written(table.print("no volumes"))
}

/// What an image is made from.
enum Source {
    Folder(Tree),
    Archive(PathBuf),
    /// With the folder it was unpacked to, which goes when this does.
    Layout {
        layout: Layout,
        _unpacked: Option<tempfile::TempDir>,
    },
}

impl Source {
    fn open(path: &Path) -> Result<Self, Failure> {
        let meta = path.metadata().map_err(|source| PackError::Read { path: path.to_owned(), source })?;
        if meta.is_dir() && oci::is_layout(path) {
            return Ok(Source::Layout { layout: Layout::open(path)?, _unpacked: None });
        }
        if meta.is_dir() {
            return Ok(Source::Folder(Tree::look_through(path, Purpose::Image)?));
        }
        if !archive::is_layout(path)? {
            return Ok(Source::Archive(path.to_owned()));
        }
        let folder = tempfile::tempdir().map_err(|source| PackError::Write { source })?;
        archive::unpack_layout(path, folder.path())?;
        Ok(Source::Layout { layout: Layout::open(folder.path())?, _unpacked: Some(folder) })
    }

    fn format(&self) -> &'static str {
        match self {
            Source::Layout { .. } => "layers",
            Source::Folder(_) | Source::Archive(_) => "tar",
        }
    }

    fn write(&self, mut pieces: Pieces) -> Result<(), PackError> {
        match self {
            Source::Folder(tree) => tree.write(pieces),
            Source::Layout { layout, .. } => layout.write(pieces),
            Source::Archive(path) => {
                let mut file =
                    File::open(path).map_err(|source| PackError::Read { path: path.clone(), source })?;
                io::copy(&mut file, &mut pieces)
                    .and_then(|_| pieces.flush())
                    .map_err(|source| PackError::Write { source })
            }
        }
    }
}

async fn import(client: &Client, image: &ImageName, path: &Path) -> Outcome {
    let source = Source::open(path)?;
    let screen = Screen::stderr();
    match &source {
        Source::Layout { layout, .. } => {
            screen.say(&format!("importing {image}: layers of {}", size(layout.bytes())))
        }
        _ => screen.say(&format!("importing {image} from {}", path.display())),
    }
    let request = format!("/v1/images/{image}/import?format={}", source.format());
    let (body, packing) = body_of(move |pieces| source.write(pieces));
    let job = client.upload::<ImageJob>(Method::POST, &request, body).await;
    // The agent only saw the stream break off; why is known here.
    match (job, packing.failure()) {
        (_, Some(failure)) if !matches!(failure, PackError::Write { .. }) => Err(failure.into()),
        (Err(error), _) => Err(error.into()),
        (Ok(job), _) => written(Screen::stdout().line(&format!("the image {} is {}", job.image, job.id))),
    }
}

async fn bootstrap(client: &Client, image: &ImageName, query: Bootstrap) -> Outcome {
    let screen = Screen::stderr();
    screen.say(&format!("making {image} from Debian {}; this takes a minute", query.suite));
    let path = format!("/v1/images/{image}/bootstrap");
    let mut lines = client.lines(Method::POST, &path, Some(&query)).await?;
    loop {
        match lines.next().await? {
            Some(JobUpdate::Output { line }) => {
                let line = screen.foreign(&line).into_owned();
                screen.say(&screen.paint(Tone::Dim, &format!("  | {line}")));
            }
            Some(JobUpdate::Over { error: Some(error) }) => return Err(error.into()),
            Some(JobUpdate::Over { error: None }) => {
                return written(Screen::stdout().line(&format!("the image {image} is made")));
            }
            None => {
                let message = format!("the agent went away while {image} was being made");
                let hint = "`epagent image ls` shows whether it was finished";
                return Err(Failure::new(status::UNREACHABLE, "agent_unreachable", message, hint));
            }
        }
    }
}
