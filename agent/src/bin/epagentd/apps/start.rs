//! Starting a jail on a release: its environment, its secrets, its volumes.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::OwnedFd;

use epagent_core::name::{JailId, ProcessName, ReleaseNumber};
use epagent_core::spec::{APP_PORT, AppSpec, Limits, Listen};
use epagent_store::{Release, StoreError, Volume};
use epagent_wire::runner::{Command, Request, SOCKET_IN_JAIL, Start};
use rustix::fs::{MemfdFlags, SealFlags};

use super::{AppLoop, Parts, RoundError};

/// What a jail's command is started with unless the manifest says otherwise.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

impl AppLoop {
    /// Has the runner start the jail of an instance. Sent twice, it is the same jail.
    pub(super) async fn start_instance(
        &self,
        jail: &JailId,
        process: &ProcessName,
        index: u32,
        number: ReleaseNumber,
    ) -> Result<(), RoundError> {
        let Some(release) = self.parts.store.release(&self.app, number).await? else { return Ok(()) };
        let Some(spec) = release.spec.processes.get(process) else { return Ok(()) };
        let mut env = environment(&release);
        env.insert("EPAGENT_PROCESS".to_owned(), process.to_string());
        env.insert("EPAGENT_INDEX".to_owned(), index.to_string());
        let listens = spec.listen == Listen::Unix;
        if listens {
            env.remove("PORT");
            env.insert("SOCKET".to_owned(), SOCKET_IN_JAIL.to_owned());
        }
        let command = Command::Shell(spec.command.clone());
        start(
            &self.parts,
            jail,
            &release,
            Job { command, env, limits: spec.limits.clone(), socket: listens, deadline_ms: None },
        )
        .await
    }
}

/// What runs in a jail.
pub struct Job {
    pub command: Command,
    pub env: BTreeMap<String, String>,
    pub limits: Limits,
    /// It listens on a unix socket.
    pub socket: bool,
    pub deadline_ms: Option<u64>,
}

/// Makes the volumes of the release sure and starts a jail on it.
pub async fn start(parts: &Parts, jail: &JailId, release: &Release, job: Job) -> Result<(), RoundError> {
    let Job { command, env, limits, socket, deadline_ms } = job;
    let failed = |attempted: String| move |source| RoundError::Runner { attempted, source };
    ensure_volumes(parts, release).await?;
    let secrets = secrets(parts, release).await?;
    let start = Start {
        app: release.app.clone(),
        release: release.tree,
        command,
        env,
        limits,
        volumes: release
            .spec
            .volumes
            .iter()
            .map(|(name, volume)| (name.clone(), volume.path.clone()))
            .collect(),
        with_secrets: secrets.is_some(),
        socket,
        deadline_ms,
    };
    let request = Request::Start { jail: jail.clone(), start };
    let fds = secrets.into_iter().collect();
    parts.runner.call_with(request, fds).await.map_err(failed(format!("starting {jail}")))?;
    Ok(())
}

async fn ensure_volumes(parts: &Parts, release: &Release) -> Result<(), RoundError> {
    for (name, volume) in &release.spec.volumes {
        let row = Volume {
            app: release.app.clone(),
            volume: name.clone(),
            quota_bytes: volume.quota_bytes,
            path: volume.path.clone(),
        };
        parts.store.volume_ensure(&row).await?;
        let request = Request::VolumeEnsure {
            app: release.app.clone(),
            volume: name.clone(),
            quota_bytes: volume.quota_bytes,
        };
        let failed = |source| RoundError::Runner { attempted: format!("making the volume {name}"), source };
        parts.runner.call(request).await.map_err(failed)?;
    }
    Ok(())
}

/// The environment of everything that runs on a release, secrets aside: the platform's own, then the manifest's,
/// then what `epagent config` set.
pub fn environment(release: &Release) -> BTreeMap<String, String> {
    let AppSpec { app, env, .. } = &release.spec;
    let mut all = BTreeMap::from([
        ("PATH".to_owned(), DEFAULT_PATH.to_owned()),
        ("HOME".to_owned(), "/app".to_owned()),
        ("LANG".to_owned(), "C.UTF-8".to_owned()),
    ]);
    all.extend(env.clone());
    all.extend(release.config.clone());
    all.insert("PORT".to_owned(), APP_PORT.to_string());
    all.insert("EPAGENT_APP".to_owned(), app.to_string());
    all.insert("EPAGENT_RELEASE".to_owned(), release.number.to_string());
    all
}

/// The release's secrets in a sealed memfd; None when it has none.
async fn secrets(parts: &Parts, release: &Release) -> Result<Option<OwnedFd>, RoundError> {
    let values = parts.store.release_secrets(release).await?;
    if values.is_empty() {
        return Ok(None);
    }
    let plain: BTreeMap<&str, &str> =
        values.iter().map(|(name, value)| (name.as_str(), value.expose())).collect();
    seal(&plain)
        .map(Some)
        .map_err(|source| RoundError::Io { attempted: "sealing the secrets".to_owned(), source })
}

fn seal(values: &BTreeMap<&str, &str>) -> std::io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = rustix::fs::memfd_create("epagent-secrets", flags)?;
    let mut file = std::fs::File::from(memory);
    serde_json::to_writer(&mut file, values)?;
    file.flush()?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    rustix::fs::fcntl_add_seals(&file, seals)?;
    Ok(file.into())
}

/// Names of secrets the manifest asks for and that are not set.
pub async fn missing_secrets(parts: &Parts, spec: &AppSpec) -> Result<Vec<String>, StoreError> {
    let set = parts.store.secrets(&spec.app).await?;
    let is_set = |name: &&String| set.iter().any(|secret| secret.name == **name);
    Ok(spec.secrets.iter().filter(|name| !is_set(name)).cloned().collect())
}
