//! A limit hit is the instance's own trouble.

mod support;

use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use epagent_isolation::cgroup::DiskLimits;
use epagent_isolation::launch::LaunchFds;
use epagent_isolation::monitor::protocol::State;
use epagent_isolation::monitor::record::ExitReason;
use support::loop_disk::LoopDisk;
use support::{Jail, Node, eventually};

#[test]
fn a_memory_hog_dies_alone_and_the_verdict_says_why() {
    let node = Node::new();
    let mut neighbour = node.running(&node.shell("neighbour", "sleep 300"));
    let mut spec =
        node.shell("hog", "sleep 200 & head -c 1G /dev/zero | tail -c 1G >/dev/null; echo survived; wait");
    spec.limits.memory_bytes = 32 << 20;
    let mut jail = node.running(&spec);
    let record = jail.await_exit();
    assert!(record.oom_killed, "{record:?}");
    assert!(!jail.output().contains("survived"), "the whole group goes, not one process of it");
    assert!(record.memory_peak_bytes.unwrap() <= 32 << 20);
    assert_eq!(neighbour.state(), State::Running);
}

#[test]
fn tmpfs_counts_as_memory_and_is_bounded_itself() {
    let node = Node::new();
    let mut spec = node.shell("fill", "for d in /tmp /run /dev/shm; do head -c 100M /dev/zero > $d/fill || echo full $d; stat -c %s $d/fill; rm $d/fill; done; i=0; while touch /tmp/$i 2>/dev/null; do i=$((i+1)); [ $i -gt 5000 ] && break; done; echo inodes $i");
    spec.limits.tmpfs_bytes = 8 << 20;
    let (record, output) = node.outcome(&spec);
    assert_eq!(record.reason, ExitReason::Exited { code: 0 }, "{output}");
    assert_eq!(output.matches("full /").count(), 3, "{output}");
    assert_eq!(output.matches("8388608").count(), 3, "{output}");
    let inodes: u32 = output.rsplit("inodes ").next().unwrap().trim().parse().unwrap();
    assert!(inodes < 2000, "{output}");

    let mut spec = node.shell("fillmem", "head -c 60M /dev/zero > /tmp/fill; echo survived");
    spec.limits.memory_bytes = 24 << 20;
    let (record, output) = node.outcome(&spec);
    assert!(record.oom_killed && !output.contains("survived"), "{record:?} {output}");
}

#[test]
fn a_fork_bomb_stays_in_its_bounds_and_dies_at_once() {
    let node = Node::new();
    // One that goes on: a shell that can't fork ends, and its bomb may be over before anybody looks.
    let mut spec =
        node.shell("bomb", "exec perl -e 'while (1) { defined(fork) or select(undef, undef, undef, 0.01) }'");
    spec.limits.pids = 64;
    let mut jail = node.running(&spec);
    eventually("the bomb", || (node.cgroups.usage(&spec.id).unwrap().pids? >= 60).then_some(()));
    assert!(node.cgroups.usage(&spec.id).unwrap().pids.unwrap() <= 64);
    let begun = Instant::now();
    jail.client.kill().unwrap();
    jail.await_exit();
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert!(!node.cgroups.app_populated(&spec.id));
}

#[test]
fn cpu_is_a_share_and_not_more() {
    let node = Node::new();
    let mut spec = node.shell("spin", "while :; do :; done");
    spec.limits.cpu_percent = 20;
    let mut jail = node.running(&spec);
    let cpu_us = || node.cgroups.usage(&spec.id).unwrap().cpu_us.unwrap();
    let (begun, before) = (Instant::now(), cpu_us());
    while begun.elapsed() < Duration::from_millis(1000) {
        std::thread::sleep(Duration::from_millis(50));
    }
    let share = (cpu_us() - before) as f64 / begun.elapsed().as_micros() as f64;
    assert!(share < 0.35, "{share} of a CPU instead of 0.2");
    jail.client.kill().unwrap();
}

/// Starts `script` with the disk on `/data`.
fn on_disk(node: &Node, disk: &LoopDisk, id: &str, script: &str, io_bytes_per_s: Option<u64>) -> Jail {
    let mut spec = node.shell(id, script);
    spec.mounts.push(disk.mount_spec());
    spec.limits.io_bytes_per_s = io_bytes_per_s;
    let folder = File::open(disk.mount_point()).unwrap();
    node.start_with(&spec, LaunchFds { mounts: vec![folder.as_fd()], ..LaunchFds::default() })
}

#[test]
fn disk_traffic_is_held_to_its_rate_and_the_neighbours_is_not() {
    let disk = LoopDisk::new();
    let mut node = Node::new();
    node.disks = vec![disk.number()];
    let flag = match node.cgroups.disk_limits(&node.disks) {
        DiskLimits::All => "conv=fsync",
        DiskLimits::Awaited => "oflag=direct",
        DiskLimits::Absent { why } => {
            eprintln!("SKIPPED: {why}");
            return;
        }
    };
    // Four mebibytes each way: without a limit, a moment.
    let script = |name: &str| {
        format!(
            "dd if=/dev/zero of=/data/{name} bs=256k count=16 {flag} && dd if=/data/{name} of=/dev/null bs=256k iflag=direct"
        )
    };
    let rounds = format!("while {}; do echo round; done 2>/dev/null", script("neighbour"));
    let neighbour = on_disk(&node, &disk, "neighbour", &rounds, None);
    let begun = Instant::now();
    let mut hog = on_disk(&node, &disk, "hog", &script("hog"), Some(1 << 20));
    let record = hog.await_exit();
    let took = begun.elapsed();
    let meanwhile = neighbour.output_now().matches("round").count();
    assert_eq!(record.reason, ExitReason::Exited { code: 0 }, "{}", hog.output());
    assert!(took > Duration::from_secs(5), "eight mebibytes went at a rate of one per second in {took:?}");
    assert!(meanwhile >= 4, "the neighbour did only {meanwhile} times as much in {took:?}");
}

#[test]
fn a_log_flood_is_bounded_on_disk_and_does_not_hold_up_the_end() {
    let node = Node::new();
    let mut spec = node.shell("flood", "while :; do echo 0123456789012345678901234567890123456789; done");
    spec.limits.log_bytes = 256 << 10;
    let mut jail = node.running(&spec);
    eventually("a rotation", || jail.logs.join("previous.log").exists().then_some(()));
    let begun = Instant::now();
    jail.client.stop(libc::SIGKILL, 0).unwrap();
    let record = jail.await_exit();
    assert!(begun.elapsed() < Duration::from_secs(5), "{record:?}");
    eventually("the record", || jail.logs.join("exit.json").exists().then_some(()));
    let bytes: u64 =
        std::fs::read_dir(&jail.logs).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
    assert!(bytes <= 2 * spec.limits.log_bytes + (64 << 10), "{bytes} bytes");
}

#[test]
fn a_frozen_instance_still_dies() {
    let node = Node::new();
    let spec = node.shell("frozen", "sleep 300");
    let mut jail = node.running(&spec);
    node.cgroups.freeze(&spec.id, true).unwrap();
    jail.client.kill().unwrap();
    assert_eq!(jail.await_exit().reason, ExitReason::Killed);
}
