//! What an instance sees and reaches: itself, and a way out.
//!
//! Everything is tried from inside, by scripts run with `epagent exec`, as a tenant would.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::{TcpListener, UdpSocket};
use std::process::Command;
use std::time::Duration;

use epagent_tests::command::run;
use epagent_tests::host::DevHost;
use epagent_tests::{AppDir, eventually};

fn host_with_app() -> DevHost {
    let host = DevHost::start();
    host.deploy(&AppDir::server("shop", "v1", "")).ok();
    host
}

/// Runs a Python script inside.
fn python(host: &DevHost, app: &str, script: &str) -> String {
    host.cli(&["exec", app, "--", "python3", "-c", script]).ok()
}

#[test]
fn it_sees_no_process_but_its_own() {
    let host = host_with_app();
    let seen = python(
        &host,
        "shop",
        "import os\n\
         for pid in filter(str.isdigit, os.listdir('/proc')):\n\
         \x20   print(pid, open(f'/proc/{pid}/cmdline').read().replace('\\0', ' '))",
    );
    assert!(seen.lines().count() <= 6, "{seen}");
    assert!(seen.lines().any(|line| line.starts_with("1 ")), "{seen}");
    for word in ["epagentd", "epagent-runner", "epagent-balancer", "cargo"] {
        assert!(!seen.contains(word), "{word} is visible:\n{seen}");
    }
    // The host's pid of the test itself means nothing in there.
    let own = std::process::id();
    host.inside("shop", &format!("kill -0 {own}")).fails(1, &["no such process"]);
    host.stop();
}

#[test]
fn it_shares_no_namespace_with_the_host_or_a_neighbour() {
    let host = host_with_app();
    host.deploy(&AppDir::server("other", "v1", "")).ok();
    let names = ["user", "mnt", "pid", "ipc", "uts", "cgroup", "net"];
    let script = names.map(|name| format!("readlink /proc/self/ns/{name};")).concat();
    let shop: BTreeSet<String> = host.inside("shop", &script).ok().lines().map(str::to_owned).collect();
    let other: BTreeSet<String> = host.inside("other", &script).ok().lines().map(str::to_owned).collect();
    let own: BTreeSet<String> = names
        .iter()
        .map(|name| {
            std::fs::read_link(format!("/proc/self/ns/{name}")).unwrap().to_string_lossy().into_owned()
        })
        .collect();
    assert_eq!(shop.len(), names.len());
    assert!(shop.is_disjoint(&own), "shared with the host: {shop:?} {own:?}");
    assert!(shop.is_disjoint(&other), "shared with a neighbour: {shop:?} {other:?}");
    host.stop();
}

#[test]
fn it_sees_no_mount_file_or_user_of_the_host() {
    let host = host_with_app();
    let canary = tempfile::Builder::new().prefix("epagent-host-file-").tempdir_in("/var/tmp").unwrap();
    std::fs::write(canary.path().join("file"), "host").unwrap();

    let points = host.inside("shop", "cut -d' ' -f5 /proc/self/mountinfo").ok();
    for point in points.lines() {
        let allowed = ["/", "/usr", "/proc", "/dev", "/tmp", "/run", "/sys", "/etc", "/app", "/var"];
        let fine = allowed
            .iter()
            .any(|root| point == *root || (root.len() > 1 && point.starts_with(&format!("{root}/"))));
        assert!(fine, "unexpected mount at {point}:\n{points}");
    }
    let state = host.state.to_string_lossy().into_owned();
    let mounts = host.inside("shop", "cat /proc/self/mountinfo").ok();
    assert!(!mounts.contains(&state), "the state folder is named in\n{mounts}");

    for path in [state.as_str(), &canary.path().to_string_lossy(), "/boot", "/lost+found"] {
        let ran = host.inside("shop", &format!("test -e '{path}'"));
        assert_eq!(ran.code, Some(1), "{path} of the host is there");
    }
    let shadow = host.inside("shop", "cat /etc/shadow 2>/dev/null").stdout;
    assert!(!shadow.contains("$"), "password hashes are readable");

    let users = host.inside("shop", "cut -d: -f1 /etc/passwd").ok();
    let theirs: BTreeSet<&str> = users.lines().collect();
    assert!(theirs.len() <= 10, "the host's users are visible: {theirs:?}");

    let sockets = host.inside("shop", "find / -xdev -type s 2>/dev/null; cat /proc/net/unix").ok();
    assert!(!sockets.contains("epagent"), "the agent's sockets are visible:\n{sockets}");
    let devices = host.inside("shop", "find /dev -type b 2>/dev/null").ok();
    assert_eq!(devices, "", "block devices are visible");
    host.stop();
}

