//! What a tenant does to its limits stays its own trouble: the neighbour answers on, the agent works on.

use std::time::{Duration, Instant};

use epagent_tests::host::DevHost;
use epagent_tests::{AppDir, Load, command, eventually, process};

/// A host with a neighbour that is under load and a tenant that will misbehave.
fn neighbours(limits: &str) -> (DevHost, Load) {
    let host = DevHost::start();
    host.deploy(&AppDir::server("neighbour", "v1", "[volume.data]\npath = \"/data\"\nquota = \"64M\"")).ok();
    host.deploy(&AppDir::server("hog", "v1", limits)).ok();
    let load = host.load("neighbour.test", "hello v1");
    (host, load)
}

/// The neighbour lost nothing, the agent deploys, the tenant's own app can be had back.
fn all_is_well(host: DevHost, load: Load) {
    host.deploy(&AppDir::server("third", "v1", "")).ok();
    assert!(host.fetch("third.test", "/").starts_with("hello v1"));
    host.inside("neighbour", "echo fine > /data/file && echo fine > /app/file && cat /data/file").ok();
    load.finish().assert_none_failed();
    let agent = host.api().get("/v1/status");
    assert!(agent["parts"].is_object(), "{agent}");
    host.stop();
}

#[test]
fn a_memory_hog_is_killed_alone() {
    let (host, load) = neighbours("limits = { memory = \"96M\" }");
    let old = host.pids("hog")[0];
    let ran = host.cli(&["exec", "hog", "--", "python3", "-c", "b = b'x' * (1 << 30)"]);
    assert_ne!(ran.code, Some(0), "a gibibyte fitted into 96M");
    let row = eventually("the hog is replaced", Duration::from_secs(20), || {
        host.healthy("hog").into_iter().find(|row| row.pid != Some(old))
    });
    let told = row.last_exit.clone().unwrap_or_default();
    assert!(told.contains("memory"), "its end is told as {told:?}");
    assert!(host.fetch("hog.test", "/").starts_with("hello v1"));
    all_is_well(host, load);
}

#[test]
fn a_memory_hog_in_a_tmpfs_is_bounded_too() {
    let (host, load) = neighbours("limits = { memory = \"96M\" }");
    let ran = host.inside(
        "hog",
        "dd if=/dev/zero of=/tmp/fill bs=1M count=1000; dd if=/dev/zero of=/dev/shm/fill bs=1M count=1000",
    );
    assert_ne!(ran.code, Some(0), "two gibibytes fitted into tmpfs");
    host.wait_healthy("hog", 1);
    all_is_well(host, load);
}

#[test]
fn a_fork_bomb_stays_within_its_own_limit() {
    let (host, load) = neighbours("limits = { pids = 64 }");
    let bomb = "import os, time\n\
                while True:\n\
                \x20   try: os.fork()\n\
                \x20   except OSError: time.sleep(0.01)\n";
    let running = command::start(
        host.command(&["exec", "hog", "--", "python3", "-c", bomb]).stdin(std::process::Stdio::null()),
    );
    let init = host.pids("hog")[0];
    let count = || process::descendants(init).len();
    eventually("the bomb is at its limit", Duration::from_secs(20), || (count() >= 50).then_some(()));
    load.wait_for(200, Duration::from_secs(30));
    assert!(count() <= 70, "{} processes with a limit of 64", count());
    // The agent has the last word.
    host.cli(&["restart", "hog"]).ok();
    host.wait_healthy("hog", 1);
    assert!(!process::is_alive(init));
    running.wait(Duration::from_secs(30));
    assert!(host.fetch("hog.test", "/").starts_with("hello v1"));
    all_is_well(host, load);
}

#[test]
fn a_full_volume_and_a_full_root_are_full_for_their_app_alone() {
    let (host, load) =
        neighbours("limits = { disk = \"64M\" }\n[volume.data]\npath = \"/data\"\nquota = \"64M\"");
    for (path, files) in [("/data", 3), ("/app", 3), ("/var/tmp", 3)] {
        for number in 0..files {
            let fill = format!("dd if=/dev/urandom of={path}/fill{number} bs=1M count=100 conv=fsync");
            let ran = host.inside("hog", &fill);
            assert_ne!(ran.code, Some(0), "{path}: 100M fitted into 64M");
            let said = ran.stderr.to_lowercase();
            assert!(said.contains("quota") || said.contains("no space"), "{ran}");
        }
    }
    // It still runs and can make room again.
    assert!(host.fetch("hog.test", "/").starts_with("hello v1"));
    host.inside("hog", "rm /data/fill*").ok();
    eventually("the volume takes data again", Duration::from_secs(40), || {
        (host.inside("hog", "dd if=/dev/zero of=/data/again bs=1M count=8 conv=fsync").code == Some(0))
            .then_some(())
    });
    all_is_well(host, load);
}

#[test]
fn a_busy_loop_leaves_the_neighbour_its_time() {
    let (host, load) = neighbours("limits = { cpu = \"50%\" }");
    let spin = command::start(
        host.command(&[
            "exec",
            "hog",
            "--",
            "/bin/sh",
            "-c",
            "for i in 1 2 3 4; do timeout 4 python3 -c 'while 1: pass' & done; wait",
        ])
        .stdin(std::process::Stdio::null()),
    );
    load.wait_for(300, Duration::from_secs(30));
    spin.wait(Duration::from_secs(60));
    all_is_well(host, load);
}

#[test]
fn a_disk_hog_is_held_to_its_rate() {
    let volume = "\n[volume.data]\npath = \"/data\"\nquota = \"64M\"";
    let (host, load) = neighbours(&format!("limits = {{ io = \"1M\" }}{volume}"));
    let told = disk_limits(&host);
    if told.contains("not in force") {
        eprintln!("SKIPPED: {told}");
        return host.stop();
    }
    // v1 does not count what the kernel flushes by itself, and it may do that before dd does.
    let flag = if told.contains("v1") { "oflag=direct" } else { "conv=fsync" };
    // Eight mebibytes.
    let write = format!("dd if=/dev/zero of=/data/written bs=256k count=32 {flag}");
    let timed = |app: &str| {
        let begun = Instant::now();
        host.inside(app, &write).ok();
        begun.elapsed()
    };
    let hog = std::thread::scope(|scope| {
        let hog = scope.spawn(|| timed("hog"));
        let mut rounds = 0;
        while !hog.is_finished() {
            timed("neighbour");
            rounds += 1;
        }
        assert!(rounds >= 3, "the neighbour wrote the same only {rounds} times meanwhile");
        hog.join().unwrap()
    });
    assert!(hog > Duration::from_secs(6), "eight mebibytes went at a rate of one per second in {hog:?}");
    all_is_well(host, load);
}

/// What `epagent doctor` says of the limits of disk traffic.
fn disk_limits(host: &DevHost) -> String {
    let checks = host.api().get("/v1/doctor");
    let mut checks = checks.as_array().unwrap().iter();
    let check = checks.find(|check| check["name"].as_str().unwrap().contains("io.max"));
    check.expect("doctor says nothing of it")["message"].as_str().unwrap().to_owned()
}
