//! Whether this machine can do it: for `check`, and for a clear word at the start instead of a strange one later.

use std::path::Path;

use nix::sys::statfs::{BTRFS_SUPER_MAGIC, statfs};
use nix::sys::utsname::uname;
use nix::unistd::geteuid;

use crate::config::{Config, Pool};

/// The oldest kernel everything was tried on.
const KERNEL_MIN: (u32, u32) = (6, 1);

pub fn refuse_without_root() -> Result<(), String> {
    match geteuid().is_root() {
        true => Ok(()),
        false => {
            Err("the runner has to be root: it makes namespaces, cgroups and mounts for others".to_owned())
        }
    }
}

/// Prints each finding; fails when one of them is a fault.
pub fn report(config: &Config) -> Result<(), String> {
    let findings = [
        ("root", refuse_without_root()),
        ("kernel", kernel()),
        ("btrfs", btrfs(config)),
        ("pool", pool(config)),
        ("nft", program("nft", "nftables")),
        (
            "cgroups",
            Path::new("/sys/fs/cgroup")
                .is_dir()
                .then_some(())
                .ok_or("nothing is mounted on /sys/fs/cgroup".to_owned()),
        ),
        ("jail_binary", file(&config.jail_binary)),
        ("unpack_binary", file(&config.unpack_binary)),
        ("build.ca_bundle", config.build.ca_bundle.as_deref().map_or(Ok(()), file)),
    ];
    let mut faults = Vec::new();
    for (what, finding) in findings {
        match finding {
            Ok(()) => println!("ok    {what}"),
            Err(why) => {
                println!("FAULT {what}: {why}");
                faults.push(format!("{what}: {why}"));
            }
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(format!("this machine is not ready: {}", faults.join("; "))) }
}

fn kernel() -> Result<(), String> {
    let name = uname().map_err(|error| format!("uname: {error}"))?;
    let release = name.release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let (major, minor) = KERNEL_MIN;
    if version < KERNEL_MIN {
        return Err(format!("Linux {release} is too old; {major}.{minor} is needed"));
    }
    Ok(())
}

fn btrfs(config: &Config) -> Result<(), String> {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let loaded = known.lines().any(|line| line.trim() == "btrfs");
    // A module that is not loaded yet is loaded by the mount.
    let module =
        std::fs::read_to_string("/proc/sys/kernel/modprobe").is_ok_and(|path| !path.trim().is_empty());
    if !loaded && !module {
        return Err("this kernel has no btrfs".to_owned());
    }
    match &config.pool {
        Pool::Loop { file, .. } if !file.exists() => program("mkfs.btrfs", "btrfs-progs"),
        _ => Ok(()),
    }
}

fn pool(config: &Config) -> Result<(), String> {
    match &config.pool {
        Pool::Path { path } => {
            let found = statfs(path).map_err(|error| format!("{}: {error}", path.display()))?;
            match found.filesystem_type() == BTRFS_SUPER_MAGIC {
                true => Ok(()),
                false => Err(format!("{} is not on btrfs", path.display())),
            }
        }
        Pool::Loop { file, .. } if file.exists() => Ok(()),
        Pool::Loop { file, size, .. } => {
            let folder = file.parent().unwrap_or(Path::new("/"));
            let found = statfs(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
            let free_bytes =
                found.blocks_available().saturating_mul(u64::try_from(found.block_size()).unwrap_or(0));
            match free_bytes >= size.0 {
                true => Ok(()),
                false => Err(format!(
                    "{} has {} MiB free, and the pool is to have {} MiB",
                    folder.display(),
                    free_bytes >> 20,
                    size.0 >> 20
                )),
            }
        }
    }
}

fn program(name: &str, package: &str) -> Result<(), String> {
    let found =
        ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].iter().any(|dir| Path::new(dir).join(name).exists());
    match found {
        true => Ok(()),
        false => Err(format!("{name} is missing; install {package}")),
    }
}

fn file(path: &Path) -> Result<(), String> {
    match path.is_file() {
        true => Ok(()),
        false => Err(format!("{} is missing", path.display())),
    }
}
