//! What an unprivileged part sees of the host's mounts.
//!
//! It gets a mount namespace of its own, in which the state folder appears as [`VIEW`], wherever it really lies.
//! From the copy of the host's mounts everything is taken out that a daemon has no use for. That is more than
//! tidiness: a copied mount of some pool, ours or another agent's, would keep its loop device busy for as long as
//! this process lives.
//!
//! One folder is shown as it changes: the runner mounts the folders of the apps' sockets below `run/apps` while the parts
//! run. So that folder is a mount of its own, which the host shares and the view follows ([mount_namespaces(7)]: the
//! view's copy is a slave).
//!
//! [mount_namespaces(7)]: https://man7.org/linux/man-pages/man7/mount_namespaces.7.html

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::layout::{APPS, VIEW};
use super::sys::StepError;

/// Mounts that stay, with what lies below them: where programs, libraries and their configuration may lie.
const KEPT: [&str; 9] = ["/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/proc", "/dev", "/sys"];
/// Mounts below the kept ones that go all the same.
const DROPPED: [&str; 2] = ["/sys/fs", "/sys/kernel"];

/// Makes the folder of the apps' sockets a mount that is shared, unless a predecessor that was killed has left it so.
pub fn share_apps(state: &Path) -> Result<(), StepError> {
    let apps = state.join(APPS);
    let none = None::<&str>;
    let mounts = fs::read_to_string("/proc/self/mountinfo")
        .map_err(|error| StepError::new("read /proc/self/mountinfo", error))?;
    fs::create_dir_all(&apps)
        .map_err(|error| StepError::new("make the folder of the apps' sockets", error))?;
    if !mounts.lines().filter_map(|line| line.split(' ').nth(4)).any(|path| unescape(path) == apps) {
        mount(Some(&apps), &apps, none, MsFlags::MS_BIND, none)
            .map_err(|errno| StepError::new("mount the folder of the apps' sockets", errno))?;
    }
    // Private first: bound on a shared mount it is of that one's group, and would show up wherever that one does.
    for propagation in [MsFlags::MS_PRIVATE, MsFlags::MS_SHARED] {
        mount(none, &apps, none, propagation, none)
            .map_err(|errno| StepError::new("share the folder of the apps' sockets", errno))?;
    }
    Ok(())
}

/// Undoes [`share_apps`]. A failure shows as something that was left behind.
pub fn unshare_apps(state: &Path) {
    let _ = umount2(&state.join(APPS), MntFlags::MNT_DETACH);
}

/// Moves the calling process into its own view. Needs root.
pub fn enter(state: &Path) -> Result<(), StepError> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|errno| StepError::new("unshare mounts", errno))?;
    // Detached from all other mounts, so that what the next line does to those is not done to it.
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let apps = open_tree(CWD, state.join(APPS), flags)
        .map_err(|error| StepError::new("clone the folder of the apps' sockets", error))?;
    // Before anything else: what happens here must not travel back to the host.
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    let none = None::<&str>;
    mount(none, "/", none, private, none).map_err(|errno| StepError::new("make mounts private", errno))?;
    // Without AT_RECURSIVE: the pool below the state folder is not part of the view.
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree =
        open_tree(CWD, state, flags).map_err(|errno| StepError::new("clone the state folder", errno))?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")
        .map_err(|error| StepError::new("read /proc/self/mountinfo", error))?;
    for path in superfluous(&mounts) {
        // With a mount go those below it, so some of the list are gone already.
        let _ = umount2(&path, MntFlags::MNT_DETACH);
    }
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&tree, "", CWD, VIEW, flags)
        .map_err(|errno| StepError::new(format!("mount the state folder on {VIEW}"), errno))?;
    let target = Path::new(VIEW).join(APPS);
    move_mount(&apps, "", CWD, &target, flags)
        .map_err(|errno| StepError::new("mount the folder of the apps' sockets in the view", errno))?;
    // What the runner mounts there comes in; nothing goes out.
    mount(none, &target, none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
        .map_err(|errno| StepError::new("follow the folder of the apps' sockets", errno))
}

/// The mount points to take out, in the order of mountinfo.
fn superfluous(mountinfo: &str) -> Vec<PathBuf> {
    mountinfo
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(unescape)
        .filter(|path| !is_kept(path))
        .collect()
}

fn is_kept(path: &Path) -> bool {
    let below = |folders: &[&str]| folders.iter().any(|folder| path.starts_with(folder));
    path == Path::new("/") || (below(&KEPT) && !below(&DROPPED))
}

/// mountinfo writes space, tab, newline and backslash as three octal digits (proc_pid_mountinfo(5)).
pub fn unescape(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut path = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = text.get(at + 1..at + 4).filter(|_| bytes[at] == b'\\');
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                path.push(byte);
                at += 4;
            }
            None => {
                path.push(bytes[at]);
                at += 1;
            }
        }
    }
    PathBuf::from(OsString::from_vec(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_and_strangers_mounts_are_taken_out() {
        let mountinfo = "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
                         22 21 0:20 / /proc rw - proc proc rw\n\
                         23 21 0:21 / /sys rw - sysfs sysfs rw\n\
                         24 23 0:22 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n\
                         25 21 0:30 / /srv/my\\040state/pool rw - btrfs /dev/loop0 rw\n\
                         26 21 0:31 / /usr rw - ext4 /dev/sda2 rw\n\
                         27 21 0:32 / /usrlocal rw - ext4 /dev/sda3 rw\n";
        let taken: Vec<String> =
            superfluous(mountinfo).iter().map(|path| path.to_string_lossy().into_owned()).collect();
        assert_eq!(taken, ["/sys/fs/cgroup", "/srv/my state/pool", "/usrlocal"]);
    }

    #[test]
    fn odd_escapes_stay_as_they_are() {
        for text in ["\\", "a\\0", "a\\09z", "\\ä\\"] {
            assert_eq!(unescape(text), PathBuf::from(text));
        }
        assert_eq!(unescape("a\\134b"), PathBuf::from("a\\b"));
    }
}
