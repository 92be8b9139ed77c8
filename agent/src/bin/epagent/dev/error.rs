//! Why `epagent dev` does not start, or did not end cleanly.

use std::io;
use std::path::PathBuf;

use nix::errno::Errno;

use super::node::Node;
use crate::failure::{Failure, status};

#[derive(Debug, thiserror::Error)]
pub enum DevError {
    #[error("`epagent dev` makes namespaces, cgroups and mounts, which only root may; this is user {uid}")]
    NotRoot { uid: u32 },
    #[error("the kernel is {release}; epagent needs 6.1 or newer")]
    OldKernel { release: String },
    #[error("this kernel has no btrfs")]
    NoBtrfs,
    #[error("the program {program} is not installed")]
    NoProgram { program: &'static str, package: &'static str },
    #[error("{name} is missing beside {}", own.display())]
    NoBinary { name: &'static str, own: PathBuf },
    #[error("the size {text:?} is not a number of bytes")]
    BadSize { text: String },
    #[error("the pool takes {wanted_bytes} bytes and the disk below {} has {free_bytes} left", path.display())]
    NoSpace { path: PathBuf, wanted_bytes: u64, free_bytes: u64 },
    #[error("the state folder's path {} is longer than {bytes_max} bytes, too long for the sockets below it", path.display())]
    PathTooLong { path: PathBuf, bytes_max: usize },
    #[error("{} can't be the state folder: {reason}", path.display())]
    NotOurs { path: PathBuf, reason: &'static str },
    #[error("another `epagent dev` runs on {}{}", path.display(), pid_note(*pid))]
    Locked { path: PathBuf, pid: Option<i32> },
    #[error("{} can't be prepared", path.display())]
    Folder { path: PathBuf, source: io::Error },
    #[error("the socket {} can't be made", path.display())]
    Socket { path: PathBuf, source: io::Error },
    #[error("{address} can't be listened on")]
    Listen { address: std::net::SocketAddr, source: io::Error },
    #[error("all {} node numbers are taken", super::node::NODE_MAX)]
    NoNode,
    #[error("the node number {} can't be held", node.number())]
    NodeSocket { node: Node, source: io::Error },
    #[error("the configuration can't be written as TOML")]
    Toml { source: toml::ser::Error },
    #[error("{name} can't be started: {step}")]
    Spawn { name: &'static str, step: String, source: io::Error },
    #[error("signals and processes can't be waited for")]
    Wait { source: Errno },
    #[error("something was left behind: {}", what.join(", "))]
    LeftBehind { what: Vec<String> },
}

fn pid_note(pid: Option<i32>) -> String {
    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

impl DevError {
    fn code(&self) -> &'static str {
        match self {
            DevError::NotRoot { .. } => "not_root",
            DevError::OldKernel { .. } => "old_kernel",
            DevError::NoBtrfs => "no_btrfs",
            DevError::NoProgram { .. } => "no_program",
            DevError::NoBinary { .. } => "no_binary",
            DevError::BadSize { .. } => "bad_size",
            DevError::NoSpace { .. } => "no_space",
            DevError::PathTooLong { .. } | DevError::NotOurs { .. } => "bad_state_folder",
            DevError::Locked { .. } => "already_running",
            DevError::Listen { .. } => "listen_failed",
            DevError::NoNode => "no_node",
            DevError::LeftBehind { .. } => "left_behind",
            DevError::Folder { .. }
            | DevError::Socket { .. }
            | DevError::NodeSocket { .. }
            | DevError::Toml { .. }
            | DevError::Spawn { .. }
            | DevError::Wait { .. } => "system_error",
        }
    }

    fn hint(&self) -> String {
        match self {
            DevError::NotRoot { .. } => "run it as root, for example with sudo".to_owned(),
            DevError::OldKernel { .. } => "boot a newer kernel; Debian 12 has 6.1".to_owned(),
            DevError::NoBtrfs => "load the module (`modprobe btrfs`) or boot a kernel that has it".to_owned(),
            DevError::NoProgram { package, .. } => format!("apt-get install {package}"),
            DevError::NoBinary { .. } => "build all of them with `make build`".to_owned(),
            DevError::BadSize { .. } => "write it like 6G or 512M".to_owned(),
            DevError::NoSpace { .. } => "free some space, or give the pool less with --size 2G".to_owned(),
            DevError::PathTooLong { .. } => "choose a folder with a shorter path".to_owned(),
            DevError::NotOurs { .. } => "name a new or an empty folder of root's".to_owned(),
            DevError::Locked { .. } => "end that one, or name another folder with --state".to_owned(),
            DevError::Listen { source, .. } if source.kind() == io::ErrorKind::AddrInUse => {
                "something listens there already; choose another address with --http".to_owned()
            }
            DevError::Listen { .. } => "choose an address of this host with --http".to_owned(),
            DevError::NoNode => {
                "end some agents; `ls -d /sys/fs/cgroup/*/epagent-*` shows who is there".to_owned()
            }
            DevError::Spawn { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                "its file must be readable and executable by everyone (mode 755)".to_owned()
            }
            DevError::LeftBehind { .. } => {
                "start `epagent dev` on the same folder and end it again, which tries once more".to_owned()
            }
            _ => String::new(),
        }
    }
}

impl From<DevError> for Failure {
    fn from(error: DevError) -> Failure {
        Failure::new(status::FAILED, error.code(), chain(&error), error.hint())
    }
}

/// The error and what lies below it, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(&format!(": {inner}"));
        cause = inner.source();
    }
    text
}
