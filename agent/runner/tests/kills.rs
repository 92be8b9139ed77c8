//! What can be killed is killed, at every moment: the runner in the middle of its work, a monitor that hangs.

mod common;

use std::os::fd::AsFd;
use std::time::Duration;

use common::{Client, Node, archive, eventually, is_alive, jail_of, monitor_of, name, start};
use epagent_wire::name::ReleaseNumber;
use epagent_wire::runner::{ArchiveFormat, Call, JailState, Reply, Request};
use nix::sys::signal::{Signal, kill};

const SLEEPER: (&str, &str) = ("serve", "#!/bin/sh\nexec sleep 1000\n");

/// Sends it and kills the runner a moment later, without an answer.
fn cut(
    node: &mut Node,
    client: &Client,
    request: Request,
    stream: Option<&std::fs::File>,
    after: Duration,
) -> Client {
    let descriptors: Vec<_> = stream.iter().map(|file| file.as_fd()).collect();
    client.send_raw(&serde_json::to_vec(&Call { id: 99, request }).unwrap(), &descriptors).unwrap();
    std::thread::sleep(after);
    node.kill();
    node.run();
    node.connect()
}

/// From before the first record is written until after all is done.
fn moments() -> impl Iterator<Item = (u64, Duration)> {
    let moments_us = [0, 300, 700, 1_500, 3_000, 5_000, 8_000, 12_000, 20_000, 40_000];
    moments_us.into_iter().enumerate().map(|(round, us)| (round as u64, Duration::from_micros(us)))
}

#[track_caller]
fn no_orphans(node: &Node, client: &mut Client) {
    let world = client.world();
    let known: Vec<String> = world.jails.iter().map(|jail| jail.id.to_string()).collect();
    let cgroups: Vec<String> = node.cgroup_ids().into_iter().filter(|id| !known.contains(id)).collect();
    assert!(cgroups.is_empty(), "cgroups {cgroups:?} of no jail in {known:?}");
    let building = world.releases.iter().filter(|release| !release.sealed).count();
    let staging = entries(node, "staging");
    assert!(staging.len() <= building + known.len(), "trees {staging:?} of no release and no job");
    let roots: Vec<String> =
        entries(node, "instances").into_iter().filter(|id| !known.contains(id)).collect();
    assert!(roots.is_empty(), "roots {roots:?} of no jail in {known:?}");
}

fn entries(node: &Node, folder: &str) -> Vec<String> {
    let entries = std::fs::read_dir(node.dir.path().join("pool").join(folder)).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_runner_killed_at_any_moment_of_a_start_leaves_no_orphan() {
    let mut node = Node::start();
    let mut client = node.connect();
    client.release("shop", 1, &[SLEEPER]);
    for (round, after) in moments() {
        let jail = jail_of("shop", round);
        let request = Request::Start { jail: jail.clone(), start: start("shop", "./serve") };
        client = cut(&mut node, &client, request.clone(), None, after);
        no_orphans(&node, &mut client);
        // Asked for again, it is there, or was lost and says so.
        assert!(matches!(client.call(request), Ok(Reply::Started { .. })));
        let is_decided = |client: &mut Client| client.jail(&jail).unwrap().state != JailState::Starting;
        eventually("it runs or has ended", || is_decided(&mut client));
    }
    forget_all(&mut client);
    no_orphans(&node, &mut client);
    eventually("the kernel takes its network down", || node.interfaces().is_empty());
}

#[test]
fn a_runner_killed_at_any_moment_of_a_build_leaves_the_old_state_or_the_new() {
    let mut node = Node::start();
    let mut client = node.connect();
    client.done(Request::AppEnsure { app: name("shop") });
    for (round, after) in moments() {
        let (app, release) = (name("shop"), ReleaseNumber(round as u32 + 1));
        let unpack = Request::BuildUnpack { app, release, image: name("host"), format: ArchiveFormat::Tar };
        client = cut(&mut node, &client, unpack, Some(&archive(&[SLEEPER])), after);
        no_orphans(&node, &mut client);
        // The agent does what it does after every restart: drops what is half done and begins again.
        forget_all(&mut client);
        client.done(Request::BuildAbort { app: name("shop"), release });
        client.release("shop", release.0, &[SLEEPER]);
        client = cut(&mut node, &client, Request::ReleaseRemove { app: name("shop"), release }, None, after);
        no_orphans(&node, &mut client);
        let there = client.world().releases.iter().any(|tree| tree.release == release);
        if there {
            // Whole, then.
            let mut order = start("shop", "./serve");
            order.release = release;
            let jail = jail_of("shop", round);
            client.call(Request::Start { jail: jail.clone(), start: order }).unwrap();
            client.running(&jail);
            forget_all(&mut client);
        }
    }
    no_orphans(&node, &mut client);
}

#[test]
fn a_runner_killed_at_any_moment_of_an_end_forgets_in_the_end() {
    let mut node = Node::start();
    let mut client = node.connect();
    client.release("shop", 1, &[("serve", "#!/bin/sh\nexit 0\n")]);
    for (round, after) in moments() {
        let jail = jail_of("shop", round);
        client.call(Request::Start { jail: jail.clone(), start: start("shop", "./serve") }).unwrap();
        client.exit(&jail);
        client = cut(&mut node, &client, Request::Forget { jail: jail.clone() }, None, after);
        no_orphans(&node, &mut client);
        client.done(Request::Forget { jail: jail.clone() });
        assert!(client.jail(&jail).is_none());
    }
    client =
        cut(&mut node, &client, Request::AppRemove { app: name("shop") }, None, Duration::from_millis(2));
    client.done(Request::AppRemove { app: name("shop") });
    let world = client.world();
    assert!(world.apps.is_empty() && world.releases.is_empty() && world.logs.is_empty());
    no_orphans(&node, &mut client);
}

#[test]
fn a_monitor_that_hangs_is_waited_for_and_not_killed() {
    let mut node = Node::start();
    let mut client = node.connect();
    client.release("shop", 1, &[SLEEPER]);
    let jail = jail_of("shop", 1);
    client.call(Request::Start { jail: jail.clone(), start: start("shop", "./serve") }).unwrap();
    let (pid, _) = client.running(&jail);
    let monitor = monitor_of(pid);
    kill(monitor, Signal::SIGSTOP).unwrap();
    node.kill();
    node.run();
    let mut client = node.connect();
    assert_eq!(client.jail(&jail).unwrap().state, JailState::Starting, "nobody has said yet how it is");
    assert!(is_alive(pid));
    kill(monitor, Signal::SIGCONT).unwrap();
    assert_eq!(client.running(&jail).0, pid);
}

fn forget_all(client: &mut Client) {
    for jail in client.world().jails {
        if !matches!(jail.state, JailState::Exited(_)) {
            client.done(Request::Stop { jail: jail.id.clone(), signal: "KILL".to_owned(), grace_ms: 0 });
        }
        eventually("it has ended", || matches!(client.jail(&jail.id).unwrap().state, JailState::Exited(_)));
        client.done(Request::Forget { jail: jail.id });
    }
}
