//! What an instance costs: time to start, and the monitor's memory.
//!
//! The bounds are loose, so that a busy machine does not fail them; the figures are printed.

mod support;

use std::time::{Duration, Instant};

use epagent_isolation::monitor::protocol::State;
use support::{Node, patience};

const STARTS: usize = 40;

#[test]
fn a_start_with_network_takes_milliseconds_and_the_monitor_a_few_pages() {
    let node = Node::new();
    let mut times_us = Vec::new();
    // They stay until the end: the kernel's teardown of a namespace would be measured with the next start.
    let mut jails = Vec::new();
    for start in 0..STARTS {
        let mut spec = node.shell(&format!("s{start}"), "exec sleep 300");
        spec.network = Some(node.network(start as u32));
        let begun = Instant::now();
        let mut jail = node.start(&spec);
        while jail.client.next_event().unwrap().is_none() {
            assert!(begun.elapsed() < patience(), "no event");
            std::thread::sleep(Duration::from_micros(100));
        }
        times_us.push(begun.elapsed().as_micros());
        if start == 0 {
            let rollup =
                std::fs::read_to_string(format!("/proc/{}/smaps_rollup", jail.launched.monitor_pid)).unwrap();
            let kib = |name: &str| -> u64 {
                let line = rollup.lines().find(|line| line.starts_with(name)).unwrap();
                line.split_whitespace().nth(1).unwrap().parse().unwrap()
            };
            println!(
                "monitor: PSS {} KiB, RSS {} KiB, locked {} KiB",
                kib("Pss:"),
                kib("Rss:"),
                kib("Locked:")
            );
            assert!(kib("Pss:") < 4096, "an unoptimised, dynamic build");
        }
        assert_eq!(jail.state(), State::Running);
        jails.push(jail);
    }
    times_us.sort_unstable();
    let (best, p50, worst) = (times_us[0], times_us[STARTS / 2], times_us[STARTS - 1]);
    println!(
        "launch to running app, with network, {STARTS} starts: best {best} µs, p50 {p50} µs, worst {worst} µs"
    );
    assert!(p50 < 50_000, "{p50} µs");
}
