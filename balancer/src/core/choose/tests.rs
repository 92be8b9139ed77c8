//! Who is chosen, how often, and what is said when nobody is.

use super::*;
use crate::core::io::Errno;
use crate::core::routes::Routes;
use crate::core::slab::RouteKey;
use crate::table::Table;

/// One route and its upstreams, as a table makes them.
struct Fleet {
    upstreams: Upstreams,
    routes: Routes,
    route: RouteKey,
    random: Random,
    now: Millis,
}

impl Fleet {
    /// Upstreams as (state, weight).
    fn new(settings: &str, members: &[(&str, u16)]) -> Self {
        let mut fleet = Self {
            upstreams: Upstreams::default(),
            routes: Routes::default(),
            route: RouteKey::NONE,
            random: Random::new(3),
            now: 1_000,
        };
        fleet.apply(settings, members);
        fleet
    }

    fn apply(&mut self, settings: &str, members: &[(&str, u16)]) {
        let member = |(n, (state, weight)): (usize, &(&str, u16))| {
            format!(r#"{{"id":"app-{n}","address":"10.0.0.{n}:80","state":"{state}","weight":{weight}}}"#)
        };
        let members: Vec<String> = members.iter().enumerate().map(member).collect();
        let table: Table = serde_json::from_str(&format!(
            r#"{{"version":1,"routes":[{{"id":"r","match":{{"host":"*"}},
                "action":{{"proxy":{{{settings} "upstreams":[{}]}}}}}}]}}"#,
            members.join(",")
        ))
        .unwrap();
        table.validate().unwrap();
        self.upstreams.apply(&table);
        self.routes.apply(self.now, &table, &self.upstreams, 1);
        self.route = self.routes.by_host("a").unwrap();
    }

    fn choose(&mut self, key: Option<u64>) -> Choice {
        let mut ask = Ask { now: self.now, key, random: &mut self.random };
        self.routes.get_mut(self.route).unwrap().chooser.choose(&mut ask, &self.upstreams)
    }

    /// The number of the one chosen.
    fn chosen(&mut self, key: Option<u64>) -> usize {
        match self.choose(key) {
            Choice::Give(key) => self.upstreams.get(key).unwrap().id[4..].parse().unwrap(),
            other => panic!("{other:?}"),
        }
    }

    fn upstream(&mut self, n: usize) -> &mut Upstream {
        let key =
            self.upstreams.key(&format!("app-{n}"), &format!("10.0.0.{n}:80").parse().unwrap()).unwrap();
        self.upstreams.get_mut(key).unwrap()
    }

    fn lose(&mut self, n: usize) {
        let now = self.now;
        self.upstream(n).connect_begins();
        self.upstream(n).connect_failed(now, Errno(libc::ECONNREFUSED));
    }

    /// How often each is chosen.
    fn counts(&mut self, of: usize, rounds: usize) -> Vec<usize> {
        let mut counts = vec![0; of];
        for key in 0..rounds {
            counts[self.chosen(Some(crate::core::random::mix(key as u64 + 1)))] += 1;
        }
        counts
    }
}

const ALGORITHMS: [&str; 5] = [
    "",
    r#""algorithm":"round_robin","#,
    r#""algorithm":"least_connections","#,
    r#""algorithm":"two_choices","#,
    r#""algorithm":{"hash":{"by":"source"}},"#,
];

#[test]
fn an_idle_fleet_is_used_by_weight_whatever_the_algorithm() {
    for algorithm in ALGORITHMS {
        let mut fleet = Fleet::new(algorithm, &[("up", 1), ("up", 2), ("up", 5)]);
        let counts = fleet.counts(3, 80_000);
        for (count, due) in counts.iter().zip([10_000, 20_000, 50_000]) {
            assert!(count.abs_diff(due) <= due / 20, "{algorithm} {counts:?}");
        }
    }
}

#[test]
fn turns_are_smooth_and_exact() {
    let mut fleet = Fleet::new(ALGORITHMS[1], &[("up", 5), ("up", 1), ("up", 1)]);
    let order: Vec<usize> = (0..14).map(|_| fleet.chosen(None)).collect();
    assert_eq!(order, [0, 0, 1, 0, 2, 0, 0, 0, 0, 1, 0, 2, 0, 0]);
}

#[test]
fn a_table_that_keeps_the_upstreams_keeps_the_turns() {
    let members = [("up", 1), ("up", 1), ("up", 1)];
    let mut fleet = Fleet::new(ALGORITHMS[1], &members);
    for n in 0..9 {
        assert_eq!(fleet.chosen(None), n % 3);
        fleet.apply(ALGORITHMS[1], &members);
    }
}

