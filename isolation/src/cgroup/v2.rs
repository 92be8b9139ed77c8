//! Pure cgroup v2: one tree for everything.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::{Disk, DiskLimits, Layout, Setting, Usage, disk, read_key, read_number};
use crate::error::Error;
use crate::id::JailId;
use crate::spec::Limits;

/// Controllers that every instance must have.
const CONTROLLERS: [&str; 3] = ["memory", "cpu", "pids"];
/// Without this one they run all the same, and `doctor` says so.
const IO: &str = "io";
/// Length of a CPU accounting period. The kernel's own default.
const CPU_PERIOD_US: u64 = 100_000;

#[derive(Debug)]
pub(super) struct V2 {
    mount: PathBuf,
    root: PathBuf,
}

impl V2 {
    pub(super) fn new(mount: &Path, name: &str) -> V2 {
        V2 { mount: mount.to_owned(), root: mount.join(name) }
    }

    fn app(&self, id: &JailId) -> PathBuf {
        self.root.join(id.as_str()).join("app")
    }

    /// The levels above the node's own, from the mount down.
    fn above(&self) -> Vec<&Path> {
        let mut above: Vec<&Path> =
            self.root.ancestors().skip(1).take_while(|dir| dir.starts_with(&self.mount)).collect();
        above.reverse();
        above
    }
}

impl Layout for V2 {
    fn name(&self) -> &'static str {
        "v2"
    }

    fn identity(&self) -> &Path {
        &self.root
    }

    fn controllers(&self) -> Vec<&Path> {
        Vec::new()
    }

    /// From the mount down: each level that lacks a controller gets it from the level above. A delegated subtree
    /// has them already, and then nothing above it is touched.
    fn prepare(&self) -> Result<(), Error> {
        fs::create_dir_all(&self.root).map_err(Error::path("create cgroup", &self.root))?;
        if !offers(&self.root, &CONTROLLERS) {
            for dir in self.above() {
                enable(dir)?;
            }
        }
        // Apart from the others: a node of an earlier version has those and not this one.
        if !offers(&self.root, &[IO]) {
            self.above().into_iter().for_each(enable_io);
        }
        enable(&self.root)?;
        enable_io(&self.root);
        Ok(())
    }

    fn delegate(&self, id: &JailId) -> Result<(), Error> {
        let dir = self.root.join(id.as_str());
        enable(&dir)?;
        enable_io(&dir);
        Ok(())
    }

    /// No `memory.high`: without swap it gives nothing back, it only makes a leaking instance hang for a minute
    /// between the two limits before it is killed and told (seen on Linux 6.1 and 6.12). Page cache is reclaimed at
    /// `memory.max` as well.
    fn limits(&self, id: &JailId, limits: &Limits, disks: &[Disk]) -> Vec<Setting> {
        let quota_us = u64::from(limits.cpu_percent) * CPU_PERIOD_US / 100;
        let set = |file, value: String, optional| Setting { dir: self.app(id), file, value, optional };
        let mut settings = vec![
            set("memory.max", limits.memory_bytes.to_string(), false),
            set("memory.swap.max", "0".to_owned(), true),
            set("memory.oom.group", "1".to_owned(), false),
            set("cpu.max", format!("{quota_us} {CPU_PERIOD_US}"), false),
            set("pids.max", limits.pids.to_string(), false),
        ];
        if let Some(rate) = limits.io_bytes_per_s {
            settings.extend(
                disks.iter().map(|disk| set("io.max", format!("{disk} rbps={rate} wbps={rate}"), true)),
            );
        }
        settings
    }

    /// Asked at the node's own cgroup, which has no limit and keeps none.
    fn disk_limits(&self, disks: &[Disk]) -> DiskLimits {
        let enabled = fs::read_to_string(self.root.join("cgroup.subtree_control")).unwrap_or_default();
        match has_word(&enabled, IO) {
            true => {
                let unlimited = |disk| format!("{disk} rbps=max wbps=max");
                disk::probe(&self.root.join("io.max"), disks, unlimited, DiskLimits::All)
            }
            false => DiskLimits::absent(format!("{} does not have the io controller", self.root.display())),
        }
    }

    fn entrances(&self, _id: &JailId) -> Vec<PathBuf> {
        Vec::new()
    }

    fn usage(&self, id: &JailId) -> Usage {
        let app = self.app(id);
        Usage {
            memory_bytes: read_number(app.join("memory.current")),
            memory_peak_bytes: read_number(app.join("memory.peak")),
            cpu_us: read_key(app.join("cpu.stat"), "usage_usec"),
            pids: read_number(app.join("pids.current")),
            oom_kills: read_key(app.join("memory.events"), "oom_kill"),
        }
    }

    /// `memory.oom.group` makes the kernel kill the group.
    fn watch_oom(&self, _id: &JailId) -> Result<Option<OwnedFd>, Error> {
        Ok(None)
    }
}

/// Whether `dir` has the controllers to give to its children.
fn offers(dir: &Path, controllers: &[&str]) -> bool {
    let text = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
    controllers.iter().all(|controller| has_word(&text, controller))
}

fn has_word(text: &str, wanted: &str) -> bool {
    text.split_whitespace().any(|word| word == wanted)
}

