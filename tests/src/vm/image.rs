//! Disks to boot from and machines to fork from, made once and kept in `target/vm-cache`.
//!
//! ```text
//!  nothing ─ image.sh ─▶ disk.raw, vmlinuz, initrd.img ─ first boot, saved ─▶ + saved, accel
//! ```
//!
//! Both steps are keyed by what goes into them, so that a change of the script makes another folder and an old one
//! is removed. From then on the disk is never written: each machine goes on from the saved memory with changes of
//! its own that qemu throws away.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use serde_json::json;

use super::accel::Accel;
use super::guest::Guest;
use super::qemu::{PAYLOAD_BYTES, Parts, Qemu};
use crate::command;

/// A Debian release that epagent supports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// Debian 12: systemd 252, Linux 6.1. The floor.
    Bookworm,
    /// Debian 13: systemd 257, Linux 6.12. The main target.
    Trixie,
}

impl Release {
    pub const ALL: [Self; 2] = [Self::Trixie, Self::Bookworm];

    pub fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
        }
    }
}

/// Making an image fetches some 150 packages and unpacks them.
const BUILD_DEADLINE: Duration = Duration::from_secs(900);

/// What else changes a saved machine: its devices, and qemu.
const DEVICES: &str = include_str!("qemu.rs");

/// An image that can be started, and how.
#[derive(Debug, Clone)]
pub struct Image {
    folder: PathBuf,
    pub release: Release,
    pub accel: Accel,
}

impl Image {
    /// The image of a release, made and booted if it is not there yet. Others that want it wait meanwhile.
    #[track_caller]
    pub fn of(release: Release) -> Self {
        let folder = cache().join(format!("{}-{:016x}", release.name(), inputs(release)));
        let _made_by_one = lock(&cache().join(format!("{}.lock", release.name())));
        if !folder.join("disk.raw").is_file() {
            forget_others(release);
            build(release, &folder);
        }
        let saved = folder.join("saved");
        let wanted = machine_key();
        let known = fs::read_to_string(folder.join("saved.key")).unwrap_or_default();
        let accel = fs::read_to_string(folder.join("accel")).ok().and_then(|name| Accel::parse(name.trim()));
        let fixed = Accel::candidates();
        match accel {
            Some(accel) if known == wanted && saved.is_file() && fixed.contains(&accel) => {
                Self { folder, release, accel }
            }
            _ => boot_and_save(folder, release),
        }
    }

    pub fn disk(&self) -> PathBuf {
        self.folder.join("disk.raw")
    }

    pub fn kernel(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    pub fn initrd(&self) -> PathBuf {
        self.folder.join("initrd.img")
    }

    /// The memory of the machine after its first boot.
    pub fn saved(&self) -> PathBuf {
        self.folder.join("saved")
    }

    /// Says that the saved memory can't be gone on from; the next one who wants the image makes it anew.
    pub fn distrust(&self) {
        let _ = fs::remove_file(self.folder.join("saved.key"));
    }
}

/// `EPAGENT_VM_CACHE`, else beside what cargo builds.
fn cache() -> PathBuf {
    let folder = std::env::var_os("EPAGENT_VM_CACHE")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/vm-cache"), PathBuf::from);
    fs::create_dir_all(&folder).unwrap_or_else(|error| panic!("making {}: {error}", folder.display()));
    folder.canonicalize().unwrap_or(folder)
}

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("vm")
}

fn inputs(release: Release) -> u64 {
    let mut hasher = DefaultHasher::new();
    release.name().hash(&mut hasher);
    for name in ["image.sh", "agent.py", "agent.service"] {
        let path = scripts().join(name);
        fs::read(&path)
            .unwrap_or_else(|error| panic!("reading {}: {error}", path.display()))
            .hash(&mut hasher);
    }
    hasher.finish()
}

#[track_caller]
fn machine_key() -> String {
    let mut hasher = DefaultHasher::new();
    DEVICES.hash(&mut hasher);
    command::run(Command::new("qemu-system-x86_64").arg("--version")).ok().hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

#[track_caller]
fn lock(path: &Path) -> Flock<File> {
    let file = File::create(path).unwrap_or_else(|error| panic!("making {}: {error}", path.display()));
    Flock::lock(file, FlockArg::LockExclusive)
        .unwrap_or_else(|(_, error)| panic!("locking {}: {error}", path.display()))
}

/// Images of earlier inputs; each is a gigabyte or two.
fn forget_others(release: Release) {
    for entry in fs::read_dir(cache()).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(&format!("{}-", release.name())) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[track_caller]
fn build(release: Release, folder: &Path) {
    eprintln!("making the image of {} (once)", release.name());
    let mut script = Command::new(scripts().join("image.sh"));
    script.arg(release.name()).arg(folder);
    command::start(&mut script).wait(BUILD_DEADLINE).ok();
}

/// Boots the disk itself with the first accelerator that works, and saves the machine once it has come up.
#[track_caller]
fn boot_and_save(folder: PathBuf, release: Release) -> Image {
    let payload = folder.join("nothing.raw");
    File::create(&payload)
        .and_then(|file| file.set_len(PAYLOAD_BYTES))
        .unwrap_or_else(|error| panic!("making an empty disk: {error}"));
    let _ = fs::remove_file(folder.join("saved.key"));
    let mut why = String::new();
    for accel in Accel::candidates() {
        if !accel.starts() {
            why.push_str(&format!("{}: qemu does not start\n", accel.name()));
            continue;
        }
        let image = Image { folder: folder.clone(), release, accel };
        eprintln!("booting {} with {} (once)", release.name(), accel.name());
        if let Err(reason) = first_boot(&image, &payload) {
            why.push_str(&format!("{}: {reason}\n", accel.name()));
            continue;
        }
        let written = fs::write(folder.join("accel"), accel.name())
            .and_then(|()| fs::write(folder.join("saved.key"), machine_key()));
        written.unwrap_or_else(|error| panic!("writing beside the image: {error}"));
        return image;
    }
    panic!("{} does not boot:\n{why}", release.name());
}

fn first_boot(image: &Image, payload: &Path) -> Result<(), String> {
    let qemu = Qemu::start(&Parts {
        accel: image.accel,
        kernel: &image.kernel(),
        initrd: &image.initrd(),
        disk: &image.disk(),
        payload,
        keeps_changes: true,
        saved: None,
        cable: None,
    });
    let guest = Guest::connect(&qemu.agent_socket(), qemu.console_log())
        .map_err(|error| format!("the agent's port: {error}"))?;
    if !guest.wait_boot(0, image.accel.boot_deadline()) {
        return Err(format!("no boot within {:?}\n{}", image.accel.boot_deadline(), qemu.console(15)));
    }
    // Once everything has started and nothing is half written. The modules are what every test loads first.
    let settle = "systemctl is-system-running --wait || systemctl --failed >&2
        modprobe -a btrfs loop nf_tables veth tun overlay 2>/dev/null; journalctl --flush --sync; sync";
    let answer = guest
        .ask(json!({ "do": "run", "script": settle, "timeout_s": 300 }), Duration::from_secs(310))
        .map_err(|silence| silence.to_string())?;
    if answer["stdout"].as_str().map(str::trim) != Some("running") {
        return Err(format!("not all units are well: {answer}"));
    }
    qemu.save(&image.saved());
    Ok(())
}
