//! What an instance cannot see and cannot do.
//!
//! Each attack runs as root of the instance. The attacker is this very test binary, mounted into the jail: its
//! ignored test [`attack`] makes the calls and prints what the kernel answered.

mod support;

use std::fs::File;
use std::os::fd::AsFd;

use epagent_isolation::launch::LaunchFds;
use epagent_isolation::monitor::record::ExitReason;
use epagent_isolation::spec::*;
use support::{Node, path};

/// Runs one attack inside and gives `name: answer` lines.
fn attacked(node: &Node, id: &str, name: &str, profile: Profile) -> (ExitReason, String) {
    let (mut spec, binary) = node.itself(id, "attack", &[("ATTACK", name)]);
    spec.profile = profile;
    let mut jail = node.start_with(&spec, LaunchFds { mounts: vec![binary.as_fd()], ..LaunchFds::default() });
    let record = jail.await_exit();
    (record.reason, jail.output())
}

#[test]
#[ignore = "runs inside a jail, started by the other tests"]
fn attack() {
    match std::env::var("ATTACK").as_deref() {
        Ok("calls") => attacks::calls(),
        Ok("i386") => attacks::i386(),
        Ok("x32") => attacks::x32(),
        _ => {}
    }
}

#[test]
fn calls_that_open_the_kernel_are_refused_and_newer_ones_look_absent() {
    let node = Node::new();
    let (reason, output) = attacked(&node, "calls", "calls", Profile::App);
    assert_eq!(reason, ExitReason::Exited { code: 0 }, "{output}");
    let refused = [
        "unshare user",
        "unshare mount",
        "setns",
        "clone user",
        "mount",
        "pivot_root",
        "open_tree",
        "fsopen",
        "bpf",
        "perf_event_open",
        "userfaultfd",
        "keyctl",
        "add_key",
        "io_uring_setup",
        "ptrace",
        "process_vm_readv",
        "pidfd_getfd",
        "open_by_handle_at",
        "mknod",
        "init_module",
        "kexec_load",
        "reboot",
        "settimeofday",
        "TIOCSTI",
        "TIOCSTI high",
        "TIOCLINUX",
        "subvolume",
        "socket raw",
        "chroot",
        "kmsg",
        "personality",
        "sethostname",
    ];
    for call in refused {
        assert!(output.contains(&format!("{call}: EPERM\n")), "{call} was not refused: {output}");
    }
    for call in ["socket alg", "socket vsock", "socket packet", "socket netlink audit"] {
        assert!(output.contains(&format!("{call}: EAFNOSUPPORT\n")), "{call} was not refused: {output}");
    }
    for call in ["clone3", "unknown"] {
        assert!(output.contains(&format!("{call}: ENOSYS\n")), "{call} did not look absent: {output}");
    }
    for call in ["socket inet", "socket unix", "socket netlink route", "fork", "mkfifo", "memfd"] {
        assert!(output.contains(&format!("{call}: ok\n")), "{call} should work: {output}");
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn other_calling_conventions_are_deadly() {
    let node = Node::new();
    for convention in ["i386", "x32"] {
        let (reason, output) = attacked(&node, convention, convention, Profile::App);
        // SIGSEGV: a kernel without 32-bit emulation has no int 0x80 to refuse.
        let deadly = |signal| matches!(signal, libc::SIGSYS | libc::SIGSEGV);
        assert!(
            matches!(reason, ExitReason::Signaled { signal, .. } if deadly(signal)),
            "{convention}: {reason:?} {output}"
        );
    }
}

#[test]
fn nothing_of_the_host_is_visible() {
    let node = Node::new();
    let script = "\
echo procs $(ls -d /proc/[0-9]* | wc -l)
echo interfaces $(ls /proc/self/net/dev_snmp6 2>/dev/null)
echo init $(cat /proc/1/cmdline 2>&1 | head -c 40 | tr '\\0' ' ')
echo exe $(readlink /proc/1/exe 2>&1)
echo cgroup $(cat /proc/self/cgroup | cut -d: -f3 | sort -u | tr '\\n' ' ')
echo uids $(cat /proc/self/uid_map)
echo roots $(ls /)
cut -d' ' -f5,6 /proc/self/mountinfo | sed 's/^/mount /'
cat /proc/kcore /proc/keys /proc/timer_list | wc -c
echo x > /proc/sys/kernel/core_pattern; echo b > /proc/sysrq-trigger
ls /dev | tr '\\n' ' '; ls -la /proc/self/fd | wc -l
cat /proc/self/status | grep -E 'NoNewPrivs|Seccomp:|CapEff|CapBnd'";
    let (record, output) = node.outcome(&node.shell("view", script));
    println!("{output}");
    assert_eq!(record.reason, ExitReason::Exited { code: 0 }, "{output}");
    let field = |name: &str| {
        let line = output.lines().find(|line| line.starts_with(name));
        line.unwrap_or_else(|| panic!("{name}: {output}"))[name.len()..].trim().to_owned()
    };
    assert!(field("procs").parse::<u32>().unwrap() <= 6, "{output}");
    assert_eq!(field("interfaces"), "lo");
    assert!(field("init").starts_with("epagent-jail"), "only its name: {output}");
    assert!(field("exe").contains("Permission denied") || field("exe").is_empty(), "{output}");
    assert_eq!(field("cgroup"), "/", "{output}");
    assert_eq!(field("roots"), "bin dev etc lib lib64 proc run sbin tmp usr");
    let mounts: Vec<&str> = output.lines().filter(|line| line.starts_with("mount ")).collect();
    assert!(mounts.iter().all(|line| line.contains("nosuid") || line.contains(" /dev/")), "{mounts:#?}");
    assert!(!output.contains("/sys/fs") && !output.contains("/work"), "{output}");
    assert!(output.lines().any(|line| line == "0"), "masked files are empty: {output}");
    assert!(output.contains("core_pattern: Read-only file system"), "{output}");
    assert!(
        output.contains("fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero"),
        "{output}"
    );
    assert!(output.contains("NoNewPrivs:\t1") && output.contains("Seccomp:\t2"), "{output}");
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, NET_BIND_SERVICE
    assert!(
        output.contains("CapEff:\t00000000000004fb") && output.contains("CapBnd:\t00000000000004fb"),
        "{output}"
    );
}

#[test]
fn ids_of_an_instance_are_nobody_on_the_host() {
    use std::os::unix::fs::MetadataExt;
    let node = Node::new();
    let volume = node.dir.join("volume");
    std::fs::create_dir(&volume).unwrap();
    let source = File::open(&volume).unwrap();
    let mut spec = node.shell("ids", "touch /data/plain; touch /raw/x 2>/dev/null || echo raw refused; chown 1000 /data/plain; chmod 4755 /data/plain; stat -c %u /data/plain");
    for (target, idmap) in [("/data", true), ("/raw", false)] {
        spec.mounts.push(MountSpec {
            target: path(target),
            source: MountSource::Descriptor { index: if idmap { 1 } else { 2 }, idmap, recursive: false },
            read_only: false,
            no_exec: false,
        });
    }
    let fds = LaunchFds { mounts: vec![source.as_fd(), source.as_fd()], ..LaunchFds::default() };
    let mut jail = node.start_with(&spec, fds);
    let init = jail.await_started();
    let status = std::fs::read_to_string(format!("/proc/{init}/status")).unwrap_or_default();
    jail.await_exit();
    let output = jail.output();
    assert!(output.contains("raw refused") && output.contains("1000"), "{output}");
    assert_eq!(volume.join("plain").metadata().unwrap().uid(), 1000, "stored as the image's ids");
    if let Some(uid) = status.lines().find(|line| line.starts_with("Uid:")) {
        assert!(uid.contains(&spec.ids.first().to_string()), "{uid}");
    }
}

#[test]
fn read_only_mounts_stay_so_for_root_inside() {
    let node = Node::new();
    let script = "touch /usr/x || echo refused; mount -o remount,rw /usr 2>&1 || echo no remount; mount -o remount,bind,rw /usr || echo no remount";
    let (_, output) = node.outcome(&node.shell("ro", script));
    assert!(output.contains("refused") && output.matches("no remount").count() == 2, "{output}");
}

/// The calls themselves, with plain libc.
mod attacks {
    fn answer(name: &str, result: libc::c_long) {
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        let text = match (result, errno) {
            (0.., _) => "ok".to_owned(),
            (_, libc::EPERM) => "EPERM".to_owned(),
            (_, libc::ENOSYS) => "ENOSYS".to_owned(),
            (_, libc::EAFNOSUPPORT) => "EAFNOSUPPORT".to_owned(),
            (_, other) => format!("errno {other}"),
        };
        println!("{name}: {text}");
    }

    pub fn calls() {
        let null = std::ptr::null::<u8>();
        println!();
        // SAFETY: each call is expected to be refused; the arguments are integers, null, or static C strings, and
        // none of those that succeed touches this process's memory.
        unsafe {
            let call3 = |name: &str, number: libc::c_long, a: usize, b: usize, c: usize| {
                answer(name, libc::syscall(number, a, b, c, 0usize, 0usize, 0usize));
            };
            call3("unshare user", libc::SYS_unshare, libc::CLONE_NEWUSER as usize, 0, 0);
            call3("unshare mount", libc::SYS_unshare, libc::CLONE_NEWNS as usize, 0, 0);
            call3("setns", libc::SYS_setns, 0, 0, 0);
            call3("clone user", libc::SYS_clone, (libc::CLONE_NEWUSER | libc::SIGCHLD) as usize, 0, 0);
            call3("clone3", libc::SYS_clone3, null as usize, 88, 0);
            call3("unknown", 600, 0, 0, 0);
            call3("mount", libc::SYS_mount, null as usize, null as usize, null as usize);
            call3("pivot_root", libc::SYS_pivot_root, null as usize, null as usize, 0);
            call3("open_tree", libc::SYS_open_tree, 0, null as usize, 1);
            call3("fsopen", libc::SYS_fsopen, null as usize, 0, 0);
            call3("bpf", libc::SYS_bpf, 0, 0, 0);
            call3("perf_event_open", libc::SYS_perf_event_open, 0, 0, 0);
            call3("userfaultfd", libc::SYS_userfaultfd, 0, 0, 0);
            call3("keyctl", libc::SYS_keyctl, 0, 0, 0);
            call3("add_key", libc::SYS_add_key, 0, 0, 0);
            call3("io_uring_setup", libc::SYS_io_uring_setup, 8, 0, 0);
            call3("ptrace", libc::SYS_ptrace, libc::PTRACE_TRACEME as usize, 0, 0);
            call3("process_vm_readv", libc::SYS_process_vm_readv, 1, 0, 0);
            call3("pidfd_getfd", libc::SYS_pidfd_getfd, 0, 0, 0);
            call3("open_by_handle_at", libc::SYS_open_by_handle_at, 0, 0, 0);
            call3(
                "mknod",
                libc::SYS_mknodat,
                libc::AT_FDCWD as usize,
                c"/tmp/sda".as_ptr() as usize,
                0o60600,
            );
            call3("init_module", libc::SYS_init_module, 0, 0, 0);
            call3("kexec_load", libc::SYS_kexec_load, 0, 0, 0);
            call3("reboot", libc::SYS_reboot, 0, 0, 0);
            call3("settimeofday", libc::SYS_settimeofday, 0, 0, 0);
            call3("chroot", libc::SYS_chroot, c"/tmp".as_ptr() as usize, 0, 0);
            call3("kmsg", libc::SYS_syslog, 3, 0, 0);
            call3("personality", libc::SYS_personality, 0x0040000, 0, 0);
            call3("sethostname", libc::SYS_sethostname, c"x".as_ptr() as usize, 1, 0);
            for (name, family, kind, protocol) in [
                ("socket alg", libc::AF_ALG, libc::SOCK_SEQPACKET, 0),
                ("socket vsock", libc::AF_VSOCK, libc::SOCK_STREAM, 0),
                ("socket packet", libc::AF_PACKET, libc::SOCK_RAW, 0),
                ("socket netlink audit", libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_AUDIT),
                ("socket raw", libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP),
                ("socket inet", libc::AF_INET, libc::SOCK_STREAM, 0),
                ("socket unix", libc::AF_UNIX, libc::SOCK_STREAM, 0),
                ("socket netlink route", libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE),
            ] {
                call3(name, libc::SYS_socket, family as usize, kind as usize, protocol as usize);
            }
            call3("TIOCSTI", libc::SYS_ioctl, 0, libc::TIOCSTI as usize, c"x".as_ptr() as usize);
            call3(
                "TIOCSTI high",
                libc::SYS_ioctl,
                0,
                libc::TIOCSTI as usize | 1 << 32,
                c"x".as_ptr() as usize,
            );
            call3("TIOCLINUX", libc::SYS_ioctl, 0, libc::TIOCLINUX as usize, c"x".as_ptr() as usize);
            // BTRFS_IOC_SUBVOL_CREATE
            call3("subvolume", libc::SYS_ioctl, 0, 0x5000_940e, c"x".as_ptr() as usize);
            call3(
                "mkfifo",
                libc::SYS_mknodat,
                libc::AT_FDCWD as usize,
                c"/tmp/fifo".as_ptr() as usize,
                0o10600,
            );
            call3("memfd", libc::SYS_memfd_create, c"m".as_ptr() as usize, 0, 0);
            match libc::fork() {
                0 => libc::_exit(0),
                pid => answer("fork", pid.into()),
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    pub fn i386() {
        // SAFETY: getpid in the 32-bit numbering touches no memory.
        unsafe { std::arch::asm!("push rbx", "int 0x80", "pop rbx", inout("eax") 20 => _) };
        println!("survived");
    }

    #[cfg(target_arch = "x86_64")]
    pub fn x32() {
        // SAFETY: getpid with the x32 bit touches no memory.
        unsafe { libc::syscall(libc::SYS_getpid | 0x4000_0000) };
        println!("survived");
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub fn i386() {}

    #[cfg(not(target_arch = "x86_64"))]
    pub fn x32() {}
}
