//! Deciding: from an operation (or a record an earlier one left) to steps. Pure; nothing here touches a disk.
//!
//! ```text
//!             stage                    publish
//!  (nothing) ───────▶ staging/stage.ID ────────▶ in place ──▶ sealed        record open until sealed
//!             create                  move
//!  (nothing) ───────▶ staging/new.X   ────────▶ in place                    record open until durable
//!             remove                  move           destroy
//!  in place  ───────────────────────▶ staging/old.X ────────▶ (nothing)     record open until durable
//! ```
//!
//! The move is each operation's point of no return. An operation that was cut short (an error, `kill -9`, a power cut)
//! is judged by [`recover`] from its record and from what is on disk: before the move a creation is taken back, after
//! it completed; a removal is always completed. The order of steps makes that sound: an object is marked before it
//! moves, so one found in place with the mark of this record is whole.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::name::{AppName, ImageId, ReleaseId, StagingId};
use crate::place::{Place, Slot, Target};
use crate::types::Quota;

/// What a record says is under way in its slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "intent")]
pub(crate) enum Intent {
    Stage { target: Target },
    Create,
    Remove,
}

/// Written on an object's root directory as a `trusted.` attribute, which a tenant in a user namespace can neither see
/// nor set; it moves and vanishes with the object.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Mark {
    pub(crate) created_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) staging: Option<StagingId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) image: Option<ImageId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) app: Option<AppName>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) release: Option<ReleaseId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) volume_id: Option<String>,
}

/// The closed list of things the executor can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// Write the intent; from here on a sweep knows about us.
    Record(Intent),
    /// Make a quota group, used by the next `Create` or `Clone`.
    Fence(Quota),
    Create(Slot),
    Clone {
        from: Place,
        to: Slot,
    },
    Mark(Slot, Box<Mark>),
    /// Write out the data of everything, so that a crash after the move cannot show empty files.
    Flush,
    /// Into a place, making its folder where it is missing.
    MoveIn(Slot, Place),
    Seal(Place),
    Unseal(Place),
    MoveOut(Place, Slot),
    /// Delete with all that is nested inside; absent is fine.
    Destroy(Slot),
    /// Make the changes to names durable.
    Commit,
    Close,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Record(_) => write!(f, "record"),
            Step::Fence(quota) => write!(f, "fence {}", quota.limit_bytes),
            Step::Create(slot) => write!(f, "create {slot}"),
            Step::Clone { from, to } => write!(f, "clone {from} to {to}"),
            Step::Mark(slot, _) => write!(f, "mark {slot}"),
            Step::Flush => write!(f, "flush"),
            Step::MoveIn(slot, place) => write!(f, "move {slot} to {place}"),
            Step::Seal(place) => write!(f, "seal {place}"),
            Step::Unseal(place) => write!(f, "unseal {place}"),
            Step::MoveOut(place, slot) => write!(f, "move {place} to {slot}"),
            Step::Destroy(slot) => write!(f, "destroy {slot}"),
            Step::Commit => write!(f, "commit"),
            Step::Close => write!(f, "close"),
        }
    }
}

fn build(slot: &Slot, from: Option<&Place>, intent: Intent, quota: Quota, mark: Mark) -> Vec<Step> {
    let make = match from {
        Some(from) => Step::Clone { from: from.clone(), to: slot.clone() },
        None => Step::Create(slot.clone()),
    };
    vec![Step::Record(intent), Step::Fence(quota), make, Step::Mark(slot.clone(), Box::new(mark))]
}

/// A caller's staging area; its record stays open for [`publish`] or [`abort`].
pub(crate) fn stage(
    slot: &Slot,
    from: Option<&Place>,
    target: Target,
    quota: Quota,
    mark: Mark,
) -> Vec<Step> {
    let mut steps = build(slot, from, Intent::Stage { target }, quota, mark);
    steps.push(Step::Commit);
    steps
}

/// From a staging area to a sealed place.
pub(crate) fn publish(slot: &Slot, place: &Place) -> Vec<Step> {
    let mut steps = vec![Step::Flush, Step::MoveIn(slot.clone(), place.clone())];
    steps.extend(settle(place));
    steps
}

/// What is left to do once an object has moved in.
fn settle(place: &Place) -> Vec<Step> {
    match place.is_sealed() {
        // A subvolume that is read-only can no longer change its parent, so sealing comes after the move; readers
        // take an unsealed image or release for absent, which makes the seal the moment of publication.
        true => vec![Step::Seal(place.clone()), Step::Commit, Step::Close],
        false => vec![Step::Commit, Step::Close],
    }
}

pub(crate) fn abort(slot: &Slot) -> Vec<Step> {
    vec![Step::Destroy(slot.clone()), Step::Commit, Step::Close]
}

/// An object made and put in place within one call.
pub(crate) fn create(place: &Place, from: Option<&Place>, quota: Quota, mark: Mark) -> Vec<Step> {
    let slot = Slot::New(place.clone());
    let mut steps = build(&slot, from, Intent::Create, quota, mark);
    steps.push(Step::MoveIn(slot, place.clone()));
    steps.extend(settle(place));
    steps
}

