//! Performs the plan's steps, in init, before any tenant code exists.
//!
//! Nothing is decided here. Mounts are made as detached objects (fsopen, open_tree) and moved to targets that were
//! reached descriptor by descriptor from the new root ([`tree`]), so that no path of the image is ever followed.

mod devices;
mod files;
mod procfs;
mod tree;

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags,
};

use crate::id::JailPath;
use crate::net::link;
use crate::plan::{Kernel, Step};
use crate::sys;
use devices::HostDevices;
use tree::Tree;

/// What the monitor hands to init for the set-up, and what init keeps of it.
#[derive(Debug)]
pub(crate) struct Builder {
    /// Detached mount of the root directory, already idmapped; taken by [`Step::RootDirectory`].
    root_mount: Option<OwnedFd>,
    /// Detached mounts by index; each is used once.
    mounts: Vec<Option<OwnedFd>>,
    devices: HostDevices,
    /// The new root, once there is one.
    tree: Option<Tree>,
    /// Our own instances of kernel file systems.
    proc: Option<OwnedFd>,
    devpts: Option<OwnedFd>,
    notes: Vec<String>,
}

/// What remains of the set-up.
#[derive(Debug)]
pub(crate) struct Built {
    /// The root of the instance's own devpts, for terminals.
    pub devpts: OwnedFd,
    /// The root of its /proc.
    pub proc: OwnedFd,
    /// What was left out, and why.
    pub notes: Vec<String>,
}

impl Builder {
    /// To be made while the host's /dev is still visible.
    pub(crate) fn new(root_mount: Option<OwnedFd>, mounts: Vec<OwnedFd>) -> io::Result<Builder> {
        Ok(Builder {
            root_mount,
            mounts: mounts.into_iter().map(Some).collect(),
            devices: HostDevices::open()?,
            tree: None,
            proc: None,
            devpts: None,
            notes: Vec::new(),
        })
    }

