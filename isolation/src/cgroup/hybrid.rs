//! Hybrid: limits and counters in v1 hierarchies, identity in a v2 tree without controllers.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Disk, DiskLimits, Layout, Setting, Usage, disk, read_key, read_number};
use crate::error::Error;
use crate::id::JailId;
use crate::spec::Limits;

/// Length of a CPU accounting period. The kernel's own default.
const CPU_PERIOD_US: u64 = 100_000;

/// Bytes per second, by disk.
const READ_RATE: &str = "blkio.throttle.read_bps_device";
const WRITE_RATE: &str = "blkio.throttle.write_bps_device";

#[derive(Debug)]
pub(super) struct Hybrid {
    identity: PathBuf,
    memory: PathBuf,
    cpu: PathBuf,
    cpuacct: PathBuf,
    pids: PathBuf,
    blkio: Option<PathBuf>,
}

impl Hybrid {
    /// `v1` must hold memory, cpu, cpuacct and pids; it may hold blkio.
    pub(super) fn new(v2: &Path, v1: &BTreeMap<String, PathBuf>, name: &str) -> Hybrid {
        let at = |controller: &str| v1[controller].join(name);
        Hybrid {
            identity: v2.join(name),
            memory: at("memory"),
            cpu: at("cpu"),
            cpuacct: at("cpuacct"),
            pids: at("pids"),
            blkio: v1.get("blkio").map(|mount| mount.join(name)),
        }
    }
}

