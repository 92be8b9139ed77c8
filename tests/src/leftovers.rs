//! What of a node exists in the kernel: what an agent must have removed at its end.
//!
//! Everything carries the node's number, so that the agents of several tests are told apart: ids of processes,
//! cgroups, veths, the nft table, the abstract socket; mounts and loop devices are known by the state folder.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::process;

/// First numeric uid of the unprivileged parts of node 0; each node has four.
const PART_UID_BASE: u32 = 60_600;
/// First id of the ranges of node 0's apps; each node has 256 ranges.
const APP_ID_BASE: u32 = 0x8000_0000;
const APP_IDS_PER_NODE: u32 = 256 << 16;

/// One node and its state folder.
#[derive(Debug, Clone)]
pub struct Node {
    pub number: u32,
    pub state: PathBuf,
}

impl Node {
    /// Reads which node an agent on `state` is (or was).
    pub fn of(state: &Path) -> Option<Self> {
        let number = fs::read_to_string(state.join("node")).ok()?.trim().parse().ok()?;
        Some(Self { number, state: state.to_owned() })
    }

    /// All that is left, one line each.
    pub fn leftovers(&self) -> Vec<String> {
        let mut found = Vec::new();
        found.extend(self.processes().iter().map(|p| {
            format!(
                "process {} (uid {}, {}, state {}) {}",
                p.pid,
                p.uid,
                p.executable(),
                p.state,
                p.arguments
            )
        }));
        found.extend(self.mounts().iter().map(|mount| format!("mount {mount}")));
        found.extend(self.cgroups().iter().map(|path| format!("cgroup {}", path.display())));
        found.extend(self.loops().iter().map(|name| format!("loop device {name}")));
        found.extend(self.veths().iter().map(|name| format!("interface {name}")));
        if self.has_nft_table() {
            found.push(format!("nft table inet {}", self.nft_table()));
        }
        if self.has_abstract_socket() {
            found.push(format!("abstract socket @epagent-node-{}", self.number));
        }
        for name in ["ready", "admin.sock", "read.sock"] {
            if self.state.join(name).exists() {
                found.push(format!("file {name} in the state folder"));
            }
        }
        found
    }

    /// Processes of the node: its parts' uids, its apps' ids, its cgroups, or its state folder in the arguments.
    pub fn processes(&self) -> Vec<process::Process> {
        let first_part = PART_UID_BASE + 4 * self.number;
        let first_app = APP_ID_BASE + self.number * APP_IDS_PER_NODE;
        let state = self.state.to_string_lossy().into_owned();
        let own = std::process::id() as i32;
        process::all()
            .into_iter()
            .filter(|p| p.pid != own && p.state != 'Z')
            .filter(|p| {
                (first_part..first_part + 4).contains(&p.uid)
                    || (first_app..first_app + APP_IDS_PER_NODE).contains(&p.uid)
                    || (p.executable().starts_with("epagent") && p.arguments.contains(&state))
                    || self.is_in_cgroup(p.pid)
            })
            .collect()
    }

    fn is_in_cgroup(&self, pid: i32) -> bool {
        let name = format!("/epagent-{}", self.number);
        fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|text| {
            text.lines().any(|line| line.ends_with(&name) || line.contains(&format!("{name}/")))
        })
    }

    fn mounts(&self) -> Vec<String> {
        let state = self.state.to_string_lossy().into_owned();
        fs::read_to_string("/proc/self/mountinfo")
            .unwrap_or_default()
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .filter(|point| point.starts_with(&state))
            .map(str::to_owned)
            .collect()
    }

    /// The node's cgroups, innermost first, in every hierarchy.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        let name = format!("epagent-{}", self.number);
        let root = Path::new("/sys/fs/cgroup");
        let mut tops = vec![root.join(&name)];
        tops.extend(fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path().join(&name)));
        let mut found = Vec::new();
        for top in tops.into_iter().filter(|top| top.is_dir()) {
            below(&top, &mut found);
        }
        found
    }

    fn loops(&self) -> Vec<String> {
        let state = self.state.to_string_lossy().into_owned();
        fs::read_dir("/sys/block")
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| {
                fs::read_to_string(entry.path().join("loop/backing_file"))
                    .is_ok_and(|file| file.starts_with(&state))
            })
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect()
    }

    fn veths(&self) -> Vec<String> {
        let prefix = format!("ep{}-", self.number);
        fs::read_dir("/sys/class/net")
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name.starts_with(&prefix))
            .collect()
    }

    pub fn nft_table(&self) -> String {
        format!("epagent_{}", self.number)
    }

    fn has_nft_table(&self) -> bool {
        let listed = Command::new("nft").args(["list", "tables"]).stderr(Stdio::null()).output();
        let line = format!("table inet {}", self.nft_table());
        listed.is_ok_and(|out| String::from_utf8_lossy(&out.stdout).lines().any(|text| text.trim() == line))
    }

    fn has_abstract_socket(&self) -> bool {
        let name = format!("@epagent-node-{}", self.number);
        fs::read_to_string("/proc/net/unix").unwrap_or_default().lines().any(|line| line.ends_with(&name))
    }

    /// Removes what a failed test left, by force, so that the next one starts on a clean machine.
    pub fn remove(&self) {
        for process in self.processes() {
            process::signal_if_alive(process.pid);
        }
        for cgroup in self.cgroups() {
            let _ = fs::OpenOptions::new()
                .write(true)
                .open(cgroup.join("cgroup.kill"))
                .and_then(|mut file| file.write_all(b"1"));
        }
        crate::until(Duration::from_secs(5), || self.processes().is_empty().then_some(()));
        for mount in self.mounts().iter().rev() {
            run_quietly("umount", &["-l", mount]);
        }
        for device in self.loops() {
            run_quietly("losetup", &["-d", &format!("/dev/{device}")]);
        }
        for veth in self.veths() {
            run_quietly("ip", &["link", "del", &veth]);
        }
        if self.has_nft_table() {
            run_quietly("nft", &["delete", "table", "inet", &self.nft_table()]);
        }
        for cgroup in self.cgroups() {
            crate::until(Duration::from_secs(1), || fs::remove_dir(&cgroup).ok());
        }
    }
}

fn below(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            below(&entry.path(), found);
        }
    }
    found.push(folder.to_owned());
}

fn run_quietly(program: &str, arguments: &[&str]) {
    let _ = Command::new(program).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status();
}
