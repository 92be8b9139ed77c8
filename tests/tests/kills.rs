//! `kill -9` of every part, under load.
//!
//! Brain, hands and lease: nothing stops, and the restarted part finds the world again. A monitor takes its
//! instance along. The balancer listens again within a second and serves what was queued meanwhile.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use epagent_core::phase::Phase;
use epagent_tests::host::DevHost;
use epagent_tests::poll::setting;
use epagent_tests::{AppDir, command, eventually, http, process};
use nix::sys::signal::Signal;

fn rounds() -> u64 {
    setting("EPAGENT_TEST_ROUNDS", 2)
}

/// Kills the parts again and again under load: no request fails, the instances stay the same, none is orphaned.
fn survives_kill_of(parts: &[&str]) {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "instances = 2")).ok();
    let pids = host.pids("shop");
    let load = host.load("shop.test", "hello v1");
    for _ in 0..rounds() {
        let old: Vec<i32> = parts.iter().map(|part| host.kill(part)).collect();
        for (part, old) in parts.iter().zip(old) {
            host.wait_restarted(part, old);
        }
        host.wait_answering();
        let rows = host.wait_healthy("shop", 2);
        let after: Vec<i32> = rows.iter().filter_map(|row| row.pid).collect();
        assert_eq!(after, pids, "the instances are not the same");
        load.wait_for(100, Duration::from_secs(30));
    }
    load.finish().assert_none_failed();
    assert_eq!(monitors(&host).len(), 2, "there are monitors without an instance, or too few");
    // What was killed can do its work again.
    host.deploy(&AppDir::server("shop", "v2", "instances = 2")).ok();
    assert!(host.fetch("shop.test", "/").starts_with("hello v2"));
    host.stop();
}

/// Pids of this node's monitors.
fn monitors(host: &DevHost) -> BTreeSet<i32> {
    let node = host.node().processes();
    let instances: BTreeSet<i32> = host.ps().iter().filter_map(|row| row.pid).collect();
    let parents: BTreeSet<i32> =
        node.iter().filter(|p| instances.contains(&p.pid)).map(|p| p.parent).collect();
    // A log writer is a child of its monitor and the same program.
    node.iter()
        .filter(|p| p.executable() == "epagent-jail" && p.uid == 0)
        .filter(|p| !parents.contains(&p.parent))
        .map(|p| p.pid)
        .collect()
}

fn monitor_of(init: i32) -> i32 {
    let monitor = process::read(init).expect("the instance runs").parent;
    let executable = process::read(monitor).expect("its monitor runs");
    assert_eq!(executable.executable(), "epagent-jail");
    monitor
}

#[test]
fn a_killed_agent_leaves_requests_and_instances_alone() {
    survives_kill_of(&["epagentd"]);
}

#[test]
fn a_killed_runner_leaves_requests_and_instances_alone() {
    survives_kill_of(&["epagent-runner"]);
}

#[test]
fn both_killed_at_once_leave_requests_and_instances_alone() {
    survives_kill_of(&["epagentd", "epagent-runner"]);
}

#[test]
fn a_killed_lease_process_leaves_requests_and_instances_alone() {
    survives_kill_of(&["epagent-lease"]);
}

/// Kills the parts when a deploy reaches each phase. The deploy is done or has failed afterwards, and what serves
/// is the one release or the other; no request fails.
fn a_deploy_survives_kill_of(parts: &[&str]) {
    let host = DevHost::start();
    let version = |number: usize| {
        let more = "[build]\nrun = [\"sleep 0.3\", \"echo built\"]\n[release]\nrun = \"sleep 0.3\"";
        let app = AppDir::server("shop", &format!("v{number}"), more);
        let manifest = std::fs::read_to_string(app.file("epagent.toml")).unwrap();
        app.write(
            "epagent.toml",
            &manifest.replace("python3 server.py", "START_DELAY=0.4 python3 server.py"),
        );
        app
    };
    host.deploy(&version(0)).ok();
    let load = host.load("shop.test", "hello v");
    let phases = [
        Phase::Received,
        Phase::Building,
        Phase::Releasing,
        Phase::Starting,
        Phase::Checking,
        Phase::Switching,
        Phase::Draining,
    ];
    for (number, phase) in (1..).zip(phases) {
        let serving = number - 1;
        let before = host.last_deploy("shop").id;
        let app = version(number);
        let running = command::start(&mut host.command(&["deploy", &app.path().to_string_lossy()]));
        eventually(&format!("the deploy reaches {phase}"), Duration::from_secs(60), || {
            let newest = host.api().deploys("shop").into_iter().next()?;
            let reached = newest.id > before && newest.steps.iter().any(|step| step.phase >= phase);
            reached.then_some(())
        });
        let old: Vec<i32> = parts.iter().map(|part| host.kill(part)).collect();
        for (part, old) in parts.iter().zip(old) {
            host.wait_restarted(part, old);
        }
        let ran = running.wait(Duration::from_secs(120));
        let deploy = eventually("the deploy is over", Duration::from_secs(60), || {
            host.api().deploys("shop").into_iter().next().filter(|deploy| deploy.phase.is_over())
        });
        println!(
            "killed {parts:?} at {phase}: {} {:?} (command: {:?})",
            deploy.phase, deploy.verdict, ran.code
        );
        let serves = if deploy.phase == Phase::Done { number } else { serving };
        let expected = if deploy.phase == Phase::Done { Some(0) } else { Some(3) };
        assert_eq!(ran.code, expected, "the command does not tell how it ended\n{ran}");
        assert_eq!(serves, number, "cut at {phase}, the deploy failed: {:?}", deploy.verdict);
        let text = host.fetch("shop.test", "/");
        assert!(text.starts_with(&format!("hello v{serves}\n")), "cut at {phase}: {text}");
        host.wait_healthy("shop", 1);
    }
    load.finish().assert_none_failed();
    assert_eq!(monitors(&host).len(), 1, "a cut deploy left a jail");
    host.stop();
}

