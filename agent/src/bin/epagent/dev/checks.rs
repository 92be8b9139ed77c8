//! What must be there before anything is made: each lack has its own clear error, and nothing was changed yet.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::statvfs::statvfs;
use nix::sys::utsname::uname;
use nix::unistd::geteuid;

use super::error::DevError;
use super::layout::Layout;

/// The oldest kernel: Debian 12's.
const KERNEL_MIN: (u32, u32) = (6, 1);
/// What the disk keeps free beside the pool, for logs and state.
const FREE_BYTES_MIN: u64 = 256 << 20;
/// Where administration programs lie; the caller's PATH may leave sbin out.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Every process `epagent dev` needs, and the two static helpers the runner hands into jails.
const BINARIES: [&str; 6] =
    ["epagentd", "epagent-runner", "epagent-balancer", "epagent-lease", "epagent-jail", "epagent-unpack"];

/// One thing this host must have: its name, and how it looks for it.
type HostCheck = (&'static str, fn() -> Result<String, DevError>);

/// In the order in which they are worth mending.
pub const HOST: [HostCheck; 5] = [
    ("root", root),
    ("kernel", kernel),
    ("btrfs-progs", || installed("mkfs.btrfs", "btrfs-progs")),
    ("nftables", || installed("nft", "nftables")),
    ("btrfs", btrfs),
];

/// The host: root, kernel, programs, btrfs.
pub fn host() -> Result<(), DevError> {
    HOST.iter().try_for_each(|(_, look)| look().map(drop))
}

fn root() -> Result<String, DevError> {
    let uid = geteuid();
    match uid.is_root() {
        true => Ok("this is root".to_owned()),
        false => Err(DevError::NotRoot { uid: uid.as_raw() }),
    }
}

fn kernel() -> Result<String, DevError> {
    let names = uname().map_err(|source| DevError::Wait { source })?;
    let release = names.release().to_string_lossy().into_owned();
    match kernel_version(&release) {
        Some(version) if version >= KERNEL_MIN => Ok(release),
        _ => Err(DevError::OldKernel { release }),
    }
}

fn installed(program: &'static str, package: &'static str) -> Result<String, DevError> {
    let found = PATH.split(':').map(|folder| Path::new(folder).join(program)).find(|path| path.is_file());
    found.map(|path| path.display().to_string()).ok_or(DevError::NoProgram { program, package })
}

fn btrfs() -> Result<String, DevError> {
    if has_btrfs() { Ok("the kernel has it".to_owned()) } else { Err(DevError::NoBtrfs) }
}

/// The folder our own executable lies in, when all the others lie there too.
pub fn binaries() -> Result<PathBuf, DevError> {
    let own = std::env::current_exe()
        .map_err(|source| DevError::Folder { path: PathBuf::from("/proc/self/exe"), source })?;
    let folder = own.parent().unwrap_or(Path::new("/")).to_owned();
    match BINARIES.into_iter().find(|name| !folder.join(name).is_file()) {
        Some(name) => Err(DevError::NoBinary { name, own }),
        None => Ok(folder),
    }
}

/// The pool is allocated whole, so that a full disk is found out now and not in the middle of an app's write.
pub fn space_for_pool(layout: &Layout, size_bytes: u64) -> Result<(), DevError> {
    if layout.pool_file().exists() {
        return Ok(());
    }
    let disk = statvfs(layout.root()).map_err(|source| DevError::Wait { source })?;
    let free_bytes = disk.blocks_available().saturating_mul(disk.fragment_size());
    if free_bytes < size_bytes.saturating_add(FREE_BYTES_MIN) {
        return Err(DevError::NoSpace {
            path: layout.root().to_owned(),
            wanted_bytes: size_bytes,
            free_bytes,
        });
    }
    Ok(())
}

/// `6G` → bytes. Units are powers of 1024.
pub fn parse_size(text: &str) -> Result<u64, DevError> {
    let bad = || DevError::BadSize { text: text.chars().take(32).collect() };
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return Err(bad()),
    };
    let number: u64 = digits.parse().map_err(|_| bad())?;
    number.checked_mul(1 << shift).filter(|bytes| *bytes > 0).ok_or_else(bad)
}

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Loads the module where btrfs is one. A failing modprobe only means that the list will still lack it.
fn has_btrfs() -> bool {
    let listed = || {
        fs::read_to_string("/proc/filesystems")
            .is_ok_and(|list| list.lines().any(|line| line.split_whitespace().last() == Some("btrfs")))
    };
    listed() || {
        let _ = Command::new("modprobe")
            .arg("btrfs")
            .env("PATH", PATH)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        listed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_compared_by_number() {
        assert_eq!(kernel_version("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(kernel_version("6.18.44-fc"), Some((6, 18)));
        assert_eq!(kernel_version("5.15.0"), Some((5, 15)));
        assert_eq!(kernel_version("x"), None);
        assert!((6, 18) > KERNEL_MIN && (5, 15) < KERNEL_MIN && (6, 1) >= KERNEL_MIN);
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("6G").unwrap(), 6 << 30);
        assert_eq!(parse_size("512m").unwrap(), 512 << 20);
        assert_eq!(parse_size("4096").unwrap(), 4096);
        for text in ["", "G", "0", "-1G", "6GB", "6 G", "99999999999T", "ä"] {
            assert!(parse_size(text).is_err(), "{text:?} was accepted");
        }
    }
}
