//! One qemu process and its control socket (QMP).
//!
//! ```text
//!  boot:  start ─▶ runs ─▶ save(file): stopped, its memory in the file, ended
//!  fork:  start from that file, its disks `snapshot=on` ─▶ runs
//!         runs ─▶ reset() (power loss) ─▶ runs
//!         runs ─▶ drop: killed, its folder removed
//! ```
//!
//! A fork must have exactly the devices of the machine that was saved, so one function makes the command line of
//! both. Only what is behind a device may differ: the network's other end, the content of the second disk.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use super::accel::Accel;
use crate::poll::until;

/// Until the control socket answers: qemu itself starts in well under a second.
const START_DEADLINE: Duration = Duration::from_secs(20);
/// Longest time of one control command, the longest being to give the memory to a pipe.
const COMMAND_DEADLINE: Duration = Duration::from_secs(120);
/// Guest memory. Three machines fit beside a build; the whole agent with its apps takes a quarter of it.
pub const MEMORY_MIB: u32 = 2048;
/// Size of the second disk, the same for every machine, since it is part of the saved state.
pub const PAYLOAD_BYTES: u64 = 2 << 30;

/// What a machine is made of.
pub struct Parts<'a> {
    pub accel: Accel,
    pub kernel: &'a Path,
    pub initrd: &'a Path,
    pub disk: &'a Path,
    /// Raw bytes the guest finds on its second disk.
    pub payload: &'a Path,
    /// Changes go to the disk itself and not to a file that is thrown away.
    pub keeps_changes: bool,
    /// The memory to go on from, as [`Qemu::save`] wrote it.
    pub saved: Option<&'a Path>,
    /// The two sockets of the network cable: its own end, the other's.
    pub cable: Option<(&'a Path, &'a Path)>,
}

/// A running qemu.
pub struct Qemu {
    child: Child,
    control: BufReader<UnixStream>,
    folder: tempfile::TempDir,
}

impl Qemu {
    /// Starts a machine. A fork is not running before [`Qemu::resume`].
    #[track_caller]
    pub fn start(parts: &Parts<'_>) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("epagent-vm-")
            .tempdir()
            .unwrap_or_else(|error| panic!("making a folder for a VM: {error}"));
        let mut command = command(parts, folder.path());
        let errors = File::create(folder.path().join("qemu.log"))
            .unwrap_or_else(|error| panic!("making a log for qemu: {error}"));
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .unwrap_or_else(|error| panic!("starting qemu (`make setup-vm` installs it): {error}"));
        let socket = folder.path().join("control");
        let control = until(START_DEADLINE, || {
            let ended = child.try_wait().ok().flatten().is_some();
            UnixStream::connect(&socket).ok().map(Some).or(ended.then_some(None))
        });
        let Some(Some(control)) = control else {
            let _ = child.kill();
            let _ = child.wait();
            panic!("qemu did not start: {}", read_tail(&folder.path().join("qemu.log"), 20));
        };
        let _ = control.set_read_timeout(Some(COMMAND_DEADLINE));
        let mut qemu = Self { child, control: BufReader::new(control), folder };
        qemu.line();
        qemu.execute("qmp_capabilities", json!({}));
        qemu
    }

    pub fn agent_socket(&self) -> PathBuf {
        self.folder.path().join("agent")
    }

