//! Throwaway machines: a stock Debian with systemd and pure cgroup v2, for what a test on this machine cannot show.
//!
//! | module | what it is |
//! |---|---|
//! | [`image`] | disks made by mmdebstrap, and machines saved after their first boot |
//! | [`accel`] | emulated or not, and how much slower |
//! | [`qemu`] | one qemu process and its control socket |
//! | [`guest`] | the conversation with the agent inside |
//! | [`payload`] | files the guest finds on its second disk: the binaries, the sources, the tests |
//! | [`cable`] | several machines on one network cable, which can be cut between any two |
//! | [`suite`] | the workspace's own test binaries, run inside |
//!
//! ```no_run
//! use epagent_tests::vm::{Release, Vm};
//!
//! let mut vm = Vm::start(Release::Trixie);
//! vm.wait_for_unit("systemd-journald");
//! assert_eq!(vm.succeed("stat -fc %T /sys/fs/cgroup").trim(), "cgroup2fs");
//! vm.power_cut();
//! ```
//!
//! A machine is forked from one that was saved after its boot, which takes a second or two where an emulated boot
//! takes a minute. `EPAGENT_VM_FRESH=1` boots each one instead. Dropped, it is gone without a trace; dropped by a
//! failing test, it first shows its console and its journal.

pub mod accel;
pub mod cable;
pub mod guest;
pub mod image;
pub mod payload;
pub mod qemu;
pub mod suite;

use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::json;

use self::accel::Accel;
use self::cable::Plug;
use self::guest::{Guest, Silence};
use self::image::Image;
pub use self::image::Release;
use self::payload::Payload;
use self::qemu::{Parts, Qemu};
use crate::command::Ran;

/// Longest time of a command that does not say otherwise, were it run on the host.
const COMMAND: Duration = Duration::from_secs(30);
/// Until a fork answers: it is there or it is not.
const FORK_DEADLINE: Duration = Duration::from_secs(30);
/// Between two looks of [`Vm::wait_until_succeeds`]; each is a shell in an emulated machine.
const PAUSE: Duration = Duration::from_millis(200);
/// Lines of the console and the journal that a failed test shows.
const LINES_SHOWN: usize = 60;

/// How many of the tests in machines are to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Extent {
    /// What `make test VM=short` has time for.
    Short,
    /// Everything, `make vm-test`.
    Whole,
}

/// Whether a test of this extent runs, by `EPAGENT_TEST_VM`; says so when not. Without the variable none does.
#[track_caller]
pub fn wanted(of: Extent) -> bool {
    let asked = match std::env::var("EPAGENT_TEST_VM").as_deref() {
        Ok("short") => Some(Extent::Short),
        Ok("whole") => Some(Extent::Whole),
        Ok("none") | Err(_) => None,
        Ok(other) => panic!("EPAGENT_TEST_VM={other}: short, whole or none"),
    };
    let is_wanted = asked >= Some(of);
    if !is_wanted {
        eprintln!("SKIPPED: this machine is not asked for; `make vm-test` runs all (EPAGENT_TEST_VM=whole)");
    }
    is_wanted
}

/// A running machine.
pub struct Vm {
    pub name: String,
    pub release: Release,
    pub accel: Accel,
    guest: Guest,
    qemu: Qemu,
    /// Whether the machine went on from saved memory.
    pub forked: bool,
    /// How long it took from the start of qemu until the machine did what it was told.
    pub took: Duration,
}

/// What may differ between machines.
#[derive(Default)]
pub struct Options {
    /// Files that are there from the beginning.
    pub payload: Payload,
    /// Host name; a numbered one when empty.
    pub name: String,
    /// One end of a network cable.
    pub plug: Option<Plug>,
}

impl Vm {
    /// A machine of its own, up and without anything of ours on it.
    #[track_caller]
    pub fn start(release: Release) -> Self {
        Self::with(release, Options::default())
    }

