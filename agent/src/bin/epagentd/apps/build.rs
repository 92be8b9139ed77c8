//! A deploy from `received` to `starting`: unpack, build, seal, release.
//!
//! ```text
//!  step 0        unpack the archive into a clone of the image      (a job in the tenant's jail)
//!  step 1 … n    the build commands, in order                      (a job each, in the same tree)
//!  step n + 1    seal the tree
//!  releasing     the release command                               (a job on a throw-away copy)
//! ```
//!
//! [`Progress`] is recorded before a job is forgotten and after it was started; in between, the job is found again
//! by what the runner says it is for. A job that ran is not run twice.

use std::fs::File;

use epagent_core::exit::Exit;
use epagent_core::name::JailId;
use epagent_core::phase::Phase;
use epagent_core::spec::Limits;
use epagent_core::verdict::Cause;
use epagent_store::{Deploy, DeployKind, Release};
use epagent_wire::runner::{ArchiveFormat, Command, Jail, JailState, Purpose, Reply, Request, World};
use serde::{Deserialize, Serialize};

use super::look::Seen;
use super::{AppLoop, RoundError, start};
use crate::clock;
use crate::runner::CallError;
use crate::uploads;

/// How long an announced archive is waited for.
const UPLOAD_MS_MAX: u64 = 15 * 60_000;
/// How long a release command may run.
const RELEASE_COMMAND_MS_MAX: u64 = 10 * 60_000;

/// How far a deploy is within its phase.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Progress {
    /// The archive is on disk.
    pub uploaded: bool,
    /// The step of `building` that is next or under way.
    pub step: usize,
    /// The job that is under way.
    pub job: Option<JailId>,
    /// Every job of this deploy whose log may be read.
    pub logs: Vec<JailId>,
}

impl Progress {
    pub fn of(deploy: &Deploy) -> Result<Self, RoundError> {
        if deploy.progress.is_null() {
            return Ok(Self::default());
        }
        let parsed = serde_json::from_value(deploy.progress.clone());
        parsed.map_err(|source| RoundError::Progress(deploy.id, source))
    }
}

/// What became of a job.
enum Job {
    Runs,
    Ended { jail: JailId, exit: Exit },
}

impl AppLoop {
    /// Does the next thing of a deploy that has no instances yet; true when the round is to begin anew.
    pub(super) async fn build(&mut self, seen: &mut Seen, world: &World) -> Result<bool, RoundError> {
        let Some(deploy) = seen.deploy.clone() else { return Ok(false) };
        let mut progress = Progress::of(&deploy)?;
        let outcome = match deploy.phase {
            Phase::Received => self.received(&deploy, &progress).await,
            Phase::Building => self.building(&deploy, &mut progress, world).await,
            Phase::Releasing => self.releasing(&deploy, &mut progress, world).await,
            _ => return Ok(false),
        };
        // What the runner will not do ends the deploy; everything else is tried again.
        match outcome {
            Err(RoundError::Runner { attempted, source: CallError::Refused(refusal) }) => {
                let cause = Cause::Refused { attempted, reason: refusal.message };
                self.give_up(&deploy, cause, None).await?;
                Ok(true)
            }
            other => other,
        }
    }

    async fn received(&mut self, deploy: &Deploy, progress: &Progress) -> Result<bool, RoundError> {
        let now_ms = clock::now_ms();
        if deploy.kind != DeployKind::Deploy {
            let note = "nothing to build";
            self.parts
                .store
                .deploy_advance(deploy.id, Phase::Received, Phase::Starting, note, now_ms)
                .await?;
        } else if progress.uploaded {
            let note = "unpacking the archive";
            self.parts
                .store
                .deploy_advance(deploy.id, Phase::Received, Phase::Building, note, now_ms)
                .await?;
        } else if self.waited_for_upload_ms(deploy) > UPLOAD_MS_MAX {
            let why = format!("its archive did not come within {} minutes", UPLOAD_MS_MAX / 60_000);
            self.give_up(deploy, Cause::Canceled { why }, None).await?;
        } else {
            return Ok(false);
        }
        Ok(true)
    }

