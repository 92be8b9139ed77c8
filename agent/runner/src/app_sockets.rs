//! The folders in which apps listen on unix sockets, one per instance, for the balancer and nobody else.
//!
//! ```text
//!   RUN/apps/          0710 root:balancer
//!   RUN/apps/JAIL/     a tmpfs of its own, 2770 app:balancer; in the jail it is mounted at /run/app
//!   RUN/apps/JAIL/app.sock   made by the app, with the balancer's group, since the folder hands it down
//! ```
//!
//! Each is a file system of its own, so that what a tenant fills is his own, and small: a socket takes an inode and no
//! block. It is the tenant's to change at any moment, so nobody here resolves a name in it by string: [`AppSockets::connect`]
//! opens the one file by its folder's descriptor, follows no link, looks at what it has, and connects to that.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use epagent_wire::name::JailId;
use epagent_wire::runner::SOCKET_NAME;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;
use rustix::fs::{FileType, OFlags, ResolveFlags, fstat, openat2};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::config::Config;
use crate::sys;
use crate::work::WorkError;

/// Bytes of one folder: whatever an app puts beside its socket.
const FOLDER_BYTES: u32 = 64 << 10;
/// Inodes of one folder.
const FOLDER_INODES: u32 = 64;
/// Where the folder is in the jail.
pub const IN_JAIL: &str = "/run/app";

/// `RUN/apps`, by descriptor.
#[derive(Debug)]
pub struct AppSockets {
    _folder: OwnedFd,
    path: PathBuf,
    /// None: the configuration names no balancer, and there are no such folders.
    balancer_gid: Option<u32>,
}

/// Why an app's socket can't be connected to.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("there is no {SOCKET_NAME} yet")]
    Missing,
    #[error("{SOCKET_NAME} is no socket, or one with several names")]
    NoSocket,
    #[error("a symlink stands in place of {SOCKET_NAME}")]
    Symlink,
    #[error("{SOCKET_NAME} does not accept connections")]
    Refused(#[source] Errno),
    #[error("open {SOCKET_NAME}")]
    Call(#[source] Errno),
}

impl AppSockets {
    /// Makes the folder of folders when it is missing.
    pub fn open(config: &Config) -> Result<AppSockets, WorkError> {
        let folder = config.run_dir.join("apps");
        let made = || -> io::Result<OwnedFd> {
            fs::DirBuilder::new().recursive(true).mode(0o710).create(&folder)?;
            chown(&folder, Some(0), Some(config.balancer_gid.unwrap_or(0)))?;
            fs::set_permissions(&folder, fs::Permissions::from_mode(0o710))?;
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            Ok(open(&folder, flags, Mode::empty())?)
        };
        let opened = made().map_err(fault("make the folder of the apps' sockets"))?;
        let path = format!("/proc/self/fd/{}", opened.as_raw_fd()).into();
        Ok(AppSockets { _folder: opened, path, balancer_gid: config.balancer_gid })
    }

    /// Whether instances can have such folders here: the balancer can be told apart, and a tenant can't send it
    /// descriptors along with bytes.
    pub fn is_possible(&self) -> bool {
        self.balancer_gid.is_some() && protected_socket().is_ok()
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the folder of an instance anew; `uid` is its root on the host.
    pub fn make(&self, jail: &JailId, uid: u32) -> Result<OwnedFd, WorkError> {
        let Some(gid) = self.balancer_gid else {
            let error = io::Error::other("the configuration names no balancer_gid");
            return Err(fault("make a folder for the app's socket")(error));
        };
        remove(&self.path, jail)?;
        let folder = self.path.join(jail.as_str());
        let made = || -> io::Result<OwnedFd> {
            fs::DirBuilder::new().mode(0o700).create(&folder)?;
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            let options =
                format!("size={FOLDER_BYTES},nr_inodes={FOLDER_INODES},mode=2770,uid={uid},gid={gid}");
            mount(Some("epagent-app"), &folder, Some("tmpfs"), flags, Some(options.as_str()))?;
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            Ok(open(&folder, flags, Mode::empty())?)
        };
        made().map_err(fault("make a folder for the app's socket"))
    }

    /// Removes the folders that are none of `known`.
    pub fn sweep(&self, known: impl Fn(&str) -> bool) -> Result<(), WorkError> {
        for name in names(&self.path).map_err(fault("list the apps' sockets"))? {
            if let (false, Ok(jail)) = (known(&name), name.parse::<JailId>()) {
                remove(&self.path, &jail)?;
            }
        }
        Ok(())
    }

    /// A connection to the instance's socket, which does not block.
    pub fn connect(&self, jail: &JailId) -> Result<OwnedFd, ConnectError> {
        let folder = self.path.join(jail.as_str());
        let call = |error: rustix::io::Errno| ConnectError::Call(Errno::from_raw(error.raw_os_error()));
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let folder = open(&folder, flags, Mode::empty()).map_err(ConnectError::Call)?;
        let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let found = openat2(&folder, SOCKET_NAME, flags, rustix::fs::Mode::empty(), within);
        let inode = match found {
            Err(rustix::io::Errno::NOENT) => return Err(ConnectError::Missing),
            Err(rustix::io::Errno::LOOP) => return Err(ConnectError::Symlink),
            found => found.map_err(call)?,
        };
        let facts = fstat(&inode).map_err(call)?;
        match FileType::from_raw_mode(facts.st_mode) {
            FileType::Symlink => return Err(ConnectError::Symlink),
            FileType::Socket if facts.st_nlink == 1 => {}
            _ => return Err(ConnectError::NoSocket),
        }
        let socket = protected_socket().map_err(ConnectError::Call)?;
        // The very inode that was looked at, whatever stands in its place by now.
        let address = SocketAddrUnix::new(format!("/proc/self/fd/{}", inode.as_raw_fd())).map_err(call)?;
        rustix::net::connect(&socket, &address)
            .map_err(|error| ConnectError::Refused(Errno::from_raw(error.raw_os_error())))?;
        Ok(socket)
    }
}

/// Removes the folder of an instance, mounted or not; one that is not there is no failure. `folders` is
/// [`AppSockets::path`], which is valid in children too.
pub fn remove(folders: &Path, jail: &JailId) -> Result<(), WorkError> {
    let folder = folders.join(jail.as_str());
    match umount2(&folder, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        // It is no mount, or not there at all.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(error) => return Err(fault("unmount the folder of the app's socket")(error.into())),
    }
    match fs::remove_dir(&folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(fault("remove the folder of the app's socket")(error))
        }
        _ => Ok(()),
    }
}

fn names(folder: &Path) -> io::Result<Vec<String>> {
    let entries = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
    Ok(entries.iter().filter_map(|entry| entry.file_name().into_string().ok()).collect())
}

/// A stream socket whose peer can't send descriptors.
fn protected_socket() -> nix::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|error| Errno::from_raw(error.raw_os_error()))?;
    sys::refuse_rights(&socket)?;
    Ok(socket)
}