impl Layout for Hybrid {
    fn name(&self) -> &'static str {
        "hybrid"
    }

    fn identity(&self) -> &Path {
        &self.identity
    }

    fn controllers(&self) -> Vec<&Path> {
        let mut dirs = vec![self.memory.as_path(), &self.cpu, &self.pids];
        for dir in [Some(&self.cpuacct), self.blkio.as_ref()].into_iter().flatten() {
            if !dirs.contains(&dir.as_path()) {
                dirs.push(dir);
            }
        }
        dirs
    }

    fn prepare(&self) -> Result<(), Error> {
        for dir in self.controllers().into_iter().chain([self.identity.as_path()]) {
            fs::create_dir_all(dir).map_err(Error::path("create cgroup", dir))?;
        }
        Ok(())
    }

    fn delegate(&self, _id: &JailId) -> Result<(), Error> {
        Ok(())
    }

    /// `memory.memsw` only exists with swap accounting; it may not be below `memory.limit`, so it comes second.
    fn limits(&self, id: &JailId, limits: &Limits, disks: &[Disk]) -> Vec<Setting> {
        let quota_us = u64::from(limits.cpu_percent) * CPU_PERIOD_US / 100;
        let set = |dir: &Path, file, value: String, optional| Setting {
            dir: dir.join(id.as_str()),
            file,
            value,
            optional,
        };
        let mut settings = vec![
            set(&self.memory, "memory.limit_in_bytes", limits.memory_bytes.to_string(), false),
            set(&self.memory, "memory.memsw.limit_in_bytes", limits.memory_bytes.to_string(), true),
            set(&self.cpu, "cpu.cfs_period_us", CPU_PERIOD_US.to_string(), false),
            set(&self.cpu, "cpu.cfs_quota_us", quota_us.to_string(), false),
            set(&self.pids, "pids.max", limits.pids.to_string(), false),
        ];
        if let (Some(blkio), Some(rate)) = (&self.blkio, limits.io_bytes_per_s) {
            let throttle =
                |file| disks.iter().map(move |disk| set(blkio, file, format!("{disk} {rate}"), true));
            settings.extend(throttle(READ_RATE).chain(throttle(WRITE_RATE)));
        }
        settings
    }

    /// Asked at the node's own cgroup, which has no limit (0) and keeps none.
    fn disk_limits(&self, disks: &[Disk]) -> DiskLimits {
        match &self.blkio {
            Some(blkio) => {
                disk::probe(&blkio.join(READ_RATE), disks, |disk| format!("{disk} 0"), DiskLimits::Awaited)
            }
            None => DiskLimits::absent("the v1 hierarchy blkio is not mounted"),
        }
    }

    /// `tasks` and not `cgroup.procs`, written by the process itself: moving a whole thread group takes a global
    /// lock that waits for an RCU grace period, 10 to 15 ms of every start. One thread moving itself needs no lock.
    fn entrances(&self, id: &JailId) -> Vec<PathBuf> {
        self.controllers().into_iter().map(|dir| dir.join(id.as_str()).join("tasks")).collect()
    }

    fn usage(&self, id: &JailId) -> Usage {
        let memory = self.memory.join(id.as_str());
        Usage {
            memory_bytes: read_number(memory.join("memory.usage_in_bytes")),
            memory_peak_bytes: read_number(memory.join("memory.max_usage_in_bytes")),
            cpu_us: read_number(self.cpuacct.join(id.as_str()).join("cpuacct.usage")).map(|ns| ns / 1000),
            pids: read_number(self.pids.join(id.as_str()).join("pids.current")),
            oom_kills: read_key(memory.join("memory.oom_control"), "oom_kill"),
        }
    }

    /// v1 kills one process and leaves a broken instance; the monitor kills the rest when this fires.
    fn watch_oom(&self, id: &JailId) -> Result<Option<OwnedFd>, Error> {
        let dir = self.memory.join(id.as_str());
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(Error::call("eventfd"))?;
        let control = dir.join("memory.oom_control");
        let control = fs::File::open(&control).map_err(Error::path("open", control))?;
        let register = format!("{} {}", event.as_fd().as_raw_fd(), control.as_raw_fd());
        let file = dir.join("cgroup.event_control");
        fs::write(&file, register).map_err(Error::path("watch memory limit", file))?;
        Ok(Some(event.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_become_these_files_and_values() {
        let mut v1: BTreeMap<String, PathBuf> = ["memory", "cpu", "cpuacct", "pids", "blkio"]
            .map(|c| {
                let mount = if c == "cpuacct" { "/cg/cpu".into() } else { format!("/cg/{c}") };
                (c.to_owned(), PathBuf::from(mount))
            })
            .into();
        let hybrid = Hybrid::new(Path::new("/cg/unified"), &v1, "epagent-7");
        let id = JailId::new("j").unwrap();
        let limits = Limits {
            memory_bytes: 4096,
            cpu_percent: 150,
            pids: 3,
            io_bytes_per_s: Some(5 << 20),
            ..Limits::default()
        };
        let disks = [Disk { major: 7, minor: 0 }];
        let settings = |hybrid: &Hybrid| -> Vec<(String, String)> {
            let settings = hybrid.limits(&id, &limits, &disks).into_iter();
            settings.map(|s| (s.dir.join(s.file).display().to_string(), s.value)).collect()
        };
        let want = [
            ("/cg/memory/epagent-7/j/memory.limit_in_bytes", "4096"),
            ("/cg/memory/epagent-7/j/memory.memsw.limit_in_bytes", "4096"),
            ("/cg/cpu/epagent-7/j/cpu.cfs_period_us", "100000"),
            ("/cg/cpu/epagent-7/j/cpu.cfs_quota_us", "150000"),
            ("/cg/pids/epagent-7/j/pids.max", "3"),
            ("/cg/blkio/epagent-7/j/blkio.throttle.read_bps_device", "7:0 5242880"),
            ("/cg/blkio/epagent-7/j/blkio.throttle.write_bps_device", "7:0 5242880"),
        ];
        let want = want.map(|(file, value)| (file.to_owned(), value.to_owned()));
        assert_eq!(settings(&hybrid), want);
        assert_eq!(hybrid.controllers().len(), 4, "a joint cpu,cpuacct hierarchy is entered once");
        v1.remove("blkio");
        let without = Hybrid::new(Path::new("/cg/unified"), &v1, "epagent-7");
        assert_eq!(settings(&without), want[..5]);
        assert!(matches!(without.disk_limits(&disks), DiskLimits::Absent { .. }));
    }
}
