//! cgroups: identity, limits, killing, counting.
//!
//! Two layouts exist in the field and both are served behind one trait, [`Layout`]:
//!
//! ```text
//! pure v2   /sys/fs/cgroup/NAME/ID/monitor          the monitor and its log writer; no limits
//!           /sys/fs/cgroup/NAME/ID/app              the instance; all limits
//! hybrid    <v2 mount>/NAME/ID/{monitor,app}        identity, cgroup.kill, freeze; no controllers there
//!           <memory, cpu, cpuacct, pids>/NAME/ID    the limits and counters of the instance
//!           <blkio>/NAME/ID                         its disk traffic, where the hierarchy is mounted
//! ```
//!
//! Whatever needs certainty (is anybody left, kill them all) asks v2, in both layouts. What a limit means in files
//! and values is a pure function of each layout ([`Layout::limits`]), so it is tested without a kernel that has it.

mod disk;
mod hybrid;
mod mounts;
mod v2;

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fs, thread};

pub use disk::{Disk, DiskLimits};

use crate::error::Error;
use crate::id::JailId;
use crate::spec::Limits;

/// Longest wait for a killed cgroup to be empty: the kernel tears down memory and namespaces of every process.
pub const EMPTY_TIMEOUT: Duration = Duration::from_secs(10);
/// How often an emptying cgroup is looked at.
const EMPTY_POLL: Duration = Duration::from_millis(2);

/// The subtree in which all instances of one node live.
#[derive(Debug)]
pub struct CgroupRoot {
    name: String,
    layout: Box<dyn Layout>,
}

/// One value to be written into one file of a cgroup directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setting {
    pub dir: PathBuf,
    pub file: &'static str,
    pub value: String,
    /// A file that some kernels lack, or a disk that takes no limits: then it is passed over.
    pub optional: bool,
}

/// Use of one instance; `None` where the kernel or the layout does not count it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub memory_bytes: Option<u64>,
    pub memory_peak_bytes: Option<u64>,
    pub cpu_us: Option<u64>,
    pub pids: Option<u64>,
    pub oom_kills: Option<u64>,
}

/// Where limits and counters are; identity is v2 in every layout.
pub(crate) trait Layout: Debug {
    fn name(&self) -> &'static str;
    /// The v2 directory holding all instances of the node.
    fn identity(&self) -> &Path;
    /// Directories outside the v2 tree that hold one directory per instance.
    fn controllers(&self) -> Vec<&Path>;
    /// Makes the node's directories, with controllers enabled for what will be below.
    fn prepare(&self) -> Result<(), Error>;
    /// Makes controllers available in `ID/app` once the directories of an instance exist.
    fn delegate(&self, id: &JailId) -> Result<(), Error>;
    /// What to write for these limits, in order.
    fn limits(&self, id: &JailId, limits: &Limits, disks: &[Disk]) -> Vec<Setting>;
    /// Whether traffic with these disks is limited here. Asks the kernel, by setting what is so already.
    fn disk_limits(&self, disks: &[Disk]) -> DiskLimits;
    /// Files to which an instance's init writes `0` (itself) to come under the limits, where being in `ID/app` is
    /// not already enough.
    fn entrances(&self, id: &JailId) -> Vec<PathBuf>;
    fn usage(&self, id: &JailId) -> Usage;
    /// An eventfd that becomes readable on a memory limit hit, where the kernel does not kill the group itself.
    fn watch_oom(&self, id: &JailId) -> Result<Option<OwnedFd>, Error>;
}

impl CgroupRoot {
    /// Looks at what is mounted and makes the subtree `name` (slashes allowed: a delegated path).
    pub fn open(name: &str) -> Result<CgroupRoot, Error> {
        let root = CgroupRoot::find(name)?;
        root.layout.prepare()?;
        Ok(root)
    }

    /// The subtree `name`, which an earlier [`CgroupRoot::open`] made.
    pub(crate) fn find(name: &str) -> Result<CgroupRoot, Error> {
        let plain = !name.is_empty() && name.split('/').all(|part| !matches!(part, "" | "." | ".."));
        if !plain {
            return Err(Error::Refused {
                operation: "open cgroup root",
                reason: format!("{name:?} is no plain relative path"),
            });
        }
        let layout = mounts::probe(name)?;
        Ok(CgroupRoot { name: name.to_owned(), layout })
    }

