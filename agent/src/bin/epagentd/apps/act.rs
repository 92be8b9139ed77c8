//! Carrying out what was planned. Each action is recorded first where a cut in the middle would otherwise be
//! forgotten, and may be carried out twice.

use epagent_core::app::{Action, Crash, InstanceState};
use epagent_core::backoff;
use epagent_core::exit::Exit;
use epagent_core::name::{DeployId, JailId, ProcessName, ReleaseNumber};
use epagent_core::phase::Phase;
use epagent_core::verdict::{Cause, Findings, LOG_LINES_MAX};
use epagent_store::{NewInstance, Wanted};
use epagent_wire::runner::{RefusalCode, Reply, Request};

use super::look::{Seen, state};
use super::{AppLoop, Next, RoundError};
use crate::clock;
use crate::logs;
use crate::runner::CallError;
use crate::supervise::chain;

impl AppLoop {
    pub(super) async fn act(&mut self, action: Action, seen: &Seen) -> Result<Next, RoundError> {
        match action {
            Action::Start { deploy, process, index } => {
                return self.add_instance(deploy, process, index, seen).await;
            }
            Action::Drain { id } => {
                self.parts.store.instance_state(&id, state::DRAINING).await?;
            }
            Action::Stop { id } => self.stop(&id, seen).await?,
            Action::Recycle { id } => self.recycle(&id, seen).await?,
            Action::Forget { id } => self.forget(&id, seen).await?,
            Action::Sleep { process } => {
                self.parts.store.sleep_begin(&self.app, &process, clock::now_ms()).await?;
                return Ok(Next::LookAgain);
            }
            Action::Wake { process } => {
                let (store, why) = (&self.parts.store, "somebody asks for it");
                store.sleep_end(&self.app, Some(&process), why, clock::now_ms()).await?;
                return Ok(Next::LookAgain);
            }
            Action::Advance { deploy, from, to } => self.advance(deploy, from, to).await?,
            Action::Fail { deploy, phase, cause, instance } => {
                self.fail(deploy, phase, cause, instance.as_ref()).await?;
                self.tidied_at = None;
                return Ok(Next::LookAgain);
            }
        }
        Ok(Next::GoOn)
    }

    async fn advance(&mut self, deploy: DeployId, from: Phase, to: Phase) -> Result<(), RoundError> {
        let store = &self.parts.store;
        if to == Phase::Switching {
            // Cut before the next line, the release before it is started meanwhile, and this one goes on.
            store.app_want(&self.app, Wanted::Running, clock::now_ms()).await?;
            store.sleep_end(&self.app, None, "a deploy of it serves", clock::now_ms()).await?;
            // The crashes were the old release's.
            self.crashes.clear();
        }
        store.deploy_advance(deploy, from, to, note(to), clock::now_ms()).await?;
        tracing::info!(app = %self.app, %deploy, phase = ?to, "a deploy goes on: {}", note(to));
        if to == Phase::Done {
            self.tidied_at = None;
        }
        Ok(())
    }

    async fn add_instance(
        &mut self,
        deploy: DeployId,
        process: ProcessName,
        index: u32,
        seen: &Seen,
    ) -> Result<Next, RoundError> {
        let candidate = seen.view.candidate.as_ref().map(|candidate| &candidate.generation);
        let generations = [seen.view.serving.as_ref(), candidate];
        let Some(generation) = generations.into_iter().flatten().find(|g| g.deploy == deploy) else {
            return Ok(Next::LookAgain);
        };
        let serves = seen.view.serving.as_ref().is_some_and(|serving| serving.deploy == deploy);
        let crash = self.crashes.get(&(process.clone(), index)).filter(|_| serves);
        let jail = JailId::new(&self.app, clock::random_u64());
        let row = NewInstance {
            jail: jail.clone(),
            app: self.app.clone(),
            deploy,
            release: generation.release,
            process: process.clone(),
            index,
            state: state::STARTING.to_owned(),
            restarts: crash.map_or(0, |crash| crash.restarts),
        };
        self.parts.store.instance_add(&row, clock::now_ms()).await?;
        self.begin_instance(&jail, deploy, row.release, &process, index, seen).await
    }

