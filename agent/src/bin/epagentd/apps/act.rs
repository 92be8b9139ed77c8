//! Carrying out what was planned. Each action is recorded first where a cut in the middle would otherwise be
//! forgotten, and may be carried out twice.

use epagent_core::app::{Action, Crash, InstanceState};
use epagent_core::backoff;
use epagent_core::exit::Exit;
use epagent_core::name::{DeployId, JailId, ProcessName};
use epagent_core::phase::Phase;
use epagent_core::verdict::{Cause, Findings};
use epagent_store::NewInstance;
use epagent_wire::runner::{RefusalCode, Reply, Request};

use super::look::{Seen, state};
use super::{AppLoop, RoundError};
use crate::clock;
use crate::logs;
use crate::runner::CallError;

impl AppLoop {
    pub(super) async fn act(&mut self, action: Action, seen: &Seen) -> Result<(), RoundError> {
        match action {
            Action::Start { deploy, process, index } => self.add_instance(deploy, process, index, seen).await,
            Action::Drain { id } => {
                self.draining.insert(id.clone(), clock::now_ms());
                self.parts.store.instance_state(&id, state::DRAINING).await?;
                Ok(())
            }
            Action::Stop { id } => self.stop(&id, seen).await,
            Action::Forget { id } => self.forget(&id, seen).await,
            Action::Advance { deploy, from, to } => {
                let note = note(to);
                self.parts.store.deploy_advance(deploy, from, to, note, clock::now_ms()).await?;
                if to == Phase::Done {
                    self.tidy().await?;
                }
                Ok(())
            }
            Action::Fail { deploy, phase, cause, instance } => {
                self.fail(deploy, phase, cause, instance.as_ref()).await
            }
        }
    }

    async fn add_instance(
        &mut self,
        deploy: DeployId,
        process: ProcessName,
        index: u32,
        seen: &Seen,
    ) -> Result<(), RoundError> {
        let generations = [seen.view.serving.as_ref(), seen.view.candidate.as_ref().map(|c| &c.generation)];
        let Some(generation) = generations.into_iter().flatten().find(|g| g.deploy == deploy) else {
            return Ok(());
        };
        let restarts = self.crashes.get(&(process.clone(), index)).map_or(0, |crash| crash.restarts);
        let jail = JailId::new(&self.app, clock::random_u64());
        let row = NewInstance {
            jail: jail.clone(),
            app: self.app.clone(),
            deploy,
            release: generation.release,
            process: process.clone(),
            index,
            state: state::STARTING.to_owned(),
            restarts,
        };
        self.parts.store.instance_add(&row, clock::now_ms()).await?;
        let attempted = format!("starting {process}.{index}");
        match self.start_instance(&jail, &process, index, generation.release, seen).await {
            Ok(()) => Ok(()),
            Err(RoundError::Runner { source: CallError::Refused(refusal), .. }) => {
                let reason = refusal.message;
                let exit =
                    Exit { start_error: Some(reason.clone()), at_ms: clock::now_ms(), ..Exit::default() };
                self.parts.store.instance_ended(&jail, state::EXITED, &exit, clock::now_ms()).await?;
                match &seen.view.candidate {
                    Some(candidate)
                        if candidate.generation.deploy == deploy && !candidate.phase.has_switched() =>
                    {
                        self.fail(deploy, candidate.phase, Cause::Refused { attempted, reason }, None).await
                    }
                    _ => {
                        self.count_crash(&process, index, 0);
                        self.tell_trouble(format!("{attempted}: {reason}")).await;
                        Ok(())
                    }
                }
            }
            Err(error) => Err(error),
        }
    }

    async fn stop(&mut self, id: &JailId, seen: &Seen) -> Result<(), RoundError> {
        self.parts.store.instance_state(id, state::STOPPING).await?;
        let stop = seen.rows.get(id).and_then(|row| {
            let release = seen.release(row.release)?;
            Some(release.spec.processes.get(&row.process)?.stop.clone())
        });
        // An instance of a generation that is no longer looked at stops as the manifest's default says.
        let stop = stop.unwrap_or_default();
        let request = Request::Stop { jail: id.clone(), signal: stop.signal, grace_ms: stop.grace_ms };
        match self.parts.runner.call(request).await {
            // It ended meanwhile: the next look sees that.
            Ok(_) | Err(CallError::Refused(_)) => Ok(()),
            Err(source) => Err(RoundError::Runner { attempted: format!("stopping {id}"), source }),
        }
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
            let lived_ms = clock::now_ms().saturating_sub(row.created_at_ms);
            self.count_crash(&row.process, row.index, lived_ms);
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
        self.crashes.insert(place, Crash { restarts, at_ms: clock::now_ms() });
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
            findings.log = self.last_lines(jail).await;
            if let Ok(Reply::Inspect(found)) =
                self.parts.runner.call(Request::Inspect { jail: jail.clone() }).await
            {
                findings.listening = found.listening;
            }
        }
        let verdict = cause.verdict(phase, findings);
        tracing::info!(app = %self.app, %deploy, code = verdict.code, message = verdict.message, "a deploy failed");
        self.parts.store.deploy_fail(deploy, phase, &verdict, clock::now_ms()).await?;
        Ok(())
    }

    /// What the jail printed last. A log that can't be read is told in its place: the verdict matters more.
    async fn last_lines(&self, jail: &JailId) -> Vec<String> {
        let answer = self.parts.runner.call_with(Request::LogOpen { jail: jail.clone() }, Vec::new()).await;
        let lines = match answer {
            Ok(answer) => match answer.fds.into_iter().next() {
                Some(folder) => {
                    logs::tail(folder, epagent_core::verdict::LOG_LINES_MAX).map(|(lines, _)| lines)
                }
                None => Ok(Vec::new()),
            },
            Err(error) => Err(std::io::Error::other(error)),
        };
        match lines {
            Ok(lines) => lines.into_iter().map(|line| line.text).collect(),
            Err(error) => vec![format!("(its log can't be read: {error})")],
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
