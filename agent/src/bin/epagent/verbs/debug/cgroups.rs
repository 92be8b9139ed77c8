//! The cgroups of a node: which there are, what they use, what they may use.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

/// Where cgroups are mounted: alone, beside the older hierarchies, or as one of those.
const MOUNTS: [&str; 6] = [
    "/sys/fs/cgroup",
    "/sys/fs/cgroup/unified",
    "/sys/fs/cgroup/memory",
    "/sys/fs/cgroup/cpu,cpuacct",
    "/sys/fs/cgroup/pids",
    "/sys/fs/cgroup/blkio",
];
/// What is told of each, of either version.
const FILES: [&str; 20] = [
    "cgroup.controllers",
    "cgroup.events",
    "cgroup.stat",
    "cpu.max",
    "cpu.weight",
    "io.max",
    "io.stat",
    "io.pressure",
    "blkio.throttle.read_bps_device",
    "blkio.throttle.write_bps_device",
    "memory.current",
    "memory.events",
    "memory.max",
    "memory.peak",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "pids.current",
    "pids.max",
    "memory.pressure",
    "cpu.pressure",
];
/// Cgroups that are shown; an instance has two.
const CGROUPS_MAX: usize = 4_096;

/// Everything below `root`, which is relative to the mount.
pub fn tree(root: &str) -> String {
    let mut text = String::new();
    for mount in MOUNTS {
        let top = Path::new(mount).join(root);
        let mut open = vec![top.clone()];
        let mut left = CGROUPS_MAX;
        while let Some(folder) = open.pop().filter(|folder| folder.is_dir() && left > 0) {
            left -= 1;
            show(&folder, &mut text);
            let mut below: Vec<PathBuf> = subfolders(&folder).collect();
            below.sort();
            open.extend(below.into_iter().rev());
        }
        if left == 0 {
            text.push_str("(there are more)\n");
        }
    }
    text
}

fn show(folder: &Path, text: &mut String) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "== {}", folder.display());
    for file in FILES {
        if let Ok(found) = fs::read_to_string(folder.join(file)) {
            let found: Vec<&str> = found.lines().collect();
            let _ = writeln!(text, "{file}: {}", found.join(", "));
        }
    }
}

fn subfolders(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path())
}
