//! The state folder: what lies where, whose it is, and who may reach it.
//!
//! ```text
//! DIR/                      0711 root
//!   admin.sock read.sock    the API
//!   run/                    0755 root; runner.sock balancer.sock lease.sock, jail/ 0700 (one socket per monitor),
//!                           apps/ 0710 root:balancer (the folders in which apps listen, each a mount)
//!   etc/                    runner.toml epagentd.toml, written at each start
//!   brain/ balancer/ lease/ 0700, each of its own user
//!   runner/                 0700 root
//!   pool.img pool/          the loop file and its mount point
//!   log/                    0700 root; stderr of each process
//!   lock node unclean processes   the supervisor's own
//!   ready                   there while the API answers; a link into /proc, so that it dies with the supervisor
//! ```
//!
//! A checkout or a state folder below /root is closed to the unprivileged processes. They see DIR as [`VIEW`] in
//! a mount namespace of their own, so every path in a file they read begins with that.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use super::error::DevError;
use super::node::Node;

/// Where the unprivileged processes see the state folder. The folder exists on every Debian and is empty there.
pub const VIEW: &str = "/mnt";

/// Below the state folder: the folders in which apps listen on unix sockets.
pub const APPS: &str = "run/apps";

/// The longest state folder path: a unix socket's path has at most 107 bytes (unix(7)), and the longest of ours is
/// `DIR/run/jail/ID` with an id of 48 bytes and room for an ending.
pub const PATH_BYTES_MAX: usize = 107 - "/run/jail/".len() - 48 - 5;

/// The numeric users of the unprivileged processes of one node; the groups have the same numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Users {
    pub brain: u32,
    pub balancer: u32,
    pub lease: u32,
}

impl Users {
    /// Four ids per node, above the 60000 that adduser hands out and below the 65533 of Debian's reserved ones.
    pub fn of(node: Node) -> Self {
        let first = 60_600 + 4 * u32::from(node.number());
        Self { brain: first, balancer: first + 1, lease: first + 2 }
    }
}

/// An opened state folder.
#[derive(Debug, Clone)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    /// Makes the folder if it is not there, and refuses one that is somebody else's.
    pub fn open(path: &Path) -> Result<Self, DevError> {
        let failed = |source| DevError::Folder { path: path.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o711).create(path).map_err(failed)?;
        let root = path.canonicalize().map_err(failed)?;
        if root.as_os_str().len() > PATH_BYTES_MAX {
            return Err(DevError::PathTooLong { path: root, bytes_max: PATH_BYTES_MAX });
        }
        let meta = root.metadata().map_err(failed)?;
        if meta.uid() != 0 || meta.mode() & 0o022 != 0 {
            return Err(DevError::NotOurs { path: root, reason: "others than root can write to it" });
        }
        let layout = Self { root };
        let mut entries = fs::read_dir(&layout.root).map_err(failed)?;
        if entries.next().is_some() && !layout.path("lock").exists() {
            let reason = "it is not empty and holds no state of epagent";
            return Err(DevError::NotOurs { path: layout.root, reason });
        }
        Ok(layout)
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A path below the folder, as root sees it.
    pub fn path(&self, below: &str) -> PathBuf {
        self.root.join(below)
    }

    pub fn pool_file(&self) -> PathBuf {
        self.path("pool.img")
    }

    pub fn pool_mount(&self) -> PathBuf {
        self.path("pool")
    }

    /// Makes the folders, each with its owner and mode. Run at each start, since a node's users follow its number.
    pub fn make_folders(&self, users: Users) -> Result<(), DevError> {
        const ROOT: u32 = 0;
        // `run/jail` and `pool` are the runner's: made here so that their modes don't hang on anyone's umask.
        let folders = [
            ("", ROOT, 0o711),
            ("run", ROOT, 0o755),
            ("run/jail", ROOT, 0o700),
            ("etc", ROOT, 0o755),
            ("runner", ROOT, 0o700),
            ("pool", ROOT, 0o700),
            ("log", ROOT, 0o700),
            ("brain", users.brain, 0o700),
            ("balancer", users.balancer, 0o700),
            ("lease", users.lease, 0o700),
        ];
        for (name, owner, mode) in folders {
            let path = self.path(name);
            make_folder(&path, owner, mode).map_err(|source| DevError::Folder { path, source })?;
        }
        Ok(())
    }
}

fn make_folder(path: &Path, owner: u32, mode: u32) -> io::Result<()> {
    match DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let meta = fs::symlink_metadata(path)?;
    if !meta.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    if meta.uid() != owner || meta.gid() != owner {
        // The node's number changed: what the process saved under the old one stays its own.
        if owner != 0 {
            own_below(path, owner)?;
        }
        chown(path, Some(owner), Some(owner))?;
    }
    if meta.mode() & 0o7777 != mode {
        fs::set_permissions(path, Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// Gives everything below `folder` to `owner`. The old owner may have planted links, so none is followed; it can't
/// swap names under our feet, since none of its processes lives any more.
fn own_below(folder: &Path, owner: u32) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let meta = entry.path().symlink_metadata()?;
        if meta.uid() != owner || meta.gid() != owner {
            std::os::unix::fs::lchown(entry.path(), Some(owner), Some(owner))?;
        }
        if meta.is_dir() {
            own_below(&entry.path(), owner)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_of_two_nodes_are_never_the_same() {
        let all: Vec<u32> = Node::all()
            .flat_map(|node| {
                let users = Users::of(node);
                [users.brain, users.balancer, users.lease]
            })
            .collect();
        let mut unique = all.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), all.len());
        assert!(unique.iter().all(|uid| (60_600..65_000).contains(uid)));
    }

    #[test]
    fn a_folder_of_others_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("precious"), "x").unwrap();
        assert!(matches!(Layout::open(dir.path()), Err(DevError::NotOurs { .. })));
        assert!(Layout::open(&dir.path().join("new")).is_ok());
    }
}