fn fault(operation: &'static str) -> impl FnOnce(io::Error) -> WorkError {
    move |source| WorkError::Call { operation, source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A folder without a mount: what is looked at in it is the same.
    fn sockets(folder: &Path) -> (AppSockets, JailId) {
        let jail = JailId::new(&"shop".parse().unwrap(), 7);
        fs::create_dir(folder.join(jail.as_str())).unwrap();
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let opened = open(folder, flags, Mode::empty()).unwrap();
        (AppSockets { _folder: opened, path: folder.to_owned(), balancer_gid: Some(0) }, jail)
    }

    #[test]
    fn a_tenant_leads_nobody_to_another_socket() {
        let folder = tempfile::tempdir().unwrap();
        let (sockets, jail) = sockets(folder.path());
        if protected_socket().is_err() {
            println!("this kernel has no SO_PASSRIGHTS: not looked at");
            return;
        }
        let own = folder.path().join(jail.as_str()).join(SOCKET_NAME);
        let hosts = folder.path().join("hosts.sock");
        let _hosts = UnixListener::bind(&hosts).unwrap();
        assert!(matches!(sockets.connect(&jail), Err(ConnectError::Missing)));
        std::os::unix::fs::symlink(&hosts, &own).unwrap();
        assert!(matches!(sockets.connect(&jail), Err(ConnectError::Symlink)));
        fs::remove_file(&own).unwrap();
        fs::hard_link(&hosts, &own).unwrap();
        assert!(matches!(sockets.connect(&jail), Err(ConnectError::NoSocket)));
        fs::remove_file(&own).unwrap();
        fs::write(&own, "").unwrap();
        assert!(matches!(sockets.connect(&jail), Err(ConnectError::NoSocket)));
        fs::remove_file(&own).unwrap();
        let _own = UnixListener::bind(&own).unwrap();
        sockets.connect(&jail).unwrap();
        // The folder itself can't be swapped for a link either: its name is the runner's.
        fs::remove_dir_all(folder.path().join(jail.as_str())).unwrap();
        assert!(matches!(sockets.connect(&jail), Err(ConnectError::Call(Errno::ENOENT))));
    }
}