pub(crate) fn remove(place: &Place) -> Vec<Step> {
    let mut steps = vec![Step::Record(Intent::Remove)];
    steps.extend(take_out(place));
    steps
}

/// Moves the object out before deleting it, so that nobody sees it half deleted.
fn take_out(place: &Place) -> Vec<Step> {
    let slot = Slot::Old(place.clone());
    let mut steps = Vec::new();
    if place.is_sealed() {
        steps.push(Step::Unseal(place.clone()));
    }
    steps.extend([
        Step::MoveOut(place.clone(), slot.clone()),
        Step::Destroy(slot),
        Step::Commit,
        Step::Close,
    ]);
    steps
}

/// What was found on disk for a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) slot: bool,
    /// The place this record's object moved to: for a removal and a creation simply whether it is there, for a
    /// staging area where an object with its mark was found.
    pub(crate) place: Option<Place>,
}

/// How an operation that was cut short ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Finish,
    Undo,
}

/// Judges a record whose operation is no longer running (or whose staging area nobody wants).
pub(crate) fn recover(slot: &Slot, intent: &Intent, seen: &Seen) -> (Verdict, Vec<Step>) {
    match (intent, &seen.place) {
        (Intent::Remove, Some(place)) if !seen.slot => (Verdict::Finish, take_out(place)),
        (Intent::Remove, _) => (Verdict::Finish, abort(slot)),
        (Intent::Stage { .. } | Intent::Create, Some(place)) if !seen.slot => {
            (Verdict::Finish, settle(place))
        }
        (Intent::Stage { .. } | Intent::Create, _) => (Verdict::Undo, abort(slot)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume() -> Place {
        Place::Volume("shop".parse().unwrap(), "data".parse().unwrap())
    }

    fn image() -> Place {
        Place::Image("py@7".parse().unwrap())
    }

    /// A model of the disk, precise enough to say what each prefix of a plan leaves behind.
    fn run(steps: &[Step], seen: &mut Seen, record: &mut bool, sealed: &mut bool) {
        for step in steps {
            match step {
                Step::Record(_) => *record = true,
                Step::Create(_) | Step::Clone { .. } => seen.slot = true,
                Step::MoveIn(_, place) => *seen = Seen { slot: false, place: Some(place.clone()) },
                Step::MoveOut(..) => *seen = Seen { slot: true, place: None },
                Step::Seal(_) => *sealed = true,
                Step::Unseal(_) => *sealed = false,
                Step::Destroy(_) => seen.slot = false,
                Step::Close => *record = false,
                Step::Fence(_) | Step::Mark(..) | Step::Flush | Step::Commit => {}
            }
        }
    }

    /// Cuts `steps` after each step and recovers; the object must then be whole or absent, with no record and no slot.
    fn cut_everywhere(slot: &Slot, intent: &Intent, steps: &[Step], start: &Seen, sealed_at_start: bool) {
        for cut in 0..=steps.len() {
            let (mut seen, mut record, mut sealed) = (start.clone(), false, sealed_at_start);
            // A staging area's record is there from before.
            if !matches!(steps[0], Step::Record(_)) {
                record = true;
            }
            run(&steps[..cut], &mut seen, &mut record, &mut sealed);
            if record {
                let (_, rest) = recover(slot, intent, &seen);
                run(&rest, &mut seen, &mut record, &mut sealed);
            }
            assert!(!record && !seen.slot, "cut after {cut} leaves {seen:?}");
            if let Some(place) = &seen.place {
                assert_eq!(sealed, place.is_sealed(), "cut after {cut}");
            }
        }
    }

    #[test]
    fn each_cut_of_each_plan_ends_in_the_old_state_or_the_new() {
        let nothing = Seen { slot: false, place: None };
        for place in [volume(), image()] {
            let steps = create(&place, None, Quota::mib(1), Mark::default());
            cut_everywhere(&Slot::New(place.clone()), &Intent::Create, &steps, &nothing, false);
            let there = Seen { slot: false, place: Some(place.clone()) };
            let steps = remove(&place);
            cut_everywhere(&Slot::Old(place.clone()), &Intent::Remove, &steps, &there, place.is_sealed());
        }
        let slot = Slot::Stage("s".parse().unwrap());
        let target = Target::Image { image: "py".parse().unwrap() };
        let staged = Seen { slot: true, place: None };
        let intent = Intent::Stage { target };
        cut_everywhere(&slot, &intent, &publish(&slot, &image()), &staged, false);
        cut_everywhere(&slot, &intent, &abort(&slot), &staged, false);
    }

    #[test]
    fn a_removal_once_recorded_is_never_taken_back() {
        for seen in [Seen { slot: true, place: None }, Seen { slot: false, place: Some(volume()) }] {
            let (verdict, _) = recover(&Slot::Old(volume()), &Intent::Remove, &seen);
            assert_eq!(verdict, Verdict::Finish);
        }
    }
}
