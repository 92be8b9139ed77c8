//! Files a guest finds on its second disk: a tar archive, written raw, unpacked over `/` once it is up.
//!
//! A disk and not a shared folder, since a machine with a mounted share can't be saved; and a disk that no boot has
//! read, since what the saved machine remembers of it would be wrong.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::qemu::PAYLOAD_BYTES;
use crate::command;
use crate::host::binary;

/// Where the binaries lie in a guest, as the package puts them.
pub const BINARIES: &str = "/usr/lib/epagent";
/// The guest's root.
const ROOT: &str = "/";
/// The binaries of an agent.
const PARTS: [&str; 7] = [
    "epagent",
    "epagentd",
    "epagent-runner",
    "epagent-balancer",
    "epagent-lease",
    "epagent-jail",
    "epagent-unpack",
];

/// A folder that becomes the guest's second disk.
#[derive(Default)]
pub struct Payload {
    staged: Option<tempfile::TempDir>,
    files: usize,
}

impl Payload {
    pub fn is_empty(&self) -> bool {
        self.files == 0
    }

    /// The agent, with `epagent` in the PATH, and the examples in `/root/examples`.
    pub fn agent() -> Self {
        let mut payload = Self::default();
        for part in PARTS {
            payload.program(&binary(part), &format!("{BINARIES}/{part}"));
        }
        payload.link(&format!("{BINARIES}/epagent"), "/usr/local/bin/epagent");
        payload.folder(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples"), "/root/examples");
        payload
    }

    /// A program, without the symbols that only a debugger reads: they are most of its size.
    pub fn program(&mut self, from: &Path, to: &str) {
        let target = self.place(to);
        let mut strip = Command::new("strip");
        strip.arg("--strip-debug").arg("-o").arg(&target).arg(from);
        if !strip.output().is_ok_and(|output| output.status.success()) {
            fs::copy(from, &target).unwrap_or_else(|error| panic!("copying {}: {error}", from.display()));
        }
        let _ = fs::set_permissions(&target, fs::Permissions::from_mode(0o755));
    }

    /// A folder with everything in it, but for what is built and what git keeps.
    pub fn folder(&mut self, from: &Path, to: &str) {
        let target = self.place(to);
        fs::create_dir_all(&target).unwrap_or_else(|error| panic!("making {}: {error}", target.display()));
        let mut copy = Command::new("sh");
        copy.args(["-c", "tar -C \"$1\" --exclude=./target --exclude=./.git -cf - . | tar -C \"$2\" -xf -"])
            .arg("sh")
            .arg(from)
            .arg(&target);
        command::run(&mut copy).ok();
    }

    /// A file as it is, into a folder.
    pub fn file(&mut self, from: &Path, folder: &str) {
        let target =
            self.place(&format!("{folder}/{}", from.file_name().unwrap_or_default().to_string_lossy()));
        fs::copy(from, &target).unwrap_or_else(|error| panic!("copying {}: {error}", from.display()));
    }

    pub fn text(&mut self, to: &str, text: &str) {
        let target = self.place(to);
        fs::write(&target, text).unwrap_or_else(|error| panic!("writing {}: {error}", target.display()));
    }

    pub fn link(&mut self, points_at: &str, to: &str) {
        let target = self.place(to);
        std::os::unix::fs::symlink(points_at, &target)
            .unwrap_or_else(|error| panic!("linking {}: {error}", target.display()));
    }

    /// Where a file of the guest lies on the host, its folders made.
    fn place(&mut self, to: &str) -> PathBuf {
        self.files += usize::from(to != ROOT);
        let folder = self.staged.get_or_insert_with(|| {
            tempfile::Builder::new()
                .prefix("epagent-payload-")
                .tempdir()
                .unwrap_or_else(|error| panic!("making a folder for a payload: {error}"))
        });
        let target = folder.path().join("root").join(to.trim_start_matches('/'));
        let parent = if to == ROOT { Some(target.as_path()) } else { target.parent() };
        if let Some(parent) = parent {
            fs::create_dir_all(parent).unwrap_or_else(|error| panic!("making {}: {error}", parent.display()));
        }
        target
    }

    /// The raw disk; it lives as long as this.
    pub fn disk(&mut self) -> PathBuf {
        let root = self.place(ROOT).join(".");
        let disk = root.join("../disk.raw");
        let mut pack = Command::new("tar");
        pack.args(["--numeric-owner", "--owner=0", "--group=0", "-cf"])
            .arg(&disk)
            .arg("-C")
            .arg(&root)
            .arg(".");
        command::run(&mut pack).ok();
        let packed = fs::metadata(&disk).map_or(0, |meta| meta.len());
        assert!(packed <= PAYLOAD_BYTES, "a payload of {packed} bytes; the disk has {PAYLOAD_BYTES}");
        fs::OpenOptions::new()
            .write(true)
            .open(&disk)
            .and_then(|file| file.set_len(PAYLOAD_BYTES))
            .unwrap_or_else(|error| panic!("sizing {}: {error}", disk.display()));
        disk
    }
}
