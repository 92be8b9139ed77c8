//! Processes that may sleep, in the same world.

use super::*;

fn web() -> ProcessName {
    "web".parse().unwrap()
}

/// A world whose app serves, may sleep, and was last asked for long ago.
fn tired(seed: u64, strategy: Strategy) -> World {
    let mut world = World::new(seed, strategy);
    world.sleep = Some(SleepSpec { idle_after_ms: 2_000 });
    world.deploy(1, 2);
    world.run_until_over(false);
    world.settle(2);
    world.view.idle_ms.insert(web(), 1_000_000);
    world
}

#[test]
fn what_nobody_asks_for_sleeps_until_somebody_waits_for_it() {
    for seed in 0..200 {
        for strategy in [Strategy::Overlap, Strategy::Replace] {
            let mut world = tired(seed, strategy);
            for _ in 0..3 {
                world.settle(0);
                assert!(world.view.asleep.contains(&web()), "seed {seed}");
                world.view.idle_ms.clear();
                world.view.awaited.insert(web());
                world.settle(2);
                world.view.awaited.clear();
                // Answered; and from then on nobody asks. It is there for as long as it may be idle.
                world.view.idle_ms.insert(web(), 1_000_000);
                let awake_at_ms = world.now_ms;
                while world.view.asleep.is_empty() {
                    assert!(world.now_ms < awake_at_ms + 60_000, "seed {seed}: it never sleeps again");
                    world.round(false);
                }
                let started = world.view.instances.iter().map(|i| i.started_at_ms).max().unwrap_or(0);
                assert!(world.now_ms >= started + 2_000, "seed {seed}: it slept too early");
            }
        }
    }
}

#[test]
fn a_request_in_the_moment_of_falling_asleep_wakes_it_again() {
    for seed in 0..200 {
        for strategy in [Strategy::Overlap, Strategy::Replace] {
            let mut world = tired(seed, strategy);
            while world.view.asleep.is_empty() {
                world.round(false);
            }
            // At any point of the drain.
            for _ in 0..seed % 9 {
                world.round(false);
            }
            world.view.idle_ms.clear();
            world.view.awaited.insert(web());
            world.settle(2);
        }
    }
}

#[test]
fn a_deploy_of_a_sleeping_app_starts_it_and_a_failed_one_leaves_it_asleep() {
    for seed in 0..100 {
        for strategy in [Strategy::Overlap, Strategy::Replace] {
            let mut world = tired(seed, strategy);
            world.settle(0);
            world.broken = Some(DeployId(2));
            world.deploy(2, 2);
            assert_eq!(world.run_until_over(false), Phase::Failed, "seed {seed}");
            world.settle(0);
            world.broken = None;
            world.view.idle_ms.clear();
            world.deploy(3, 3);
            assert_eq!(world.run_until_over(false), Phase::Done, "seed {seed}");
            world.settle(3);
            world.view.idle_ms.insert(web(), 1_000_000);
            world.settle(0);
        }
    }
}