    pub fn console_socket(&self) -> PathBuf {
        self.folder.path().join("console")
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Waits until the saved memory is read, and lets the machine run.
    #[track_caller]
    pub fn resume(&mut self) {
        self.wait_status("read the saved memory", &["running", "paused", "prelaunch"]);
        self.execute("cont", json!({}));
    }

    fn wait_status(&mut self, what: &str, wanted: &[&str]) {
        let reached = until(COMMAND_DEADLINE, || {
            let status = self.execute("query-status", json!({}));
            let state = status["status"].as_str().unwrap_or("");
            (wanted.contains(&state)).then_some(())
        });
        assert!(reached.is_some(), "{what}: not within {COMMAND_DEADLINE:?}");
    }

    /// Stops the machine, writes its memory and devices to `file` and ends. The disk is as the memory believes.
    #[track_caller]
    pub fn save(mut self, file: &Path) {
        self.execute("stop", json!({}));
        // Faster than any pipe; the default is the speed of a network card of long ago.
        self.execute("migrate-set-parameters", json!({ "max-bandwidth": 10_u64 << 30 }));
        self.execute("migrate", json!({ "uri": format!("exec:cat > '{}'", file.display()) }));
        let done = until(COMMAND_DEADLINE, || {
            let state = self.execute("query-migrate", json!({}));
            match state["status"].as_str() {
                Some("completed") => Some(Ok(())),
                Some("failed") => Some(Err(state["error-desc"].to_string())),
                _ => None,
            }
        });
        match done {
            Some(Ok(())) => {}
            Some(Err(why)) => panic!("saving the machine failed: {why}"),
            None => panic!("saving the machine: not within {COMMAND_DEADLINE:?}"),
        }
        self.execute("quit", json!({}));
        let _ = until(START_DEADLINE, || self.child.try_wait().ok().flatten());
    }

    /// Power loss: what the guest has not written to its disk is gone, and it boots again.
    #[track_caller]
    pub fn reset(&mut self) {
        self.execute("system_reset", json!({}));
    }

    /// Pulls the network cable at this machine's end, or plugs it in.
    #[track_caller]
    pub fn set_link(&mut self, up: bool) {
        self.execute("set_link", json!({ "name": "cable", "up": up }));
    }

    /// One control command; its answer, or a panic with qemu's reason.
    #[track_caller]
    pub fn execute(&mut self, name: &str, arguments: Value) -> Value {
        let request = json!({ "execute": name, "arguments": arguments });
        let sent = writeln!(self.control.get_mut(), "{request}");
        sent.unwrap_or_else(|error| panic!("qemu, {name}: {error}; {}", self.errors()));
        loop {
            let answer = self.line();
            if let Some(error) = answer.get("error") {
                panic!("qemu, {name}: {error}");
            }
            // Everything else on this socket is an event that happened in between.
            if let Some(value) = answer.get("return") {
                return value.clone();
            }
        }
    }

    #[track_caller]
    fn line(&mut self) -> Value {
        let mut line = String::new();
        let read = self.control.read_line(&mut line);
        assert!(read.is_ok_and(|bytes| bytes > 0), "qemu is gone or stuck: {}", self.errors());
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("qemu said {line:?}: {error}"))
    }

    pub fn errors(&self) -> String {
        read_tail(&self.folder.path().join("qemu.log"), 20)
    }

    /// The end of what the machine wrote to its console.
    pub fn console(&self, lines: usize) -> String {
        read_tail(&self.console_log(), lines)
    }

    pub fn console_log(&self) -> PathBuf {
        self.folder.path().join("console.log")
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(parts: &Parts<'_>, folder: &Path) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    // Bounds of what an emulated guest takes of the host: two processors, this memory, this much translated code.
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-machine",
        "q35,sata=off",
        "-smp",
        "2",
    ]);
    command.args(parts.accel.arguments()).args(["-m", &MEMORY_MIB.to_string()]);
    command.arg("-kernel").arg(parts.kernel).arg("-initrd").arg(parts.initrd);
    // Mitigations cost an emulated guest a third of its speed, and no test is about them.
    command.args(["-append", "root=/dev/vda rw console=ttyS0 net.ifnames=0 mitigations=off"]);
    // Without the host's own flushes: a power cut here is the guest's, and the host's page cache survives it.
    let snapshot = if parts.keeps_changes { "off" } else { "on" };
    let drive = |id: &str, path: &Path, snapshot: &str| {
        format!(
            "id={id},if=none,format=raw,cache=unsafe,discard=unmap,snapshot={snapshot},file={}",
            path.display()
        )
    };
    command.arg("-drive").arg(drive("root", parts.disk, snapshot));
    command.args(["-device", "virtio-blk-pci,drive=root"]);
    command.arg("-drive").arg(drive("payload", parts.payload, "on"));
    command.args(["-device", "virtio-blk-pci,drive=payload"]);
    let socket = |id: &str| format!("socket,id={id},server=on,wait=off,path={}/{id}", folder.display());
    command.args(["-device", "virtio-serial-pci", "-chardev", &socket("agent")]);
    command.args(["-device", "virtserialport,chardev=agent,name=epagent.agent"]);
    command.args(["-chardev", &format!("{},logfile={}/console.log", socket("console"), folder.display())]);
    command.args(["-serial", "chardev:console", "-qmp"]);
    command.arg(format!("unix:{}/control,server=on,wait=off", folder.display()));
    command.arg("-netdev").arg(match parts.cable {
        Some((own, other)) => format!(
            "dgram,id=cable,local.type=unix,local.path={},remote.type=unix,remote.path={}",
            own.display(),
            other.display()
        ),
        None => "hubport,id=cable,hubid=0".to_owned(),
    });
    command.args(["-device", "virtio-net-pci,netdev=cable,romfile="]);
    if let Some(saved) = parts.saved {
        command.arg("-S").arg("-incoming").arg(format!("exec:cat '{}'", saved.display()));
    }
    command
}

/// The last lines of a file that may not exist.
pub fn read_tail(path: &Path, lines: usize) -> String {
    let text = fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
