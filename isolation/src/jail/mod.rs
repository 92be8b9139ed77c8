//! `epagent-jail`: the processes of one instance that are ours.
//!
//! ```text
//! runner ─ launch ─▶ monitor (ID/monitor) ─┬─▶ log writer (ID/monitor)   [log_writer]: alone touches the log folder
//!                     [monitor, core]      └─▶ init (ID/app), PID 1      [init] ─▶ the app, exec'ed commands
//! ```
//!
//! All are forks of one static, single-threaded program; nothing is executed but the app. The monitor outlives the
//! runner and everything else. After the start it does nothing but wait, and touches no file system but cgroupfs.

mod birth;
mod channel;
mod command;
mod core;
mod init;
mod log;
mod log_writer;
mod monitor;
mod server;
mod terminal;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

use caps::{CapSet, Capability};
use rustix::mm::MlockAllFlags;

use self::core::Core;
use crate::cgroup::CgroupRoot;
use crate::handover::{Handover, read_sealed};
use crate::sys::process::{self, Fork, SingleThreaded, exit_now};
use birth::{BirthError, Sources, give_birth};
use log::Sink;
use monitor::{Monitor, Parts};
use server::Server;

/// As a monitor must outlive what it watches; needs CAP_SYS_RESOURCE, without which the value stays.
const MONITOR_OOM_SCORE_ADJ: &str = "-900";
/// Signals of terminals, service managers and habit: a monitor ends by `release` or SIGKILL.
const IGNORED: [i32; 8] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGPIPE,
    libc::SIGALRM,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
];
/// CAP_KILL: the kernel checks at the monitor's death that it may kill init. CAP_IPC_LOCK: later pages stay locked.
const MONITOR_KEEPS: [Capability; 2] = [Capability::CAP_KILL, Capability::CAP_IPC_LOCK];
/// A log folder may belong to somebody else than root.
const WRITER_KEEPS: [Capability; 1] = [Capability::CAP_DAC_OVERRIDE];

/// The whole program. Returns the exit code, which nobody should need: failures are in the exit record.
pub fn main() -> i32 {
    match run() {
        Ok(()) => 0,
        // Only what precedes the record: a handover that cannot be read.
        Err(_) => command::CODE_SETUP,
    }
}

fn run() -> io::Result<()> {
    let token = SingleThreaded::check()?;
    let count = std::env::args().nth(1).and_then(|count| count.parse().ok());
    let count: usize = count.ok_or_else(|| io::Error::other("to be started by epagent-runner"))?;
    let mut fds: Vec<Option<OwnedFd>> =
        process::take_inherited(&token, count)?.into_iter().map(Some).collect();
    let handover = take(&mut fds, 0)?;
    let handover: Handover = serde_json::from_slice(&read_sealed(handover)?)?;
    detach()?;
    watch_over(token, handover, fds)
}

/// A session of its own, deaf to signals, hard to kill, and with none of its pages on a disk.
fn detach() -> io::Result<()> {
    rustix::process::setsid()?;
    process::ignore_signals(&IGNORED);
    nix::sys::signal::SigSet::empty().thread_set_mask()?;
    let _ = fs::write("/proc/self/oom_score_adj", MONITOR_OOM_SCORE_ADJ);
    let _ = rustix::thread::set_name(c"epagent-jail");
    // Copies of this memory become init and the app's process before its exec: nobody looks into them.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    rustix::process::chdir("/")?;
    // Best effort where RLIMIT_MEMLOCK is small and the capability missing.
    let _ = rustix::mm::mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT);
    Ok(())
}

/// Descriptors handed over, apart from the log folder.
struct Inherited {
    listener: OwnedFd,
    lease: Option<OwnedFd>,
    sources: Sources,
}

fn watch_over(token: SingleThreaded, handover: Handover, mut fds: Vec<Option<OwnedFd>>) -> io::Result<()> {
    let started = Instant::now();
    let mut take_if = |at: Option<usize>| at.map(|at| take(&mut fds, at)).transpose();
    let logs = take_if(handover.logs)?;
    let inherited = Inherited {
        listener: take_if(Some(handover.control))?.ok_or(io::ErrorKind::NotFound)?,
        lease: take_if(handover.lease)?,
        sources: Sources {
            root: take_if(handover.root)?,
            program: take_if(handover.program)?,
            secrets: take_if(handover.secrets)?,
            stdin: match take_if(handover.stdin)? {
                Some(stdin) => stdin,
                None => fs::File::open("/dev/null")?.into(),
            },
            mounts: handover.mounts.iter().map(|at| take(&mut fds, *at)).collect::<io::Result<_>>()?,
        },
    };
    let spec = handover.spec;
    let cgroups = Rc::new(CgroupRoot::find(&handover.cgroup_root).map_err(io::Error::other)?);
    let (sink, writer, inherited) = start_writer(&token, logs, spec.limits.log_bytes, inherited)?;
    let Inherited { listener, lease, sources } = inherited;
    let monitor = Monitor::new(Parts {
        id: spec.id.clone(),
        core: Core::new(spec.id.to_string(), spec.deadline_ms),
        server: Server::new(listener),
        oom: cgroups.watch_oom(&spec.id).map_err(io::Error::other)?,
        cgroups: Rc::clone(&cgroups),
        sink,
        writer,
        lease,
        started,
    });
    let mut monitor = Some(monitor);
    let born = give_birth(token, &spec, &cgroups, sources, || drop(monitor.take()));
    let Some(mut monitor) = monitor else { return Ok(()) };
    match born {
        Ok(born) => monitor.adopt(born),
        Err(BirthError { step, error, born }) => {
            born.into_iter().for_each(|born| monitor.adopt(born));
            monitor.start_failed(step, error);
        }
    }
    keep_only(&MONITOR_KEEPS)?;
    // Best effort: it only makes a monitor smaller.
    let _ = crate::sys::memory::forget_program();
    monitor.run();
    Ok(())
}

/// Forks the log writer, which keeps nothing but the folder and its end of the pipe.
fn start_writer(
    token: &SingleThreaded,
    logs: Option<OwnedFd>,
    limit_bytes: u64,
    inherited: Inherited,
) -> io::Result<(Sink, Option<OwnedFd>, Inherited)> {
    let Some(logs) = logs else { return Ok((Sink::none(), None, inherited)) };
    let (sink, frames) = log::pipe()?;
    match process::fork(token, 0, None)? {
        Fork::Parent { pidfd, pid: _ } => Ok((sink, Some(pidfd), inherited)),
        Fork::Child => {
            drop((sink, inherited));
            let _ = rustix::thread::set_name(c"epagent-log");
            if keep_only(&WRITER_KEEPS).is_ok() {
                log_writer::run(frames, logs, limit_bytes);
            }
            exit_now(0)
        }
    }
}

fn keep_only(capabilities: &[Capability]) -> io::Result<()> {
    let held = caps::read(None, CapSet::Permitted).map_err(io::Error::other)?;
    let kept = capabilities.iter().copied().filter(|capability| held.contains(capability)).collect();
    caps::set(None, CapSet::Effective, &kept).map_err(io::Error::other)?;
    caps::set(None, CapSet::Permitted, &kept).map_err(io::Error::other)
}

/// Each place of the list is for one descriptor and is taken once.
fn take(fds: &mut [Option<OwnedFd>], at: usize) -> io::Result<OwnedFd> {
    let found = fds.get_mut(at).and_then(Option::take);
    found.ok_or_else(|| io::Error::other(format!("no descriptor at place {at} of the handover")))
}
