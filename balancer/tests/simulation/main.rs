//! The core under a seeded simulator: a network that delivers late, short and in pieces, buffers that run
//! out, receives that end by themselves, apps that come, go and crash, clients that pipeline, stall, half
//! close and vanish, streams that end either way round, balancers that drain and are succeeded. Every seed
//! replays exactly.
//!
//! What is checked: what the core asks of a door is within the contract; no byte is lost, doubled or mixed
//! up between requests; without crashes every request gets its answer; a request that must not be repeated
//! never reaches an app twice; nobody is given a request that may not have one; shared buffers are never kept; nothing is left open at the end.
//!
//! `SIMULATION_SEEDS=N` runs more seeds, `SIMULATION_SEED=S` replays one, `SIMULATION_TRACE=1`
//! shows everything that passes between core and door.

mod actors;
mod far;
#[path = "../common/hello.rs"]
#[allow(dead_code, reason = "alerts are for those who read them")]
mod hello;
mod judging;
mod ledger;
#[path = "../common/lent.rs"]
mod lent;
mod prefaces;
mod secure;
mod world;

use world::{Mode, World};

/// Seeds of one test run, over the five modes: as many as fit into a minute, which without optimisation are
/// fewer. `make soak` runs a million.
const SEEDS: u64 = if cfg!(debug_assertions) { 2_500 } else { 10_000 };
const MODES: u64 = 5;

fn seeds(mode_index: u64) -> Vec<u64> {
    if let Ok(seed) = std::env::var("SIMULATION_SEED") {
        return vec![seed.parse().expect("SIMULATION_SEED is a number")];
    }
    let count = std::env::var("SIMULATION_SEEDS").map_or(SEEDS, |text| text.parse().expect("a number"));
    (0..count / MODES).map(|seed| seed * MODES + mode_index).collect()
}

fn check(mode: Mode, mode_index: u64) {
    for seed in seeds(mode_index) {
        let outcome = std::panic::catch_unwind(|| World::new(seed, mode).run());
        if let Err(panic) = outcome {
            eprintln!("replay with SIMULATION_SEED={seed} ({mode:?})");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn calm_networks_lose_and_mix_up_nothing() {
    check(Mode::Calm, 0);
}

#[test]
fn deploys_fail_no_request() {
    check(Mode::Deploys, 1);
}

#[test]
fn crashes_and_vanishing_clients_hurt_only_their_own_requests() {
    check(Mode::Crashes, 2);
}

#[test]
fn a_balancer_that_drains_and_its_successor_fail_no_request() {
    check(Mode::Handovers, 3);
}

#[test]
fn only_those_who_may_be_given_requests_are_and_what_is_limited_is_counted_back() {
    check(Mode::Judged, 4);
}
