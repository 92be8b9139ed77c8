//! The phases of a deploy.
//!
//! ```text
//!  received ─▶ building ─▶ releasing ─▶ starting ─▶ checking ─▶ switching ─▶ draining ─▶ done
//!      └──────────┴────────────┴───────────┴───────────┴───────────┴──▶ failed
//! ```
//!
//! Each step is recorded before the work of the phase begins, and the work of a phase may be begun again: so a
//! brain that was killed reads the phase and goes on. A rollback, a restart or a change of configuration is a
//! deploy that has nothing to build and skips to `starting`. Past `switching` a deploy can't fail any more: the
//! new release serves, and what is left is to let the old one go.

use std::fmt;

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// The archive and the manifest are on disk.
    Received,
    /// The archive is unpacked on the image and the build commands run.
    Building,
    /// The release command runs, once.
    Releasing,
    /// Instances of the new release are being created.
    Starting,
    /// They run and are being checked.
    Checking,
    /// The balancer's table is changing over to them.
    Switching,
    /// The old instances finish what they have.
    Draining,
    Done,
    Failed,
}

impl Phase {
    pub fn is_over(self) -> bool {
        matches!(self, Phase::Done | Phase::Failed)
    }

    /// Whether the deploy's own instances are the ones to serve from here on.
    pub fn has_switched(self) -> bool {
        matches!(self, Phase::Switching | Phase::Draining | Phase::Done)
    }

    /// Whether `next` may follow.
    pub fn may_become(self, next: Phase) -> bool {
        use Phase::*;
        matches!(
            (self, next),
            (Received, Building | Starting)
                | (Building, Releasing)
                | (Releasing, Starting)
                | (Starting, Checking)
                | (Checking, Switching)
                | (Switching, Draining)
                | (Draining, Done)
                | (Received | Building | Releasing | Starting | Checking, Failed)
        )
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Received => "received",
            Phase::Building => "building",
            Phase::Releasing => "releasing",
            Phase::Starting => "starting",
            Phase::Checking => "checking",
            Phase::Switching => "switching",
            Phase::Draining => "draining",
            Phase::Done => "done",
            Phase::Failed => "failed",
        }
    }

    pub const ALL: [Phase; 9] = [
        Phase::Received,
        Phase::Building,
        Phase::Releasing,
        Phase::Starting,
        Phase::Checking,
        Phase::Switching,
        Phase::Draining,
        Phase::Done,
        Phase::Failed,
    ];
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl std::str::FromStr for Phase {
    type Err = UnknownPhase;

    fn from_str(text: &str) -> Result<Self, UnknownPhase> {
        Self::ALL
            .into_iter()
            .find(|phase| phase.as_str() == text)
            .ok_or_else(|| UnknownPhase(text.to_owned()))
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a phase of a deploy")]
pub struct UnknownPhase(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_follows_the_end() {
        for phase in Phase::ALL {
            assert!(!Phase::Done.may_become(phase));
            assert!(!Phase::Failed.may_become(phase));
        }
    }

    #[test]
    fn a_deploy_that_serves_does_not_fail() {
        for phase in Phase::ALL.into_iter().filter(|phase| phase.has_switched()) {
            assert!(!phase.may_become(Phase::Failed), "{phase}");
        }
    }

    #[test]
    fn names_round_trip() {
        for phase in Phase::ALL {
            assert_eq!(phase.as_str().parse::<Phase>().unwrap(), phase);
        }
    }
}
