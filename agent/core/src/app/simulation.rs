//! A seeded world around [`plan`](super::plan): instances start, become healthy, crash and end at random moments,
//! actions get lost, and the caller is killed between any two of them. Each seed can be replayed by its number.

mod clocks;
mod sleeping;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::*;
use crate::spec::{Check, HealthSpec, Limits, ProcessSpec, SleepSpec, StopSpec, Strategy};

/// xorshift64*: small, seeded and good enough to shake a state machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }
}

fn spec(strategy: Strategy, instances: u32) -> Arc<AppSpec> {
    let web = ProcessSpec {
        command: "serve".to_owned(),
        instances,
        sleep: None,
        listen: Default::default(),
        deploy: strategy,
        stop: StopSpec::default(),
        health: HealthSpec { deadline_ms: 5_000, ..HealthSpec::new(Check::Tcp) },
        limits: Limits::default(),
    };
    Arc::new(AppSpec {
        app: "shop".parse().unwrap(),
        image: "host".parse().unwrap(),
        secrets: Default::default(),
        build: Vec::new(),
        release: None,
        env: BTreeMap::new(),
        processes: BTreeMap::from([("web".parse().unwrap(), web)]),
        volumes: BTreeMap::new(),
        routes: Vec::new(),
    })
}

struct World {
    view: View,
    random: Random,
    now_ms: u64,
    salt: u64,
    /// Instances of this deploy never become healthy.
    broken: Option<DeployId>,
    ended: Option<Phase>,
    strategy: Strategy,
    sleep: Option<SleepSpec>,
    /// Instances that were asked to end.
    asked: BTreeSet<JailId>,
    /// Instances that are up in the table the balancer has.
    taken: BTreeSet<JailId>,
    /// The balancer takes no table.
    deaf: bool,
    /// Requests do not end.
    busy: bool,
    starts: u32,
}

impl World {
    fn new(seed: u64, strategy: Strategy) -> Self {
        let view = View {
            wanted: true,
            serving: None,
            candidate: None,
            scale: BTreeMap::new(),
            instances: Vec::new(),
            crashes: BTreeMap::new(),
            table_current: false,
            asleep: BTreeSet::new(),
            idle_ms: BTreeMap::new(),
            awaited: BTreeSet::new(),
        };
        let random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        Self {
            view,
            random,
            now_ms: 1_000,
            salt: 0,
            broken: None,
            ended: None,
            strategy,
            sleep: None,
            asked: BTreeSet::new(),
            taken: BTreeSet::new(),
            deaf: false,
            busy: false,
            starts: 0,
        }
    }

    fn deploy(&mut self, id: i64, instances: u32) {
        let mut spec = spec(self.strategy, instances);
        if let Some(sleep) = &self.sleep {
            let web = Arc::make_mut(&mut spec).processes.values_mut();
            web.for_each(|process| process.sleep = Some(sleep.clone()));
        }
        let generation = Generation { deploy: DeployId(id), release: ReleaseNumber(id as u32), spec };
        self.view.candidate = Some(Candidate { generation, phase: Phase::Starting });
        self.view.table_current = false;
        self.ended = None;
    }

    fn apply(&mut self, action: Action) {
        match action {
            Action::Start { deploy, process, index } => {
                self.salt += 1;
                self.starts += 1;
                self.view.instances.push(Instance {
                    id: JailId::new(&"shop".parse().unwrap(), self.salt),
                    deploy,
                    process,
                    index,
                    state: InstanceState::Starting,
                    health: Health::Unproven,
                    started_at_ms: self.now_ms,
                    unhealthy_since_ms: None,
                    last_error: None,
                });
            }
            Action::Drain { id } => {
                self.asked.insert(id.clone());
                let since_ms = self.now_ms;
                self.find(&id).state = InstanceState::Draining { since_ms, in_flight: None };
                self.view.table_current = false;
            }
            Action::Stop { id } => {
                let up = self.taken.contains(&id);
                assert!(!up, "stopped while the balancer's table has it as up: {id}");
                // The order may get lost; then it has to be given again.
                let sent = !self.random.one_in(3);
                self.find(&id).state = InstanceState::Stopping { sent };
            }
            Action::Forget { id } => {
                let gone = self.find(&id).clone();
                if self.view.is_serving(&gone) && !self.asked.contains(&id) {
                    let at_ms = self.now_ms;
                    let crash = self.view.crashes.entry((gone.process, gone.index));
                    let crash = crash.or_insert(Crash { restarts: 0, at_ms });
                    *crash = Crash { restarts: crash.restarts + 1, at_ms };
                }
                self.view.instances.retain(|instance| instance.id != id);
            }
            Action::Recycle { id } => self.apply(Action::Drain { id }),
            Action::Sleep { process } => {
                assert!(!self.view.awaited.contains(&process), "it sleeps while somebody waits for it");
                assert!(self.view.asleep.insert(process), "it sleeps already");
            }
            Action::Wake { process } => assert!(self.view.asleep.remove(&process), "it is awake already"),
            Action::Advance { from, to, .. } => {
                assert!(from.may_become(to), "{from} → {to}");
                let candidate = self.view.candidate.as_mut().expect("an advancing deploy is there");
                candidate.phase = to;
                self.view.table_current = false;
                if to == Phase::Switching {
                    self.view.wanted = true;
                    self.view.crashes.clear();
                    self.view.asleep.clear();
                    self.view.serving = Some(candidate.generation.clone());
                } else if to == Phase::Done {
                    self.view.candidate = None;
                    self.ended = Some(Phase::Done);
                }
            }
            Action::Fail { phase, .. } => {
                assert!(phase.may_become(Phase::Failed), "{phase} → failed");
                self.view.candidate = None;
                self.view.table_current = false;
                self.ended = Some(Phase::Failed);
            }
        }
    }

