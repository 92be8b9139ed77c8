//! Which upstream of a route is next.
//!
//! ```text
//!  request ──▶ choose ── one can take it ─────────────────▶ Give
//!                 ├───── they have all the connects they may ▶ Busy      (held, whatever the policy)
//!                 └───── none can, or there is none ────────▶ AllDown, NoUpstreams ──▶ the route's policy
//! ```
//!
//! What an upstream can take is a fact (`upstreams`: is it reached, how much has it under way); whether it
//! should be given any is a judgement (the table's state). A choice is a function of these, the algorithm's
//! own little state, and the request's key. Nothing here knows clients or sockets.

mod maglev;
mod outlier;
#[cfg(test)]
mod tests;
mod turns;

use self::maglev::Maglev;
pub use self::maglev::size_for as maglev_size_for;
use self::outlier::Outlier;
use super::io::Millis;
use super::random::Random;
use super::slab::UpstreamKey;
use super::upstreams::{Standing, Upstream, Upstreams};
use crate::control::protocol::{Ejected, FleetStatus};
use crate::table::{Algorithm, AllDown, HashBy, Passive};

/// One of the upstreams a route may choose from. Those that drain are none of them.
#[derive(Debug, Clone)]
pub struct Candidate {
    pub key: UpstreamKey,
    pub weight: u32,
    /// The table says it is up; otherwise down.
    pub up: bool,
    /// Its place in the turns: who has the most goes next.
    turn: i64,
    outlier: Outlier,
}

/// What there is to be known of a request, and of the moment.
pub struct Ask<'a> {
    pub now: Millis,
    /// What is hashed of the request; none where there is nothing to hash.
    pub key: Option<u64>,
    pub random: &'a mut Random,
}

/// What choosing came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    Give(UpstreamKey),
    /// Some could take it but for the connects that are under way to them already.
    Busy,
    /// There are upstreams, and none may or can be given anything now.
    AllDown,
    /// The route names no upstream.
    NoUpstreams,
}

/// What it came to that traffic failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reported {
    /// The upstream gets none for so long.
    Ejected { for_ms: Millis },
    /// It failed as often as it may, but too many are ejected already.
    Capped,
}

/// A route's way of choosing.
#[derive(Debug, Default)]
pub struct Chooser {
    algorithm: Algorithm,
    pub all_down: AllDown,
    candidates: Vec<Candidate>,
    /// How many upstreams the route names, the draining ones among them.
    named: usize,
    passive: Option<Passive>,
    /// Sums of the weights up to each candidate.
    weight_sums: Vec<u32>,
    /// The table of the hash; made when it is first needed.
    maglev: Option<Maglev>,
    /// How many entries that table has.
    maglev_size: u32,
}

/// What a table says of a route's choosing.
pub struct Wanted<'a> {
    pub algorithm: &'a Algorithm,
    pub all_down: AllDown,
    pub candidates: Vec<Candidate>,
    pub named: usize,
    pub passive: Option<Passive>,
    pub maglev_size: u32,
}

impl Candidate {
    pub fn new(key: UpstreamKey, weight: u16, up: bool) -> Self {
        Self { key, weight: u32::from(weight), up, turn: 0, outlier: Outlier::default() }
    }
}

impl Chooser {
    /// Takes over what a new table says. Whoever stays keeps its place in the turns.
    pub fn apply(&mut self, wanted: Wanted<'_>) {
        let mut candidates = wanted.candidates;
        for (at, candidate) in candidates.iter_mut().enumerate() {
            // Most tables leave them where they were.
            let same_place = self.candidates.get(at).filter(|known| known.key == candidate.key);
            let known =
                same_place.or_else(|| self.candidates.iter().find(|known| known.key == candidate.key));
            if let Some(known) = known {
                (candidate.turn, candidate.outlier) = (known.turn, known.outlier);
            }
        }
        let share = |candidate: &Candidate| (candidate.key, candidate.weight);
        let same_set = candidates.len() == self.candidates.len()
            && candidates.iter().map(share).eq(self.candidates.iter().map(share));
        if !same_set || self.maglev_size != wanted.maglev_size {
            self.maglev = None;
        }
        self.maglev_size = wanted.maglev_size;
        self.weight_sums = sums(&candidates);
        self.candidates = candidates;
        self.named = wanted.named;
        self.passive = wanted.passive;
        self.algorithm = wanted.algorithm.clone();
        self.all_down = wanted.all_down;
    }

    /// How many of the upstreams the table says are up.
    pub fn up_count(&self) -> usize {
        self.candidates.iter().filter(|candidate| candidate.up).count()
    }

