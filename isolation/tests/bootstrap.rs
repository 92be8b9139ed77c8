//! mmdebstrap makes an image inside a jail, unprivileged on the host.
//!
//! Here with one small package, to show each part (download, unpack with ids, mounts, chroot) in seconds. A full
//! `--variant=apt` takes about a minute on two cores and works the same way.

mod support;

use std::fs::{self, File};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use epagent_isolation::launch::LaunchFds;
use epagent_isolation::monitor::record::ExitReason;
use epagent_isolation::net::{
    FirewallConfig, disable_forwarding, enable_forwarding, install_firewall, remove_firewall, resolvers,
};
use epagent_isolation::spec::*;
use support::{Node, path};

const SCRIPT: &str = "\
export TMPDIR=/tmp
mount -o remount,bind,rw /usr || echo usr is locked
mmdebstrap --mode=root --keyring=/usr/share/keyrings --variant=extract --include=busybox-static \
  bookworm /target http://deb.debian.org/debian || exit 1
mkdir -p /target/mnt
mount -t tmpfs none /target/mnt && umount /target/mnt && echo mounted
chroot /target /bin/busybox id";

#[test]
fn mmdebstrap_makes_an_image_with_the_ids_of_an_image() {
    let way_out = "deb.debian.org:80".to_socket_addrs().ok().and_then(|mut all| all.next());
    let way_out = way_out.filter(|at| TcpStream::connect_timeout(at, Duration::from_secs(3)).is_ok());
    let resolvers = resolvers().unwrap();
    if way_out.is_none() || resolvers.is_empty() || !std::path::Path::new("/usr/bin/mmdebstrap").exists() {
        eprintln!(
            "SKIPPED: this host has no mmdebstrap, no name server to redirect to, or no way to a mirror"
        );
        return;
    }
    let node = Node::new();
    install_firewall(&FirewallConfig { node: node.number, resolvers, allowed: vec![] }).unwrap();
    enable_forwarding(node.number).unwrap();
    let (target, etc) = (node.dir.join("target"), node.dir.join("etc"));
    fs::create_dir(&target).unwrap();
    fs::create_dir_all(etc.join("apt/apt.conf.d")).unwrap();
    fs::write(etc.join("passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
    let mut spec = node.shell("bootstrap", SCRIPT);
    spec.profile = Profile::Bootstrap;
    spec.network = Some(node.network(1));
    spec.limits = Limits { memory_bytes: 1 << 30, pids: 512, tmpfs_bytes: 256 << 20, ..Limits::default() };
    spec.deadline_ms = Some(60_000);
    for (index, dir) in [(1, "/target"), (2, "/etc")] {
        spec.mounts.push(MountSpec {
            target: path(dir),
            source: MountSource::Descriptor { index, idmap: true, recursive: false },
            read_only: false,
            no_exec: false,
        });
    }
    let fds = [&target, &etc].map(|dir| File::open(dir).unwrap());
    let mounts = fds.iter().map(AsFd::as_fd).collect();
    let mut jail = node.start_with(&spec, LaunchFds { mounts, ..LaunchFds::default() });
    let record = jail.await_exit();
    disable_forwarding(node.number).unwrap();
    remove_firewall(node.number).unwrap();
    let output = jail.output();
    assert_eq!(record.reason, ExitReason::Exited { code: 0 }, "{output}");
    for part in ["usr is locked", "mounted", "uid=0"] {
        assert!(output.contains(part), "{part}: {output}");
    }
    assert_eq!(fs::metadata(target.join("bin/busybox")).unwrap().uid(), 0, "stored with the image's ids");
}
