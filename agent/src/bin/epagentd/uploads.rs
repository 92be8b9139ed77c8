//! Archives on their way to a build: one file per deploy, in a folder of the agent's own.
//!
//! An archive is written under another name and renamed when it is whole and on disk, so that a file of the
//! deploy's name is a whole archive. Tenants' bytes are never parsed here.

use std::path::PathBuf;

use epagent_core::name::DeployId;
use tokio::fs::File;
use tokio::io::{AsyncWrite, AsyncWriteExt};

use crate::clock;
use crate::config::Config;

pub fn folder(config: &Config) -> PathBuf {
    config.state_dir.join("uploads")
}

pub fn path(config: &Config, deploy: DeployId) -> PathBuf {
    folder(config).join(format!("{deploy}.tar"))
}

/// Removes the archive, if there is one. What can't be removed now goes when the agent starts again.
pub fn remove(config: &Config, deploy: DeployId) {
    let path = path(config, deploy);
    if let Err(error) = std::fs::remove_file(&path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(%error, path = %path.display(), "an upload could not be removed");
    }
}

/// Removes everything but the archives of these deploys. For the start of the agent.
pub fn sweep(config: &Config, live: &[DeployId]) -> std::io::Result<()> {
    let kept: Vec<PathBuf> = live.iter().map(|&deploy| path(config, deploy)).collect();
    std::fs::create_dir_all(folder(config))?;
    for entry in std::fs::read_dir(folder(config))? {
        let path = entry?.path();
        if !kept.contains(&path) {
            std::fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// An archive that is being received.
pub struct Incoming {
    file: File,
    partial: PathBuf,
    whole: PathBuf,
}

impl Incoming {
    pub async fn begin(config: &Config, deploy: DeployId) -> std::io::Result<Self> {
        let whole = path(config, deploy);
        // Two uploads of one deploy do not write to one file; the first that is whole is taken.
        let partial = whole.with_extension(format!("{:x}.part", clock::random_u64()));
        let file = File::create(&partial).await?;
        Ok(Self { file, partial, whole })
    }

    pub fn writer(&mut self) -> &mut (impl AsyncWrite + Unpin + use<>) {
        &mut self.file
    }

    /// Everything has come: puts it in its place, durably.
    pub async fn finish(mut self) -> std::io::Result<()> {
        self.file.flush().await?;
        self.file.sync_all().await?;
        tokio::fs::rename(&self.partial, &self.whole).await?;
        if let Some(folder) = self.whole.parent() {
            File::open(folder).await?.sync_all().await?;
        }
        Ok(())
    }

    pub async fn abandon(self) {
        let _ = tokio::fs::remove_file(&self.partial).await;
    }
}