    /// Whether one that the table says is up is still to be judged by its checks for the first time.
    pub fn awaits_verdict(&self, upstreams: &Upstreams) -> bool {
        let is_unjudged = |candidate: &Candidate| {
            candidate.up && upstreams.get(candidate.key).is_some_and(Upstream::is_unjudged)
        };
        self.candidates.iter().any(is_unjudged)
    }

    /// What of a request is hashed, if anything is.
    pub fn hash_by(&self) -> Option<&HashBy> {
        match &self.algorithm {
            Algorithm::Hash(hash) => Some(&hash.by),
            _ => None,
        }
    }

    /// Chooses who gets a request.
    pub fn choose(&mut self, ask: &mut Ask<'_>, upstreams: &Upstreams) -> Choice {
        let mut found = self.pick(&mut View { upstreams, now: ask.now, open: false }, ask);
        if found.is_none() && self.all_down == AllDown::FailOpen && !self.is_busy(upstreams, ask.now) {
            found = self.pick(&mut View { upstreams, now: ask.now, open: true }, ask);
        }
        match found {
            Some(at) => Choice::Give(self.candidates[at].key),
            None if self.is_busy(upstreams, ask.now) => Choice::Busy,
            None if self.named > 0 => Choice::AllDown,
            None => Choice::NoUpstreams,
        }
    }

    /// Takes in what became of traffic given to an upstream; what it came to.
    pub fn report(
        &mut self,
        key: UpstreamKey,
        good: bool,
        now: Millis,
        upstreams: &Upstreams,
    ) -> Option<Reported> {
        let passive = self.passive?;
        // Whom its checks keep away cannot stand in for one that is ejected.
        let is_proven = |candidate: &Candidate| upstreams.get(candidate.key).is_some_and(Upstream::is_proven);
        let is_away = |candidate: &&Candidate| candidate.outlier.is_ejected(now) || !is_proven(candidate);
        let away = self.candidates.iter().filter(|candidate| candidate.up).filter(is_away).count();
        let of = self.up_count();
        let outlier = &mut self.candidates.iter_mut().find(|candidate| candidate.key == key)?.outlier;
        if good {
            outlier.succeeded();
        }
        if good || outlier.is_ejected(now) || !outlier.failed(&passive) {
            return None;
        }
        match outlier::may_eject(&passive, away, of) {
            true => Some(Reported::Ejected { for_ms: outlier.eject(&passive, now) }),
            false => Some(Reported::Capped),
        }
    }

    /// Those that are ejected.
    fn ejected(&self, now: Millis) -> impl Iterator<Item = &Candidate> {
        self.candidates.iter().filter(move |candidate| candidate.up && candidate.outlier.is_ejected(now))
    }

    pub fn status(&self, now: Millis, upstreams: &Upstreams) -> FleetStatus {
        let view = View { upstreams, now, open: false };
        let is_usable = |candidate: &&Candidate| view.standing(candidate) != Standing::Away;
        let ejected = |candidate: &Candidate| {
            let upstream = upstreams.get(candidate.key)?.id.clone();
            Some(Ejected { upstream, left_ms: candidate.outlier.left_ms(now) })
        };
        FleetStatus {
            named: self.named as u64,
            up: self.up_count() as u64,
            usable: self.candidates.iter().filter(is_usable).count() as u64,
            ejected: self.ejected(now).filter_map(ejected).collect(),
        }
    }

    fn pick(&mut self, view: &mut View<'_>, ask: &mut Ask<'_>) -> Option<usize> {
        match &self.algorithm {
            Algorithm::LeastLoad => self.least(view, Upstream::load),
            Algorithm::RoundRobin => self.least(view, |_| 0),
            Algorithm::LeastConnections => self.least(view, Upstream::connections),
            Algorithm::TwoChoices => self.better_of_two(view, ask.random),
            Algorithm::Hash(_) => match ask.key {
                Some(key) => self.of_key(view, key),
                None => self.least(view, Upstream::load),
            },
        }
    }

    /// The one with the least for its weight, in turn among equals; or a lost one whose time has come to be
    /// tried, which goes first, so that it is found again soon.
    fn least(&mut self, view: &View<'_>, load: impl Fn(&Upstream) -> u64) -> Option<usize> {
        let mut least: Option<(u64, u32)> = None;
        let mut last_resort = None;
        for (at, candidate) in self.candidates.iter().enumerate() {
            match view.standing(candidate) {
                Standing::Ready => {
                    let found = (view.load(candidate, &load), candidate.weight);
                    if least.is_none_or(|best| is_less(found, best)) {
                        least = Some(found);
                    }
                }
                Standing::Due => return Some(at),
                Standing::LastResort => last_resort = Some(at),
                Standing::Busy | Standing::Away => {}
            }
        }
        let Some(least) = least else { return last_resort };
        let is_one_of_them = |candidate: &Candidate| {
            view.standing(candidate) == Standing::Ready
                && !is_less(least, (view.load(candidate, &load), candidate.weight))
        };
        turns::next(&mut self.candidates, is_one_of_them)
    }

