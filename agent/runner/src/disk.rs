//! The durable tables: one small JSON file per record.
//!
//! ```text
//!  state_dir/apps/shop.json    state_dir/releases/shop.r7.json    state_dir/jails/shop-abcdefgh.json
//!  state_dir/slots.json        from which slot on none was ever given
//! ```
//!
//! A record is written as a whole (temporary file, fsync, rename, fsync of the folder) or not at all; names hold
//! no dot, so a temporary file is never taken for a record. One file per record keeps a write small however much
//! the node has. Writing is done in the forked children ([`crate::worker`]), because an fsync waits for the
//! disk and the loop does not.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::tables::{AppRecord, JailRecord, ReleaseRecord};
use epagent_wire::name::{AppName, JailId, ReleaseNumber};

/// No record is nearly as large; a file that is was not written by the runner.
const RECORD_BYTES_MAX: u64 = 256 << 10;

#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("{operation} {path}")]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "record {path} is not readable by this version; the runner that wrote it may have been a newer one"
    )]
    Record {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

/// The open folders of the tables.
#[derive(Debug)]
pub struct Disk {
    apps: Folder,
    releases: Folder,
    jails: Folder,
    marks: Folder,
}

/// Slots are marked as used this many at a time, so that most starts write no mark.
const SLOTS_PER_MARK: u32 = 64;
const SLOTS_MARK: &str = "slots";
const POOL_MARK: &str = "pool";

/// Everything that is on disk.
#[derive(Debug, Default)]
pub struct Records {
    pub apps: Vec<AppRecord>,
    pub releases: Vec<ReleaseRecord>,
    pub jails: Vec<JailRecord>,
    /// The slot to begin with. The balancer may still know the address of a jail that is gone with the whole node:
    /// given to another app at once, that app would get the requests.
    pub first_slot: u32,
}

impl Disk {
    /// Opens the tables, making their folders (0700) where they are missing.
    pub fn open(state_dir: &Path) -> Result<Disk, DiskError> {
        Ok(Disk {
            apps: Folder::open(state_dir.join("apps"))?,
            releases: Folder::open(state_dir.join("releases"))?,
            jails: Folder::open(state_dir.join("jails"))?,
            marks: Folder::open(state_dir.to_owned())?,
        })
    }

    pub fn read(&self) -> Result<Records, DiskError> {
        let first_slot: u32 = self.marks.read_one(SLOTS_MARK)?.unwrap_or(0);
        self.marks.put(SLOTS_MARK, &first_slot.saturating_add(SLOTS_PER_MARK))?;
        Ok(Records {
            apps: self.apps.read()?,
            releases: self.releases.read()?,
            jails: self.jails.read()?,
            first_slot,
        })
    }

    /// Whether a release is on record.
    pub fn has_releases(&self) -> Result<bool, DiskError> {
        Ok(!self.releases.read::<ReleaseRecord>()?.is_empty())
    }

    /// Of the pool that the records tell of.
    pub fn pool_number(&self) -> Result<Option<u16>, DiskError> {
        self.marks.read_one(POOL_MARK)
    }

    pub fn put_pool_number(&self, number: u16) -> Result<(), DiskError> {
        self.marks.put(POOL_MARK, &number)
    }

    pub fn put_app(&self, record: &AppRecord) -> Result<(), DiskError> {
        self.apps.put(record.app.as_str(), record)
    }

    pub fn put_release(&self, record: &ReleaseRecord) -> Result<(), DiskError> {
        self.releases.put(&release_key(&record.app, record.release), record)
    }

    pub fn put_jail(&self, record: &JailRecord) -> Result<(), DiskError> {
        // In the second half of what is marked, the mark goes on before it is reached.
        if let Some(slot) = record.slot.filter(|slot| slot % SLOTS_PER_MARK >= SLOTS_PER_MARK / 2) {
            self.marks.put(SLOTS_MARK, &((slot / SLOTS_PER_MARK + 2) * SLOTS_PER_MARK))?;
        }
        self.jails.put(record.jail.as_str(), record)
    }

    pub fn remove_app(&self, app: &AppName) -> Result<(), DiskError> {
        self.apps.remove(app.as_str())
    }

    pub fn remove_release(&self, app: &AppName, release: ReleaseNumber) -> Result<(), DiskError> {
        self.releases.remove(&release_key(app, release))
    }

    pub fn remove_jail(&self, jail: &JailId) -> Result<(), DiskError> {
        self.jails.remove(jail.as_str())
    }
}

fn release_key(app: &AppName, release: ReleaseNumber) -> String {
    format!("{app}.{release}")
}

#[derive(Debug)]
struct Folder {
    path: PathBuf,
    dir: OwnedFd,
}

impl Folder {
    fn open(path: PathBuf) -> Result<Folder, DiskError> {
        let fault = |operation| {
            let path = path.clone();
            move |source: io::Error| DiskError::Io { operation, path, source }
        };
        let mut builder = std::fs::DirBuilder::new();
        std::os::unix::fs::DirBuilderExt::mode(builder.recursive(true), 0o700);
        builder.create(&path).map_err(fault("make folder"))?;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let dir =
            nix::fcntl::open(&path, flags, Mode::empty()).map_err(|e| fault("open folder")(e.into()))?;
        Ok(Folder { path, dir })
    }

    fn read<R: DeserializeOwned>(&self) -> Result<Vec<R>, DiskError> {
        let fault = |source| DiskError::Io { operation: "list", path: self.path.clone(), source };
        let mut records = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(fault)? {
            let path = entry.map_err(fault)?.path();
            if path.extension() == Some(OsStr::new("json")) {
                records.push(read_record(path)?);
            }
        }
        Ok(records)
    }

    fn read_one<R: DeserializeOwned>(&self, key: &str) -> Result<Option<R>, DiskError> {
        match read_record(self.path.join(format!("{key}.json"))) {
            Ok(record) => Ok(Some(record)),
            Err(DiskError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn put(&self, key: &str, record: &impl Serialize) -> Result<(), DiskError> {
        let (name, temporary) = (format!("{key}.json"), format!("{key}.new"));
        let path = self.path.join(&name);
        let fault = |operation| {
            let path = path.clone();
            move |source: io::Error| DiskError::Io { operation, path, source }
        };
        let text =
            serde_json::to_vec(record).map_err(|source| DiskError::Record { path: path.clone(), source })?;
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let fd = openat(&self.dir, temporary.as_str(), flags, mode).map_err(|e| fault("create")(e.into()))?;
        let mut file = File::from(fd);
        file.write_all(&text).and_then(|()| file.sync_all()).map_err(fault("write"))?;
        renameat(&self.dir, temporary.as_str(), &self.dir, name.as_str())
            .map_err(|e| fault("put in place")(e.into()))?;
        nix::unistd::fsync(&self.dir).map_err(|e| fault("make durable")(e.into()))
    }

    fn remove(&self, key: &str) -> Result<(), DiskError> {
        let name = format!("{key}.json");
        let fault = |operation, source: nix::Error| DiskError::Io {
            operation,
            path: self.path.join(&name),
            source: source.into(),
        };
        match unlinkat(&self.dir, name.as_str(), UnlinkatFlags::NoRemoveDir) {
            Ok(()) => nix::unistd::fsync(&self.dir).map_err(|e| fault("make durable", e)),
            Err(nix::Error::ENOENT) => Ok(()),
            Err(error) => Err(fault("remove", error)),
        }
    }
}

fn read_record<R: DeserializeOwned>(path: PathBuf) -> Result<R, DiskError> {
    let mut text = Vec::new();
    let read = File::open(&path).and_then(|file| file.take(RECORD_BYTES_MAX).read_to_end(&mut text));
    if let Err(source) = read {
        return Err(DiskError::Io { operation: "read", path, source });
    }
    serde_json::from_slice(&text).map_err(|source| DiskError::Record { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_of_one_run_are_not_the_first_of_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::open(dir.path()).unwrap();
        let mut first = disk.read().unwrap().first_slot;
        for _ in 0..3 {
            let next = disk.read().unwrap().first_slot;
            assert!(next >= first + SLOTS_PER_MARK, "{next} after {first}");
            first = next;
        }
    }

    #[test]
    fn records_are_found_again_and_half_written_ones_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::open(dir.path()).unwrap();
        let app = AppRecord { app: "shop".parse().unwrap(), range: 7 };
        disk.put_app(&app).unwrap();
        disk.put_app(&AppRecord { range: 8, ..app.clone() }).unwrap();
        std::fs::write(dir.path().join("apps/blog.new"), "{\"app\":").unwrap();

        let disk = Disk::open(dir.path()).unwrap();
        assert_eq!(disk.read().unwrap().apps, [AppRecord { range: 8, ..app.clone() }]);
        disk.remove_app(&app.app).unwrap();
        disk.remove_app(&app.app).unwrap();
        assert!(disk.read().unwrap().apps.is_empty());
    }

    #[test]
    fn a_record_of_another_format_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::open(dir.path()).unwrap();
        std::fs::write(dir.path().join("apps/shop.json"), "{}").unwrap();
        let error = disk.read().unwrap_err().to_string();
        assert!(error.contains("apps/shop.json"), "{error}");
    }
}