    /// The name given to [`CgroupRoot::open`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `v2` or `hybrid`, for `doctor`.
    pub fn layout(&self) -> &'static str {
        self.layout.name()
    }

    /// Whether the limits of instances on these disks hold, for `doctor`. The kernel may wait until none of them has a
    /// request under way: not to be asked by who must not wait.
    pub fn disk_limits(&self, disks: &[Disk]) -> DiskLimits {
        self.layout.disk_limits(disks)
    }

    /// Makes the directories of an instance and sets its limits.
    pub(crate) fn create(&self, id: &JailId, limits: &Limits, disks: &[Disk]) -> Result<(), Error> {
        for dir in self.directories(id).iter().rev() {
            match fs::create_dir(dir) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Error::path("create cgroup", dir)(e)),
            }
        }
        self.layout.delegate(id)?;
        for setting in self.layout.limits(id, limits, disks) {
            setting.write()?;
        }
        Ok(())
    }

    /// `ID/monitor`, for CLONE_INTO_CGROUP.
    pub(crate) fn monitor_dir(&self, id: &JailId) -> PathBuf {
        self.layout.identity().join(id.as_str()).join("monitor")
    }

    /// `ID/app`, for CLONE_INTO_CGROUP.
    pub(crate) fn app_dir(&self, id: &JailId) -> PathBuf {
        self.layout.identity().join(id.as_str()).join("app")
    }

    /// Opens what the instance's init (already in `ID/app`) has to write `0` to, to come under its limits.
    pub(crate) fn entrances(&self, id: &JailId) -> Result<Vec<OwnedFd>, Error> {
        let open = |file: PathBuf| match fs::File::options().write(true).open(&file) {
            Ok(opened) => Ok(opened.into()),
            Err(e) => Err(Error::path("open cgroup", file)(e)),
        };
        self.layout.entrances(id).into_iter().map(open).collect()
    }

    pub(crate) fn watch_oom(&self, id: &JailId) -> Result<Option<OwnedFd>, Error> {
        self.layout.watch_oom(id)
    }

    /// Kills every process of the instance, not its monitor. One write, no race with forks.
    pub fn kill_app(&self, id: &JailId) -> Result<(), Error> {
        write_if_present(&self.app_dir(id).join("cgroup.kill"), "1")
    }

    /// Kills instance and monitor.
    pub(crate) fn kill_all(&self, id: &JailId) -> Result<(), Error> {
        write_if_present(&self.layout.identity().join(id.as_str()).join("cgroup.kill"), "1")
    }

    /// Stops or continues every process of the instance. A frozen instance still dies of [`CgroupRoot::kill_app`].
    pub fn freeze(&self, id: &JailId, frozen: bool) -> Result<(), Error> {
        let file = self.app_dir(id).join("cgroup.freeze");
        fs::write(&file, if frozen { "1" } else { "0" }).map_err(Error::path("freeze", file))
    }

    /// Whether any process is in `ID/app`.
    pub fn app_populated(&self, id: &JailId) -> bool {
        populated(&self.app_dir(id))
    }

    /// Whether any process is in `ID/monitor`.
    pub fn monitor_populated(&self, id: &JailId) -> bool {
        populated(&self.monitor_dir(id))
    }

    /// What the instance uses now.
    pub fn usage(&self, id: &JailId) -> Result<Usage, Error> {
        let dir = self.app_dir(id);
        if !dir.exists() {
            return Err(Error::path("read cgroup", dir)(io::Error::from(io::ErrorKind::NotFound)));
        }
        Ok(self.layout.usage(id))
    }

    /// Ids that have a cgroup in any hierarchy. Directories whose name is no id are not ours and are passed over.
    pub fn ids(&self) -> Result<BTreeSet<JailId>, Error> {
        let mut ids = BTreeSet::new();
        for dir in self.layout.controllers().into_iter().chain([self.layout.identity()]) {
            let entries = match fs::read_dir(dir) {
                Ok(entries) => entries,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(Error::path("list cgroup", dir)(e)),
            };
            for entry in entries.flatten() {
                let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
                let id = entry.file_name().into_string().ok().and_then(|name| JailId::new(name).ok());
                ids.extend(id.filter(|_| is_dir));
            }
        }
        Ok(ids)
    }

    /// Removes an instance's directories, which must be empty or emptying (waits up to [`EMPTY_TIMEOUT`]).
    pub(crate) fn remove_instance(&self, id: &JailId) -> Result<(), Error> {
        let deadline = Instant::now() + EMPTY_TIMEOUT;
        for dir in self.directories(id) {
            remove_dir(&dir, deadline)?;
        }
        Ok(())
    }

    /// Removes the node's own (empty) subtree: the end of a node. Parents given in a name with slashes stay.
    pub fn remove(self) -> Result<(), Error> {
        let deadline = Instant::now() + EMPTY_TIMEOUT;
        for dir in self.layout.controllers().into_iter().chain([self.layout.identity()]) {
            remove_dir(dir, deadline)?;
        }
        Ok(())
    }

    /// All directories of an instance, children before parents.
    fn directories(&self, id: &JailId) -> Vec<PathBuf> {
        let mut dirs = vec![self.app_dir(id), self.monitor_dir(id), self.layout.identity().join(id.as_str())];
        dirs.extend(self.layout.controllers().into_iter().map(|dir| dir.join(id.as_str())));
        dirs
    }
}

impl Setting {
    fn write(&self) -> Result<(), Error> {
        let file = self.dir.join(self.file);
        match fs::write(&file, &self.value) {
            Err(e) if self.optional && is_lack(&e) => Ok(()),
            result => result.map_err(Error::path("set cgroup limit", file)),
        }
    }
}

/// No such file in this kernel, no such disk, or one that is not made for limits.
fn is_lack(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::EACCES | libc::EPERM | libc::ENODEV | libc::EOPNOTSUPP)
    )
}

/// `populated 1` in `cgroup.events`; a cgroup that is gone has nobody.
fn populated(dir: &Path) -> bool {
    fs::read_to_string(dir.join("cgroup.events"))
        .is_ok_and(|text| text.lines().any(|line| line == "populated 1"))
}

fn write_if_present(file: &Path, value: &str) -> Result<(), Error> {
    match fs::write(file, value) {
        // ENODEV: removed between open and write.
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        result => result.map_err(Error::path("write", file)),
    }
}

/// A cgroup is busy for a moment after its last process died.
fn remove_dir(dir: &Path, deadline: Instant) -> Result<(), Error> {
    loop {
        match fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                thread::sleep(EMPTY_POLL)
            }
            Err(e) => return Err(Error::path("remove cgroup", dir)(e)),
        }
    }
}

/// The number in a file that holds one; `max` and a missing file are `None`.
fn read_number(file: PathBuf) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// The number behind `key` in a flat-keyed file.
fn read_key(file: PathBuf, key: &str) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}
