//! One process of the instance: the app itself, or an exec'ed command. Both get the same lockdown.
//!
//! The order inside the new process (runc's, from `standard_init_linux.go`):
//!
//! ```text
//! session, terminal, stdio → signals → rlimits → (Bootstrap: nested user namespace) → capability bounds
//!   → groups, gid, uid → capabilities → working directory → no_new_privs → close-on-exec → seccomp → exec
//! ```
//!
//! The memory of the process is a copy of init's until exec, and stays non-dumpable: nobody in the instance can look
//! into it. What fails is told through a close-on-exec pipe, so the reader sees either an error or, on exec, its end.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ffi::CString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use caps::{CapSet, Capability};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid};
use rustix::process::{Resource, Rlimit};
use serde::{Deserialize, Serialize};

use crate::apply::c_string;
use crate::monitor::protocol::ExecOutcome;
use crate::seccomp::Filters;
use crate::spec::{Limits, Profile, User};
use crate::sys::process::{self, Fork, SingleThreaded};

/// Where commands are searched when the environment has no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Exit codes as shells and container tools use them.
pub(super) const CODE_SETUP: i32 = 125;
const CODE_NOT_EXECUTABLE: i32 = 126;
const CODE_NOT_FOUND: i32 = 127;

/// What to run.
#[derive(Debug)]
pub(super) struct Command<'a> {
    pub argv: &'a [String],
    pub cwd: &'a str,
    pub env: &'a BTreeMap<String, String>,
    pub user: User,
    pub stdio: [BorrowedFd<'a>; 3],
    /// Whether `stdio` is a terminal to become the controlling one.
    pub tty: bool,
    /// Executed instead of what `argv[0]` names.
    pub program: Option<BorrowedFd<'a>>,
}

/// What is the same for every process of the instance.
#[derive(Debug)]
pub(super) struct Lockdown<'a> {
    pub profile: Profile,
    pub limits: &'a Limits,
    pub umask: u32,
    pub filters: &'a Filters,
}

/// A process that is about to exec, or has.
#[derive(Debug)]
pub(super) struct Started {
    pub pid: i32,
    /// Ends at exec; before it, an error can be read from it.
    pub report: OwnedFd,
    /// A Bootstrap process waits for its ids behind this.
    nested: Option<(OwnedFd, OwnedFd)>,
}

/// Why a process never became its program.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct StartError {
    pub step: String,
    pub error: String,
    pub code: i32,
}

impl From<StartError> for ExecOutcome {
    fn from(error: StartError) -> ExecOutcome {
        ExecOutcome::Failed { error: error.error, code: error.code }
    }
}

/// Forks and locks down.
pub(super) fn start(
    token: &SingleThreaded,
    command: &Command<'_>,
    lockdown: &Lockdown<'_>,
) -> io::Result<Started> {
    let (report, report_in) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let nested = match lockdown.profile {
        Profile::Bootstrap => Some(NestedPipes::new()?),
        _ => None,
    };
    match process::fork(token, 0, None)? {
        Fork::Child => {
            let nested = nested.map(NestedPipes::into_child);
            let error = match become_program(command, lockdown, nested.as_ref()) {
                Ok(never) => match never {},
                Err(error) => error,
            };
            let code = error.code;
            let _ = serde_json::to_vec(&error).map(|bytes| std::fs::File::from(report_in).write_all(&bytes));
            process::exit_now(code)
        }
        Fork::Parent { pid, pidfd: _ } => {
            Ok(Started { pid, report, nested: nested.map(NestedPipes::into_parent) })
        }
    }
}

impl Started {
    /// Lets a Bootstrap process have its ids: the same ones, mapped one to one, one namespace further in.
    pub(super) fn map_nested(&mut self, proc: BorrowedFd<'_>) -> io::Result<()> {
        let Some((ready, go)) = self.nested.take() else { return Ok(()) };
        if std::fs::File::from(ready).read(&mut [0])? == 0 {
            // It ended before; its report says why.
            return Ok(());
        }
        for file in ["uid_map", "gid_map"] {
            let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC;
            let name = format!("{}/{file}", self.pid);
            let file = rustix::fs::openat(proc, &name, flags, rustix::fs::Mode::empty())?;
            rustix::io::write(&file, b"0 0 65536\n")?;
        }
        rustix::io::write(&go, b"g")?;
        Ok(())
    }

    /// What the report says, once it is readable: `None` after a successful exec.
    pub(super) fn read_report(report: OwnedFd) -> Option<StartError> {
        let mut bytes = Vec::new();
        let read = std::fs::File::from(report).read_to_end(&mut bytes);
        if read.is_ok() && bytes.is_empty() {
            return None;
        }
        let broken = |_| setup("report", "the process ended before its program");
        Some(serde_json::from_slice(&bytes).unwrap_or_else(broken))
    }
}