    /// Sends the start of instances again whose first sending was cut; true when that changed anything.
    pub(super) async fn start_again(&mut self, seen: &Seen) -> Result<bool, RoundError> {
        for id in &seen.unstarted {
            if let Some(row) = seen.rows.get(id) {
                self.begin_instance(id, row.deploy, row.release, &row.process, row.index, seen).await?;
            }
        }
        Ok(!seen.unstarted.is_empty())
    }

    /// Has the runner start an instance that is written down. What it refuses ends the deploy that asked for it, or
    /// counts as a crash of the place.
    async fn begin_instance(
        &mut self,
        jail: &JailId,
        deploy: DeployId,
        release: ReleaseNumber,
        process: &ProcessName,
        index: u32,
        seen: &Seen,
    ) -> Result<Next, RoundError> {
        let refusal = match self.start_instance(jail, process, index, release).await {
            Ok(()) => return Ok(Next::GoOn),
            Err(RoundError::Runner { source: CallError::Refused(refusal), .. }) => refusal.message,
            Err(RoundError::Runner { source: error @ CallError::TooLarge, .. }) => error.to_string(),
            Err(error) => return Err(error),
        };
        let attempted = format!("starting {process}.{index}");
        let at_ms = clock::now_ms();
        let exit = Exit { start_error: Some(refusal.clone()), at_ms, ..Exit::default() };
        self.parts.store.instance_ended(jail, state::EXITED, &exit, at_ms).await?;
        match &seen.view.candidate {
            Some(candidate) if candidate.generation.deploy == deploy && !candidate.phase.has_switched() => {
                self.fail(deploy, candidate.phase, Cause::Refused { attempted, reason: refusal }, None)
                    .await?;
            }
            _ => {
                self.count_crash(process, index, 0);
                self.tell_trouble(format!("{attempted}: {refusal}")).await;
            }
        }
        Ok(Next::LookAgain)
    }

    /// Puts another in the place of an instance that does not become healthy.
    async fn recycle(&mut self, id: &JailId, seen: &Seen) -> Result<(), RoundError> {
        let (Some(row), Some(instance)) =
            (seen.rows.get(id), seen.view.instances.iter().find(|instance| instance.id == *id))
        else {
            return Ok(());
        };
        let why = instance.last_error.as_deref().unwrap_or("its check did not pass");
        let message = format!("{}.{} of {} is replaced: {why}", row.process, row.index, self.app);
        let store = &self.parts.store;
        let now_ms = clock::now_ms();
        store.event_add(Some(&self.app), Some(row.deploy), "instance.unhealthy", &message, now_ms).await?;
        self.count_crash(&row.process, row.index, self.ages.lived_ms(id, clock::moment()));
        self.parts.store.instance_state(id, state::DRAINING).await?;
        Ok(())
    }

    /// Tells the runner to end an instance. Told is told: a runner or an agent that is killed here is told again.
    async fn stop(&mut self, id: &JailId, seen: &Seen) -> Result<(), RoundError> {
        let Some(row) = seen.rows.get(id) else { return Ok(()) };
        self.parts.store.instance_state(id, state::STOPPING).await?;
        // Its own release says how it is stopped, which may be an older one than those that are looked at.
        let release = self.parts.store.release(&self.app, row.release).await?;
        let process = release.as_ref().and_then(|release| release.spec.processes.get(&row.process));
        let stop = process.map(|process| process.stop.clone()).unwrap_or_default();
        let request = Request::Stop { jail: id.clone(), signal: stop.signal, grace_ms: stop.grace_ms };
        match self.parts.runner.call(request).await {
            Ok(_) => {}
            // It ended meanwhile: the next look sees that.
            Err(CallError::Refused(refusal))
                if matches!(refusal.code, RefusalCode::NotFound | RefusalCode::Conflict) => {}
            Err(source) => return Err(RoundError::Runner { attempted: format!("stopping {id}"), source }),
        }
        self.stops_sent.insert(id.clone());
        Ok(())
    }

