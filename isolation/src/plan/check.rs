//! Whether a spec can be carried out at all, before anything is touched.
//!
//! Runs on both sides: in the launching process, so that a bad order costs nothing, and again in the monitor.

use std::collections::BTreeSet;

use crate::id::JailPath;
use crate::spec::*;

/// Longest hostname, as sethostname(2) takes it.
const HOSTNAME_LEN_MAX: usize = 64;
/// Longest interface name (IFNAMSIZ less its NUL).
const LINK_NAME_LEN_MAX: usize = 15;
/// Below this, not even our init and a shell start.
const MEMORY_BYTES_MIN: u64 = 4 << 20;
/// Below this, reading a program takes longer than anybody waits. (0 would be no limit at all to v1.)
const IO_BYTES_PER_S_MIN: u64 = 1 << 20;
/// Init, the app, and one child of it.
const PIDS_MIN: u32 = 3;
/// Where only we mount.
const RESERVED: [&str; 3] = ["/proc", "/dev", "/sys"];

impl JailSpec {
    /// Refuses what cannot work or must not be, naming the field.
    pub fn check(&self) -> Result<(), SpecError> {
        check_hostname(&self.hostname)?;
        check_root(&self.root)?;
        check_mounts(&self.mounts)?;
        check_files(&self.files)?;
        check_program(&self.program)?;
        check_user("user", self.user)?;
        check_limits(&self.limits)?;
        self.network.as_ref().map_or(Ok(()), check_network)
    }

    /// How many mount sources [`crate::launch::LaunchFds::mounts`] must hold at least.
    pub(crate) fn mount_sources(&self) -> usize {
        let indexes = self.mounts.iter().filter_map(|mount| match mount.source {
            MountSource::Descriptor { index, .. } => Some(index + 1),
            MountSource::Tmpfs { .. } => None,
        });
        indexes.max().unwrap_or(0)
    }
}

fn fault<T>(field: impl Into<String>, why: impl Into<String>) -> Result<T, SpecError> {
    Err(SpecError { field: field.into(), why: why.into() })
}

fn check_hostname(name: &str) -> Result<(), SpecError> {
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
    match !name.is_empty() && name.len() <= HOSTNAME_LEN_MAX && plain {
        true => Ok(()),
        false => {
            fault("hostname", format!("{name:?} is not 1 to {HOSTNAME_LEN_MAX} letters, digits, '-' and '.'"))
        }
    }
}

fn check_root(root: &RootSpec) -> Result<(), SpecError> {
    let RootSpec::Tmpfs { size_bytes, symlinks } = root else { return Ok(()) };
    check_size("root.size_bytes", *size_bytes)?;
    if symlinks.len() > FILES_MAX {
        return fault("root.symlinks", format!("more than {FILES_MAX}"));
    }
    match symlinks.iter().find(|link| link.target.is_empty() || link.target.contains('\0')) {
        Some(link) => {
            fault("root.symlinks", format!("{} has a target that is empty or holds a NUL", link.path))
        }
        None => Ok(()),
    }
}

fn check_size(field: &str, bytes: u64) -> Result<(), SpecError> {
    // tmpfs takes 0 as "no limit".
    if bytes < 4096 { fault(field, format!("{bytes} bytes is less than a page")) } else { Ok(()) }
}

fn check_mounts(mounts: &[MountSpec]) -> Result<(), SpecError> {
    if mounts.len() > MOUNTS_MAX {
        return fault("mounts", format!("{} mounts, at most {MOUNTS_MAX}", mounts.len()));
    }
    let mut seen = BTreeSet::new();
    for mount in mounts {
        let field = format!("mounts[{}]", mount.target);
        if mount.target.as_str() == "/" || RESERVED.iter().any(|dir| mount.target.is_in(dir)) {
            return fault(field, "/, /proc, /dev and /sys are not for mounts");
        }
        if mount.target.as_str() == FILES_DIR {
            return fault(field, "holds the files; mount below it");
        }
        if !seen.insert(&mount.target) {
            return fault(field, "is there twice");
        }
        match mount.source {
            MountSource::Descriptor { index, .. } if index >= MOUNTS_MAX => {
                return fault(field, format!("source index {index}, at most {}", MOUNTS_MAX - 1));
            }
            MountSource::Tmpfs { size_bytes, .. } => check_size(&field, size_bytes)?,
            MountSource::Descriptor { .. } => {}
        }
    }
    Ok(())
}