    /// Of two drawn by weight, the one with less under way for its weight.
    fn better_of_two(&mut self, view: &View<'_>, random: &mut Random) -> Option<usize> {
        let total = u64::from(*self.weight_sums.last()?);
        let mut draw = || {
            let ticket = random.below(total) as u32;
            self.weight_sums.partition_point(|sum| *sum <= ticket)
        };
        let first = draw();
        // The same one twice is no choice of two; a heavy one may well come up several times.
        let drawn = (0..4).map(|_| draw()).find(|second| *second != first);
        let second = drawn.unwrap_or((first + 1) % self.candidates.len());
        let of = |at: usize| {
            let candidate = &self.candidates[at];
            (view.standing(candidate), (view.load(candidate, Upstream::load), candidate.weight))
        };
        match (of(first), of(second)) {
            ((Standing::Due, _), _) => Some(first),
            (_, (Standing::Due, _)) => Some(second),
            ((Standing::Ready, a), (Standing::Ready, b)) => Some(if is_less(b, a) { second } else { first }),
            ((Standing::Ready, _), _) => Some(first),
            (_, (Standing::Ready, _)) => Some(second),
            _ => self.least(view, Upstream::load),
        }
    }

    /// The one this key belongs to. While that one is away its keys go to the others, each to the next in
    /// the table, and nobody else's keys move.
    fn of_key(&mut self, view: &View<'_>, key: u64) -> Option<usize> {
        let Self { candidates, maglev, maglev_size, .. } = self;
        let maglev = maglev.get_or_insert_with(|| {
            let names = candidates.iter().map(|candidate| (view.name(candidate), candidate.weight));
            Maglev::new(&names.collect::<Vec<_>>(), *maglev_size)
        });
        let own = maglev.owner(key)?;
        if matches!(view.standing(&candidates[own]), Standing::Ready | Standing::Due) {
            return Some(own);
        }
        let ready: Vec<bool> =
            candidates.iter().map(|candidate| view.standing(candidate) == Standing::Ready).collect();
        if !ready.contains(&true) {
            return self.least(view, Upstream::load);
        }
        maglev.next_owner(key, |at| ready[at])
    }

    fn is_busy(&self, upstreams: &Upstreams, now: Millis) -> bool {
        let view = View { upstreams, now, open: self.all_down == AllDown::FailOpen };
        self.candidates.iter().any(|candidate| view.standing(candidate) == Standing::Busy)
    }
}

/// The upstreams at one moment, with or without heed to what is thought of them.
struct View<'a> {
    upstreams: &'a Upstreams,
    now: Millis,
    /// Only facts count: what is not reached is not up, whatever else is said of it.
    open: bool,
}

impl View<'_> {
    fn standing(&self, candidate: &Candidate) -> Standing {
        match self.upstreams.get(candidate.key) {
            Some(upstream) if self.open || self.is_trusted(candidate, upstream) => {
                upstream.standing(self.now)
            }
            _ => Standing::Away,
        }
    }

    /// What is thought of it: by whoever made the table, by its checks, and by what became of its traffic.
    fn is_trusted(&self, candidate: &Candidate, upstream: &Upstream) -> bool {
        candidate.up && upstream.is_proven() && !candidate.outlier.is_ejected(self.now)
    }

    fn load(&self, candidate: &Candidate, load: impl Fn(&Upstream) -> u64) -> u64 {
        self.upstreams.get(candidate.key).map_or(0, load)
    }

    /// What an upstream is known by in every process.
    fn name(&self, candidate: &Candidate) -> u64 {
        self.upstreams.get(candidate.key).map_or(0, Upstream::name_hash)
    }
}

/// Whether one load is less than another, each for its weight.
fn is_less((load, weight): (u64, u32), (other_load, other_weight): (u64, u32)) -> bool {
    load * u64::from(other_weight) < other_load * u64::from(weight)
}

fn sums(candidates: &[Candidate]) -> Vec<u32> {
    let mut total = 0;
    let sum = |candidate: &Candidate| {
        total += candidate.weight;
        total
    };
    candidates.iter().map(sum).collect()
}
