//! What the balancer says goes to the journal with its severity and its facts where standard error leads there, and
//! to nobody else's.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command};
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

/// A balancer whose standard error is a file, which `stream` names or not.
fn balancer(arguments: &[&str], stderr: &Path, stream: impl Fn(u64, u64) -> String) -> Command {
    let file = File::create(stderr).unwrap();
    let facts = file.metadata().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_epagent-balancer"));
    command.args(arguments).env("JOURNAL_STREAM", stream(facts.dev(), facts.ino())).stderr(file);
    command
}

/// Ends with the test, also with one that fails.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The next entry that says something.
fn entry(journal: &UnixDatagram, start: &str) -> Vec<String> {
    let mut bytes = vec![0; 64 << 10];
    loop {
        let length = journal.recv(&mut bytes).unwrap();
        let fields: Vec<String> =
            std::str::from_utf8(&bytes[..length]).unwrap().lines().map(str::to_owned).collect();
        if fields[0].starts_with(&format!("MESSAGE={start}")) {
            return fields;
        }
    }
}

#[test]
fn words_go_to_the_journal_with_their_facts_where_stderr_leads_there_and_only_there() {
    let test = std::thread::spawn(|| {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let stderr = folder.path().join("stderr");
        let said = || fs::read_to_string(&stderr).unwrap();
        let journal = journal();
        let leads_there = |device, inode| format!("{device}:{inode}");
        let config = folder.path().join("balancer.toml");
        let run = ["--config", config.to_str().unwrap()];

        let status = balancer(&run, &stderr, leads_there).status().unwrap();
        assert!(!status.success());
        assert_eq!(said(), "", "said twice");
        assert_eq!(entry(&journal, "")[1..], ["PRIORITY=3", "SYSLOG_IDENTIFIER=epagent-balancer"]);

        fs::write(&config, "[[listeners]]\nname = \"web\"\naddress = \"127.0.0.1:0\"\nmode = \"http\"\n")
            .unwrap();
        let running = Running(balancer(&run, &stderr, leads_there).spawn().unwrap());
        let listening = entry(&journal, "listening: http on 127.0.0.1:");
        drop(running);
        assert_eq!(
            listening[1..],
            ["PRIORITY=6", "SYSLOG_IDENTIFIER=epagent-balancer", "EPAGENT_LISTENER=http"]
        );
        assert_eq!(said(), "", "said twice");

        // Standard error was led elsewhere after systemd had said where it leads.
        journal.set_nonblocking(true).unwrap();
        while journal.recv(&mut [0; 1]).is_ok() {}
        fs::remove_file(&config).unwrap();
        let status =
            balancer(&run, &stderr, |device, inode| format!("{device}:{}", inode + 1)).status().unwrap();
        assert!(!status.success());
        assert!(said().starts_with("epagent-balancer: "), "{}", said());
        assert!(journal.recv(&mut [0; 1]).is_err(), "said twice");
    });
    test.join().unwrap();
}
