//! Starting a monitor: the one entry point for runners.
//!
//! [`launch`] makes the cgroups and the control socket, then clones `epagent-jail` into its cgroup and returns; it does
//! not wait for the app. What goes wrong after that is told by the monitor as an `exited` event or record with
//! [`crate::monitor::record::ExitReason::StartFailed`], so that there is one place to look for every kind of end.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::cgroup::{CgroupRoot, Disk};
use crate::error::Error;
use crate::handover::{DOCUMENT_BYTES_MAX, Handover, sealed};
use crate::spec::{JailSpec, Program, RootSpec, SpecError};
use crate::sys::message::FDS_MAX;
use crate::sys::process::{FIRST_FD, Spawn, spawn};

/// Connections to a monitor that may wait to be accepted.
const CONTROL_BACKLOG: i32 = 16;
/// Largest executable that [`JailExecutable::load`] takes.
const EXECUTABLE_BYTES_MAX: u64 = 256 << 20;

/// The jail executable, copied into a sealed memfd: what runs is what was loaded, also after an upgrade on disk,
/// and none of its pages is on a disk that could stall.
#[derive(Debug)]
pub struct JailExecutable {
    image: OwnedFd,
}

/// What is the same for all instances of a node, and where this one's socket shall be.
#[derive(Debug)]
pub struct LaunchConfig<'a> {
    pub executable: &'a JailExecutable,
    pub cgroups: &'a CgroupRoot,
    /// Those on which the instance's traffic is limited: whatever its root and mounts lie on.
    pub disks: &'a [Disk],
    /// The control socket to make (mode 0600). At most 107 bytes; a leftover of the same name is replaced.
    pub control_socket: PathBuf,
}

/// Descriptors handed to the monitor; duplicated, the caller keeps its own.
#[derive(Debug, Default)]
pub struct LaunchFds<'a> {
    /// For [`crate::spec::RootSpec::Directory`].
    pub root: Option<BorrowedFd<'a>>,
    /// For [`crate::spec::MountSource::Descriptor`], by index.
    pub mounts: Vec<BorrowedFd<'a>>,
    /// For [`crate::spec::Program::Fd`].
    pub program: Option<BorrowedFd<'a>>,
    /// From [`seal_secrets`].
    pub secrets: Option<BorrowedFd<'a>>,
    /// The folder for `current.log`, `previous.log`, `exit.json`. `None`: output is thrown away.
    pub logs: Option<BorrowedFd<'a>>,
    /// The app's stdin (uploads). `None`: /dev/null.
    pub stdin: Option<BorrowedFd<'a>>,
    /// The socket over which the lease process will feed deadlines.
    pub lease: Option<BorrowedFd<'a>>,
}

/// A monitor that was started.
#[derive(Debug)]
pub struct Launched {
    /// Readable when the monitor has ended. The caller is its parent and reaps it (`waitid` on this descriptor).
    pub monitor: OwnedFd,
    pub monitor_pid: i32,
}

/// Starts the monitor of one instance.
///
/// On an error nothing runs; cgroups and socket may be left and are removed by [`crate::sweep::remove`] and
/// replaced by the next launch of the same id.
pub fn launch(config: &LaunchConfig<'_>, spec: &JailSpec, fds: &LaunchFds<'_>) -> Result<Launched, Error> {
    spec.check()?;
    check_descriptors(spec, fds)?;
    config.cgroups.create(&spec.id, &spec.limits, config.disks)?;
    let control = listen(&config.control_socket)?;
    let mut handed = Handed::default();
    let control = handed.add(control.as_fd())?;
    let handover = Handover {
        spec: spec.clone(),
        cgroup_root: config.cgroups.name().to_owned(),
        control,
        root: handed.add_if(fds.root)?,
        mounts: fds.mounts.iter().map(|fd| handed.add(*fd)).collect::<Result<_, _>>()?,
        program: handed.add_if(fds.program)?,
        secrets: handed.add_if(fds.secrets)?,
        logs: handed.add_if(fds.logs)?,
        stdin: handed.add_if(fds.stdin)?,
        lease: handed.add_if(fds.lease)?,
    };
    handed.start(&handover, config)
}

/// Secrets (name → value) as a sealed memfd for [`LaunchFds::secrets`].
pub fn seal_secrets(secrets: &BTreeMap<String, String>) -> Result<OwnedFd, Error> {
    let bytes = serde_json::to_vec(secrets).map_err(|e| Error::call("encode secrets")(io::Error::from(e)))?;
    if bytes.len() as u64 > DOCUMENT_BYTES_MAX {
        let reason = format!("{} bytes, at most {DOCUMENT_BYTES_MAX}", bytes.len());
        return Err(Error::Refused { operation: "seal secrets", reason });
    }
    sealed("secrets", &bytes, MemfdFlags::empty())
}

