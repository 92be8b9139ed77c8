//! Images made to lead set-up astray.

mod support;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use epagent_isolation::launch::LaunchFds;
use epagent_isolation::monitor::record::ExitReason;
use epagent_isolation::spec::*;
use support::{Node, path};

/// A root directory with what an image has, bound to the host's /usr.
fn image(node: &Node, name: &str, change: impl FnOnce(&PathBuf)) -> PathBuf {
    let root = node.dir.join(name);
    for dir in ["usr", "etc", "dev", "proc", "tmp", "run"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    for name in ["bin", "sbin", "lib", "lib64"] {
        symlink(format!("usr/{name}"), root.join(name)).unwrap();
    }
    change(&root);
    root
}

fn run(
    node: &Node,
    id: &str,
    root: &PathBuf,
    read_only: bool,
    script: &str,
) -> (ExitReason, String, Vec<String>) {
    let mut spec = node.shell(id, script);
    spec.root = RootSpec::Directory { read_only, idmap: true };
    let root = File::open(root).unwrap();
    let mut jail = node.start_with(&spec, LaunchFds { root: Some(root.as_fd()), ..LaunchFds::default() });
    let record = jail.await_exit();
    let notes = jail.client.status().unwrap().notes;
    (record.reason, jail.output(), notes)
}

#[test]
fn a_directory_of_ours_that_is_a_symlink_is_refused_and_named() {
    let node = Node::new();
    let host = node.dir.join("host");
    fs::create_dir(&host).unwrap();
    for (id, name, target) in [
        ("dev-abs", "dev", host.display().to_string()),
        ("dev-up", "dev", "../../host".to_owned()),
        ("proc-in", "proc", "tmp".to_owned()),
        ("run-in", "run", "/tmp".to_owned()),
        ("etc-out", "etc", host.display().to_string()),
    ] {
        let root = image(&node, id, |root| {
            fs::remove_dir(root.join(name)).unwrap();
            symlink(&target, root.join(name)).unwrap();
        });
        let (reason, _, _) = run(&node, id, &root, false, "echo started");
        let ExitReason::StartFailed { error, .. } = reason else { panic!("{id}: {reason:?}") };
        assert!(error.contains(&format!("/{name} in the image is a symlink")), "{id}: {error}");
    }
    assert_eq!(fs::read_dir(&host).unwrap().count(), 0, "nothing was made on the host");
}

#[test]
fn a_resolv_conf_that_is_a_symlink_is_covered_and_its_target_untouched() {
    let node = Node::new();
    let outside = node.dir.join("outside");
    fs::write(&outside, "the host's own\n").unwrap();
    for (id, target, read_only) in [
        ("rc-out", outside.display().to_string(), false),
        ("rc-out-ro", outside.display().to_string(), true),
        ("rc-stub", "../run/systemd/resolve/stub-resolv.conf".to_owned(), true),
    ] {
        let root = image(&node, id, |root| {
            symlink(&target, root.join("etc/resolv.conf")).unwrap();
            for name in ["hosts", "hostname"] {
                fs::write(root.join("etc").join(name), "of the image\n").unwrap();
            }
        });
        let (reason, output, _) =
            run(&node, id, &root, read_only, "cat /etc/resolv.conf /etc/hosts /etc/hostname; echo end");
        assert_eq!(reason, ExitReason::Exited { code: 0 }, "{id}: {output}");
        assert!(output.contains("127.0.0.1 localhost") && output.contains(id), "{id}: {output}");
        assert!(!output.contains("the host's own") && !output.contains("of the image"), "{id}: {output}");
    }
    assert_eq!(fs::read_to_string(&outside).unwrap(), "the host's own\n");
}

#[test]
fn a_read_only_image_needs_its_directories_and_may_lack_the_files() {
    let node = Node::new();
    let root = image(&node, "bare", |_| {});
    let (reason, output, notes) =
        run(&node, "bare", &root, true, "touch /x || echo refused; touch /tmp/x && echo tmp");
    assert_eq!(reason, ExitReason::Exited { code: 0 }, "{output}");
    assert!(output.contains("refused") && output.contains("tmp"), "{output}");
    assert!(notes.len() == 3 && notes[0].contains("/etc/resolv.conf left out"), "{notes:?}");

    let root = image(&node, "lacking", |root| fs::remove_dir(root.join("tmp")).unwrap());
    let (reason, _, _) = run(&node, "lacking", &root, true, "true");
    let ExitReason::StartFailed { error, .. } = reason else { panic!("{reason:?}") };
    assert!(error.contains("the image has no /tmp, and its root is read-only"), "{error}");
}

#[test]
fn mount_points_are_made_in_a_writable_root_with_the_ids_of_the_image() {
    use std::os::unix::fs::MetadataExt;
    let node = Node::new();
    let root_dir = image(&node, "mounts", |_| {});
    let volume = node.dir.join("volume");
    fs::create_dir(&volume).unwrap();
    let (root, volume) = (File::open(&root_dir).unwrap(), File::open(&volume).unwrap());
    let mut spec = node.shell(
        "mounts",
        "echo kept > /srv/data/file; stat -f -c %T /scratch; touch /scratch/y || echo scratch refused",
    );
    spec.root = RootSpec::Directory { read_only: false, idmap: true };
    spec.mounts.push(MountSpec {
        target: path("/srv/data"),
        source: MountSource::Descriptor { index: 1, idmap: true, recursive: false },
        read_only: false,
        no_exec: true,
    });
    spec.mounts.push(MountSpec {
        target: path("/scratch"),
        source: MountSource::Tmpfs { size_bytes: 1 << 16, mode: 0o755 },
        read_only: true,
        no_exec: true,
    });
    let fds = LaunchFds { root: Some(root.as_fd()), mounts: vec![volume.as_fd()], ..LaunchFds::default() };
    let mut jail = node.start_with(&spec, fds);
    assert_eq!(jail.await_exit().reason, ExitReason::Exited { code: 0 });
    let output = jail.output();
    assert!(output.contains("tmpfs") && output.contains("scratch refused"), "{output}");
    assert_eq!(fs::read_to_string(node.dir.join("volume/file")).unwrap(), "kept\n");
    assert_eq!(root_dir.join("srv/data").metadata().unwrap().uid(), 0);
}

#[test]
fn a_file_system_that_cannot_map_ids_is_named() {
    let node = Node::new();
    let mut spec = node.shell("proc", "true");
    let source = File::open("/proc/sys").unwrap();
    spec.mounts.push(MountSpec {
        target: path("/data"),
        source: MountSource::Descriptor { index: 1, idmap: true, recursive: false },
        read_only: true,
        no_exec: true,
    });
    let mut jail = node.start_with(&spec, LaunchFds { mounts: vec![source.as_fd()], ..LaunchFds::default() });
    let ExitReason::StartFailed { step, error, .. } = jail.await_exit().reason else { panic!() };
    assert!(step == "map mounts" && error.contains("/data") && error.contains("idmap"), "{step}: {error}");
}

#[test]
fn a_root_on_a_shared_mount_starts_and_shares_nothing_with_the_host() {
    let node = Node::new();
    let shared = node.dir.join("shared");
    fs::create_dir(&shared).unwrap();
    // As every mount is under systemd. A bind mount, since a tmpfs can't be idmapped before Linux 6.3.
    let none = None::<&str>;
    nix::mount::mount(Some(&shared), &shared, none, nix::mount::MsFlags::MS_BIND, none).unwrap();
    let mounted = Unmount(&shared);
    nix::mount::mount(none, &shared, none, nix::mount::MsFlags::MS_SHARED, none).unwrap();
    let root = image(&node, "shared/root", |_| {});
    let script = "grep -c -e shared: -e master: /proc/self/mountinfo; ls /usr/bin/env";
    let (reason, said, _) = run(&node, "shared", &root, false, script);
    assert_eq!(reason, ExitReason::Exited { code: 0 }, "{said}");
    assert_eq!(said.lines().next(), Some("0"), "mounts of the host's peer groups");
    drop(mounted);
}

/// Unmounts a folder when the test ends, whatever happened.
struct Unmount<'a>(&'a PathBuf);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}