    #[track_caller]
    pub fn with(release: Release, mut options: Options) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        if options.name.is_empty() {
            options.name = format!("vm{}", COUNT.fetch_add(1, Ordering::Relaxed));
        }
        let image = Image::of(release);
        let disk = options.payload.disk();
        let fresh = std::env::var_os("EPAGENT_VM_FRESH").is_some();
        let forked = if fresh { None } else { Self::launch(&image, &disk, &options, true) };
        let vm = forked.unwrap_or_else(|| {
            if !fresh {
                eprintln!("{}: the fork does not answer; booting instead", options.name);
                image.distrust();
            }
            Self::launch(&image, &disk, &options, false)
                .unwrap_or_else(|| panic!("{} does not come up", options.name))
        });
        if !options.payload.is_empty() {
            // The boot looked at the disk when it was still empty, and remembers that.
            vm.succeed("blockdev --flushbufs /dev/vdb && tar -C / --no-overwrite-dir --keep-directory-symlink -xf /dev/vdb");
        }
        vm
    }

    /// None when it does not answer in time.
    #[track_caller]
    fn launch(image: &Image, payload: &Path, options: &Options, fork: bool) -> Option<Self> {
        let since = Instant::now();
        let saved = image.saved();
        let mut qemu = Qemu::start(&Parts {
            accel: image.accel,
            kernel: &image.kernel(),
            initrd: &image.initrd(),
            disk: &image.disk(),
            payload,
            keeps_changes: false,
            saved: fork.then_some(saved.as_path()),
            cable: options.plug.as_ref().map(|plug| (plug.own.as_path(), plug.other.as_path())),
        });
        let guest = Guest::connect(&qemu.agent_socket(), qemu.console_log())
            .unwrap_or_else(|error| panic!("the port of the guest's agent: {error}"));
        if fork {
            qemu.resume();
        } else if !guest.wait_boot(0, image.accel.boot_deadline()) {
            eprintln!("{}", qemu.console(LINES_SHOWN));
            return None;
        }
        let mut vm = Self {
            name: options.name.clone(),
            release: image.release,
            accel: image.accel,
            guest,
            qemu,
            forked: fork,
            took: Duration::ZERO,
        };
        match vm.become_itself() {
            Ok(()) => {
                vm.took = since.elapsed();
                if let Some(plug) = &options.plug {
                    vm.succeed(&plug.setup());
                }
                Some(vm)
            }
            Err(silence) => {
                eprintln!("{}: {silence}", vm.name);
                None
            }
        }
    }

    /// Name, machine id, time and randomness, none of which two forks may share.
    fn become_itself(&self) -> Result<(), Silence> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let request = json!({
            "do": "become",
            "hostname": self.name,
            "machine_id": hex(&random::<16>()),
            "clock_ns": u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            "seed": base64(&random::<64>()),
        });
        self.guest.ask(request, FORK_DEADLINE).map(drop)
    }

    /// Runs a bash script as root; its output is bounded to 1 MiB of each stream.
    #[track_caller]
    pub fn run(&self, script: &str) -> Ran {
        self.run_within(script, COMMAND)
    }

    /// As [`Vm::run`] with a deadline of its own, which is what the script may take on the host.
    #[track_caller]
    pub fn run_within(&self, script: &str, native: Duration) -> Ran {
        let deadline = self.accel.scaled(native);
        let since = Instant::now();
        let request = json!({ "do": "run", "script": script, "timeout_s": deadline.as_secs() });
        // The guest ends the script itself; this wait only has to be the longer one.
        let answer = match self.guest.ask(request, deadline + FORK_DEADLINE) {
            Ok(answer) => answer,
            Err(silence) => panic!("{} $ {script}\n{silence}", self.name),
        };
        let text = |name: &str| answer[name].as_str().unwrap_or_default().to_owned();
        let line = match answer["code"].is_null() {
            true => format!("{} $ {script}\n(killed after {deadline:?})", self.name),
            false => format!("{} $ {script}", self.name),
        };
        let code =
            answer["code"].as_i64().and_then(|code| i32::try_from(code).ok()).filter(|code| *code >= 0);
        Ran { line, code, stdout: text("stdout"), stderr: text("stderr"), took: since.elapsed() }
    }

    /// What a script prints that must end with 0.
    #[track_caller]
    pub fn succeed(&self, script: &str) -> String {
        self.run(script).ok()
    }

    /// A script that must end with anything else.
    #[track_caller]
    pub fn fail(&self, script: &str) -> Ran {
        let ran = self.run(script);
        assert!(ran.code.is_some_and(|code| code != 0), "expected a failure\n{ran}");
        ran
    }

    /// Waits until a script succeeds and returns what it printed. `native` is what it may take on the host.
    #[track_caller]
    pub fn wait_until_succeeds(&self, script: &str, native: Duration) -> String {
        let end = Instant::now() + self.accel.scaled(native);
        loop {
            let ran = self.run(script);
            if ran.code == Some(0) {
                return ran.stdout;
            }
            assert!(Instant::now() < end, "not within {:?}\n{ran}", self.accel.scaled(native));
            std::thread::sleep(PAUSE);
        }
    }

    /// Waits until a unit is active. One that has failed will not become so by waiting.
    #[track_caller]
    pub fn wait_for_unit(&self, unit: &str) {
        let end = Instant::now() + self.accel.scaled(COMMAND);
        loop {
            let state = self.run(&format!("systemctl is-active {unit}")).stdout;
            match state.trim() {
                "active" => return,
                "failed" => panic!("{unit} failed\n{}", self.run(&format!("systemctl status {unit}"))),
                other => assert!(Instant::now() < end, "{unit} is still {other}"),
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Writes a file of the host into the guest. For many or large ones there is [`Payload`].
    #[track_caller]
    pub fn copy_in(&self, from: &Path, to: &str) {
        use std::os::unix::fs::PermissionsExt;
        /// A piece of a file in one request, well under what the agent takes for a line.
        const PIECE: usize = 1 << 20;
        let bytes = fs::read(from).unwrap_or_else(|error| panic!("reading {}: {error}", from.display()));
        let mode = fs::metadata(from).map_or(0o644, |meta| meta.permissions().mode() & 0o7777);
        let pieces = bytes.chunks(PIECE).map(<[u8]>::to_vec);
        for (index, piece) in pieces.chain(bytes.is_empty().then(Vec::new)).enumerate() {
            let request = json!({
                "do": "write", "path": to, "mode": mode, "append": index > 0, "data": base64(&piece),
            });
            if let Err(silence) = self.guest.ask(request, self.accel.scaled(COMMAND)) {
                panic!("writing {to} in {}: {silence}", self.name);
            }
        }
    }

    /// The power goes and comes back: what was not written to the disk is lost. Returns when it has booted.
    #[track_caller]
    pub fn power_cut(&mut self) {
        let seen = self.guest.boots();
        self.qemu.reset();
        self.wait_back(seen);
    }

    /// An orderly restart. Returns when it has booted.
    #[track_caller]
    pub fn reboot(&mut self) {
        let seen = self.guest.boots();
        self.guest.tell(json!({ "do": "run", "script": "systemctl reboot", "timeout_s": 60 }));
        self.wait_back(seen);
    }

    #[track_caller]
    fn wait_back(&self, seen: usize) {
        let deadline = self.accel.boot_deadline() * 2;
        let back = self.guest.wait_boot(seen, deadline);
        assert!(back, "{} is not back within {deadline:?}\n{}", self.name, self.qemu.console(LINES_SHOWN));
        self.guest.forget();
    }

    /// Pulls the network cable, or plugs it in.
    #[track_caller]
    pub fn set_link(&mut self, up: bool) {
        self.qemu.set_link(up);
    }

    /// The folder with the sockets, for one who wants to talk to the console.
    pub fn console(&self) -> std::path::PathBuf {
        self.qemu.console_socket()
    }

    fn show(&self) {
        eprintln!("--- the console of {}\n{}", self.name, self.qemu.console(LINES_SHOWN));
        let script = format!("journalctl -b --no-pager -n {LINES_SHOWN}; systemctl --failed --no-pager");
        let request = json!({ "do": "run", "script": script, "timeout_s": 20 });
        match self.guest.ask(request, FORK_DEADLINE) {
            Ok(answer) => {
                let journal = answer["stdout"].as_str().unwrap_or_default();
                eprintln!("--- the journal of {}\n{journal}", self.name);
            }
            Err(silence) => eprintln!("--- the journal of {}: {silence}", self.name),
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.show();
        }
    }
}

/// Bytes from the host's generator.
#[track_caller]
fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .unwrap_or_else(|error| panic!("reading /dev/urandom: {error}"));
    bytes
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// RFC 4648, with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let word =
            three.iter().fold(0_u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
        for digit in 0..4 {
            match digit <= three.len() {
                true => text.push(char::from(DIGITS[(word >> (18 - 6 * digit) & 63) as usize])),
                false => text.push('='),
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::base64;

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (bytes, text) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }
}
