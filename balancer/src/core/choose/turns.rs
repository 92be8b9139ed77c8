//! Taking turns by weight, smoothly: with weights 5, 1, 1 the order is a a b a c a a, not a a a a a b c.
//!
//! Each turn everybody who takes part gains its weight, the one who has the most goes and loses the sum
//! (nginx's smooth weighted round robin). Over a round everybody goes as often as its weight says, and what
//! one has neither grows nor falls beyond that sum while the same ones take part. It is in whole numbers and
//! draws no lots, so a run replays.

use super::Candidate;

/// Whose turn it is among those that take part.
pub(super) fn next(candidates: &mut [Candidate], takes_part: impl Fn(&Candidate) -> bool) -> Option<usize> {
    let (mut total, mut most) = (0, None);
    for (at, candidate) in candidates.iter_mut().enumerate().filter(|(_, candidate)| takes_part(candidate)) {
        total += i64::from(candidate.weight);
        candidate.turn += i64::from(candidate.weight);
        if most.is_none_or(|(turn, _)| candidate.turn > turn) {
            most = Some((candidate.turn, at));
        }
    }
    let (_, at) = most?;
    candidates[at].turn -= total;
    Some(at)
}
