//! What an agent must not leave behind: looked for at the end, so that a teardown that failed is not silent.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use super::layout::Layout;
use super::node::{Node, cgroup_exists};
use super::{checks, view};

/// Everything of the node that still exists in the kernel, in words.
pub fn find(layout: &Layout, node: Node) -> Vec<String> {
    let mut found = Vec::new();
    if cgroup_exists(Path::new("/sys/fs/cgroup"), node) {
        found.push(format!("the cgroup {}", node.cgroup()));
    }
    found.extend(mounts_below(layout.root()).into_iter().map(|path| format!("the mount {path}")));
    found.extend(loop_device_of(&layout.pool_file()).map(|name| format!("the loop device {name}")));
    found.extend(network_devices(&node.veth_prefix()).into_iter().map(|name| format!("the device {name}")));
    if nft_table_exists(&node.nft_table()) {
        found.push(format!("the nft table inet {}", node.nft_table()));
    }
    found
}

fn mounts_below(root: &Path) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let paths = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(view::unescape);
    paths
        .filter(|path| path != root && path.starts_with(root))
        .map(|path| path.display().to_string())
        .collect()
}

fn loop_device_of(file: &Path) -> Option<String> {
    let devices = fs::read_dir("/sys/block").ok()?;
    devices.flatten().find_map(|device| {
        let backing = fs::read_to_string(device.path().join("loop/backing_file")).ok()?;
        // A removed file is written with ` (deleted)` behind it.
        let backing = backing.trim_end();
        let backing = backing.strip_suffix(" (deleted)").unwrap_or(backing);
        (Path::new(backing) == file).then(|| device.file_name().to_string_lossy().into_owned())
    })
}

fn network_devices(prefix: &str) -> Vec<String> {
    let Ok(devices) = fs::read_dir("/sys/class/net") else {
        return Vec::new();
    };
    let names = devices.flatten().map(|device| device.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with(prefix)).collect()
}

fn nft_table_exists(table: &str) -> bool {
    let listed = Command::new("nft")
        .args(["list", "table", "inet", table])
        .env("PATH", checks::PATH)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    listed.is_ok_and(|status| status.success())
}