    fn find(&mut self, id: &JailId) -> &mut Instance {
        self.view
            .instances
            .iter_mut()
            .find(|instance| instance.id == *id)
            .expect("an action names what is there")
    }

    /// The world moves: things start, get healthy, empty, end, and now and then crash.
    fn move_on(&mut self, crashes: bool) {
        self.now_ms += 50;
        let broken = self.broken;
        for instance in &mut self.view.instances {
            let chance = self.random.next() % 100;
            match &mut instance.state {
                InstanceState::Starting if chance < 60 => instance.state = InstanceState::Running,
                InstanceState::Running if crashes && chance < 2 => {
                    instance.state = InstanceState::Exited(Exit { code: Some(1), ..Exit::default() });
                }
                InstanceState::Running if chance < 60 && Some(instance.deploy) != broken => {
                    instance.health = Health::Healthy;
                }
                InstanceState::Draining { in_flight, .. } if chance < 50 && self.view.table_current => {
                    *in_flight = Some(u32::from(self.busy));
                }
                InstanceState::Stopping { sent: true } if chance < 50 => {
                    instance.state = InstanceState::Exited(Exit { signal: Some(15), ..Exit::default() });
                }
                _ => {}
            }
        }
        if !self.deaf && self.random.one_in(2) {
            self.view.table_current = true;
            let up = |i: &&Instance| self.view.is_serving(i) && i.is_live();
            self.taken = self.view.instances.iter().filter(up).map(|i| i.id.clone()).collect();
        }
    }

    fn round(&mut self, crashes: bool) {
        for action in plan(&self.view, self.now_ms) {
            // The caller is killed in the middle of its list: the rest is planned again from what is there.
            if self.random.one_in(7) {
                break;
            }
            self.apply(action);
            self.check();
        }
        self.move_on(crashes);
    }

    fn check(&self) {
        if self.strategy == Strategy::Replace {
            let mut running = self.view.instances.iter().filter(|instance| !instance.has_ended());
            let first = running.next().map(|instance| instance.deploy);
            assert!(
                running.all(|instance| Some(instance.deploy) == first),
                "two generations of a replaced process at once: {:#?}",
                self.view.instances
            );
        }
        if self.strategy == Strategy::Replace {
            let mut writers: Vec<_> = self
                .view
                .instances
                .iter()
                .filter(|i| !i.has_ended())
                .map(|i| (&i.process, i.index))
                .collect();
            writers.sort();
            let count = writers.len();
            writers.dedup();
            assert_eq!(count, writers.len(), "two writers in one place");
        }
        let mut places: Vec<_> = self
            .view
            .instances
            .iter()
            .filter(|i| i.is_live())
            .map(|i| (i.deploy, &i.process, i.index))
            .collect();
        places.sort();
        let count = places.len();
        places.dedup();
        assert_eq!(count, places.len(), "two live instances in one place");
    }

    fn serving_up(&self) -> usize {
        let up = |i: &&Instance| self.view.is_serving(i) && i.is_live() && i.health == Health::Healthy;
        self.view.instances.iter().filter(up).count()
    }

    fn run_until_over(&mut self, crashes: bool) -> Phase {
        for _ in 0..2_000 {
            self.round(crashes);
            if let Some(phase) = self.ended {
                return phase;
            }
        }
        panic!("the deploy never ended: {:#?}", self.view);
    }

    fn settle(&mut self, count: usize) {
        for _ in 0..2_000 {
            self.round(false);
            if self.serving_up() == count && self.view.instances.len() == count {
                return;
            }
        }
        panic!("never settled at {count}: {:#?}", self.view);
    }
}

#[test]
fn deploys_end_and_leave_what_was_asked_for() {
    for seed in 0..400 {
        for strategy in [Strategy::Overlap, Strategy::Replace] {
            let mut world = World::new(seed, strategy);
            world.deploy(1, 2);
            assert_eq!(world.run_until_over(false), Phase::Done, "seed {seed}");
            world.settle(2);
            world.deploy(2, 3);
            assert_eq!(world.run_until_over(false), Phase::Done, "seed {seed}");
            world.settle(3);
            assert!(world.view.instances.iter().all(|i| i.deploy == DeployId(2)), "seed {seed}");
        }
    }
}

