//! What makes the core choose: algorithms and weights in every run; checks, ejections, limits and policies where
//! apps are judged.

use crate::actors::Rng;
use crate::world::{APPS, Mode};

/// Settings of one run, and what apps have shown of themselves.
pub struct Judging {
    algorithm: &'static str,
    weights: [u64; APPS],
    health: String,
    all_down: &'static str,
    limits: String,
    /// Apps that fail their checks, and answer with an error.
    pub sick: [bool; APPS],
    up: [bool; APPS],
    /// How often the table has said of each app that it is up, after it was not.
    ups: [u32; APPS],
    /// Apps that have passed a check since.
    passed: [bool; APPS],
}

impl Judging {
    pub fn new(rng: &mut Rng, mode: Mode) -> Self {
        let algorithm = [
            "",
            r#""algorithm":"round_robin","#,
            r#""algorithm":"least_connections","#,
            r#""algorithm":"two_choices","#,
            r#""algorithm":{"hash":{"by":"source"}},"#,
            r#""algorithm":{"hash":{"by":{"header":"x-id"}}},"#,
        ][rng.below(6) as usize];
        let weights = std::array::from_fn(|_| 1 + rng.below(5));
        let mut judging = Self {
            algorithm,
            weights,
            health: String::new(),
            all_down: "",
            limits: String::new(),
            sick: [false; APPS],
            up: [false; APPS],
            ups: [0; APPS],
            passed: [false; APPS],
        };
        if mode == Mode::Judged {
            judging.health = health(rng);
            judging.all_down =
                ["", r#""all_down":"answer","#, r#""all_down":"fail_open","#][rng.below(3) as usize];
            judging.limits = limits(rng);
        }
        judging
    }

    /// What a proxy action of HTTP routes says besides its upstreams.
    pub fn settings(&self) -> String {
        format!("{}{}{}", self.algorithm, self.all_down, self.health)
    }

    /// The same for streams, which are neither checked nor limited.
    pub fn stream_settings(&self) -> &str {
        self.algorithm
    }

    pub fn weight(&self, app: usize) -> u64 {
        self.weights[app]
    }

    /// The limits of a route.
    pub fn limits(&self) -> &str {
        &self.limits
    }

    /// The run is over: nothing is checked any more.
    pub fn rest(&mut self) {
        self.health.clear();
    }

    pub fn fails_open(&self) -> bool {
        self.all_down.contains("fail_open")
    }

    /// A table says of each app whether it is up.
    pub fn told(&mut self, states: impl Iterator<Item = bool>) {
        for (app, up) in states.enumerate() {
            if up && !std::mem::replace(&mut self.up[app], up) {
                self.passed[app] = false;
                self.ups[app] += 1;
            }
            self.up[app] = up;
        }
    }

    pub fn checked(&mut self, app: usize) {
        self.passed[app] |= !self.sick[app];
    }

    /// Since when a connection made now is there.
    pub fn ups(&self, app: usize) -> u32 {
        self.ups[app]
    }

    /// An app got a request over a connection made back then: it must have proven itself, where it had to.
    pub fn check_request(&self, app: usize, ups: u32) {
        let must = self.health.contains("active") && !self.fails_open() && ups == self.ups[app];
        assert!(!must || self.passed[app], "a request to app {app}, which has never passed a check");
    }
}

fn health(rng: &mut Rng) -> String {
    let active = format!(
        r#""active":{{"check":{{"http":{{"path":"/healthz"{}}}}},"interval_ms":{},"timeout_ms":{},"rise":{},"fall":{}}}"#,
        if rng.one_in(2) { r#","body":"well""# } else { "" },
        50 + rng.below(500),
        20 + rng.below(500),
        1 + rng.below(2),
        1 + rng.below(3),
    );
    let passive = format!(
        r#""passive":{{"failures":{},"ejection_ms":{},"ejected_max_percent":{}}}"#,
        1 + rng.below(4),
        50 + rng.below(500),
        rng.below(101),
    );
    match rng.below(4) {
        0 => format!(r#""health":{{{active}}},"#),
        1 => format!(r#""health":{{{passive}}},"#),
        _ => format!(r#""health":{{{active},{passive}}},"#),
    }
}

fn limits(rng: &mut Rng) -> String {
    let one = |rng: &mut Rng| match rng.below(3) {
        0 => format!(r#""connections_max":{}"#, 1 + rng.below(4)),
        1 => format!(r#""requests_per_second":{},"burst":{}"#, 1 + rng.below(50), 1 + rng.below(5)),
        _ => format!(r#""connections_max":{},"requests_per_second":{}"#, 1 + rng.below(4), 1 + rng.below(50)),
    };
    match rng.below(3) {
        0 => String::new(),
        1 => format!(r#""limits":{{{}}},"#, one(rng)),
        _ => format!(r#""limits":{{{},"per_source":{{{}}}}},"#, one(rng), one(rng)),
    }
}
