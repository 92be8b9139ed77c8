//! From a spec to the steps that build the instance's world. Pure.
//!
//! [`plan`] decides everything that init will do between its birth and the start of the app: which mounts, in which
//! order, which are masked, what is made read-only last. [`crate::apply`] only performs. The order matters:
//!
//! ```text
//! root → /dev /proc /tmp /run → masks → the spec's mounts (parents first) → files and /etc → read-only flips
//!      → network → hostname → pivot
//! ```
//!
//! /proc comes before the pivot because the kernel lets a user namespace mount it only while the host's unmasked
//! /proc is still visible. Flips come last because mount points are made below what becomes read-only.

mod check;
mod step;

use crate::id::JailPath;
use crate::spec::{ETC_DIR, FILES_DIR, FileSpec, JailSpec, MountSource, MountSpec, NetSpec, RootSpec};

pub(crate) use check::{check_command, check_user};
pub(crate) use step::{Kernel, Step};

/// /proc files that tell about the host or act on it: covered by the null device (crun's and runc's lists).
const MASKED_FILES: [&str; 7] =
    ["kcore", "keys", "latency_stats", "timer_list", "sched_debug", "sysrq-trigger", "kmsg"];
/// /proc directories, likewise: covered by an empty tmpfs.
const MASKED_DIRS: [&str; 3] = ["acpi", "scsi", "asound"];
/// /proc directories that may be read only: sysctls, interrupt affinity, bus configuration, file system knobs.
const READ_ONLY_DIRS: [&str; 4] = ["bus", "fs", "irq", "sys"];
/// Device nodes bound from the host, verified by device number before use.
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
/// /dev holds a handful of nodes and links.
const DEV_BYTES: u64 = 64 << 10;
/// /run/epagent: the files' own bound, and as much again for block rounding.
const FILES_TMPFS_BYTES: u64 = 2 * crate::spec::FILES_BYTES_MAX as u64;

/// All steps for this spec, in order.
pub(crate) fn plan(spec: &JailSpec) -> Vec<Step> {
    let mut steps = vec![Step::CgroupNamespace, Step::PrivateMounts];
    plan_root(spec, &mut steps);
    plan_dev(spec, &mut steps);
    plan_proc(&mut steps);
    plan_scratch(spec, &mut steps);
    plan_mounts(spec, &mut steps);
    plan_files(spec, &mut steps);
    plan_flips(spec, &mut steps);
    steps.push(Step::Loopback);
    steps.extend(spec.network.clone().map(Step::Link));
    steps.push(Step::Hostname { name: spec.hostname.clone() });
    steps.push(Step::Pivot);
    steps
}

fn plan_root(spec: &JailSpec, steps: &mut Vec<Step>) {
    match &spec.root {
        RootSpec::Directory { .. } => steps.push(Step::RootDirectory),
        RootSpec::Tmpfs { size_bytes, symlinks } => {
            steps.push(Step::RootTmpfs { size_bytes: *size_bytes });
            let links = symlinks.iter();
            steps.extend(
                links.map(|link| Step::Symlink { path: link.path.clone(), target: link.target.clone() }),
            );
        }
    }
}

fn plan_dev(spec: &JailSpec, steps: &mut Vec<Step>) {
    let scratch = spec.limits.tmpfs_bytes;
    steps.push(tmpfs("/dev", DEV_BYTES, 0o755, true));
    steps.extend(DEVICES.map(|name| Step::Device { name }));
    steps.push(Step::Mount { kind: Kernel::Devpts, target: path("/dev/pts") });
    steps.push(Step::Mount { kind: Kernel::Mqueue, target: path("/dev/mqueue") });
    steps.push(tmpfs("/dev/shm", scratch, 0o1777, true));
    for (link, target) in [
        ("/dev/ptmx", "pts/ptmx"),
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        steps.push(Step::Symlink { path: path(link), target: target.to_owned() });
    }
}

fn plan_proc(steps: &mut Vec<Step>) {
    steps.push(Step::Mount { kind: Kernel::Proc, target: path("/proc") });
    // Sysctls of the new network namespace, while they can still be written.
    steps.push(Step::NetworkSysctls);
    steps.extend(MASKED_FILES.map(|name| Step::MaskProcFile { name }));
    steps.extend(MASKED_DIRS.map(|name| Step::MaskProcDir { name }));
    steps.extend(READ_ONLY_DIRS.map(|name| Step::ReadOnlyProcDir { name }));
}

