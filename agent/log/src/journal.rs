//! The journal, in its native protocol: one datagram per record, a field for each fact, so that
//! `journalctl EPAGENT_APP=shop` finds what the daemons said of one app.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use epagent_wire::said::{Record, Severity};

/// Where journald listens.
pub const SOCKET: &str = "/run/systemd/journal/socket";
/// Of a field that is not one of the journal's own.
const PREFIX: &str = "EPAGENT_";

/// The way to a journal. Each datagram is addressed anew, so that a journal that was restarted is no trouble.
pub struct Journal {
    socket: UnixDatagram,
    path: PathBuf,
    name: &'static str,
    dropped: u64,
}

/// Whether standard error leads to the journal: systemd says in `JOURNAL_STREAM` which file that is (systemd.exec(5)).
pub fn is_stderr() -> bool {
    let Ok(facts) = rustix::fs::fstat(std::io::stderr()) else { return false };
    std::env::var("JOURNAL_STREAM").is_ok_and(|said| said == format!("{}:{}", facts.st_dev, facts.st_ino))
}

impl Journal {
    /// Fails when nobody listens there.
    pub fn open(name: &'static str, path: &Path) -> io::Result<Journal> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        UnixDatagram::unbound()?.connect(path)?;
        Ok(Journal { socket, path: path.to_owned(), name, dropped: 0 })
    }

    /// Writes a record, or counts it.
    pub fn write(&mut self, record: &Record) {
        if self.dropped > 0 {
            let told = datagram(&missing(self.dropped, record.at_us), self.name);
            if self.socket.send_to(&told, &self.path).is_ok() {
                self.dropped = 0;
            }
        }
        if self.socket.send_to(&datagram(record, self.name), &self.path).is_err() {
            self.dropped += 1;
        }
    }
}

fn missing(count: u64, at_us: u64) -> Record {
    let message = format!("{count} records are missing here: the journal did not take them in time");
    let fields = vec![("dropped".to_owned(), count.to_string())];
    Record { at_us, severity: Severity::Warning, message, fields }
}

fn datagram(record: &Record, name: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(512);
    field(&mut out, "MESSAGE", &record.message);
    field(&mut out, "PRIORITY", &record.severity.number().to_string());
    field(&mut out, "SYSLOG_IDENTIFIER", name);
    for (name, value) in &record.fields {
        // The journal ignores names with anything else in them.
        let name: String = name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' })
            .collect();
        field(&mut out, &format!("{PREFIX}{name}"), value);
    }
    out
}

/// A value without a line's end goes behind `=`; any other has its length before it, in 64 bits.
fn field(out: &mut Vec<u8>, name: &str, value: &str) {
    out.extend_from_slice(name.as_bytes());
    if value.contains('\n') {
        out.push(b'\n');
        out.extend_from_slice(&(value.len() as u64).to_le_bytes());
    } else {
        out.push(b'=');
    }
    out.extend_from_slice(value.as_bytes());
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(message: &str) -> Record {
        let fields = vec![("app".into(), "shop".into()), ("exit.code".into(), "1\nPRIORITY=0".into())];
        Record { at_us: 1, severity: Severity::Error, message: message.to_owned(), fields }
    }

    #[test]
    fn every_fact_is_a_field_and_no_value_can_become_one() {
        let expected = b"MESSAGE=down\nPRIORITY=3\nSYSLOG_IDENTIFIER=epagentd\nEPAGENT_APP=shop\n\
            EPAGENT_EXIT_CODE\n\x0c\0\0\0\0\0\0\x001\nPRIORITY=0\n";
        assert_eq!(datagram(&record("down"), "epagentd"), expected);
    }

    #[test]
    fn a_journal_that_does_not_read_holds_nobody_up_and_what_it_missed_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listening = UnixDatagram::bind(&path).unwrap();
        let mut journal = Journal::open("epagentd", &path).unwrap();
        // Far more than any queue of datagrams holds; this returns although nobody reads.
        for _ in 0..100_000 {
            journal.write(&record("lost"));
        }
        let dropped = journal.dropped;
        assert!(dropped > 0);
        listening.set_nonblocking(true).unwrap();
        let mut bytes = vec![0; 4096];
        while listening.recv(&mut bytes).is_ok() {}
        journal.write(&record("heard"));
        let mut heard = || {
            let length = listening.recv(&mut bytes).unwrap();
            String::from_utf8_lossy(&bytes[..length]).into_owned()
        };
        assert!(heard().contains(&format!("EPAGENT_DROPPED={dropped}\n")));
        assert!(heard().starts_with("MESSAGE=heard\n"));
        assert_eq!(journal.dropped, 0);
    }
}