fn check_files(files: &[FileSpec]) -> Result<(), SpecError> {
    if files.len() > FILES_MAX {
        return fault("files", format!("{} files, at most {FILES_MAX}", files.len()));
    }
    let bytes: usize = files.iter().map(|file| file.content.len()).sum();
    if bytes > FILES_BYTES_MAX {
        return fault("files", format!("{bytes} bytes, at most {FILES_BYTES_MAX}"));
    }
    let misplaced =
        |path: &JailPath| !path.is_in(FILES_DIR) || path.as_str() == FILES_DIR || path.is_in(ETC_DIR);
    match files.iter().find(|file| misplaced(&file.path)) {
        Some(file) => {
            fault(format!("files[{}]", file.path), format!("must be below {FILES_DIR} and not in {ETC_DIR}"))
        }
        None => Ok(()),
    }
}

fn check_program(program: &Program) -> Result<(), SpecError> {
    let (argv, _, env) = program.parts();
    check_command("program", argv, env)
}

/// Shared with exec requests, which bring a command of their own.
pub(crate) fn check_command(
    field: &str,
    argv: &[String],
    env: &std::collections::BTreeMap<String, String>,
) -> Result<(), SpecError> {
    if argv.first().is_none_or(|command| command.is_empty()) {
        return fault(format!("{field}.argv"), "names no command");
    }
    if argv.iter().chain(env.keys()).chain(env.values()).any(|text| text.contains('\0')) {
        return fault(field, "holds a NUL");
    }
    if let Some(name) = env.keys().find(|name| name.is_empty() || name.contains('=')) {
        return fault(format!("{field}.env"), format!("{name:?} is no name of a variable"));
    }
    let bytes: usize = argv.iter().chain(env.keys()).chain(env.values()).map(|text| text.len() + 1).sum();
    match bytes > ARGUMENTS_BYTES_MAX {
        true => {
            fault(field, format!("{bytes} bytes of arguments and environment, at most {ARGUMENTS_BYTES_MAX}"))
        }
        false => Ok(()),
    }
}

pub(crate) fn check_user(field: &str, user: User) -> Result<(), SpecError> {
    match user.uid.max(user.gid) < crate::id::IDS_PER_RANGE {
        true => Ok(()),
        false => fault(field, format!("{}:{} is outside 0..65536", user.uid, user.gid)),
    }
}

fn check_limits(limits: &Limits) -> Result<(), SpecError> {
    if limits.memory_bytes < MEMORY_BYTES_MIN {
        return fault(
            "limits.memory_bytes",
            format!("{} is less than {MEMORY_BYTES_MIN}", limits.memory_bytes),
        );
    }
    if limits.pids < PIDS_MIN {
        return fault("limits.pids", format!("{} is less than {PIDS_MIN}", limits.pids));
    }
    if limits.cpu_percent == 0 || limits.cpu_percent > 100 * 1024 {
        return fault("limits.cpu_percent", format!("{} is not in 1..=102400", limits.cpu_percent));
    }
    if let Some(rate) = limits.io_bytes_per_s.filter(|rate| *rate < IO_BYTES_PER_S_MIN) {
        return fault("limits.io_bytes_per_s", format!("{rate} is less than {IO_BYTES_PER_S_MIN}"));
    }
    if limits.open_files < 16 {
        return fault("limits.open_files", format!("{} is less than 16", limits.open_files));
    }
    check_size("limits.log_bytes", limits.log_bytes)?;
    check_size("limits.tmpfs_bytes", limits.tmpfs_bytes)
}

fn check_network(network: &NetSpec) -> Result<(), SpecError> {
    let link = network.link();
    if link.len() > LINK_NAME_LEN_MAX {
        return fault("network", format!("interface name {link:?} is longer than {LINK_NAME_LEN_MAX}"));
    }
    // RFC 8200: the least an IPv6 link must carry.
    if !(1280..=65535).contains(&network.mtu) {
        return fault("network.mtu", format!("{} is not in 1280..=65535", network.mtu));
    }
    let pair = network.v4.is_none_or(|v4| u32::from(v4.host) ^ u32::from(v4.inside) == 1)
        && network.v6.is_none_or(|v6| u128::from(v6.host) ^ u128::from(v6.inside) == 1);
    if pair { Ok(()) } else { fault("network", "host and inside are not the two addresses of a /31 (/127)") }
}
