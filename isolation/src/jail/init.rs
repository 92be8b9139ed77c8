//! PID 1 of an instance. Ours, never the app.
//!
//! ```text
//! forked ── Begin ─▶ root of its user namespace, parent-death signal ── Alive/Go ─▶ plan's steps
//!        ─▶ app started ─▶ loop: reap, run exec'ed commands, pass signals ── app ended ─▶ report, end
//!   any failure ─▶ StartFailed, end            channel closed ─▶ end
//! ```
//!
//! It is a copy of the monitor, not another program: its memory belongs to the host's user namespace and it is not
//! dumpable, so even root of the instance can neither trace it nor read `/proc/1`. When it ends, the kernel kills
//! every process of the instance's pid namespace.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Gid, Pid, Uid};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{DumpableBehavior, set_dumpable_behavior, set_parent_process_death_signal};

use super::channel::{self, FromInit, ToInit};
use super::command::{self, CODE_SETUP, Command, Lockdown, StartError, Started};
use super::terminal::{self, Terminal};
use crate::apply::{Builder, Built};
use crate::monitor::protocol::{ExecCall, ExecOutcome};
use crate::plan::{self, check_command, check_user};
use crate::seccomp::Filters;
use crate::spec::{JailSpec, Program};
use crate::sys::process::{SingleThreaded, exit_now};

/// Exec'ed commands at one time.
const SESSIONS_MAX: usize = 16;
/// Between the hang-up of a command whose client vanished and its kill.
const HANG_UP_GRACE: Duration = Duration::from_secs(2);

/// What init takes from the monitor's memory.
#[derive(Debug)]
pub(super) struct InitSide {
    pub channel: OwnedFd,
    /// Where it enters the cgroups that hold its limits.
    pub entrances: Vec<OwnedFd>,
    pub spec: JailSpec,
    pub filters: Filters,
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
    pub program: Option<OwnedFd>,
    pub secrets: Option<OwnedFd>,
}

/// Runs the instance. Ends the process.
pub(super) fn run(token: SingleThreaded, side: InitSide) -> ! {
    let channel = match rustix::io::fcntl_dupfd_cloexec(&side.channel, 3) {
        Ok(channel) => channel,
        Err(_) => exit_now(CODE_SETUP),
    };
    let code = match start(&token, side) {
        Ok(mut init) => init.run(&token),
        Err(StartError { step, error, code }) => {
            let _ = channel::send(channel.as_fd(), &FromInit::StartFailed { step, error, code }, &[]);
            code
        }
    };
    exit_now(code)
}

/// A running instance, as init sees it.
#[derive(Debug)]
struct Init {
    channel: OwnedFd,
    signals: SignalFd,
    spec: JailSpec,
    filters: Filters,
    /// Of the app: specification and secrets.
    env: BTreeMap<String, String>,
    built: Built,
    app: i32,
    /// Until the app's program runs.
    app_report: Option<OwnedFd>,
    sessions: BTreeMap<u32, Session>,
}

/// One exec'ed command.
#[derive(Debug)]
struct Session {
    pid: i32,
    /// Until its program runs.
    report: Option<OwnedFd>,
    failed: Option<StartError>,
    master: Option<OwnedFd>,
    /// Set when its client is gone: then it is killed.
    kill_at: Option<Instant>,
}

fn failed<E: std::fmt::Display>(step: impl std::fmt::Display) -> impl FnOnce(E) -> StartError {
    move |error| StartError { step: step.to_string(), error: format!("{step}: {error}"), code: CODE_SETUP }
}

