//! Processes that are stopped while nobody asks for them.
//!
//! ```text
//!            nobody has asked for `idle_after`, and its instances are as old as that
//!   awake ───────────────────────────────────────────────────────────────────────────▶ asleep
//!     ▲                                                                                  │
//!     ├──────────────────── a request of its route waits, with nobody to answer ─────────┤
//!     └──────────────────── a deploy switches to a new generation ───────────────────────┘
//! ```
//!
//! Falling asleep is scaling to zero: the instances drain, so that a request that came in the same moment is still
//! answered. Its route stays, and holds what comes next until the process is awake again.

use super::{Action, Generation, InstanceState, View};
use crate::name::ProcessName;
use crate::spec::SleepSpec;

pub(super) fn plan(view: &View, serving: &Generation, now_ms: u64, actions: &mut Vec<Action>) {
    // A deploy under way wakes what it brings up, and judges it undisturbed.
    if !view.wanted || view.candidate.is_some() {
        return;
    }
    for (process, spec) in &serving.spec.processes {
        let is_awaited = view.awaited.contains(process);
        match (&spec.sleep, view.asleep.contains(process)) {
            (_, true) if is_awaited => actions.push(Action::Wake { process: process.clone() }),
            // It slept under an older release and may not under this one.
            (None, true) => actions.push(Action::Wake { process: process.clone() }),
            (Some(sleep), false) if !is_awaited && is_tired(view, serving, process, sleep, now_ms) => {
                actions.push(Action::Sleep { process: process.clone() });
            }
            _ => {}
        }
    }
}

/// Whether nobody asked for it long enough, and it has been there to be asked for as long.
fn is_tired(
    view: &View,
    serving: &Generation,
    process: &ProcessName,
    sleep: &SleepSpec,
    now_ms: u64,
) -> bool {
    let is_idle = view.idle_ms.get(process).is_some_and(|idle_ms| *idle_ms >= sleep.idle_after_ms);
    is_idle
        && view.count(serving, process) > 0
        && view.of(serving.deploy).filter(|instance| instance.process == *process).all(|instance| {
            let age_ms = now_ms.saturating_sub(instance.started_at_ms);
            instance.state == InstanceState::Running && age_ms >= sleep.idle_after_ms
        })
}