#[test]
fn it_sees_one_interface_of_its_own_and_loopback() {
    let host = host_with_app();
    let seen =
        host.inside("shop", "ls /sys/class/net 2>/dev/null || tail -n +3 /proc/net/dev | cut -d: -f1").ok();
    let names: Vec<&str> = seen.split_whitespace().collect();
    assert_eq!(names.len(), 2, "{names:?}");
    assert!(names.contains(&"lo"), "{names:?}");
    let hosts: BTreeSet<String> = std::fs::read_dir("/sys/class/net")
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("ep"))
        .collect();
    assert!(names.iter().all(|name| !hosts.contains(*name)), "{names:?}");
    host.stop();
}

#[test]
fn it_has_no_power_over_the_kernel() {
    let host = host_with_app();
    let status = host.inside("shop", "cat /proc/self/status").ok();
    for line in ["NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "{line} is missing in\n{status}");
    }
    let maps = host.inside("shop", "cat /proc/self/uid_map").ok();
    let fields: Vec<u64> = maps.split_whitespace().map(|field| field.parse().unwrap()).collect();
    assert_eq!((fields[0], fields[2]), (0, 65_536), "{maps}");
    assert!(fields[1] >= 0x8000_0000, "{maps}");

    // Each of these must fail; some are calls the kernel would grant to an ordinary user.
    let refused = [
        "unshare -U true",
        "unshare -r -m true",
        "mount -t tmpfs none /tmp",
        "umount /proc",
        "mknod /tmp/disk b 7 0",
        "hostname changed",
        "chroot / true",
        "dmesg",
        "sysctl -w kernel.hostname=changed",
        // Where the kernel has them, the null device lies over them: it takes what is written and gives nothing.
        "test ! -c /proc/sysrq-trigger && echo h > /proc/sysrq-trigger",
        "head -c1 /proc/kcore | grep -q .",
        "echo 1 > /proc/sys/kernel/panic",
        "ip link add probe type dummy",
        "losetup -f /etc/hostname",
        "nsenter -t 1 -n true",
    ];
    for line in refused {
        let ran = host.inside("shop", &format!("{line} 2>&1"));
        assert_ne!(ran.code, Some(0), "`{line}` was allowed: {}", ran.stdout);
    }
    let calls = python(
        &host,
        "shop",
        "import ctypes, os, socket\n\
         libc = ctypes.CDLL(None, use_errno=True)\n\
         bad = []\n\
         numbers = {'x86_64': dict(bpf=321, keyctl=250, io_uring_setup=425, perf_event_open=298, init_module=175,\n\
         \x20 userfaultfd=323, kexec_load=246, open_by_handle_at=304, add_key=248, clone3=435)}\n\
         for name, number in numbers.get(os.uname().machine, {}).items():\n\
         \x20   if libc.syscall(number, 0, 0, 0, 0, 0, 0) != -1: bad.append(name)\n\
         \x20   elif ctypes.get_errno() not in (1, 38): bad.append((name, ctypes.get_errno()))\n\
         for family in (17, 38, 40):\n\
         \x20   try: socket.socket(family, socket.SOCK_RAW if family == 17 else socket.SOCK_STREAM)\n\
         \x20   except OSError: continue\n\
         \x20   bad.append(('socket', family))\n\
         print(bad)",
    );
    assert_eq!(calls.trim(), "[]", "calls that got through");
    host.stop();
}

