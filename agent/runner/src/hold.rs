//! The holder of the instances' cgroup, all that `epagent-instances.service` runs.
//!
//! ```text
//!   epagent-instances.service/          systemd's, delegated to us
//!     holder/                           this process, and nothing else
//!     apps/                             `cgroup.root`: the runner's, one folder per instance
//! ```
//!
//! The service manager keeps a unit's cgroup while something runs in it, and puts what it starts at its top. A cgroup
//! that gives controllers to its children may have no process of its own, so the holder steps aside first (not every
//! version of systemd does it for us, by `DelegateSubgroup=`). It does nothing else: killed, it takes nothing along.

use std::fs;
use std::path::{Component, Path, PathBuf};

use nix::sys::signal::{SigSet, Signal};

use crate::config::Config;

const MOUNT: &str = "/sys/fs/cgroup";
const HOLDER: &str = "holder";

/// Steps aside, says so, and stays until it is told to end.
pub fn hold(config: &Config) -> Result<(), String> {
    let mut ending = SigSet::empty();
    ending.add(Signal::SIGTERM);
    ending.add(Signal::SIGINT);
    ending.thread_block().map_err(|error| format!("block signals: {error}"))?;
    let own = own_cgroup(&read("/proc/self/cgroup")?)?;
    let top = top(&own, Path::new(&config.cgroup.root))?;
    let holder = Path::new(MOUNT).join(&top).join(HOLDER);
    let failed = |what: &str| format!("{what} {}", holder.display());
    match fs::create_dir(&holder) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(format!("{}: {error}", failed("make the cgroup")));
        }
        _ => {}
    }
    let moved = fs::write(holder.join("cgroup.procs"), std::process::id().to_string());
    moved.map_err(|error| format!("{}: {error}", failed("move into the cgroup")))?;
    // Nobody may listen: then nobody waits for it either.
    let _ = sd_notify::notify(&[
        sd_notify::NotifyState::Ready,
        sd_notify::NotifyState::Status("holds the cgroup of the instances"),
    ]);
    ending.wait().map_err(|error| format!("wait for a signal: {error}"))?;
    Ok(())
}

fn read(path: &str) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("read {path}: {error}"))
}

/// The path below the mount of the cgroup this process is in, cgroups(7).
fn own_cgroup(text: &str) -> Result<PathBuf, String> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"));
    path.map(PathBuf::from).ok_or_else(|| "this system has no cgroup v2".to_owned())
}

/// The delegated cgroup: where this process was put (or stepped aside from before), and the one above `root`.
fn top(own: &Path, root: &Path) -> Result<PathBuf, String> {
    let top = match own.components().next_back() {
        Some(Component::Normal(last)) if last == HOLDER => own.parent().unwrap_or(own),
        _ => own,
    };
    if root.parent() == Some(top) && !top.as_os_str().is_empty() {
        return Ok(top.to_owned());
    }
    Err(format!(
        "cgroup.root is {}, which does not lie directly below this process's own cgroup {}; the holder is started by \
         epagent-instances.service alone",
        root.display(),
        top.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: &str = "epagent.slice/epagent-instances.service";

    #[test]
    fn the_root_lies_directly_below_the_unit() {
        let root = Path::new("epagent.slice/epagent-instances.service/apps");
        assert_eq!(top(Path::new(UNIT), root), Ok(PathBuf::from(UNIT)));
        assert_eq!(top(&Path::new(UNIT).join("holder"), root), Ok(PathBuf::from(UNIT)));
        for wrong in ["", "user.slice", "epagent.slice", "epagent.slice/epagent-instances.service/apps"] {
            assert!(top(Path::new(wrong), root).is_err(), "{wrong}");
        }
        assert!(top(Path::new(""), Path::new("epagent-1")).is_err(), "the top of all cgroups was taken");
    }

    #[test]
    fn the_v2_line_counts() {
        assert_eq!(own_cgroup("1:cpu:/x\n0::/a/b\n"), Ok(PathBuf::from("a/b")));
        assert!(own_cgroup("1:cpu:/x\n").is_err());
    }
}