    /// How long this deploy's archive has been waited for.
    fn waited_for_upload_ms(&mut self, deploy: &Deploy) -> u64 {
        let now = clock::moment();
        let since_ms = match self.awaited_upload {
            Some((awaited, since_ms)) if awaited == deploy.id => since_ms,
            _ => now.when(deploy.created_at_ms),
        };
        self.awaited_upload = Some((deploy.id, since_ms));
        now.steady_ms.saturating_sub(since_ms)
    }

    async fn building(
        &self,
        deploy: &Deploy,
        progress: &mut Progress,
        world: &World,
    ) -> Result<bool, RoundError> {
        let Some(release) = self.parts.store.release(&self.app, deploy.release).await? else {
            return Ok(false);
        };
        let commands = &release.spec.build;
        if progress.step > commands.len() {
            let request = Request::BuildSeal { app: self.app.clone(), release: release.tree };
            self.call("sealing the release", request).await?;
            uploads::remove(&self.parts.config, deploy.id);
            let note = if release.spec.release.is_some() { "running the release command" } else { "" };
            let store = &self.parts.store;
            store.deploy_advance(deploy.id, Phase::Building, Phase::Releasing, note, clock::now_ms()).await?;
            return Ok(true);
        }
        let command = progress.step.checked_sub(1).map(|step| commands[step].clone());
        let is_ours = |jail: &&Jail| {
            jail.app.as_ref() == Some(&self.app)
                && jail.release == Some(release.number)
                && is_for(&jail.purpose, command.as_deref())
                && !progress.logs.contains(&jail.id)
        };
        if progress.job.is_none() {
            let started = match world.jails.iter().find(is_ours) {
                Some(jail) => jail.id.clone(),
                None => self.start_build_job(deploy, &release, command.as_deref()).await?,
            };
            progress.job = Some(started.clone());
            progress.logs.push(started);
            self.record(deploy, progress).await?;
            return Ok(true);
        }
        match job(progress, world) {
            None => {
                // A job that was recorded is known to the runner until we forget it; this one was lost with its
                // tables.
                let exit = Exit { monitor_lost: true, ..Exit::default() };
                let command = command.unwrap_or_else(|| "unpack the archive".to_owned());
                self.give_up(deploy, Cause::BuildCommand { command, exit }, None).await?;
                Ok(true)
            }
            Some(Job::Runs) => Ok(false),
            Some(Job::Ended { jail, exit }) if exit.success() => {
                progress.step += 1;
                progress.job = None;
                self.record(deploy, progress).await?;
                if let Some(next) = commands.get(progress.step - 1) {
                    self.parts
                        .store
                        .deploy_note(deploy.id, &format!("running `{next}`"), clock::now_ms())
                        .await?;
                }
                self.forget_jail(&jail).await?;
                Ok(true)
            }
            Some(Job::Ended { jail, exit }) => {
                let cause = match command {
                    None => Cause::Unpack { exit },
                    Some(command) => Cause::BuildCommand { command, exit },
                };
                self.give_up(deploy, cause, Some(&jail)).await?;
                Ok(true)
            }
        }
    }

    async fn start_build_job(
        &self,
        deploy: &Deploy,
        release: &Release,
        command: Option<&str>,
    ) -> Result<JailId, RoundError> {
        let (app, number) = (self.app.clone(), release.number);
        let (attempted, request, fds) = match command {
            None => {
                self.call("preparing the app", Request::AppEnsure { app: app.clone() }).await?;
                let archive = File::open(uploads::path(&self.parts.config, deploy.id));
                let attempted = "reading the uploaded archive".to_owned();
                let archive = archive.map_err(|source| RoundError::Io { attempted, source })?;
                let image = release.image.clone();
                let format = ArchiveFormat::Tar;
                let request = Request::BuildUnpack { app, release: number, image, format };
                ("unpacking the archive", request, vec![archive.into()])
            }
            Some(command) => {
                let env = start::environment(release);
                let request = Request::BuildRun { app, release: number, command: command.to_owned(), env };
                ("starting the build command", request, Vec::new())
            }
        };
        match self.parts.runner.call_with(request, fds).await {
            Ok(answer) => match answer.reply {
                Reply::Started { jail, .. } => Ok(jail),
                _ => {
                    Err(RoundError::Runner { attempted: attempted.to_owned(), source: CallError::Unexpected })
                }
            },
            Err(source) => Err(RoundError::Runner { attempted: attempted.to_owned(), source }),
        }
    }

