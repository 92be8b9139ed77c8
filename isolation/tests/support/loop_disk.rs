//! A disk of a test's own: a btrfs in a file, as a pool is.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;

use epagent_isolation::cgroup::Disk;
use epagent_isolation::spec::{MountSource, MountSpec};

use super::path;

const BYTES: u64 = 128 << 20;

/// Mounted until it is dropped; the loop device frees itself with the mount.
pub struct LoopDisk {
    dir: PathBuf,
}

impl LoopDisk {
    pub fn new() -> LoopDisk {
        let dir = std::env::temp_dir().join(format!("epagent-isolation-disk-{}", std::process::id()));
        fs::create_dir_all(dir.join("mnt")).unwrap();
        let disk = LoopDisk { dir };
        let file = disk.dir.join("disk.img");
        File::create(&file).and_then(|made| made.set_len(BYTES)).unwrap();
        run(Command::new("mkfs.btrfs").args(["--quiet", "--mixed"]).arg(&file));
        run(Command::new("mount").args(["-o", "loop,noatime"]).arg(&file).arg(disk.mount_point()));
        disk
    }

    pub fn mount_point(&self) -> PathBuf {
        self.dir.join("mnt")
    }

    /// Of the loop device that has the file.
    pub fn number(&self) -> Disk {
        let file = fs::metadata(self.dir.join("disk.img")).unwrap();
        let devices = fs::read_dir("/sys/block").unwrap().flatten().map(|entry| entry.path());
        let device = devices.into_iter().find(|device| {
            let backing = fs::read_to_string(device.join("loop/backing_file")).unwrap_or_default();
            fs::metadata(backing.trim())
                .is_ok_and(|found| (found.dev(), found.ino()) == (file.dev(), file.ino()))
        });
        let number = fs::read_to_string(device.unwrap().join("dev")).unwrap();
        let (major, minor) = number.trim().split_once(':').unwrap();
        Disk { major: major.parse().unwrap(), minor: minor.parse().unwrap() }
    }

    /// As the first mount beside the host's /usr, on `/data`.
    pub fn mount_spec(&self) -> MountSpec {
        MountSpec {
            target: path("/data"),
            source: MountSource::Descriptor { index: 1, idmap: true, recursive: false },
            read_only: false,
            no_exec: true,
        }
    }
}

fn run(command: &mut Command) {
    let ran = command.output().unwrap();
    assert!(ran.status.success(), "{command:?}: {}", String::from_utf8_lossy(&ran.stderr));
}

/// Lazily: what a failed test leaves running in it dies with its node, a moment later.
impl Drop for LoopDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.mount_point()).status();
        let _ = fs::remove_dir_all(&self.dir);
    }
}