/// `ready`: child → parent; `go`: parent → child.
struct NestedPipes {
    ready: (OwnedFd, OwnedFd),
    go: (OwnedFd, OwnedFd),
}

impl NestedPipes {
    fn new() -> io::Result<NestedPipes> {
        let pipe = || nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC);
        Ok(NestedPipes { ready: pipe()?, go: pipe()? })
    }

    fn into_child(self) -> (OwnedFd, OwnedFd) {
        (self.ready.1, self.go.0)
    }

    fn into_parent(self) -> (OwnedFd, OwnedFd) {
        (self.ready.0, self.go.1)
    }
}

fn setup(step: &str, error: impl std::fmt::Display) -> StartError {
    StartError { step: step.to_owned(), error: format!("{step}: {error}"), code: CODE_SETUP }
}

/// `map_err` adapter naming the step.
fn at<E: std::fmt::Display>(step: &'static str) -> impl FnOnce(E) -> StartError {
    move |error| setup(step, error)
}

fn become_program(
    command: &Command<'_>,
    lockdown: &Lockdown<'_>,
    nested: Option<&(OwnedFd, OwnedFd)>,
) -> Result<Infallible, StartError> {
    take_terminal(command).map_err(at("set up stdio"))?;
    process::default_signals();
    nix::sys::signal::SigSet::empty().thread_set_mask().map_err(at("unblock signals"))?;
    set_rlimits(lockdown.limits).map_err(at("set resource limits"))?;
    if let Some((ready, go)) = nested {
        enter_nested(ready, go).map_err(at("enter a nested user namespace"))?;
    }
    bound_capabilities(lockdown.profile).map_err(at("bound capabilities"))?;
    become_user(command.user).map_err(at("change user"))?;
    keep_capabilities(lockdown.profile, command.user).map_err(at("set capabilities"))?;
    enter(command.cwd)
        .map_err(|error| setup("enter working directory", format!("{}: {error}", command.cwd)))?;
    rustix::thread::set_no_new_privs(true).map_err(at("set no_new_privs"))?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(lockdown.umask & 0o777));
    process::close_on_exec_from(3).map_err(at("mark descriptors close-on-exec"))?;
    let image = Image::prepare(command).map_err(at("prepare arguments"))?;
    lockdown.filters.install().map_err(at("install seccomp filters"))?;
    image.execute(command)
}

fn take_terminal(command: &Command<'_>) -> io::Result<()> {
    rustix::process::setsid()?;
    let [stdin, stdout, stderr] = command.stdio;
    rustix::stdio::dup2_stdin(stdin)?;
    rustix::stdio::dup2_stdout(stdout)?;
    rustix::stdio::dup2_stderr(stderr)?;
    if command.tty {
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
    }
    Ok(())
}

/// A hard limit cannot be raised above the one we have without a capability that no jail has: it is cut.
fn set_rlimits(limits: &Limits) -> io::Result<()> {
    for (resource, wanted) in [
        (Resource::Nofile, limits.open_files),
        (Resource::Core, limits.core_bytes),
        (Resource::Fsize, limits.file_bytes),
    ] {
        let possible = rustix::process::getrlimit(resource).maximum.unwrap_or(u64::MAX);
        let value = Some(wanted.min(possible));
        rustix::process::setrlimit(resource, Rlimit { current: value, maximum: value })?;
    }
    Ok(())
}

/// A user and a mount namespace below the instance's: here CAP_SYS_ADMIN may mount, while every mount made by init
/// is locked with its flags (mount_namespaces(7)). /proc files of a non-dumpable process belong to the host's root,
/// so it is dumpable while init writes its maps; no tenant code exists yet.
fn enter_nested(ready: &OwnedFd, go: &OwnedFd) -> io::Result<()> {
    use rustix::process::{DumpableBehavior, set_dumpable_behavior};
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)?;
    set_dumpable_behavior(DumpableBehavior::Dumpable)?;
    rustix::io::write(ready, b"r")?;
    if rustix::io::read(go, &mut [0])? == 0 {
        return Err(io::Error::other("init did not map the ids"));
    }
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    // The new namespace maps the same ids, so we are its root already; say so to the credentials.
    become_user(User::default())
}

/// What root of the instance may do inside its user namespace. Docker's default list less NET_RAW, MKNOD, SETPCAP,
/// AUDIT_WRITE, SETFCAP and SYS_CHROOT.
const APP: [Capability; 8] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_KILL,
    Capability::CAP_NET_BIND_SERVICE,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
];
/// Maintainer scripts: chroot, and file capabilities of packages such as iputils-ping.
const BUILD: [Capability; 2] = [Capability::CAP_SYS_CHROOT, Capability::CAP_SETFCAP];
/// mmdebstrap: mounts and nodes in the tree it makes.
const BOOTSTRAP: [Capability; 4] = [
    Capability::CAP_SYS_ADMIN,
    Capability::CAP_MKNOD,
    Capability::CAP_SETPCAP,
    Capability::CAP_DAC_READ_SEARCH,
];