    async fn releasing(
        &self,
        deploy: &Deploy,
        progress: &mut Progress,
        world: &World,
    ) -> Result<bool, RoundError> {
        let Some(release) = self.parts.store.release(&self.app, deploy.release).await? else {
            return Ok(false);
        };
        let Some(command) = release.spec.release.clone() else {
            self.begin_starting(deploy, "").await?;
            return Ok(true);
        };
        let Some(jail) = progress.job.clone() else {
            // Written down before it is started: whether it ran must be known for certain.
            let jail = JailId::new(&self.app, clock::random_u64());
            progress.job = Some(jail.clone());
            progress.logs.push(jail);
            self.record(deploy, progress).await?;
            return Ok(true);
        };
        match job(progress, world) {
            None => {
                let shell = Command::Shell(command);
                let env = start::environment(&release);
                let limits = Limits::default();
                let deadline_ms = Some(RELEASE_COMMAND_MS_MAX);
                let job = start::Job { command: shell, env, limits, socket: false, deadline_ms };
                start::start(&self.parts, &jail, &release, job).await?;
                Ok(true)
            }
            Some(Job::Runs) => Ok(false),
            Some(Job::Ended { jail, exit }) if exit.success() => {
                self.begin_starting(deploy, "the release command has run").await?;
                self.forget_jail(&jail).await?;
                Ok(true)
            }
            Some(Job::Ended { jail, exit }) => {
                self.give_up(deploy, Cause::ReleaseCommand { command, exit }, Some(&jail)).await?;
                Ok(true)
            }
        }
    }

    async fn begin_starting(&self, deploy: &Deploy, note: &str) -> Result<(), RoundError> {
        let store = &self.parts.store;
        store.deploy_advance(deploy.id, Phase::Releasing, Phase::Starting, note, clock::now_ms()).await?;
        Ok(())
    }

    /// Fails the deploy and drops what it built.
    pub(super) async fn give_up(
        &self,
        deploy: &Deploy,
        cause: Cause,
        jail: Option<&JailId>,
    ) -> Result<(), RoundError> {
        self.fail(deploy.id, deploy.phase, cause, jail).await?;
        uploads::remove(&self.parts.config, deploy.id);
        Ok(())
    }

    async fn record(&self, deploy: &Deploy, progress: &Progress) -> Result<(), RoundError> {
        let value = serde_json::to_value(progress).map_err(|error| RoundError::Progress(deploy.id, error))?;
        self.parts.store.deploy_progress(deploy.id, &value).await?;
        Ok(())
    }

    pub(super) async fn call(&self, attempted: &str, request: Request) -> Result<Reply, RoundError> {
        let failed = |source| RoundError::Runner { attempted: attempted.to_owned(), source };
        self.parts.runner.call(request).await.map_err(failed)
    }
}

/// Whether a job is the one for this command, or for the archive when there is none. The runner shows the beginning of
/// a long command.
fn is_for(purpose: &Purpose, command: Option<&str>) -> bool {
    match (purpose, command) {
        (Purpose::BuildUnpack, None) => true,
        (Purpose::BuildRun { command: shown }, Some(command)) => {
            !shown.is_empty() && command.starts_with(shown.as_str())
        }
        _ => false,
    }
}

/// The job under way, as the runner sees it; None when the runner does not know it.
fn job(progress: &Progress, world: &World) -> Option<Job> {
    let id = progress.job.as_ref()?;
    let jail = world.jails.iter().find(|jail| jail.id == *id)?;
    Some(match &jail.state {
        JailState::Exited(exit) => Job::Ended { jail: id.clone(), exit: exit.clone() },
        _ => Job::Runs,
    })
}
