//! A small pool of a test's own, taken down with everything on it when the test ends, also when it fails.
#![allow(dead_code)]

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use epagent_storage::*;

pub const POOL_BYTES: u64 = 320 << 20;
pub const RESERVE_BYTES: u64 = 32 << 20;
pub const MIB: usize = 1 << 20;

/// A folder with a pool file and a mount point; on drop both are gone, whatever happened.
pub struct Site {
    pub dir: tempfile::TempDir,
}

impl Site {
    pub fn new() -> Self {
        Self { dir: tempfile::Builder::new().prefix("epagent-pool-").tempdir().unwrap() }
    }

    pub fn file(&self) -> PathBuf {
        self.dir.path().join("pool.btrfs")
    }

    pub fn mount_point(&self) -> PathBuf {
        self.dir.path().join("pool")
    }

    pub fn config(&self) -> PoolConfig {
        config_in(self.dir.path())
    }

    pub fn open(&self) -> Pool {
        Pool::open_or_create(&self.config()).unwrap()
    }

    /// The loop devices attached to files of this site.
    pub fn loop_devices(&self) -> Vec<String> {
        let prefix = self.dir.path().to_str().unwrap().to_owned();
        let mut found = Vec::new();
        for entry in fs::read_dir("/sys/block").unwrap().flatten() {
            if let Ok(backing) = fs::read_to_string(entry.path().join("loop/backing_file"))
                && backing.starts_with(&prefix)
            {
                found.push(entry.file_name().into_string().unwrap());
            }
        }
        found
    }

    pub fn mounts(&self) -> Vec<String> {
        let prefix = self.dir.path().to_str().unwrap().to_owned();
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let points = table.lines().filter_map(|line| line.split(' ').nth(4));
        points.filter(|point| point.starts_with(&prefix)).map(str::to_owned).collect()
    }

    pub fn assert_nothing_left(&self) {
        assert_eq!(self.mounts(), Vec::<String>::new());
        eventually("the loop device is free", || self.loop_devices().is_empty());
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for point in self.mounts().iter().rev() {
            let _ = Command::new("umount").args(["--lazy", point]).status();
        }
        let deadline = Instant::now() + Duration::from_secs(2);
        while !self.loop_devices().is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        for device in self.loop_devices() {
            let _ = Command::new("losetup").args(["--detach", &format!("/dev/{device}")]).status();
        }
    }
}

pub fn config_in(dir: &Path) -> PoolConfig {
    let mut config = PoolConfig::loop_file(dir.join("pool.btrfs"), dir.join("pool"), POOL_BYTES);
    config.reserve_bytes = Some(RESERVE_BYTES);
    config.lock_wait_ms = 0;
    config.quota.mode = wanted_quotas();
    config
}

/// The quotas to test with, where the kernel has better ones too: `EPAGENT_TEST_QUOTAS=ordinary`.
pub fn wanted_quotas() -> Option<QuotaMode> {
    match std::env::var("EPAGENT_TEST_QUOTAS").as_deref() {
        Ok("ordinary") => Some(QuotaMode::Ordinary),
        Ok(other) => panic!("EPAGENT_TEST_QUOTAS={other}: there is only \"ordinary\" to ask for"),
        Err(_) => None,
    }
}

/// The quotas that a pool of this kernel gets.
pub fn expected_quotas() -> QuotaMode {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    match version >= (6, 7) {
        true => wanted_quotas().unwrap_or(QuotaMode::Simple),
        false => QuotaMode::Ordinary,
    }
}

/// Whether a pool has simple quotas; says what is not shown where it has not.
pub fn has_simple_quotas(pool: &Pool, what: &str) -> bool {
    let simple = pool.facts().quota_mode == QuotaMode::Simple;
    if !simple {
        println!("SKIPPED: no simple quotas (Linux 6.7): {what}");
    }
    simple
}

/// How many times longer everything takes than on the machines the limits are meant for: what an emulated one sets.
pub fn slowness() -> u32 {
    std::env::var("EPAGENT_TEST_SLOWNESS").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let patience = Duration::from_secs(10) * slowness();
    let deadline = Instant::now() + patience;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {patience:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub fn app(name: &str) -> AppName {
    AppName::new(name).unwrap()
}
pub fn image(name: &str) -> ImageName {
    ImageName::new(name).unwrap()
}
pub fn release(name: &str) -> ReleaseId {
    ReleaseId::new(name).unwrap()
}
pub fn instance(name: &str) -> InstanceId {
    InstanceId::new(name).unwrap()
}
pub fn volume(name: &str) -> VolumeName {
    VolumeName::new(name).unwrap()
}
pub fn staging(name: &str) -> StagingId {
    StagingId::new(name).unwrap()
}

/// A path through a descriptor, for the plain file functions of a test.
pub fn at(dir: &OwnedFd, name: &str) -> PathBuf {
    Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name)
}

pub fn write(dir: &OwnedFd, name: &str, bytes: &[u8]) {
    fs::write(at(dir, name), bytes).unwrap();
}

pub fn read(dir: &OwnedFd, name: &str) -> String {
    fs::read_to_string(at(dir, name)).unwrap()
}

/// Writes incompressible-enough data until `bytes` are on disk or an error stops it.
pub fn fill(path: &Path, bytes: usize) -> io::Result<usize> {
    let block = vec![0xa5u8; MIB];
    let mut file = File::create(path)?;
    let mut written = 0;
    while written < bytes {
        file.write_all(&block)?;
        written += MIB;
        if written.is_multiple_of(4 * MIB) {
            file.sync_data()?;
        }
    }
    file.sync_all()?;
    Ok(written)
}

/// An image `py` and a release `shop/r1` on it.
pub fn publish_release(pool: &Pool) -> ImageId {
    let id = publish_image(pool, "py", "one");
    let stage = staging("rel-1");
    let base = Base::Image(id.clone());
    let dir = pool.release_stage(&stage, &app("shop"), &release("r1"), &base, Quota::mib(32)).unwrap();
    write(&dir, "built", b"app");
    pool.release_publish(&stage, &app("shop"), &release("r1")).unwrap();
    id
}

pub fn publish_image(pool: &Pool, name: &str, content: &str) -> ImageId {
    let stage = staging(&format!("img-{name}-{content}"));
    let dir = pool.image_stage(&stage, &image(name), Quota::mib(32)).unwrap();
    write(&dir, "content", content.as_bytes());
    pool.image_publish(&stage, &image(name)).unwrap()
}

/// All subvolume paths of the file system, by the tool that is not ours.
pub fn subvolumes(site: &Site) -> Vec<String> {
    let output = Command::new("btrfs").args(["subvolume", "list"]).arg(site.mount_point()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().filter_map(|line| line.split(" path ").nth(1)).map(str::to_owned).collect()
}

pub fn entries(path: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

pub fn assert_idle(site: &Site) {
    assert_eq!(entries(&site.mount_point().join("staging")), Vec::<String>::new(), "staging");
    assert_eq!(entries(&site.mount_point().join("records")), Vec::<String>::new(), "records");
}