#[test]
fn it_reaches_neither_the_host_nor_its_neighbours() {
    let host = host_with_app();
    host.deploy(&AppDir::server("other", "v1", "")).ok();
    let other = host.healthy("other")[0].address.clone().expect("it has an address");

    // Sockets of the host on every address: reachable from the host, and from nowhere in an instance.
    let listener = TcpListener::bind("[::]:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
    let addresses = run(Command::new("ip").args(["-o", "addr", "show", "up"])).ok();
    let mut targets: Vec<String> = addresses
        .lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace().skip(1);
            let (name, _family, address) = (fields.next()?, fields.next()?, fields.next()?);
            // Other suites' agents come and go; their addresses are tried by their own tests.
            let ours = !name.starts_with("ep") || name.starts_with(&format!("ep{}-", host.node().number));
            let address = address.split('/').next()?;
            (ours && !address.starts_with("fe80")).then(|| address.to_owned())
        })
        .map(|address| format!("('{address}', {port})"))
        .collect();
    targets.push(format!("('{}', {})", host.http.ip(), host.http.port()));
    let (address, other_port) = other.rsplit_once(':').unwrap_or((&other, "8000"));
    targets.push(format!("('{}', {other_port})", address.trim_matches(['[', ']'])));
    assert!(targets.len() >= 4, "{targets:?}");
    let reached = python(
        &host,
        "shop",
        &format!(
            "import socket\n\
             for target in [{}]:\n\
             \x20   try:\n\
             \x20       socket.create_connection(target, 0.5)\n\
             \x20       print(target)\n\
             \x20   except OSError: pass",
            targets.join(", ")
        ),
    );
    assert_eq!(reached.trim(), "", "reached from inside");

    // Datagrams do not arrive either.
    let datagrams = UdpSocket::bind("0.0.0.0:0").unwrap();
    datagrams.set_nonblocking(true).unwrap();
    let port = datagrams.local_addr().unwrap().port();
    python(
        &host,
        "shop",
        &format!(
            "import socket\n\
             s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
             for line in open('/proc/net/route').read().splitlines()[1:]:\n\
             \x20   gateway = bytes.fromhex(line.split()[2])[::-1]\n\
             \x20   if any(gateway): s.sendto(b'x', (socket.inet_ntoa(gateway), {port}))"
        ),
    );
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(datagrams.recv_from(&mut [0; 8]).is_err(), "a datagram reached the host");

    // The check itself sees what can be reached: the app's own server.
    let own = python(
        &host,
        "shop",
        "import socket; socket.create_connection(('127.0.0.1', 8000), 1); print('own')",
    );
    assert_eq!(own.trim(), "own");
    host.stop();
}

#[test]
fn its_abstract_sockets_and_shared_memory_are_its_own() {
    let host = host_with_app();
    let node = host.node().number;
    let reached = python(
        &host,
        "shop",
        &format!(
            "import socket\n\
             s = socket.socket(socket.AF_UNIX)\n\
             try:\n\
             \x20   s.connect('\\0epagent-node-{node}')\n\
             \x20   print('reached')\n\
             except OSError as error: print(error.errno)"
        ),
    );
    assert_eq!(reached.trim(), "111", "the agent's abstract socket");
    let mut file = tempfile::Builder::new().prefix("epagent-shm-").tempfile_in("/dev/shm").unwrap();
    file.write_all(b"host").unwrap();
    assert_eq!(host.inside("shop", "ls /dev/shm").ok(), "");
    host.stop();
}

#[test]
fn a_fence_that_somebody_took_away_comes_back() {
    let host = host_with_app();
    let table = format!("epagent_{}", host.api().get("/v1/version")["node"]);
    let nft = |verb: &str| run(Command::new("nft").args([verb, "table", "inet", &table]));
    nft("delete").ok();
    eventually("the packet filter is back", Duration::from_secs(20), || {
        (nft("list").code == Some(0)).then_some(())
    });
    host.stop();
}