fn kept(profile: Profile) -> caps::CapsHashSet {
    let mut kept: caps::CapsHashSet = APP.into_iter().collect();
    match profile {
        Profile::App => {}
        Profile::Build => kept.extend(BUILD),
        Profile::Bootstrap => kept.extend(BUILD.into_iter().chain(BOOTSTRAP)),
    }
    kept
}

fn bound_capabilities(profile: Profile) -> Result<(), caps::errors::CapsError> {
    static KNOWN: OnceLock<caps::CapsHashSet> = OnceLock::new();
    let kept = kept(profile);
    for capability in KNOWN.get_or_init(caps::runtime::thread_all_supported).difference(&kept) {
        caps::drop(None, CapSet::Bounding, *capability)?;
    }
    Ok(())
}

fn become_user(user: User) -> io::Result<()> {
    nix::unistd::setgroups(&[])?;
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    nix::unistd::setresgid(gid, gid, gid)?;
    Ok(nix::unistd::setresuid(uid, uid, uid)?)
}

/// Root keeps the list; any other user has nothing left after setresuid, and the ambient set is empty.
fn keep_capabilities(profile: Profile, user: User) -> Result<(), caps::errors::CapsError> {
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    let kept = if user.uid == 0 { kept(profile) } else { caps::CapsHashSet::new() };
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)
}

/// Enters a directory and verifies that it is below the root (CVE-2024-21626).
fn enter(cwd: &str) -> io::Result<()> {
    rustix::process::chdir(cwd)?;
    match rustix::process::getcwd(Vec::new())?.to_bytes().first() {
        Some(b'/') => Ok(()),
        _ => Err(io::Error::other("lies outside the root")),
    }
}

/// Arguments as exec wants them.
struct Image {
    argv: Vec<CString>,
    env: Vec<CString>,
    candidates: Vec<CString>,
}

impl Image {
    fn prepare(command: &Command<'_>) -> io::Result<Image> {
        let name = command.argv.first().map(String::as_str).unwrap_or_default();
        let candidates: Vec<String> = if name.contains('/') {
            vec![name.to_owned()]
        } else {
            let path = command.env.get("PATH").map_or(DEFAULT_PATH, String::as_str);
            path.split(':').filter(|dir| !dir.is_empty()).map(|dir| format!("{dir}/{name}")).collect()
        };
        let pair = |(name, value): (&String, &String)| c_string(&format!("{name}={value}"));
        Ok(Image {
            argv: command.argv.iter().map(|arg| c_string(arg)).collect::<io::Result<_>>()?,
            env: command.env.iter().map(pair).collect::<io::Result<_>>()?,
            candidates: candidates.iter().map(|path| c_string(path)).collect::<io::Result<_>>()?,
        })
    }

    /// As execvp(3): the search goes on after "not there" and "may not", and remembers the latter.
    fn execute(&self, command: &Command<'_>) -> Result<Infallible, StartError> {
        use nix::errno::Errno;
        let name = command.argv.first().map(String::as_str).unwrap_or_default();
        if let Some(program) = command.program {
            let Err(errno) = nix::unistd::execveat(
                program,
                c"",
                &self.argv,
                &self.env,
                nix::fcntl::AtFlags::AT_EMPTY_PATH,
            );
            return Err(not_executable(name, errno));
        }
        let mut worst = None;
        for path in &self.candidates {
            let Err(errno) = nix::unistd::execve(path, &self.argv, &self.env);
            match errno {
                // A script or binary that is there, while what it asks to be run by is not.
                Errno::ENOENT
                    if nix::unistd::access(path.as_c_str(), nix::unistd::AccessFlags::F_OK).is_ok() =>
                {
                    let error = format!("{name}: its interpreter (or dynamic loader) is not in the image");
                    return Err(StartError { step: "exec".to_owned(), error, code: CODE_NOT_FOUND });
                }
                Errno::ENOENT | Errno::ENOTDIR => {}
                Errno::EACCES => worst = Some(errno),
                errno => return Err(not_executable(name, errno)),
            }
        }
        Err(match worst {
            Some(errno) => not_executable(name, errno),
            None => StartError {
                step: "exec".to_owned(),
                error: format!("command not found: {name}"),
                code: CODE_NOT_FOUND,
            },
        })
    }
}

fn not_executable(name: &str, errno: nix::errno::Errno) -> StartError {
    StartError {
        step: "exec".to_owned(),
        error: format!("cannot execute {name}: {}", errno.desc()),
        code: CODE_NOT_EXECUTABLE,
    }
}

/// The pipe end is only polled by init.
impl AsFd for Started {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.report.as_fd()
    }
}
