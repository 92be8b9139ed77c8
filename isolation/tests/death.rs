//! Whatever ends an instance, all of it ends, and nothing is left.

mod support;

use std::time::{Duration, Instant};

use epagent_isolation::launch::{LaunchConfig, LaunchFds, launch};
use epagent_isolation::monitor::protocol::State;
use epagent_isolation::monitor::record::{ExitReason, StopCause};
use epagent_isolation::sweep;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::{Node, alive, eventually};

const DAEMONS: &str = "\
trap '' TERM HUP; for i in $(seq 100); do (trap '' TERM HUP; setsid sh -c 'trap \"\" TERM HUP; sleep 300 & wait' &) ; done; echo ready; sleep 300 & wait";

#[test]
fn stop_waits_its_grace_and_leaves_none_of_100_daemons() {
    let node = Node::new();
    let mut spec = node.shell("daemons", DAEMONS);
    spec.limits.pids = 400;
    let mut jail = node.running(&spec);
    eventually("all daemons", || jail.output_now().contains("ready").then_some(()));
    let begun = Instant::now();
    jail.client.stop(libc::SIGTERM, 300).unwrap();
    let record = jail.await_exit();
    assert_eq!(record.cause, Some(StopCause::StopForced));
    assert!(begun.elapsed() >= Duration::from_millis(300), "not before the grace");
    assert!(!node.cgroups.app_populated(&spec.id));
}

#[test]
fn an_app_that_obeys_is_not_forced() {
    let node = Node::new();
    let spec = node.shell("obeys", "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.05; done");
    let mut jail = node.running(&spec);
    eventually("ready", || jail.output_now().contains("ready").then_some(()));
    jail.client.stop(libc::SIGTERM, 10_000).unwrap();
    let record = jail.await_exit();
    assert_eq!((record.reason, record.cause), (ExitReason::Exited { code: 3 }, Some(StopCause::Stop)));
    assert!(jail.output().contains("bye"));
}

#[test]
fn killed_monitor_takes_its_instance_along() {
    let node = Node::new();
    let mut spec = node.shell("orphan", DAEMONS);
    spec.limits.pids = 400;
    spec.network = Some(node.network(1));
    let mut jail = node.running(&spec);
    eventually("all daemons", || jail.output_now().contains("ready").then_some(()));
    let init = jail.init_pid();
    kill(Pid::from_raw(jail.launched.monitor_pid), Signal::SIGKILL).unwrap();
    eventually("the instance's end", || (!node.cgroups.app_populated(&spec.id)).then_some(()));
    // The last process leaves its cgroup a moment before its pid is free.
    eventually("the end of init", || (!alive(init)).then_some(()));
    eventually("the link's end", || (!link_exists(&spec.network.as_ref().unwrap().link())).then_some(()));
    sweep::remove(&node.cgroups, &spec.id).unwrap();
    assert_eq!(sweep::survey(&node.cgroups).unwrap(), []);
}

/// Init cannot notice anything by itself when it is stopped: this is the parent-death signal alone.
#[test]
fn killed_monitor_takes_even_a_stopped_instance_along() {
    let node = Node::new();
    let spec = node.shell("stopped", "sleep 300");
    let mut jail = node.running(&spec);
    kill(Pid::from_raw(jail.init_pid()), Signal::SIGSTOP).unwrap();
    kill(Pid::from_raw(jail.launched.monitor_pid), Signal::SIGKILL).unwrap();
    eventually("the instance's end", || (!node.cgroups.app_populated(&spec.id)).then_some(()));
}

#[test]
fn a_monitor_outlives_its_launcher_and_keeps_the_verdict() {
    let node = Node::new();
    let mut jail = node.running(&node.shell("linger", "sleep 0.2; exit 9"));
    // A runner that goes away is a connection that closes.
    let path = node.socket("linger");
    jail.client = epagent_isolation::monitor::Client::connect(&path).unwrap();
    eventually("the end", || (jail.state() == State::Exited).then_some(()));
    let status = jail.client.status().unwrap();
    assert_eq!(status.record.unwrap().reason, ExitReason::Exited { code: 9 });
    assert_eq!(status.pid, None);
    jail.client.release().unwrap();
    eventually("the monitor's end", || (!node.cgroups.monitor_populated(&jail.id)).then_some(()));
    sweep::remove(&node.cgroups, &jail.id).unwrap();
    assert!(node.cgroups.ids().unwrap().is_empty());
}

#[test]
fn a_monitor_is_deaf_to_signals() {
    let node = Node::new();
    let mut jail = node.running(&node.shell("deaf", "sleep 60"));
    for signal in [Signal::SIGHUP, Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1, Signal::SIGPIPE] {
        kill(Pid::from_raw(jail.launched.monitor_pid), signal).unwrap();
    }
    assert_eq!(jail.state(), State::Running);
}

/// The monitor is killed at some 60 moments of its start, from before its first instruction to after the app's.
#[test]
fn killed_at_any_step_of_a_start_leaves_nothing_after_a_sweep() {
    let node = Node::new();
    let mut spec = node.shell("steps", "sleep 300");
    spec.network = Some(node.network(2));
    let link = spec.network.as_ref().unwrap().link();
    for step in 0..60u64 {
        let config = LaunchConfig {
            executable: &node.executable,
            cgroups: &node.cgroups,
            disks: &[],
            control_socket: node.socket("steps"),
        };
        let mounts = vec![std::os::fd::AsFd::as_fd(&node.usr)];
        let launched = launch(&config, &spec, &LaunchFds { mounts, ..LaunchFds::default() }).unwrap();
        let until = Instant::now() + Duration::from_micros(step * 250);
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        kill(Pid::from_raw(launched.monitor_pid), Signal::SIGKILL).unwrap();
        sweep::remove(&node.cgroups, &spec.id).unwrap();
        nix::sys::wait::waitpid(Pid::from_raw(launched.monitor_pid), None).unwrap();
        sweep::remove_links(node.number, &[]).unwrap();
        assert_eq!(sweep::survey(&node.cgroups).unwrap(), [], "step {step}");
        assert!(!link_exists(&link), "step {step}");
    }
}

#[test]
fn sweep_keeps_links_in_use_and_other_nodes() {
    let node = Node::new();
    let mut spec = node.shell("kept", "sleep 60");
    spec.network = Some(node.network(3));
    let _jail = node.running(&spec);
    let link = spec.network.as_ref().unwrap().link();
    assert!(sweep::remove_links(node.number, &[3]).unwrap().is_empty());
    assert!(
        sweep::remove_links(node.number / 10, &[]).unwrap().is_empty(),
        "a node whose number begins alike"
    );
    assert!(link_exists(&link));
    assert_eq!(sweep::remove_links(node.number, &[]).unwrap(), [link]);
}

fn link_exists(name: &str) -> bool {
    std::path::Path::new("/sys/class/net").join(name).exists()
}