/// /tmp and /run, unless the spec mounts something of its own there.
fn plan_scratch(spec: &JailSpec, steps: &mut Vec<Step>) {
    for (dir, mode) in [("/tmp", 0o1777), ("/run", 0o755)] {
        if !spec.mounts.iter().any(|mount| mount.target.as_str() == dir) {
            steps.push(tmpfs(dir, spec.limits.tmpfs_bytes, mode, false));
        }
    }
}

/// Parents before children, so that no mount hides another; those below /run/epagent wait for its tmpfs.
fn plan_mounts(spec: &JailSpec, steps: &mut Vec<Step>) {
    let mut mounts: Vec<&MountSpec> = spec.mounts.iter().collect();
    mounts.sort_by_key(|mount| (mount.target.is_in(FILES_DIR), mount.target.as_str().matches('/').count()));
    let first_inner = mounts.partition_point(|mount| !mount.target.is_in(FILES_DIR));
    let (outer, inner) = mounts.split_at(first_inner);
    steps.extend(outer.iter().map(|mount| mount_step(mount)));
    steps.push(tmpfs(FILES_DIR, FILES_TMPFS_BYTES, 0o755, true));
    steps.extend(inner.iter().map(|mount| mount_step(mount)));
}

fn mount_step(mount: &MountSpec) -> Step {
    match mount.source {
        MountSource::Descriptor { index, .. } => Step::Attach { index, target: mount.target.clone() },
        MountSource::Tmpfs { size_bytes, mode } => {
            Step::Tmpfs { target: mount.target.clone(), size_bytes, mode, no_exec: mount.no_exec }
        }
    }
}

/// The spec's files, and the three files of /etc that belong to the instance, bound from there.
fn plan_files(spec: &JailSpec, steps: &mut Vec<Step>) {
    steps.extend(spec.files.iter().cloned().map(|file| Step::File { file, user: spec.user }));
    let etc = [
        ("resolv.conf", spec.resolv_conf.clone().unwrap_or_else(|| resolv_conf(spec.network.as_ref()))),
        ("hosts", spec.hosts.clone().unwrap_or_else(|| hosts(&spec.hostname, spec.network.as_ref()))),
        ("hostname", format!("{}\n", spec.hostname)),
    ];
    for (name, content) in etc {
        let source = path(&format!("{ETC_DIR}/{name}"));
        let file = FileSpec { path: source.clone(), content, mode: 0o644 };
        steps.push(Step::File { file, user: crate::spec::User::default() });
        steps.push(Step::BindFile { source, target: path(&format!("/etc/{name}")) });
    }
}

fn plan_flips(spec: &JailSpec, steps: &mut Vec<Step>) {
    steps.push(Step::ReadOnly { target: path(FILES_DIR) });
    steps.push(Step::ReadOnly { target: path("/dev") });
    for mount in &spec.mounts {
        if mount.read_only && matches!(mount.source, MountSource::Tmpfs { .. }) {
            steps.push(Step::ReadOnly { target: mount.target.clone() });
        }
    }
    if matches!(spec.root, RootSpec::Tmpfs { .. }) {
        steps.push(Step::ReadOnly { target: path("/") });
    }
}

/// The gateway answers port 53; IPv4 first, since a node may have no IPv6 resolver to redirect to.
fn resolv_conf(network: Option<&NetSpec>) -> String {
    let gateway = network.and_then(|net| {
        net.v4.map(|v4| v4.host.to_string()).or_else(|| net.v6.map(|v6| v6.host.to_string()))
    });
    gateway.map_or_else(String::new, |gateway| format!("nameserver {gateway}\n"))
}

fn hosts(name: &str, network: Option<&NetSpec>) -> String {
    let mut text = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n".to_owned();
    match network.and_then(|net| net.v4) {
        Some(v4) => text.push_str(&format!("{} {name}\n", v4.inside)),
        None => text.push_str(&format!("127.0.1.1 {name}\n")),
    }
    text
}

fn tmpfs(target: &str, size_bytes: u64, mode: u32, no_exec: bool) -> Step {
    Step::Tmpfs { target: path(target), size_bytes, mode, no_exec }
}

/// A path written in this file.
fn path(text: &str) -> JailPath {
    JailPath::new(text).expect("paths in the plan are literals of the accepted form")
}

#[cfg(test)]
mod tests;
