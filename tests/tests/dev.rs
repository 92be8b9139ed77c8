//! `epagent dev`: everything from one folder, and nothing of it afterwards.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use epagent_tests::command::run;
use epagent_tests::host::{DevHost, Options, binary};
use epagent_tests::{AppDir, eventually, process};
use nix::sys::signal::Signal;

#[test]
fn an_agent_with_running_apps_ends_without_a_trace() {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "instances = 2")).ok();
    host.deploy(&AppDir::server("keeper", "v1", "[volume.data]\npath = \"/data\"\nquota = \"64M\"")).ok();
    assert!(host.fetch("shop.test", "/").starts_with("hello v1"));
    assert!(host.fetch("keeper.test", "/").starts_with("hello v1"));
    let node = host.node();
    assert!(node.leftovers().len() > 10, "the check for leftovers does not see a running agent");
    host.stop();
}

#[test]
fn every_signal_that_asks_for_the_end_gets_an_orderly_one() {
    for signal in [Signal::SIGTERM, Signal::SIGHUP] {
        let mut host = DevHost::start();
        host.end(signal);
        host.assert_nothing_left();
    }
}

#[test]
fn a_second_ctrl_c_hurries_and_still_cleans_up() {
    let mut host = DevHost::start();
    let app = AppDir::server("stubborn", "v1", "stop = { signal = \"TERM\", grace = \"50s\" }");
    app.write(
        "stubborn.py",
        "import signal\nsignal.signal(15, signal.SIG_IGN)\nexec(open('server.py').read())\n",
    );
    let manifest = std::fs::read_to_string(app.file("epagent.toml")).unwrap();
    app.write("epagent.toml", &manifest.replace("server.py", "stubborn.py"));
    host.deploy(&app).ok();

    process::signal(host.pid(), Signal::SIGINT);
    eventually("the end has begun", Duration::from_secs(10), || {
        host.api().try_get("/v1/version").is_err().then_some(())
    });
    let since = std::time::Instant::now();
    host.end(Signal::SIGINT);
    assert!(since.elapsed() < Duration::from_secs(20), "the second took {:?}", since.elapsed());
    host.assert_nothing_left();
}

#[test]
fn apps_are_back_after_an_orderly_end_and_a_new_start() {
    let mut host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "")).ok();
    host.end(Signal::SIGINT);
    host.assert_nothing_left();
    host.start_again();
    host.wait_healthy("shop", 1);
    assert!(host.fetch("shop.test", "/").starts_with("hello v1"));
    host.stop();
}

#[test]
fn a_killed_supervisor_takes_its_parts_along_and_leaves_the_instances() {
    let mut host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "instances = 2")).ok();
    let pids = host.pids("shop");
    let parts: Vec<i32> = ["epagentd", "epagent-runner", "epagent-balancer", "epagent-lease"]
        .iter()
        .map(|part| host.pid_of(part))
        .collect();
    let number = host.node().number;

    host.kill_dev();
    eventually("the parts died with it", Duration::from_secs(5), || {
        parts.iter().all(|pid| !process::is_alive(*pid)).then_some(())
    });
    assert!(pids.iter().all(|pid| process::is_alive(*pid)), "an instance died with the supervisor");

    host.start_again();
    assert_eq!(host.node().number, number, "a new start is another node");
    let rows = host.wait_healthy("shop", 2);
    let after: Vec<i32> = rows.iter().filter_map(|row| row.pid).collect();
    assert_eq!(after, pids, "a new start did not find the instances");
    assert!(host.fetch("shop.test", "/").starts_with("hello v1"));
    host.stop();
}

#[test]
fn a_balancer_that_hands_over_is_followed_until_all_ends() {
    let mut host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "")).ok();
    let first = host.pid_of("epagent-balancer");
    let load = host.load("shop.test", "hello v1");
    for _ in 0..3 {
        host.cli(&["balancer", "reload"]).ok();
        load.wait_for(100, Duration::from_secs(30));
    }
    load.finish().assert_none_failed();
    let balancers = |host: &DevHost| -> Vec<i32> {
        let all = process::descendants(host.pid()).into_iter();
        all.filter(|p| p.executable() == "epagent-balancer" && p.state != 'Z').map(|p| p.pid).collect()
    };
    eventually("the old ones have drained", Duration::from_secs(90), || {
        (balancers(&host).len() == 1).then_some(())
    });
    assert_ne!(balancers(&host), [first]);

    // The one in charge dies: another is started, with the same listeners.
    let old = host.kill("epagent-balancer");
    host.wait_restarted("epagent-balancer", old);
    assert!(host.fetch("shop.test", "/").starts_with("hello v1"));

    // A successor dies with the supervisor, although it was not started by it.
    host.cli(&["balancer", "reload"]).ok();
    let left = balancers(&host);
    host.kill_dev();
    eventually("all balancers died with it", Duration::from_secs(5), || {
        left.iter().all(|pid| !process::is_alive(*pid)).then_some(())
    });
    host.start_again();
    host.wait_healthy("shop", 1);
    host.cli(&["balancer", "reload"]).ok();
    assert!(host.fetch("shop.test", "/").starts_with("hello v1"));
    host.stop();
}

