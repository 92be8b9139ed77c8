//! Lines for systemd's journal, in its native protocol: one datagram each, with a field for each fact, so that
//! `journalctl EPAGENT_ROUTE=shop-web EPAGENT_STATUS=502` finds them. Nothing waits: what the journal does not
//! take at once is dropped, and counted by the caller.

use std::fmt::Display;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use super::format::request_line;
use crate::core::access::Access;

/// Where journald listens.
pub const SOCKET: &str = "/run/systemd/journal/socket";

/// The way to a journal. It is found anew for each line, so that one that was restarted is no trouble.
pub struct Journal {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Journal {
    /// Fails when nobody listens there.
    pub fn open(path: &Path) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        UnixDatagram::unbound()?.connect(path)?;
        Ok(Self { socket, path: path.to_owned() })
    }

    /// Whether the line was taken.
    pub fn write(&self, access: &Access) -> bool {
        self.socket.send_to(&datagram(access), &self.path).is_ok()
    }
}

fn datagram(access: &Access) -> Vec<u8> {
    let mut out = Vec::with_capacity(768);
    let status = access.status.map_or_else(|| "-".to_owned(), |status| status.to_string());
    let message = format!("{} {status} {}", request_line(access), access.outcome);
    field(&mut out, "MESSAGE", message);
    // As syslog numbers them: warning, informational.
    let failed = access.status.is_some_and(|status| status >= 500) || access.outcome == "cut";
    field(&mut out, "PRIORITY", if failed { 4 } else { 6 });
    field(&mut out, "SYSLOG_IDENTIFIER", "epagent-balancer");
    let texts = [
        ("EPAGENT_REQUEST_ID", &access.request_id),
        ("EPAGENT_METHOD", &access.method),
        ("EPAGENT_TARGET", &access.target),
        ("EPAGENT_HOST", &access.host),
    ];
    for (name, text) in texts.into_iter().filter(|(_, text)| !text.is_empty()) {
        field(&mut out, name, text);
    }
    some(&mut out, "EPAGENT_CLIENT", access.client.as_ref());
    some(&mut out, "EPAGENT_ROUTE", access.route.as_ref());
    some(&mut out, "EPAGENT_UPSTREAM", access.upstream.as_ref());
    some(&mut out, "EPAGENT_STATUS", access.status.as_ref());
    field(&mut out, "EPAGENT_OUTCOME", access.outcome);
    field(&mut out, "EPAGENT_BYTES_IN", access.bytes_in);
    field(&mut out, "EPAGENT_BYTES_OUT", access.bytes_out);
    field(&mut out, "EPAGENT_DURATION_US", access.duration_us);
    some(&mut out, "EPAGENT_TTFB_US", access.ttfb_us.as_ref());
    some(&mut out, "EPAGENT_HELD_US", access.held_us.as_ref());
    some(&mut out, "EPAGENT_SAMPLE", access.sample.as_ref());
    out
}

fn some<T: Display>(out: &mut Vec<u8>, name: &str, value: Option<&T>) {
    if let Some(value) = value {
        field(out, name, value);
    }
}

/// A value without a line's end goes behind `=`; any other has its length before it, in 64 bits.
fn field(out: &mut Vec<u8>, name: &str, value: impl Display) {
    let value = value.to_string();
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

    #[test]
    fn a_value_cannot_become_a_field_of_its_own() {
        let mut out = Vec::new();
        field(&mut out, "A", "b");
        field(&mut out, "C", "d\nPRIORITY=0");
        assert_eq!(out, b"A=b\nC\n\x0c\0\0\0\0\0\0\0d\nPRIORITY=0\n");
    }
}
