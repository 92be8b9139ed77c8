//! systemd's journal, in its native protocol: one datagram for each entry, with a field for each fact, so that
//! `journalctl EPAGENT_ROUTE=shop-web EPAGENT_STATUS=502` finds it. Nothing waits: what the journal does not take
//! at once, it does not get.

use std::fmt::Display;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

/// Where journald listens.
pub const SOCKET: &str = "/run/systemd/journal/socket";
/// Of a field that is not one of the journal's own.
const PREFIX: &str = "EPAGENT_";

/// The way to a journal. It is found anew for each entry, so that one that was restarted is no trouble.
pub struct Journal {
    socket: UnixDatagram,
    path: PathBuf,
}

/// Whether standard error leads to the journal: systemd says in `JOURNAL_STREAM` which file that is (systemd.exec(5)).
pub fn is_stderr() -> bool {
    let Ok(facts) = rustix::fs::fstat(std::io::stderr()) else { return false };
    std::env::var("JOURNAL_STREAM").is_ok_and(|said| said == format!("{}:{}", facts.st_dev, facts.st_ino))
}

impl Journal {
    /// Fails when nobody listens there.
    pub fn open(path: &Path) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        UnixDatagram::unbound()?.connect(path)?;
        Ok(Self { socket, path: path.to_owned() })
    }

    /// Whether the entry was taken.
    pub fn write(&self, entry: &Entry) -> bool {
        self.socket.send_to(&entry.bytes, &self.path).is_ok()
    }
}

/// What is written at a time.
pub struct Entry {
    bytes: Vec<u8>,
}

impl Entry {
    /// With a priority as syslog numbers them.
    pub fn new(message: impl Display, priority: u8) -> Self {
        let mut entry = Self { bytes: Vec::with_capacity(768) };
        entry.field("", "MESSAGE", message);
        entry.field("", "PRIORITY", priority);
        entry.field("", "SYSLOG_IDENTIFIER", "epagent-balancer");
        entry
    }

    /// A fact, named in small letters and underscores.
    pub fn fact(&mut self, name: &str, value: impl Display) {
        self.field(PREFIX, name, value);
    }

    /// A fact, if it is known.
    pub fn known<T: Display>(&mut self, name: &str, value: Option<&T>) {
        if let Some(value) = value {
            self.fact(name, value);
        }
    }

    /// A value without a line's end goes behind `=`; any other has its length before it, in 64 bits.
    fn field(&mut self, prefix: &str, name: &str, value: impl Display) {
        let value = value.to_string();
        let out = &mut self.bytes;
        out.extend_from_slice(prefix.as_bytes());
        out.extend(name.bytes().map(|letter| letter.to_ascii_uppercase()));
        if value.contains('\n') {
            out.push(b'\n');
            out.extend_from_slice(&(value.len() as u64).to_le_bytes());
        } else {
            out.push(b'=');
        }
        out.extend_from_slice(value.as_bytes());
        out.push(b'\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_cannot_become_a_field_of_its_own() {
        let mut entry = Entry::new("down", 3);
        entry.fact("route", "shop");
        entry.fact("request_id", "d\nPRIORITY=0");
        let expected = b"MESSAGE=down\nPRIORITY=3\nSYSLOG_IDENTIFIER=epagent-balancer\nEPAGENT_ROUTE=shop\n\
            EPAGENT_REQUEST_ID\n\x0c\0\0\0\0\0\0\0d\nPRIORITY=0\n";
        assert_eq!(entry.bytes, expected);
    }
}