impl JailExecutable {
    /// Loads it once, at the start of the runner.
    pub fn load(path: &Path) -> Result<JailExecutable, Error> {
        let file = File::open(path).map_err(Error::path("open jail executable", path))?;
        let mut bytes = Vec::new();
        file.take(EXECUTABLE_BYTES_MAX)
            .read_to_end(&mut bytes)
            .map_err(Error::path("read jail executable", path))?;
        // MFD_EXEC (Linux 6.3) is asked for where sysctl vm.memfd_noexec may turn the default around.
        let image = sealed("epagent-jail", &bytes, MemfdFlags::EXEC)
            .or_else(|_| sealed("epagent-jail", &bytes, MemfdFlags::empty()))?;
        Ok(JailExecutable { image })
    }
}

fn check_descriptors(spec: &JailSpec, fds: &LaunchFds<'_>) -> Result<(), SpecError> {
    let missing = |field: &str, why: &str| Err(SpecError { field: field.to_owned(), why: why.to_owned() });
    if matches!(spec.root, RootSpec::Directory { .. }) && fds.root.is_none() {
        return missing("root", "a directory is wanted and no descriptor given");
    }
    if matches!(spec.program, Program::Fd { .. }) && fds.program.is_none() {
        return missing("program", "a descriptor is wanted and none given");
    }
    if spec.mount_sources() > fds.mounts.len() {
        return missing("mounts", "a mount names a descriptor that was not given");
    }
    Ok(())
}

/// A listening socket at `path` that only root can connect to, from the moment it exists.
fn listen(path: &Path) -> Result<OwnedFd, Error> {
    let failed = || Error::path("make control socket", path);
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(Error::path("remove old control socket", path)(e));
        }
        _ => {}
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(|e| failed()(io::Error::from(e)))?;
    // bind(2) takes the mode of the socket's own inode: there is no moment with a wider one.
    rustix::fs::fchmod(&socket, Mode::from_raw_mode(0o600)).map_err(|e| failed()(io::Error::from(e)))?;
    let address = SocketAddrUnix::new(path).map_err(|e| failed()(io::Error::from(e)))?;
    rustix::net::bind(&socket, &address).map_err(|e| failed()(io::Error::from(e)))?;
    rustix::net::listen(&socket, CONTROL_BACKLOG).map_err(|e| failed()(io::Error::from(e)))?;
    Ok(socket)
}

/// Duplicates numbered above the places they will be moved to in the new process.
#[derive(Default)]
struct Handed(Vec<OwnedFd>);

impl Handed {
    fn duplicate(fd: BorrowedFd<'_>) -> Result<OwnedFd, Error> {
        let above = FIRST_FD + FDS_MAX as i32 + 1;
        rustix::io::fcntl_dupfd_cloexec(fd, above)
            .map_err(|e| Error::call("duplicate descriptor")(io::Error::from(e)))
    }

    /// Adds one and tells its place; place 0 is kept for the handover.
    fn add(&mut self, fd: BorrowedFd<'_>) -> Result<usize, Error> {
        self.0.push(Handed::duplicate(fd)?);
        Ok(self.0.len())
    }

    fn add_if(&mut self, fd: Option<BorrowedFd<'_>>) -> Result<Option<usize>, Error> {
        fd.map(|fd| self.add(fd)).transpose()
    }

    fn start(self, handover: &Handover, config: &LaunchConfig<'_>) -> Result<Launched, Error> {
        let id = &handover.spec.id;
        let bytes =
            serde_json::to_vec(handover).map_err(|e| Error::call("encode handover")(io::Error::from(e)))?;
        let order = Handed::duplicate(sealed("handover", &bytes, MemfdFlags::empty())?.as_fd())?;
        let executable = Handed::duplicate(config.executable.image.as_fd())?;
        let null = File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .map_err(Error::path("open", "/dev/null"))?;
        let null = Handed::duplicate(null.as_fd())?;
        let cgroup_dir = config.cgroups.monitor_dir(id);
        let cgroup =
            rustix::fs::open(&cgroup_dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .map_err(|e| Error::path("open cgroup", &cgroup_dir)(io::Error::from(e)))?;
        let fds: Vec<BorrowedFd<'_>> =
            [order.as_fd()].into_iter().chain(self.0.iter().map(AsFd::as_fd)).collect();
        let count = CString::from(
            fds.len()
                .to_string()
                .into_bytes()
                .into_iter()
                .filter_map(std::num::NonZero::new)
                .collect::<Vec<_>>(),
        );
        let name = CString::from(id.as_str().bytes().filter_map(std::num::NonZero::new).collect::<Vec<_>>());
        let argv = [c"epagent-jail", count.as_c_str(), name.as_c_str()];
        let order = Spawn {
            executable: executable.as_fd(),
            argv: &argv,
            null: null.as_fd(),
            fds: &fds,
            cgroup: cgroup.as_fd(),
        };
        let (monitor_pid, monitor) = spawn(&order).map_err(Error::path("start monitor", id.as_str()))?;
        Ok(Launched { monitor, monitor_pid })
    }
}
