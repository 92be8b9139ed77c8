//! Images: imported from a stream, bootstrapped from Debian, replaced, removed; each by a job in a jail.

mod common;

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::time::Duration;

use common::{Node, archive, eventually, jail_of, name, start};
use epagent_wire::name::ReleaseNumber;
use epagent_wire::runner::{ArchiveFormat, JailState, RefusalCode, Reply, Request};

#[test]
fn an_imported_image_is_there_when_its_job_has_ended() {
    let mut node = Node::start();
    let mut client = node.connect();
    let import = Request::ImageImport { image: name("mine"), format: ArchiveFormat::Tar };
    let (job, exit) = client.job(import.clone(), &[archive(&[("etc/marker", "one")]).as_fd()]);
    assert!(exit.success(), "{exit}\n{}", client.log(&job));
    let first =
        client.world().images.into_iter().find(|image| image.name == name("mine")).expect("the image");

    // Noise instead of an archive: the job fails, the image stays as it was.
    let mut noise = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut noise, &[0x55; 4096]).unwrap();
    std::io::Seek::rewind(&mut noise).unwrap();
    let (failed, exit) = client.job(import.clone(), &[noise.as_fd()]);
    assert!(!exit.success());
    let now = client.world().images.into_iter().find(|image| image.name == name("mine")).unwrap();
    assert_eq!(now.id, first.id);

    let (_, exit) = client.job(import, &[archive(&[("etc/marker", "two")]).as_fd()]);
    assert!(exit.success());
    let second = client.world().images.into_iter().find(|image| image.name == name("mine")).unwrap();
    assert_ne!(second.id, first.id);

    node.kill();
    node.run();
    let mut client = node.connect();
    let jails = client.world().jails;
    assert_eq!(jails.len(), 3, "ended jobs are known until they are forgotten");
    let of_failed = jails.iter().find(|jail| jail.id == failed).unwrap();
    assert!(matches!(&of_failed.state, JailState::Exited(exit) if !exit.success()));
    for jail in jails {
        client.done(Request::Forget { jail: jail.id });
    }
    client.done(Request::ImageRemove { image: name("mine") });
    assert!(client.world().images.iter().all(|image| image.name == name("host")));
    assert!(node.cgroup_ids().is_empty());
    let staging = std::fs::read_dir(node.dir.path().join("pool/staging")).unwrap().count();
    assert_eq!(staging, 0, "no tree is left");
}

#[test]
fn a_job_that_ends_while_the_runner_is_away_is_concluded_by_the_next() {
    let mut node = Node::start();
    let mut client = node.connect();
    // The stream ends when the test lets go of it, which is after the runner is gone.
    let (read, write) = nix::unistd::pipe().unwrap();
    let import = Request::ImageImport { image: name("mine"), format: ArchiveFormat::Tar };
    let (reply, _) = client.call_with(import, &[read.as_fd()]).unwrap();
    let Reply::Started { jail, .. } = reply else { panic!("{reply:?}") };
    client.runs(&jail);
    drop(read);
    node.kill();
    let mut file = archive(&[("etc/marker", "one")]);
    std::io::copy(&mut file, &mut std::fs::File::from(write)).unwrap();
    node.run();
    let mut client = node.connect();
    eventually("the image is there", || client.world().images.iter().any(|image| image.name == name("mine")));
    let JailState::Exited(exit) = client.jail(&jail).unwrap().state else { panic!("the job has ended") };
    assert!(exit.success());
}

#[test]
fn the_image_host_builds_with_what_is_in_usr_and_can_not_change_it() {
    let node = Node::start();
    let mut client = node.connect();
    let build = "python3 -m venv venv && venv/bin/python -c 'import ssl' && awk 'BEGIN { exit 0 }' \
                 && ! touch /usr/x /etc/ssl/x /etc/alternatives/x && test ! -e /etc/shadow && test $(id -u) = 0 \
                 && if command -v npm; then npm --version && node -e 'require(\"crypto\")'; fi";
    client.release_built("shop", 1, &[("serve", "#!/bin/sh\nexec sleep 1000\n")], Some(build));
    assert!(!std::path::Path::new("/usr/x").exists());
    // No more of the host than its programs: each of these is a name of this machine.
    let jail = jail_of("shop", 1);
    let order = start(
        "shop",
        "venv/bin/python -c 'import os; print(sorted(os.listdir(\"/home\") + os.listdir(\"/root\")))'",
    );
    client.call(Request::Start { jail: jail.clone(), start: order }).unwrap();
    assert!(client.exit(&jail).success(), "{}", client.log(&jail));
    assert!(client.log(&jail).contains("o []"), "{}", client.log(&jail));
}

/// Makes a Debian of its own, builds on it, runs on it. Minutes, and needs a mirror.
#[test]
#[ignore = "downloads Debian packages"]
fn a_bootstrapped_debian_builds_and_runs_python() {
    let mut node = Node::prepare("ca_bundle = \"/etc/ssl/certs/ca-certificates.crt\"");
    let text = std::fs::read_to_string(&node.config).unwrap();
    let text = text.replace("size = \"1G\"", "size = \"4G\"").replace("disk = \"400M\"", "disk = \"2G\"");
    std::fs::write(&node.config, text).unwrap();
    node.run();
    let mut client = node.connect();
    let include = BTreeSet::from(["python3".to_owned(), "python3-venv".to_owned()]);
    let bootstrap = Request::ImageBootstrap { image: name("py"), suite: "bookworm".to_owned(), include };
    let (reply, _) = client.call_with(bootstrap, &[]).unwrap();
    let Reply::Started { jail, .. } = reply else { panic!("{reply:?}") };
    let exit = client.exit_within(&jail, Duration::from_secs(600));
    assert!(exit.success(), "{exit}\n{}", client.log(&jail));

    client.done(Request::AppEnsure { app: name("shop") });
    let (app, release) = (name("shop"), ReleaseNumber(1));
    let unpack = Request::BuildUnpack { app, release, image: name("py"), format: ArchiveFormat::Tar };
    let (job, exit) = client.job(unpack, &[archive(&[("requirements.txt", "flask\n")]).as_fd()]);
    assert!(exit.success(), "{exit}\n{}", client.log(&job));
    let command =
        "python3 -m venv venv && venv/bin/pip install -r requirements.txt && apt-get --version".to_owned();
    let run = Request::BuildRun { app: name("shop"), release, command, env: Default::default() };
    let (reply, _) = client.call_with(run, &[]).unwrap();
    let Reply::Started { jail, .. } = reply else { panic!("{reply:?}") };
    let exit = client.exit_within(&jail, Duration::from_secs(300));
    assert!(exit.success(), "{exit}\n{}", client.log(&jail));
    client.done(Request::BuildSeal { app: name("shop"), release });
    let jail = jail_of("shop", 1);
    let order =
        start("shop", "venv/bin/python -c 'import flask, os; print(os.stat(\"/usr/bin/python3\").st_uid)'");
    client.call(Request::Start { jail: jail.clone(), start: order }).unwrap();
    assert!(client.exit(&jail).success(), "{}", client.log(&jail));
    assert!(client.log(&jail).ends_with("o 0\n"), "{}", client.log(&jail));
    let refusal = client.call(Request::ImageRemove { image: name("py") }).unwrap_err();
    assert_eq!(refusal.code, RefusalCode::Conflict);
}
