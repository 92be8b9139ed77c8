//! Whose traffic with which disks is limited, and where it is not, why.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

/// A whole disk (no partition: the kernel sets no limits for those), as the kernel numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Disk {
    pub major: u32,
    pub minor: u32,
}

/// As the files of cgroups have it, `7:0`.
impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// What [`crate::spec::Limits::io_bytes_per_s`] comes to on a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskLimits {
    /// All of an instance's reads and writes are held to it.
    All,
    /// Those that an instance waits for: reads, direct writes, fsync of what is still in the page cache. What the kernel
    /// writes from there by itself, v1 does not count as the instance's.
    Awaited,
    /// Instances run without.
    Absent { why: String },
}

impl DiskLimits {
    pub(super) fn absent(why: impl Into<String>) -> DiskLimits {
        DiskLimits::Absent { why: why.into() }
    }
}

/// Whether `file` takes a limit for each disk; `unlimited` is what it holds for one without.
pub(super) fn probe(
    file: &Path,
    disks: &[Disk],
    unlimited: fn(Disk) -> String,
    found: DiskLimits,
) -> DiskLimits {
    if disks.is_empty() {
        return DiskLimits::absent("no disk of the pool is known");
    }
    for disk in disks {
        match fs::write(file, unlimited(*disk)) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return DiskLimits::absent("this kernel is built without CONFIG_BLK_DEV_THROTTLING");
            }
            Err(e) => return DiskLimits::absent(format!("disk {disk} takes no limits: {e}")),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNLIMITED: fn(Disk) -> String = |disk| format!("{disk} max");

    #[test]
    fn a_limit_is_absent_for_a_reason() {
        let dir = std::env::temp_dir().join(format!("epagent-disk-limits-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let disk = Disk { major: 7, minor: 3 };
        let why = |file: &str, disks: &[Disk]| match probe(&dir.join(file), disks, UNLIMITED, DiskLimits::All)
        {
            DiskLimits::Absent { why } => why,
            other => panic!("{other:?}"),
        };
        assert!(why("io.max", &[]).contains("no disk"));
        assert!(why("missing/io.max", &[disk]).contains("CONFIG_BLK_DEV_THROTTLING"));
        assert!(why("", &[disk]).contains("disk 7:3"));
        assert_eq!(probe(&dir.join("io.max"), &[disk], UNLIMITED, DiskLimits::All), DiskLimits::All);
        assert_eq!(fs::read_to_string(dir.join("io.max")).unwrap(), "7:3 max");
        fs::remove_dir_all(&dir).unwrap();
    }
}
