//! Executing the program on disk, by way of a launcher.
//!
//! The launcher is our own program once more, by /proc/self/exe, so it runs whatever has become of the file on
//! disk. It has one thread, executes the new program, sends back a pidfd of it, made while it is its parent
//! and so surely of that process, and ends: the new process is adopted by whoever supervises us.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::channel::{Channel, Message};
use super::{ENVIRONMENT, HandoverError, LAUNCH_TIMEOUT};

/// The subcommand by which the program is its own launcher.
pub const SUBCOMMAND: &str = "handover-launch";

/// What to execute: what was executed to start this process, with the same arguments.
#[derive(Debug)]
pub struct Program {
    path: PathBuf,
    /// A descriptor of the folder it is in. A checkout below /root is closed to an unprivileged process; a
    /// supervisor that executes it by descriptor hands over the folder so that the next one can be found.
    folder: Option<OwnedFd>,
    arguments: Vec<OsString>,
}

impl Program {
    /// By the path we were executed with, links in it unresolved: what they point to may have been changed,
    /// and that is the point.
    pub fn of_this_process(folder: Option<OwnedFd>) -> Self {
        let mut words = std::env::args_os();
        let word = PathBuf::from(words.next().unwrap_or_default());
        let by_path = word.components().count() > 1;
        let absolute = by_path.then(|| std::path::absolute(&word).ok()).flatten();
        let path = absolute.or_else(|| std::env::current_exe().ok()).unwrap_or(word);
        Self { path, folder, arguments: words.collect() }
    }

    /// As the one before us knew it: where it was executed from, we may see another path.
    pub fn at(self, path: PathBuf) -> Self {
        Self { path, ..self }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn folder(&self) -> Option<BorrowedFd<'_>> {
        self.folder.as_ref().map(AsFd::as_fd)
    }
}

/// A launched process. Killed when dropped, unless it is let live.
#[derive(Debug)]
pub struct Launched {
    pub pid: u32,
    process: OwnedFd,
    lives: bool,
}

impl Launched {
    pub fn let_live(mut self) {
        self.lives = true;
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        if !self.lives {
            // It may have ended by itself.
            let _ = pidfd_send_signal(&self.process, Signal::KILL);
        }
    }
}

/// Executes the program; returns its process and a channel to it.
pub fn launch(program: &Program) -> Result<(Launched, Channel), HandoverError> {
    let failed = |what| move |source| HandoverError::System { what, source };
    let (channel, theirs) = Channel::pair().map_err(failed("make a channel"))?;
    let name = match &program.folder {
        Some(_) => program.path.file_name().unwrap_or(program.path.as_os_str()),
        None => program.path.as_os_str(),
    };
    let mut launcher = Command::new("/proc/self/exe")
        .arg(SUBCOMMAND)
        .arg("--")
        .arg(name)
        .args(&program.arguments)
        .env(ENVIRONMENT, "1")
        .stdin(Stdio::from(theirs.into_descriptor()))
        .spawn()
        .map_err(failed("start the launcher"))?;
    let folder: Vec<BorrowedFd<'_>> = program.folder().into_iter().collect();
    let answer = channel
        .send(&Message::Launch {}, &folder)
        .and_then(|()| channel.wait(Instant::now() + LAUNCH_TIMEOUT));
    if answer.is_err() {
        let _ = launcher.kill();
    }
    // It ends right after its answer, or has just been killed.
    launcher.wait().map_err(failed("wait for the launcher"))?;
    let mut answer = answer?;
    match (answer.message, answer.descriptors.pop()) {
        (Message::Launched { pid }, Some(process)) => Ok((Launched { pid, process, lives: false }, channel)),
        (Message::Unlaunchable { why }, _) => {
            Err(HandoverError::Execute { program: program.path.display().to_string(), why })
        }
        _ => Err(HandoverError::Missing { what: "launched process" }),
    }
}

/// What the launcher does, from its first moment to its last.
pub fn be_launcher(command: &[OsString]) -> Result<(), HandoverError> {
    let failed = |what| move |source| HandoverError::System { what, source };
    let stdin = std::io::stdin();
    let channel = Channel::from_descriptor(
        stdin.as_fd().try_clone_to_owned().map_err(failed("take over the channel"))?,
    );
    let launch = channel.wait(Instant::now() + LAUNCH_TIMEOUT)?;
    let Some((name, arguments)) = command.split_first() else {
        return Err(HandoverError::Missing { what: "program" });
    };
    match execute(name, arguments, launch.descriptors.first()) {
        Ok(pid) => {
            let opened = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(HandoverError::Ended)?;
            let process = pidfd_open(opened, PidfdFlags::empty())
                .map_err(|errno| HandoverError::System { what: "open the process", source: errno.into() })?;
            channel.send(&Message::Launched { pid }, &[process.as_fd()])?;
        }
        Err(error) => channel.send(&Message::Unlaunchable { why: error.to_string() }, &[])?,
    }
    Ok(())
}

/// Executes it with the channel as its standard input, as ours is. Who waits for it is whoever adopts it.
fn execute(name: &OsStr, arguments: &[OsString], folder: Option<&OwnedFd>) -> std::io::Result<u32> {
    let path = match folder {
        Some(folder) => Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name),
        None => PathBuf::from(name),
    };
    Ok(Command::new(path).arg0(name).args(arguments).spawn()?.id())
}