/// Enables the controllers for the children of `dir`.
fn enable(dir: &Path) -> Result<(), Error> {
    let file = dir.join("cgroup.subtree_control");
    let enabled = fs::read_to_string(&file).map_err(Error::path("read", &file))?;
    for controller in CONTROLLERS.iter().filter(|c| !has_word(&enabled, c)) {
        fs::write(&file, format!("+{controller}")).map_err(|source| {
            if source.raw_os_error() == Some(libc::EBUSY) {
                let reason =
                    format!("{} has processes of its own; give a delegated, empty cgroup", dir.display());
                return Error::Refused { operation: "enable cgroup controllers", reason };
            }
            let missing = source.kind() == io::ErrorKind::NotFound;
            let operation = if missing {
                "enable cgroup controller not offered by the level above"
            } else {
                "enable cgroup controller"
            };
            Error::path(operation, dir.join(controller))(source)
        })?;
    }
    Ok(())
}

/// Enables the io controller for the children of `dir` if that can be. Where it cannot, `io.max` is missing below, and
/// [`Layout::disk_limits`] says so.
fn enable_io(dir: &Path) {
    let file = dir.join("cgroup.subtree_control");
    if fs::read_to_string(&file).is_ok_and(|enabled| !has_word(&enabled, IO)) && offers(dir, &[IO]) {
        let _ = fs::write(&file, format!("+{IO}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_become_these_files_and_values() {
        let v2 = V2::new(Path::new("/sys/fs/cgroup"), "system.slice/epagent-instances.service");
        let id = JailId::new("shop-web-1").unwrap();
        let limits = Limits {
            memory_bytes: 1 << 24,
            cpu_percent: 50,
            pids: 9,
            io_bytes_per_s: Some(5 << 20),
            ..Limits::default()
        };
        let disks = [Disk { major: 7, minor: 0 }, Disk { major: 259, minor: 16 }];
        let settings = |limits: &Limits| -> Vec<(String, String)> {
            let settings = v2.limits(&id, limits, &disks).into_iter();
            settings.map(|s| (s.dir.join(s.file).display().to_string(), s.value)).collect()
        };
        let app = "/sys/fs/cgroup/system.slice/epagent-instances.service/shop-web-1/app";
        let want = [
            ("memory.max", "16777216"),
            ("memory.swap.max", "0"),
            ("memory.oom.group", "1"),
            ("cpu.max", "50000 100000"),
            ("pids.max", "9"),
            ("io.max", "7:0 rbps=5242880 wbps=5242880"),
            ("io.max", "259:16 rbps=5242880 wbps=5242880"),
        ];
        let want = want.map(|(file, value)| (format!("{app}/{file}"), value.to_owned()));
        assert_eq!(settings(&limits), want);
        assert_eq!(
            settings(&Limits { io_bytes_per_s: None, ..limits }),
            want[..5],
            "no limit, nothing to write"
        );
    }

    #[test]
    fn controllers_are_read_as_words() {
        let dir = std::env::temp_dir().join(format!("epagent-v2-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("cgroup.controllers"), "cpuset cpu io memory pids\n").unwrap();
        assert!(offers(&dir, &CONTROLLERS) && offers(&dir, &[IO]));
        fs::write(dir.join("cgroup.controllers"), "cpuset io memory pids\n").unwrap();
        assert!(!offers(&dir, &CONTROLLERS), "cpuset is not cpu");
        fs::remove_dir_all(&dir).unwrap();
    }

    /// A plain folder in place of a cgroup: what is written to a file is seen in it, and nothing comes of it.
    #[test]
    fn io_is_enabled_where_it_is_offered_and_missed_where_not() {
        let mount = std::env::temp_dir().join(format!("epagent-v2-io-{}", std::process::id()));
        let v2 = V2::new(&mount, "n");
        let disk = [Disk { major: 7, minor: 0 }];
        let control = v2.root.join("cgroup.subtree_control");
        for (offered, written) in [("cpu memory pids", "cpu memory pids"), ("cpu io memory pids", "+io")] {
            fs::create_dir_all(&v2.root).unwrap();
            fs::write(v2.root.join("cgroup.controllers"), offered).unwrap();
            fs::write(&control, "cpu memory pids").unwrap();
            v2.prepare().unwrap();
            assert_eq!(fs::read_to_string(&control).unwrap(), written);
        }
        fs::write(&control, "cpu memory pids").unwrap();
        assert!(matches!(v2.disk_limits(&disk), DiskLimits::Absent { .. }));
        fs::write(&control, "cpu io memory pids").unwrap();
        assert_eq!(v2.disk_limits(&disk), DiskLimits::All);
        assert_eq!(fs::read_to_string(v2.root.join("io.max")).unwrap(), "7:0 rbps=max wbps=max");
        fs::remove_dir_all(&mount).unwrap();
    }

    #[test]
    fn counters_are_read_from_the_files_of_v2() {
        let mount = std::env::temp_dir().join(format!("epagent-v2-usage-{}", std::process::id()));
        let id = JailId::new("a").unwrap();
        let v2 = V2::new(&mount, "n");
        let app = v2.app(&id);
        fs::create_dir_all(&app).unwrap();
        fs::write(app.join("memory.current"), "4096\n").unwrap();
        fs::write(app.join("cpu.stat"), "usage_usec 77\nuser_usec 70\n").unwrap();
        fs::write(app.join("memory.events"), "low 0\noom 3\noom_kill 2\noom_group_kill 1\n").unwrap();
        let usage = v2.usage(&id);
        assert_eq!(
            (usage.memory_bytes, usage.cpu_us, usage.oom_kills, usage.pids),
            (Some(4096), Some(77), Some(2), None)
        );
        fs::remove_dir_all(&mount).unwrap();
    }
}