    /// Performs one step.
    pub(crate) fn perform(&mut self, step: &Step) -> io::Result<()> {
        match step {
            Step::CgroupNamespace => {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWCGROUP).map_err(Into::into)
            }
            Step::PrivateMounts => {
                let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
                Ok(rustix::mount::mount_change("/", flags)?)
            }
            Step::RootDirectory => {
                let mount = self.root_mount.take().ok_or_else(|| gone("the root directory"))?;
                self.attach_root(mount)
            }
            Step::RootTmpfs { size_bytes } => self.attach_root(tmpfs(*size_bytes, 0o755, false)?),
            Step::Symlink { path, target } => self.tree()?.symlink(path, target),
            Step::Tmpfs { target, size_bytes, mode, no_exec } => {
                let directory = self.tree()?.directory(target)?;
                attach(&tmpfs(*size_bytes, *mode, *no_exec)?, directory.as_fd())
            }
            Step::Mount { kind, target } => self.mount_kernel(*kind, target),
            Step::Device { name } => {
                let node = self.devices.clone_of(name)?;
                let path = JailPath::new(format!("/dev/{name}")).map_err(io::Error::other)?;
                let target = self.tree()?.empty_file(&path)?;
                attach(&node, target.as_fd())
            }
            Step::NetworkSysctls => procfs::set_network_sysctls(self.proc()?),
            Step::MaskProcFile { name } => procfs::mask_file(self.proc()?, name, &self.devices),
            Step::MaskProcDir { name } => procfs::mask_dir(self.proc()?, name),
            Step::ReadOnlyProcDir { name } => procfs::make_read_only(self.proc()?, name),
            Step::Attach { index, target } => {
                let mount = self.mounts.get_mut(*index).and_then(Option::take);
                let mount = mount.ok_or_else(|| gone("the mount source"))?;
                let is_dir = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&mount)?.st_mode).is_dir();
                let target =
                    if is_dir { self.tree()?.directory(target)? } else { self.tree()?.file(target)? };
                attach(&mount, target.as_fd())
            }
            Step::File { file, user } => files::write(self.tree()?, file, *user),
            Step::BindFile { source, target } => {
                let note = files::bind_over(self.tree()?, source, target)?;
                self.notes.extend(note);
                Ok(())
            }
            Step::ReadOnly { target } => {
                let directory = self.tree()?.existing(target)?;
                sys::mount::set_attributes(directory.as_fd(), false, sys::mount::MOUNT_ATTR_RDONLY, None)
            }
            Step::Loopback => link::loopback_up(),
            Step::Link(net) => link::configure_inner(net),
            Step::Hostname { name } => Ok(nix::unistd::sethostname(name)?),
            Step::Pivot => self.pivot(),
        }
    }

    /// After the last step.
    pub(crate) fn finish(self) -> io::Result<Built> {
        let devpts = self.devpts.ok_or_else(|| gone("devpts"))?;
        let proc = self.proc.ok_or_else(|| gone("proc"))?;
        Ok(Built { devpts, proc, notes: self.notes })
    }

    fn tree(&self) -> io::Result<&Tree> {
        self.tree.as_ref().ok_or_else(|| gone("the root"))
    }

    fn proc(&self) -> io::Result<BorrowedFd<'_>> {
        self.proc.as_ref().map(AsFd::as_fd).ok_or_else(|| gone("proc"))
    }

    /// The new root is mounted over the old one's root directory: a place that always exists. The process keeps
    /// seeing the old tree until the pivot.
    fn attach_root(&mut self, mount: OwnedFd) -> io::Result<()> {
        rustix::mount::move_mount(&mount, "", rustix::fs::CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        self.tree = Some(Tree::new(mount));
        Ok(())
    }

    fn mount_kernel(&mut self, kind: Kernel, target: &JailPath) -> io::Result<()> {
        let directory = self.tree()?.directory(target)?;
        let (name, options): (_, &[(&str, &str)]) = match kind {
            Kernel::Proc => ("proc", &[]),
            Kernel::Mqueue => ("mqueue", &[]),
            // gid 5 is tty on every distribution; ids are those of the instance.
            Kernel::Devpts => ("devpts", &[("mode", "0620"), ("ptmxmode", "0666"), ("gid", "5")]),
        };
        let no_exec = MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let mount = filesystem(name, options, no_exec)?;
        attach(&mount, directory.as_fd())?;
        match kind {
            Kernel::Proc => self.proc = Some(mount),
            Kernel::Devpts => self.devpts = Some(mount),
            Kernel::Mqueue => {}
        }
        Ok(())
    }

    /// pivot_root(".", ".") stacks the old root on the new one, from where it is detached (pivot_root(2), NOTES).
    fn pivot(&self) -> io::Result<()> {
        rustix::process::fchdir(self.tree()?.root())?;
        rustix::process::pivot_root(".", ".")?;
        rustix::mount::unmount(".", UnmountFlags::DETACH)?;
        Ok(rustix::process::chdir("/")?)
    }
}

fn gone(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{what} is not there"))
}

/// A new, detached instance of a kernel file system; always nosuid, and nodev but for none.
fn filesystem(name: &str, options: &[(&str, &str)], more: MountAttrFlags) -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen(name, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        rustix::mount::fsconfig_set_string(&context, *key, *value)?;
    }
    rustix::mount::fsconfig_create(&context)?;
    // devpts without nodev: terminals are devices.
    let nodev = if name == "devpts" { MountAttrFlags::empty() } else { MountAttrFlags::MOUNT_ATTR_NODEV };
    let flags = MountAttrFlags::MOUNT_ATTR_NOSUID | nodev | more;
    Ok(rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, flags)?)
}

/// A tmpfs bounded in bytes and, with an inode for each 8 KiB, in files.
fn tmpfs(size_bytes: u64, mode: u32, no_exec: bool) -> io::Result<OwnedFd> {
    let inodes = (size_bytes / 8192).max(256).to_string();
    let (size, mode) = (size_bytes.to_string(), format!("{mode:o}"));
    let flags = if no_exec { MountAttrFlags::MOUNT_ATTR_NOEXEC } else { MountAttrFlags::empty() };
    filesystem("tmpfs", &[("size", &size), ("mode", &mode), ("nr_inodes", &inodes)], flags)
}

/// Moves a detached mount onto what `target` refers to, be it a directory, a file or a symlink itself.
fn attach(mount: &OwnedFd, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(rustix::mount::move_mount(mount, "", target, "", flags)?)
}

/// A detached bind of what `source` refers to.
fn bind(source: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    Ok(rustix::mount::open_tree(source, "", flags)?)
}

/// A C string from text that a spec check has cleared of NULs.
pub(crate) fn c_string(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))
}