#[test]
fn a_release_that_never_gets_healthy_leaves_the_old_one_serving() {
    for seed in 0..400 {
        for strategy in [Strategy::Overlap, Strategy::Replace] {
            let mut world = World::new(seed, strategy);
            world.deploy(1, 2);
            world.run_until_over(false);
            world.settle(2);
            world.broken = Some(DeployId(2));
            world.deploy(2, 2);
            assert_eq!(world.run_until_over(false), Phase::Failed, "seed {seed}");
            world.settle(2);
            assert!(world.view.instances.iter().all(|i| i.deploy == DeployId(1)), "seed {seed}");
        }
    }
}

#[test]
fn overlap_never_goes_below_what_served() {
    for seed in 0..400 {
        let mut world = World::new(seed, Strategy::Overlap);
        world.deploy(1, 2);
        world.run_until_over(false);
        world.settle(2);
        world.deploy(2, 2);
        while world.ended.is_none() {
            world.round(false);
            assert!(world.serving_up() >= 2, "seed {seed}: {:#?}", world.view);
        }
    }
}

#[test]
fn crashes_at_any_moment_end_a_deploy_one_way_or_the_other() {
    for seed in 0..400 {
        for strategy in [Strategy::Overlap, Strategy::Replace] {
            let mut world = World::new(seed, strategy);
            world.deploy(1, 2);
            world.run_until_over(false);
            world.deploy(2, 2);
            world.run_until_over(true);
            world.settle(2);
        }
    }
}

#[test]
fn stopping_and_scaling_reach_their_number() {
    for seed in 0..200 {
        let mut world = World::new(seed, Strategy::Overlap);
        world.deploy(1, 1);
        world.run_until_over(false);
        world.settle(1);
        for count in [5, 2] {
            world.view.scale.insert("web".parse().unwrap(), count);
            world.settle(count as usize);
        }
        world.view.wanted = false;
        world.settle(0);
    }
}

#[test]
fn scaling_down_and_up_never_has_two_writers_in_one_place() {
    for seed in 0..200 {
        let mut world = World::new(seed, Strategy::Replace);
        world.deploy(1, 1);
        world.run_until_over(false);
        world.settle(1);
        for count in [0, 1, 0, 1] {
            world.view.scale.insert("web".parse().unwrap(), count);
            for _ in 0..3 {
                world.round(false);
            }
        }
        world.settle(1);
    }
}

#[test]
fn a_balancer_that_takes_no_table_keeps_what_it_sends_to() {
    for seed in 0..200 {
        let mut world = World::new(seed, Strategy::Overlap);
        world.deploy(1, 2);
        world.run_until_over(false);
        world.settle(2);
        world.deaf = true;
        world.deploy(2, 2);
        // Far longer than a drain may last: `apply` fails if one that gets requests is stopped.
        for _ in 0..1_000 {
            world.round(false);
        }
        assert!(world.ended.is_none(), "seed {seed}");
        world.deaf = false;
        assert_eq!(world.run_until_over(false), Phase::Done, "seed {seed}");
    }
}

#[test]
fn a_release_that_crashes_after_the_switch_is_restarted_with_waits() {
    for seed in 0..50 {
        let mut world = World::new(seed, Strategy::Overlap);
        world.deploy(1, 1);
        world.run_until_over(false);
        world.settle(1);
        world.deploy(2, 1);
        while world.view.candidate.as_ref().is_some_and(|candidate| !candidate.phase.has_switched()) {
            world.round(false);
        }
        world.deaf = true;
        world.starts = 0;
        for _ in 0..200 {
            world.round(false);
            for instance in world.view.instances.iter_mut().filter(|i| i.state == InstanceState::Running) {
                instance.state = InstanceState::Exited(Exit { code: Some(1), ..Exit::default() });
            }
        }
        // Ten seconds: three at once, then after 2 and 4 seconds.
        assert!(world.starts <= 8, "seed {seed}: {} starts", world.starts);
        assert!(world.view.instances.len() <= 4, "seed {seed}: {:#?}", world.view.instances);
    }
}

#[test]
fn an_app_that_was_stopped_stays_stopped_when_its_deploy_fails() {
    for seed in 0..100 {
        let mut world = World::new(seed, Strategy::Overlap);
        world.deploy(1, 2);
        world.run_until_over(false);
        world.view.wanted = false;
        world.settle(0);
        world.broken = Some(DeployId(2));
        world.deploy(2, 2);
        assert_eq!(world.run_until_over(false), Phase::Failed, "seed {seed}");
        world.settle(0);
        world.broken = None;
        world.deploy(3, 2);
        assert_eq!(world.run_until_over(false), Phase::Done, "seed {seed}");
        world.settle(2);
    }
}
