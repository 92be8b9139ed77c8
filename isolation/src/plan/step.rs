//! The closed list of what init does before the app exists. Each names itself for error messages.

use std::fmt;

use crate::id::JailPath;
use crate::spec::{FileSpec, NetSpec, User};

/// File systems of the kernel's own, one new instance each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kernel {
    Proc,
    Devpts,
    Mqueue,
}

/// One step. Targets are resolved below the new root, never following a symlink.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Step {
    /// A cgroup namespace of its own, once the process is in its cgroups.
    CgroupNamespace,
    /// Nothing mounted here shows up on the host, nor the reverse.
    PrivateMounts,
    /// The root directory handed over becomes the new root.
    RootDirectory,
    RootTmpfs {
        size_bytes: u64,
    },
    Symlink {
        path: JailPath,
        target: String,
    },
    Tmpfs {
        target: JailPath,
        size_bytes: u64,
        mode: u32,
        no_exec: bool,
    },
    Mount {
        kind: Kernel,
        target: JailPath,
    },
    /// A host device node, bound to `/dev/<name>`.
    Device {
        name: &'static str,
    },
    NetworkSysctls,
    MaskProcFile {
        name: &'static str,
    },
    MaskProcDir {
        name: &'static str,
    },
    ReadOnlyProcDir {
        name: &'static str,
    },
    /// The handed-over mount number `index`.
    Attach {
        index: usize,
        target: JailPath,
    },
    File {
        file: FileSpec,
        user: User,
    },
    /// A file of the instance over one of the image; a symlink there is covered, not followed.
    BindFile {
        source: JailPath,
        target: JailPath,
    },
    ReadOnly {
        target: JailPath,
    },
    Loopback,
    /// Addresses and routes of the inner end of the veth.
    Link(NetSpec),
    Hostname {
        name: String,
    },
    /// The new root becomes `/`, the host's tree goes away.
    Pivot,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::CgroupNamespace => write!(f, "enter a cgroup namespace"),
            Step::PrivateMounts => write!(f, "make mounts private"),
            Step::RootDirectory => write!(f, "attach the root directory"),
            Step::RootTmpfs { size_bytes } => write!(f, "mount a root tmpfs of {size_bytes} bytes"),
            Step::Symlink { path, .. } => write!(f, "make symlink {path}"),
            Step::Tmpfs { target, .. } => write!(f, "mount tmpfs on {target}"),
            Step::Mount { kind: Kernel::Proc, target } => write!(f, "mount proc on {target}"),
            Step::Mount { kind: Kernel::Devpts, target } => write!(f, "mount devpts on {target}"),
            Step::Mount { kind: Kernel::Mqueue, target } => write!(f, "mount mqueue on {target}"),
            Step::Device { name } => write!(f, "bind device /dev/{name}"),
            Step::NetworkSysctls => write!(f, "set network sysctls"),
            Step::MaskProcFile { name } | Step::MaskProcDir { name } => write!(f, "mask /proc/{name}"),
            Step::ReadOnlyProcDir { name } => write!(f, "make /proc/{name} read-only"),
            Step::Attach { target, .. } => write!(f, "mount on {target}"),
            Step::File { file, .. } => write!(f, "write {}", file.path),
            Step::BindFile { target, .. } => write!(f, "bind {target}"),
            Step::ReadOnly { target } => write!(f, "make {target} read-only"),
            Step::Loopback => write!(f, "bring loopback up"),
            Step::Link(net) => write!(f, "configure the inner end of {}", net.link()),
            Step::Hostname { .. } => write!(f, "set the hostname"),
            Step::Pivot => write!(f, "pivot into the new root"),
        }
    }
}
