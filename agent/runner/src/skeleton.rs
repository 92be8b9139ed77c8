//! The runner's own image: the folders of a root with nothing in them.
//!
//! With the host's /usr mounted in it, it is the image `host` of `epagent dev`; it is also the root in which a bootstrap
//! job runs. It is written by the runner itself, into a staging area that was empty and that no jail ever saw.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use epagent_storage::{ImageId, Pool, Quota, StagingId};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::symlinkat;

use crate::jobs::HOST_IMAGE;
use crate::work::WorkError;

/// Changed with what is below, so that an older skeleton is replaced.
const VERSION: &str = "1\n";
const VERSION_FILE: &str = "etc/epagent-skeleton";
const QUOTA: Quota = Quota::mib(16);

/// `/` as Debian has it since usr-merge, less what the jail makes itself.
const FOLDERS: [&str; 25] = [
    "usr",
    "etc",
    "etc/alternatives",
    "etc/ssl",
    "etc/apt",
    "var",
    "var/lib",
    "var/lib/dpkg",
    "var/cache",
    "var/log",
    "var/tmp",
    "root",
    "home",
    "app",
    "opt",
    "srv",
    "mnt",
    "target",
    "tmp",
    "run",
    "proc",
    "dev",
    "sys",
    "var/lib/apt",
    "var/cache/apt",
];
const LINKS: [(&str, &str); 10] = [
    ("bin", "usr/bin"),
    ("sbin", "usr/sbin"),
    ("lib", "usr/lib"),
    ("lib32", "usr/lib32"),
    ("lib64", "usr/lib64"),
    ("libx32", "usr/libx32"),
    ("etc/os-release", "../usr/lib/os-release"),
    ("etc/mtab", "../proc/self/mounts"),
    ("etc/localtime", "/usr/share/zoneinfo/Etc/UTC"),
    ("var/run", "../run"),
];
const FILES: [(&str, &str); 10] = [
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n\
                    _apt:x:100:65534::/nonexistent:/usr/sbin/nologin\n",
    ),
    ("etc/group", "root:x:0:\ntty:x:5:\nstaff:x:50:\nnogroup:x:65534:\n"),
    ("etc/nsswitch.conf", "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n"),
    ("etc/subuid", "root:0:65536\n"),
    ("etc/subgid", "root:0:65536\n"),
    ("etc/shells", "/bin/sh\n"),
    ("etc/hosts", ""),
    ("etc/hostname", ""),
    ("etc/resolv.conf", ""),
    (VERSION_FILE, VERSION),
];
/// Files of the host that programs in its /usr need to start at all: where libraries are.
const COPIED: [&str; 1] = ["etc/ld.so.cache"];
/// No copied file is nearly as large.
const COPY_BYTES_MAX: u64 = 4 << 20;

/// The current skeleton; made when there is none of this version.
pub fn ensure(pool: &Pool) -> Result<ImageId, WorkError> {
    let name = epagent_storage::ImageName::new(HOST_IMAGE).map_err(epagent_storage::Error::from)?;
    if let Some(current) = pool.image_current(&name)?
        && version(&pool.image_open(&current)?).as_deref() == Some(VERSION)
    {
        return Ok(current);
    }
    let staging = StagingId::new(HOST_IMAGE).map_err(epagent_storage::Error::from)?;
    pool.staging_abort(&staging)?;
    let tree = pool.image_stage(&staging, &name, QUOTA)?;
    fill(&tree).map_err(|source| WorkError::Call { operation: "write the skeleton image", source })?;
    Ok(pool.image_publish(&staging, &name)?)
}

fn version(tree: &OwnedFd) -> Option<String> {
    let file =
        openat(tree, VERSION_FILE, OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW, Mode::empty())
            .ok()?;
    let mut text = String::new();
    File::from(file).take(64).read_to_string(&mut text).ok()?;
    Some(text)
}

fn fill(tree: &OwnedFd) -> std::io::Result<()> {
    let all = Mode::from_bits_truncate(0o755);
    for folder in FOLDERS {
        ignore_existing(mkdirat(tree.as_fd(), folder, all))?;
    }
    for (link, target) in LINKS {
        ignore_existing(symlinkat(target, tree.as_fd(), link))?;
    }
    for (path, text) in FILES {
        write(tree, path, text.as_bytes())?;
    }
    for path in COPIED {
        let mut bytes = Vec::new();
        let read =
            File::open(format!("/{path}")).and_then(|file| file.take(COPY_BYTES_MAX).read_to_end(&mut bytes));
        if read.is_ok() {
            write(tree, path, &bytes)?;
        }
    }
    Ok(())
}

fn write(tree: &OwnedFd, path: &str, bytes: &[u8]) -> std::io::Result<()> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    let file = openat(tree, path, flags, Mode::from_bits_truncate(0o644))?;
    File::from(file).write_all(bytes)
}

fn ignore_existing(result: nix::Result<()>) -> nix::Result<()> {
    match result {
        Err(Errno::EEXIST) => Ok(()),
        result => result,
    }
}