fn start(token: &SingleThreaded, side: InitSide) -> Result<Init, StartError> {
    enter_limits(side.entrances).map_err(failed("enter the cgroups of the limits"))?;
    let mounts = await_begin(&side.channel)?;
    become_root().map_err(failed("become root of the instance"))?;
    await_go(&side.channel)?;
    let signals = watch_children().map_err(failed("watch for ended children"))?;
    let env = environment(&side.spec, side.secrets).map_err(failed("read secrets"))?;
    let built = build(&side.spec, mounts)?;
    let (argv, cwd, _) = side.spec.program.parts();
    let order = Command {
        argv,
        cwd: cwd.as_str(),
        env: &env,
        user: side.spec.user,
        stdio: [side.stdin.as_fd(), side.stdout.as_fd(), side.stderr.as_fd()],
        tty: false,
        program: side
            .program
            .as_ref()
            .filter(|_| matches!(side.spec.program, Program::Fd { .. }))
            .map(AsFd::as_fd),
    };
    let mut app = command::start(token, &order, &lockdown(&side.spec, &side.filters))
        .map_err(failed("start the app"))?;
    app.map_nested(built.proc.as_fd()).map_err(failed("map ids of the nested user namespace"))?;
    let Started { pid, report, .. } = app;
    Ok(Init {
        channel: side.channel,
        signals,
        env,
        built,
        app: pid,
        app_report: Some(report),
        sessions: BTreeMap::new(),
        spec: side.spec,
        filters: side.filters,
    })
}

fn lockdown<'a>(spec: &'a JailSpec, filters: &'a Filters) -> Lockdown<'a> {
    Lockdown { profile: spec.profile, limits: &spec.limits, umask: spec.umask, filters }
}

/// The descriptors carry the monitor's right to do so, which init itself does not have.
fn enter_limits(entrances: Vec<OwnedFd>) -> io::Result<()> {
    entrances.iter().try_for_each(|entrance| Ok(rustix::io::write(entrance, b"0").map(drop)?))
}

/// The mounts, once ids are mapped.
fn await_begin(channel: &OwnedFd) -> Result<(Option<OwnedFd>, Vec<OwnedFd>), StartError> {
    match channel::receive(channel).map_err(failed("wait for the monitor"))? {
        Some((ToInit::Begin { root }, mut fds)) => {
            let root = (root && !fds.is_empty()).then(|| fds.remove(0));
            Ok((root, fds))
        }
        Some(_) => Err(failed("wait for the monitor")("not the message expected")),
        None => exit_now(CODE_SETUP),
    }
}

/// The parent-death signal is cleared by every change of credentials, so it comes after the last one. The kernel
/// then checks at the parent's death that the parent may kill us, which is why the monitor keeps CAP_KILL.
fn become_root() -> io::Result<()> {
    nix::unistd::setgroups(&[])?;
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    nix::unistd::setresgid(gid, gid, gid)?;
    nix::unistd::setresuid(uid, uid, uid)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?)
}

/// A parent that died before the signal was set cannot answer now. (getppid tells nothing across pid namespaces.)
fn await_go(channel: &OwnedFd) -> Result<(), StartError> {
    channel::send(channel.as_fd(), &FromInit::Alive, &[]).map_err(failed("check for the monitor"))?;
    match channel::receive(channel).map_err(failed("check for the monitor"))? {
        Some((ToInit::Go, _)) => Ok(()),
        Some(_) => Err(failed("check for the monitor")("not the message expected")),
        None => exit_now(CODE_SETUP),
    }
}

fn watch_children() -> io::Result<SignalFd> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.thread_block()?;
    Ok(SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
}

fn environment(spec: &JailSpec, secrets: Option<OwnedFd>) -> io::Result<BTreeMap<String, String>> {
    let mut env = spec.program.parts().2.clone();
    if let Some(secrets) = secrets {
        let secrets: BTreeMap<String, String> =
            serde_json::from_slice(&crate::handover::read_sealed(secrets)?)
                .map_err(|_| io::Error::other("not a map of names to values"))?;
        env.extend(secrets);
    }
    Ok(env)
}