#[test]
fn the_least_loaded_for_its_weight_is_next() {
    for algorithm in ["", ALGORITHMS[2]] {
        let mut fleet = Fleet::new(algorithm, &[("up", 1), ("up", 4)]);
        fleet.upstream(0).active_requests = 1;
        fleet.upstream(1).active_requests = 3;
        assert_eq!(fleet.chosen(None), 1, "3 for a weight of 4 is less than 1 for 1");
        fleet.upstream(1).active_requests = 5;
        assert_eq!(fleet.chosen(None), 0);
    }
}

#[test]
fn of_two_drawn_the_less_loaded_is_taken() {
    let mut fleet = Fleet::new(ALGORITHMS[3], &[("up", 1); 10]);
    fleet.upstream(4).active_requests = 50;
    let counts = fleet.counts(10, 20_000);
    assert_eq!(counts[4], 0, "whoever is drawn with it has less to do");
    assert!(
        counts.iter().enumerate().all(|(n, count)| n == 4 || (1_800..2_800).contains(count)),
        "{counts:?}"
    );
}

#[test]
fn nobody_is_given_anything_who_is_down_draining_or_lost() {
    for algorithm in ALGORITHMS {
        let mut fleet =
            Fleet::new(algorithm, &[("up", 1), ("down", 9), ("draining", 9), ("up", 1), ("up", 1)]);
        fleet.lose(3);
        let counts = fleet.counts(5, 300);
        assert_eq!((counts[1], counts[2], counts[3]), (0, 0, 0), "{algorithm}");
        assert!(counts[0] > 0 && counts[4] > 0, "{algorithm} {counts:?}");
    }
}

#[test]
fn a_lost_one_is_tried_again_by_one_request_when_its_time_has_come() {
    for algorithm in &ALGORITHMS[..3] {
        let mut fleet = Fleet::new(algorithm, &[("up", 1), ("up", 1)]);
        fleet.lose(1);
        fleet.now += 60;
        assert_eq!(fleet.chosen(None), 1, "{algorithm}");
        fleet.upstream(1).connect_begins();
        assert!((0..10).all(|_| fleet.chosen(None) == 0), "{algorithm}: one at a time");
    }
}

#[test]
fn a_key_stays_where_it_is_while_others_come_and_go() {
    let algorithm = ALGORITHMS[4];
    let mut fleet = Fleet::new(algorithm, &[("up", 1); 4]);
    let keys: Vec<u64> = (0..2_000).map(crate::core::random::mix).collect();
    let owners = |fleet: &mut Fleet| keys.iter().map(|key| fleet.chosen(Some(*key))).collect::<Vec<_>>();
    let before = owners(&mut fleet);
    fleet.apply(algorithm, &[("up", 1), ("down", 1), ("up", 1), ("up", 1)]);
    let without = owners(&mut fleet);
    assert!(before.iter().zip(&without).all(|(a, b)| if *a == 1 { *b != 1 } else { a == b }));
    fleet.apply(algorithm, &[("up", 1); 4]);
    assert_eq!(owners(&mut fleet), before, "and it comes back");
    // Another process, another thread: the same table, the same mapping.
    assert_eq!(owners(&mut Fleet::new(algorithm, &[("up", 1); 4])), before);
}

#[test]
fn what_is_said_of_nobody_depends_on_why() {
    for algorithm in ALGORITHMS {
        assert_eq!(Fleet::new(algorithm, &[]).choose(Some(1)), Choice::NoUpstreams);
        assert_eq!(Fleet::new(algorithm, &[("draining", 1)]).choose(Some(1)), Choice::AllDown);
        assert_eq!(Fleet::new(algorithm, &[("down", 1)]).choose(Some(1)), Choice::AllDown);
        let mut lost = Fleet::new(algorithm, &[("up", 1), ("down", 1)]);
        lost.lose(0);
        assert_eq!(lost.choose(Some(1)), Choice::AllDown);
        let mut busy = Fleet::new(algorithm, &[("up", 1), ("down", 1)]);
        busy.upstream(0).connecting = crate::core::config::Config::CONNECTING_MAX;
        assert_eq!(busy.choose(Some(1)), Choice::Busy);
    }
}

#[test]
fn failing_open_uses_those_that_are_down_but_never_those_that_drain() {
    for algorithm in ALGORITHMS {
        let open = format!(r#"{algorithm}"all_down":"fail_open","#);
        let mut fleet = Fleet::new(&open, &[("down", 1), ("draining", 1), ("down", 1)]);
        let counts = fleet.counts(3, 100);
        assert!(counts[0] > 0 && counts[1] == 0 && counts[2] > 0, "{algorithm} {counts:?}");
        fleet.apply(&open, &[("down", 1), ("draining", 1), ("up", 1)]);
        assert_eq!(fleet.counts(3, 100), [0, 0, 100], "{algorithm}");
    }
}
