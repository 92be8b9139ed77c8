//! Since when each instance is as it is, by the steady clock ([`crate::clock`]), as far as one process has seen it.

use std::collections::HashMap;

use crate::clock::Moment;
use crate::name::JailId;

/// What was seen of the instances of an app.
#[derive(Debug, Default)]
pub struct Ages {
    of: HashMap<JailId, Age>,
}

#[derive(Debug)]
struct Age {
    /// When it was made, also if that was before the first look.
    born_ms: u64,
    /// When it was first seen to be made, or to run.
    since_ms: u64,
    is_started: bool,
    draining_since_ms: Option<u64>,
    unhealthy_since_ms: Option<u64>,
}

impl Ages {
    /// Looks at an instance; since when it has been being made, or running.
    pub fn see(&mut self, id: &JailId, created_wall_ms: u64, is_started: bool, now: Moment) -> u64 {
        let age = self.of.entry(id.clone()).or_insert_with(|| Age {
            born_ms: now.when(created_wall_ms),
            since_ms: now.steady_ms,
            is_started,
            draining_since_ms: None,
            unhealthy_since_ms: None,
        });
        if is_started && !age.is_started {
            (age.is_started, age.since_ms) = (true, now.steady_ms);
        }
        age.since_ms
    }

    /// How long ago it was made.
    pub fn lived_ms(&self, id: &JailId, now: Moment) -> u64 {
        self.of.get(id).map_or(0, |age| now.steady_ms.saturating_sub(age.born_ms))
    }

    /// Since when it has been unhealthy, if it is.
    pub fn unhealthy_since(&mut self, id: &JailId, is_unhealthy: bool, now: Moment) -> Option<u64> {
        let age = self.of.get_mut(id)?;
        age.unhealthy_since_ms = is_unhealthy.then(|| age.unhealthy_since_ms.unwrap_or(now.steady_ms));
        age.unhealthy_since_ms
    }

    /// The balancer is known to send it nothing new: the time its drain may take begins, if it has not.
    pub fn drains(&mut self, id: &JailId, now: Moment) {
        if let Some(age) = self.of.get_mut(id) {
            age.draining_since_ms.get_or_insert(now.steady_ms);
        }
    }

    /// Since when that is known.
    pub fn draining_since(&self, id: &JailId) -> Option<u64> {
        self.of.get(id)?.draining_since_ms
    }

    /// Forgets the others.
    pub fn keep(&mut self, stays: impl Fn(&JailId) -> bool) {
        self.of.retain(|id, _| stays(id));
    }
}
