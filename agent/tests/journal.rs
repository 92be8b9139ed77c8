//! Where epagentd's words go: to the journal when its standard error leads there, and to nobody else's.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// A journal in a mount namespace of the calling thread, which needs root.
fn journal() -> UnixDatagram {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(none, "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();
    fs::create_dir_all("/run/systemd/journal").unwrap();
    let journal = UnixDatagram::bind("/run/systemd/journal/socket").unwrap();
    journal.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    journal
}

/// Starts epagentd on a configuration that is not there; what it wrote to standard error.
fn fail(folder: &Path, stream: impl Fn(u64, u64) -> String) -> String {
    let path = folder.join("stderr");
    let file = File::create(&path).unwrap();
    let facts = file.metadata().unwrap();
    let status = Command::new(env!("CARGO_BIN_EXE_epagentd"))
        .args(["--config", "/nowhere/epagentd.toml"])
        .env("JOURNAL_STREAM", stream(facts.dev(), facts.ino()))
        .stderr(file)
        .status();
    assert!(!status.unwrap().success());
    fs::read_to_string(&path).unwrap()
}

#[test]
fn words_go_to_the_journal_with_their_fields_where_stderr_leads_there_and_only_there() {
    let test = std::thread::spawn(|| {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let journal = journal();
        let said = fail(folder.path(), |device, inode| format!("{device}:{inode}"));
        assert_eq!(said, "", "said twice");
        let mut bytes = vec![0; 64 << 10];
        let length = journal.recv(&mut bytes).unwrap();
        let fields: Vec<&str> = std::str::from_utf8(&bytes[..length]).unwrap().lines().collect();
        assert!(fields[0].starts_with("MESSAGE=read /nowhere/epagentd.toml: "), "{fields:?}");
        assert_eq!(fields[1..], ["PRIORITY=3", "SYSLOG_IDENTIFIER=epagentd"]);

        // Standard error was led elsewhere after systemd had said where it leads.
        let said = fail(folder.path(), |device, inode| format!("{device}:{}", inode + 1));
        assert!(said.contains(" ERROR read /nowhere/epagentd.toml: "), "{said}");
        journal.set_nonblocking(true).unwrap();
        assert!(journal.recv(&mut bytes).is_err(), "said twice");
    });
    test.join().unwrap();
}