    /// Records how an instance ended and has the runner remove it. Cut in between, the sweep removes it.
    async fn forget(&mut self, id: &JailId, seen: &Seen) -> Result<(), RoundError> {
        let Some(row) = seen.rows.get(id) else { return Ok(()) };
        let found = seen.view.instances.iter().find(|instance| instance.id == *id);
        let Some(InstanceState::Exited(exit)) = found.map(|instance| &instance.state) else { return Ok(()) };
        let was_asked = row.state == state::STOPPING || row.state == state::DRAINING;
        let by_itself = !was_asked && !exit.is_unknown();
        let serves = seen.view.serving.as_ref().is_some_and(|serving| serving.deploy == row.deploy);
        if by_itself && serves {
            self.count_crash(&row.process, row.index, self.ages.lived_ms(id, clock::moment()));
        }
        self.parts.store.instance_ended(id, state::EXITED, exit, clock::now_ms()).await?;
        self.forget_jail(id).await
    }

    pub(super) async fn forget_jail(&self, id: &JailId) -> Result<(), RoundError> {
        match self.parts.runner.call(Request::Forget { jail: id.clone() }).await {
            Ok(_) => Ok(()),
            Err(CallError::Refused(refusal)) if refusal.code == RefusalCode::NotFound => Ok(()),
            Err(source) => {
                Err(RoundError::Runner { attempted: format!("removing what is left of {id}"), source })
            }
        }
    }

    fn count_crash(&mut self, process: &ProcessName, index: u32, lived_ms: u64) {
        let place = (process.clone(), index);
        let before = self.crashes.get(&place).map_or(0, |crash| crash.restarts);
        let restarts = if lived_ms >= backoff::FORGIVEN_AFTER_MS { 1 } else { before + 1 };
        self.crashes.insert(place, Crash { restarts, at_ms: clock::steady_ms() });
    }

    /// Ends a deploy as failed, with everything that can be found out about it.
    pub(super) async fn fail(
        &self,
        deploy: DeployId,
        phase: Phase,
        cause: Cause,
        jail: Option<&JailId>,
    ) -> Result<(), RoundError> {
        let mut findings = Findings::default();
        if let Some(jail) = jail {
            findings.log = self.last_lines(jail, !matches!(cause, Cause::Unhealthy { .. })).await;
            if let Ok(Reply::Inspect(found)) =
                self.parts.runner.call(Request::Inspect { jail: jail.clone() }).await
            {
                findings.listening = found.listening;
            }
        }
        let verdict = cause.verdict(phase, findings);
        let instance = jail.map(tracing::field::display);
        let (code, reason) = (&verdict.code, &verdict.message);
        tracing::warn!(app = %self.app, %deploy, instance, code, reason, "a deploy failed");
        self.parts.store.deploy_fail(deploy, phase, &verdict, clock::now_ms()).await?;
        Ok(())
    }

    /// What the jail printed last. A log that can't be read is told in its place: the verdict matters more.
    async fn last_lines(&self, jail: &JailId, ended: bool) -> Vec<String> {
        let runner = &self.parts.runner;
        let read = match ended {
            true => logs::last_lines(runner, jail, LOG_LINES_MAX).await,
            false => logs::open(runner, jail, LOG_LINES_MAX).await.map(|(lines, _)| lines),
        };
        match read {
            Ok(lines) => lines.into_iter().map(|line| line.text).collect(),
            Err(error) => vec![format!("(its log can't be read: {})", chain(&error))],
        }
    }
}

fn note(to: Phase) -> &'static str {
    match to {
        Phase::Checking => "all instances run",
        Phase::Switching => "all instances are healthy",
        Phase::Draining => "the new release serves",
        Phase::Done => "the old release is gone",
        _ => "",
    }
}