#[test]
fn a_deploy_goes_on_when_the_agent_is_killed_in_any_phase() {
    a_deploy_survives_kill_of(&["epagentd"]);
}

#[test]
fn a_deploy_goes_on_when_the_runner_is_killed_in_any_phase() {
    a_deploy_survives_kill_of(&["epagent-runner"]);
}

#[test]
fn an_instance_dies_with_its_monitor_and_is_replaced() {
    let host = DevHost::start();
    // The app clears its own parent-death signal and leaves a child in a session of its own.
    let app = AppDir::server("shop", "v1", "");
    app.write(
        "loner.py",
        "import ctypes, os, subprocess\n\
         assert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0\n\
         subprocess.Popen(['sleep', '1000'], start_new_session=True)\n\
         exec(open('server.py').read())\n",
    );
    let manifest = std::fs::read_to_string(app.file("epagent.toml")).unwrap();
    app.write("epagent.toml", &manifest.replace("server.py", "loner.py"));
    host.deploy(&app).ok();

    let row = host.wait_healthy("shop", 1).remove(0);
    let init = row.pid.unwrap();
    let family: Vec<i32> =
        process::descendants(init).iter().map(|p| p.pid).chain(std::iter::once(init)).collect();
    assert!(family.len() >= 3, "the app and its child are not below init: {family:?}");
    process::kill_hard(monitor_of(init));
    eventually("all of the instance is dead", Duration::from_secs(3), || {
        family.iter().all(|pid| !process::is_alive(*pid)).then_some(())
    });
    let next = eventually("it is replaced", Duration::from_secs(20), || {
        host.healthy("shop").into_iter().find(|next| next.pid != row.pid)
    });
    assert_ne!(next.id, row.id);
    assert!(host.fetch("shop.test", "/").starts_with("hello v1"));
    assert_eq!(monitors(&host).len(), 1);
    host.stop();
}

#[test]
fn a_killed_instance_is_replaced_and_its_end_is_told() {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "")).ok();
    let old = host.pids("shop")[0];
    process::kill_hard(old);
    let next = eventually("it is replaced", Duration::from_secs(20), || {
        host.healthy("shop").into_iter().find(|row| row.pid != Some(old))
    });
    assert!(next.restarts >= 1, "{next:?}");
    assert!(next.last_exit.is_some(), "{next:?}");
    assert!(host.fetch("shop.test", "/").starts_with("hello v1"));
    host.stop();
}

#[test]
fn a_killed_balancer_listens_again_within_a_second() {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "")).ok();
    let patience = Duration::from_secs(5);
    for round in 0..rounds() {
        if round > 1 {
            // What keeps dying is restarted later and later, until it has lived for five seconds.
            std::thread::sleep(Duration::from_millis(5_200));
        }
        let old = host.kill("epagent-balancer");
        let since = Instant::now();
        // What it has accepted dies with it; from its death on, connections wait in the queue of the listener.
        eventually("it is dead", Duration::from_secs(5), || process::has_ended(old).then_some(()));
        let response =
            http::get(host.http, "shop.test", "/", patience).expect("the queued request is answered");
        let took = since.elapsed();
        println!("answered {took:?} after the kill");
        assert_eq!(response.status, 200, "{}", response.text());
        assert!(took < Duration::from_secs(1), "answered only after {took:?}");
        host.wait_restarted("epagent-balancer", old);
    }
    host.stop();
}

#[test]
fn connections_queued_while_no_balancer_runs_are_served() {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "")).ok();
    // The supervisor is stopped, so that the balancer stays dead while clients connect.
    process::signal(host.pid(), Signal::SIGSTOP);
    let old = host.kill("epagent-balancer");
    eventually("it is dead", Duration::from_secs(5), || process::has_ended(old).then_some(()));
    let waiting: Vec<_> = (0..40)
        .map(|_| {
            let address = host.http;
            std::thread::spawn(move || http::get(address, "shop.test", "/", Duration::from_secs(10)))
        })
        .collect();
    std::thread::sleep(Duration::from_millis(300));
    process::signal(host.pid(), Signal::SIGCONT);
    for request in waiting {
        let response = request.join().unwrap().expect("a queued request is answered");
        assert_eq!(response.status, 200, "{}", response.text());
    }
    host.stop();
}

#[test]
fn the_balancer_serves_its_saved_table_without_the_agent() {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "")).ok();
    let agent = host.pid_of("epagentd");
    process::signal(agent, Signal::SIGSTOP);
    let old = host.kill("epagent-balancer");
    host.wait_restarted("epagent-balancer", old);
    let answered = http::get(host.http, "shop.test", "/", Duration::from_secs(5));
    process::signal(agent, Signal::SIGCONT);
    assert_eq!(answered.expect("answered without the agent").status, 200);
    host.stop();
}