fn build(spec: &JailSpec, (root, mounts): (Option<OwnedFd>, Vec<OwnedFd>)) -> Result<Built, StartError> {
    let mut builder = Builder::new(root, mounts).map_err(failed("open the host's devices"))?;
    for step in plan::plan(spec) {
        builder.perform(&step).map_err(failed(&step))?;
    }
    builder.finish().map_err(failed("finish the root"))
}

impl Init {
    /// Until the app has ended or the monitor is gone. Returns init's own exit code.
    fn run(&mut self, token: &SingleThreaded) -> i32 {
        loop {
            let ready = self.wait();
            if let Some(code) = self.take_reports() {
                return code;
            }
            if let Some(code) = self.reap() {
                return code;
            }
            self.kill_hung_up();
            match ready {
                Ok(true) if !self.take_message(token) => return 0,
                Ok(_) => {}
                Err(_) => return CODE_SETUP,
            }
        }
    }

    /// Sleeps until there is something to do; tells whether the channel has a message.
    fn wait(&self) -> io::Result<bool> {
        let reports = self.sessions.values().filter_map(|session| session.report.as_ref());
        let mut polled =
            vec![PollFd::new(&self.channel, PollFlags::IN), PollFd::new(&self.signals, PollFlags::IN)];
        polled.extend(reports.chain(&self.app_report).map(|report| PollFd::new(report, PollFlags::IN)));
        let next = self.sessions.values().filter_map(|session| session.kill_at).min();
        let timeout = next.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = timeout.and_then(|left| Timespec::try_from(left).ok());
        match rustix::event::poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(!polled[0].revents().is_empty()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Programs that have started, or have not. Returns a code when the app has not.
    fn take_reports(&mut self) -> Option<i32> {
        if let Some(report) = self.app_report.take_if(|report| readable(report.as_fd())) {
            match Started::read_report(report) {
                None => {
                    let notes = std::mem::take(&mut self.built.notes);
                    self.tell(&FromInit::Started { notes }, &[]);
                }
                Some(StartError { step, error, code }) => {
                    self.tell(&FromInit::StartFailed { step, error, code }, &[]);
                    return Some(code);
                }
            }
        }
        for session in self.sessions.values_mut() {
            if let Some(report) = session.report.take_if(|report| readable(report.as_fd())) {
                session.failed = Started::read_report(report);
            }
        }
        None
    }

    /// Buries all dead children, orphans of the instance included. Returns a code when the app was among them.
    fn reap(&mut self) -> Option<i32> {
        while let Ok(Some(_)) = self.signals.read_signal() {}
        loop {
            let ended = waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG).ok()?;
            let (pid, message, outcome) = match ended {
                WaitStatus::Exited(pid, code) => {
                    (pid, FromInit::AppExited { code }, ExecOutcome::Exited { code })
                }
                WaitStatus::Signaled(pid, signal, core_dumped) => {
                    let signal = signal as i32;
                    (pid, FromInit::AppSignaled { signal, core_dumped }, ExecOutcome::Signaled { signal })
                }
                _ => return None,
            };
            if pid.as_raw() == self.app {
                // Both may be there at once: the report of a failed exec comes before the exit it caused.
                if let Some(code) = self.take_reports() {
                    return Some(code);
                }
                self.tell(&message, &[]);
                return Some(0);
            }
            self.end_session(pid.as_raw(), outcome);
        }
    }

    fn end_session(&mut self, pid: i32, outcome: ExecOutcome) {
        let Some((&number, _)) = self.sessions.iter().find(|(_, session)| session.pid == pid) else { return };
        let Some(mut session) = self.sessions.remove(&number) else { return };
        let failed = session.failed.take().or_else(|| session.report.take().and_then(Started::read_report));
        let outcome = failed.map_or(outcome, ExecOutcome::from);
        self.tell(&FromInit::ExecEnded { session: number, outcome }, &[]);
    }

    fn kill_hung_up(&mut self) {
        let now = Instant::now();
        for session in
            self.sessions.values_mut().filter(|session| session.kill_at.is_some_and(|at| at <= now))
        {
            session.kill_at = None;
            let _ = kill(Pid::from_raw(-session.pid), Signal::SIGKILL);
        }
    }

    /// Handles one message; false when the monitor is gone.
    fn take_message(&mut self, token: &SingleThreaded) -> bool {
        let Ok(Some((message, fds))) = channel::receive(&self.channel) else { return false };
        match message {
            ToInit::Begin { .. } | ToInit::Go => {}
            ToInit::Signal { signal } => send_signal(self.app, signal),
            ToInit::Exec { session, call } => match self.exec(token, session, &call, fds) {
                Ok(()) => {}
                Err(error) => self.tell(&FromInit::ExecRefused { session, error: error.to_string() }, &[]),
            },
            ToInit::ExecResize { session, size } => {
                if let Some(master) = self.sessions.get(&session).and_then(|session| session.master.as_ref())
                {
                    let _ = terminal::resize(master.as_fd(), size);
                }
            }
            ToInit::ExecSignal { session, signal } => {
                if let Some(session) = self.sessions.get(&session) {
                    send_signal(-session.pid, signal);
                }
            }
            ToInit::ExecHangUp { session } => {
                if let Some(session) = self.sessions.get_mut(&session) {
                    session.master = None;
                    session.kill_at = Some(Instant::now() + HANG_UP_GRACE);
                    let _ = kill(Pid::from_raw(-session.pid), Signal::SIGHUP);
                }
            }
        }
        true
    }

    fn exec(
        &mut self,
        token: &SingleThreaded,
        number: u32,
        call: &ExecCall,
        fds: Vec<OwnedFd>,
    ) -> io::Result<()> {
        let user = call.user.unwrap_or(self.spec.user);
        check_command("exec", &call.argv, &call.env).map_err(io::Error::other)?;
        check_user("exec.user", user).map_err(io::Error::other)?;
        if self.sessions.len() >= SESSIONS_MAX {
            return Err(io::Error::other(format!("{SESSIONS_MAX} commands run already")));
        }
        if self.spec.profile == crate::spec::Profile::Bootstrap {
            return Err(io::Error::other(
                "not in a bootstrap job, whose mounts are in a namespace of their own",
            ));
        }
        let mut env = self.env.clone();
        env.extend(call.env.clone());
        let terminal =
            call.tty.map(|size| terminal::open(self.built.devpts.as_fd(), size, user)).transpose()?;
        let stdio = match (&terminal, fds.as_slice()) {
            (Some(Terminal { slave, .. }), []) => [slave.as_fd(); 3],
            (None, [stdin, stdout, stderr]) => [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()],
            _ => return Err(io::Error::other("wants three descriptors, or none and a terminal")),
        };
        let tty = terminal.is_some();
        let order =
            Command { argv: &call.argv, cwd: call.cwd.as_str(), env: &env, user, stdio, tty, program: None };
        let started = command::start(token, &order, &lockdown(&self.spec, &self.filters))?;
        let master = terminal.map(|terminal| terminal.master);
        let fds: Vec<BorrowedFd<'_>> = master.iter().map(AsFd::as_fd).collect();
        self.tell(&FromInit::ExecStarted { session: number, pid: started.pid }, &fds);
        let session =
            Session { pid: started.pid, report: Some(started.report), failed: None, master, kill_at: None };
        self.sessions.insert(number, session);
        Ok(())
    }

    /// A monitor that does not read is dead or about to be; the closed channel ends us.
    fn tell(&self, message: &FromInit, fds: &[BorrowedFd<'_>]) {
        let _ = channel::send(self.channel.as_fd(), message, fds);
    }
}

fn send_signal(pid: i32, signal: i32) {
    if let Ok(signal) = Signal::try_from(signal) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

fn readable(fd: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    rustix::event::poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
}
