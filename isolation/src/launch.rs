//! Starting a monitor: the one entry point for runners.
//!
//! [`launch`] makes the cgroups and the control socket, then clones `epagent-jail` into its cgroup and returns; it does
//! not wait for the app. What goes wrong after that is told by the monitor as an `exited` event or record with
//! [`crate::monitor::record::ExitReason::StartFailed`], so that there is one place to look for every kind of end.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use crate::cgroup::CgroupRoot;
use crate::error::Error;
use crate::spec::JailSpec;

/// The jail executable, copied into a sealed memfd: what runs is what was loaded, also after an upgrade on disk,
/// and none of its pages is on a disk that could stall.
#[derive(Debug)]
pub struct JailExecutable {
    #[allow(dead_code)]
    image: OwnedFd,
}

impl JailExecutable {
    /// Loads it once, at the start of the runner.
    pub fn load(_path: &Path) -> Result<JailExecutable, Error> {
        unimplemented!()
    }
}

/// What is the same for all instances of a node, and where this one's socket shall be.
#[derive(Debug)]
pub struct LaunchConfig<'a> {
    pub executable: &'a JailExecutable,
    pub cgroups: &'a CgroupRoot,
    /// The control socket to make (mode 0600). At most 107 bytes; a leftover of the same name is replaced.
    pub control_socket: PathBuf,
}

/// Descriptors handed to the monitor; duplicated, the caller keeps its own.
#[derive(Debug, Default)]
pub struct LaunchFds<'a> {
    /// For [`crate::spec::RootSpec::Directory`].
    pub root: Option<BorrowedFd<'a>>,
    /// For [`crate::spec::MountSource::Descriptor`], by index.
    pub mounts: Vec<BorrowedFd<'a>>,
    /// For [`crate::spec::Program::Fd`].
    pub program: Option<BorrowedFd<'a>>,
    /// From [`seal_secrets`].
    pub secrets: Option<BorrowedFd<'a>>,
    /// The folder for `current.log`, `previous.log`, `exit.json`. `None`: output is thrown away.
    pub logs: Option<BorrowedFd<'a>>,
    /// The app's stdin (uploads). `None`: /dev/null.
    pub stdin: Option<BorrowedFd<'a>>,
    /// The socket over which the lease process will feed deadlines.
    pub lease: Option<BorrowedFd<'a>>,
}

/// A monitor that was started.
#[derive(Debug)]
pub struct Launched {
    /// Readable when the monitor has ended. The caller is its parent and reaps it (`waitid` on this descriptor).
    pub monitor: OwnedFd,
    pub monitor_pid: i32,
}

/// Starts the monitor of one instance.
pub fn launch(_config: &LaunchConfig<'_>, _spec: &JailSpec, _fds: &LaunchFds<'_>) -> Result<Launched, Error> {
    unimplemented!()
}

/// Secrets (name → value) as a sealed memfd for [`LaunchFds::secrets`].
pub fn seal_secrets(_secrets: &std::collections::BTreeMap<String, String>) -> Result<OwnedFd, Error> {
    unimplemented!()
}
