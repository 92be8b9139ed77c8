//! The wall clock is set to and fro while instances drain, prove themselves and crash: what is measured stays as long
//! as it should be.

use std::collections::HashMap;

use super::*;
use crate::app::ages::Ages;
use crate::clock::Moment;

/// One step of the world's time.
const STEP_MS: u64 = 50;
/// How far the wall clock jumps at most, either way: ten years.
const JUMP_MS: u64 = 10 * 365 * 86_400_000;

/// The caller's clocks and memory, beside a world whose own time is the steady clock.
struct Caller {
    wall_ms: u64,
    /// Recorded by the wall clock, and kept over restarts of the caller.
    created: HashMap<JailId, u64>,
    ages: Ages,
}

impl Caller {
    fn new() -> Self {
        Self { wall_ms: 2 * JUMP_MS, created: HashMap::new(), ages: Ages::default() }
    }

    fn restart(&mut self) {
        self.ages = Ages::default();
    }

    /// One round, begun with a look by clocks of which one may just have been set.
    fn round(&mut self, world: &mut World) {
        self.wall_ms = match world.random.next() % 10 {
            0 => self.wall_ms.saturating_sub(world.random.next() % JUMP_MS),
            1 => self.wall_ms + world.random.next() % JUMP_MS,
            _ => self.wall_ms + STEP_MS,
        };
        let now = Moment { wall_ms: self.wall_ms, steady_ms: world.now_ms };
        self.look(world, now);
        world.round(false);
    }

    /// Rounds until something holds.
    fn until(&mut self, world: &mut World, what: &str, holds: impl Fn(&World) -> bool) {
        for _ in 0..5_000 {
            if holds(world) {
                return;
            }
            self.round(world);
        }
        panic!("never {what}: {:#?}", world.view);
    }

    fn look(&mut self, world: &mut World, now: Moment) {
        let table_current = world.view.table_current;
        for instance in &mut world.view.instances {
            let created_ms = *self.created.entry(instance.id.clone()).or_insert(now.wall_ms);
            let is_started = instance.state != InstanceState::Starting;
            instance.started_at_ms = self.ages.see(&instance.id, created_ms, is_started, now);
            let is_unhealthy = instance.health == Health::Unhealthy;
            instance.unhealthy_since_ms = self.ages.unhealthy_since(&instance.id, is_unhealthy, now);
            if let InstanceState::Draining { since_ms, .. } = &mut instance.state {
                if table_current {
                    self.ages.drains(&instance.id, now);
                }
                *since_ms = self.ages.draining_since(&instance.id).unwrap_or(now.steady_ms);
            }
        }
        self.ages.keep(|id| world.view.instances.iter().any(|instance| instance.id == *id));
    }
}

fn drains(world: &World) -> bool {
    world.view.instances.iter().any(|instance| matches!(instance.state, InstanceState::Draining { .. }))
}

#[test]
fn a_drain_lasts_as_long_as_it_may_whatever_the_wall_clock_does() {
    for seed in 0..200 {
        let (mut world, mut caller) = (World::new(seed, Strategy::Overlap), Caller::new());
        world.deploy(1, 1);
        caller.until(&mut world, "deployed", |world| world.ended.is_some());
        // Its requests never end.
        world.busy = true;
        world.deploy(2, 1);
        caller.until(&mut world, "drained", |world| drains(world) && world.view.table_current);
        let begun_ms = world.now_ms;
        caller.until(&mut world, "done draining", |world| !drains(world));
        let took_ms = world.now_ms - begun_ms;
        // A caller that is cut in the middle of a round does the rest in a later one.
        let expected = DRAIN_MS_MAX..DRAIN_MS_MAX + 50 * STEP_MS;
        assert!(expected.contains(&took_ms), "seed {seed}: a drain took {took_ms} ms");
    }
}

#[test]
fn a_release_has_its_whole_time_to_become_healthy_whatever_the_wall_clock_does() {
    for seed in 0..200 {
        let (mut world, mut caller) = (World::new(seed, Strategy::Overlap), Caller::new());
        world.broken = Some(DeployId(1));
        world.deploy(1, 1);
        let restart_at = world.random.next() % 200;
        let (mut rounds, mut looked_since_ms) = (0, world.now_ms);
        while world.ended.is_none() {
            // Who restarts gives it the time again.
            if rounds == restart_at {
                caller.restart();
                looked_since_ms = world.now_ms;
            }
            rounds += 1;
            caller.round(&mut world);
            assert!(rounds < 1_000, "seed {seed}: its deadline never came");
        }
        let took_ms = world.now_ms - looked_since_ms;
        assert_eq!(world.ended, Some(Phase::Failed), "seed {seed}");
        assert!((5_000..12_000).contains(&took_ms), "seed {seed}: it had {took_ms} ms");
    }
}

#[test]
fn what_keeps_crashing_waits_whatever_the_wall_clock_does() {
    for seed in 0..50 {
        let (mut world, mut caller) = (World::new(seed, Strategy::Overlap), Caller::new());
        world.deploy(1, 1);
        caller.until(&mut world, "deployed", |world| world.ended.is_some());
        world.starts = 0;
        for _ in 0..200 {
            caller.round(&mut world);
            for instance in world.view.instances.iter_mut().filter(|i| i.state == InstanceState::Running) {
                instance.state = InstanceState::Exited(Exit { code: Some(1), ..Exit::default() });
            }
        }
        // Ten seconds: three at once, then after 2 and 4 seconds.
        assert!((3..=8).contains(&world.starts), "seed {seed}: {} starts", world.starts);
    }
}