#[test]
fn a_folder_serves_one_agent_at_a_time() {
    let host = DevHost::start();
    let second = run(&mut host.dev_command());
    assert_ne!(second.code, Some(0));
    second.says(&["error", &host.state.to_string_lossy()]);
    host.wait_answering();
    host.stop();
}

#[test]
fn a_missing_right_or_tool_is_named_before_anything_is_made() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let state = folder.path().join("state");
    let copy = folder.path().join("epagent");
    std::fs::copy(binary("epagent"), &copy).unwrap();
    let dev = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        command.args(arguments).args(["dev", "--http", "127.0.0.1:18099", "--state"]).arg(&state);
        command
    };
    let copy = copy.to_string_lossy().into_owned();
    let epagent = binary("epagent").to_string_lossy().into_owned();

    let ran = run(&mut dev("setpriv", &["--reuid=65534", "--regid=65534", "--clear-groups", &copy]));
    assert_ne!(ran.code, Some(0));
    ran.says(&["error", "root"]);

    let machine = std::env::consts::ARCH;
    let ran = run(&mut dev("setarch", &[machine, "--uname-2.6", &epagent]));
    assert_ne!(ran.code, Some(0));
    ran.says(&["error", "kernel", "2.6", "6.1"]);

    // In a mount namespace of its own, the machine lacks what is covered there.
    let list = folder.path().join("filesystems");
    std::fs::write(&list, "nodev\ttmpfs\n\text4\n").unwrap();
    let mkfs = run(Command::new("sh").args(["-c", "PATH=$PATH:/usr/sbin:/sbin command -v mkfs.btrfs"])).ok();
    for (what, cover, word) in
        [(mkfs.trim(), "/dev/null", "mkfs.btrfs"), ("/proc/filesystems", list.to_str().unwrap(), "no btrfs")]
    {
        let script = format!("mount --bind {cover} $(realpath {what}) && exec \"$@\"");
        let ran = run(&mut dev("unshare", &["--mount", "sh", "-c", &script, "sh", &epagent]));
        assert_ne!(ran.code, Some(0), "{ran}");
        ran.says(&["error", word]);
    }

    assert!(!state.join("pool.img").exists(), "a pool was made all the same");
}

#[test]
fn a_pool_that_does_not_fit_is_refused_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let disk = SmallDisk::mount(folder.path().join("disk"));
    let state = disk.0.join("state");
    let ran = run(Command::new(binary("epagent"))
        .args(["dev", "--http", "127.0.0.1:18098", "--size", "6G", "--state"])
        .arg(&state));
    assert_ne!(ran.code, Some(0));
    ran.says(&["error", "pool", "space"]);
    if let Some(node) = epagent_tests::leftovers::Node::of(&state) {
        let left = node.leftovers();
        assert!(left.is_empty(), "left behind: {left:?}");
    }
}

/// A file system of 32 MiB, unmounted when dropped.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(point: std::path::PathBuf) -> Self {
        std::fs::create_dir(&point).unwrap();
        let target = point.to_string_lossy().into_owned();
        run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=32m", "none", &target])).ok();
        Self(point)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn blocked_signals_of_the_caller_do_not_reach_the_apps() {
    // A caller that blocked TERM (a demo, a CI runner) must not make apps that can't be stopped.
    use nix::sys::signal::{SigSet, SigmaskHow};
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    let old = set.thread_swap_mask(SigmaskHow::SIG_BLOCK).unwrap();
    let host = DevHost::with(Options::default());
    old.thread_set_mask().unwrap();
    host.deploy(&AppDir::server("shop", "v1", "")).ok();
    let init = host.pids("shop")[0];
    let app = process::descendants(init).into_iter().find(|p| p.arguments.contains("server.py"));
    let app = app.expect("the app is below its init").pid;
    for pid in [init, app] {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:\t")).unwrap();
        let term = 1 << (Signal::SIGTERM as u64 - 1);
        assert_eq!(u64::from_str_radix(mask, 16).unwrap() & term, 0, "TERM is blocked in {pid}: {mask}");
    }
    host.stop();
}
