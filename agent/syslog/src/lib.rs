//! A sender of syslog messages over TCP and TLS that knows what has arrived.
//!
//! Messages are those of RFC 5424, framed by their length in octets (RFC 6587, 3.4.1; RFC 5425, 4.3). The protocol has
//! no acknowledgement, so a sender that only writes loses what was on its way when the connection broke. Here a batch
//! counts as sent when the peer's kernel has acknowledged all of it and the connection still stood after that; until
//! then the caller keeps it, and sends it again. So a message may come twice, and is lost only with a server that
//! dies with bytes it had received and not read.
//!
//! ```text
//!  away ── connect, handshake ──▶ linked ── write ──▶ wait for the peer's kernel ──▶ linked, batch sent
//!    ▲                               │ closed          │ closed, PATIENCE            │
//!    └───────────────────────────────┴─────────────────┴────────── the caller tries again
//! ```

#![deny(unsafe_code)]

mod link;
mod message;
mod sys;
mod trust;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use link::{Link, LinkError};
pub use message::{Facility, Message, SD_ID};

/// The port of syslog over TLS (RFC 5425); plain TCP has none of its own, and this one is as good.
const PORT_DEFAULT: u16 = 6514;

/// A server: `tls://logs.example:6514` or `tcp://[fd00::1]:601`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Server {
    pub tls: bool,
    /// A name or an address, without brackets.
    pub host: String,
    pub port: u16,
}

/// Who may vouch for the server's certificate.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Trust {
    /// The host's own authorities, as Debian's ca-certificates keeps them.
    #[default]
    System,
    /// Those in this file alone.
    File(PathBuf),
}

impl FromStr for Server {
    type Err = String;

    fn from_str(text: &str) -> Result<Server, String> {
        let refused =
            || format!("{text:?} is not a server like \"tls://logs.example:6514\" or \"tcp://10.0.0.5:601\"");
        let (scheme, rest) = text.split_once("://").ok_or_else(refused)?;
        let tls = match scheme {
            "tls" => true,
            "tcp" => false,
            _ => return Err(refused()),
        };
        let (host, port) = match rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, "")) => (host, None),
            Some((host, port)) => (host, Some(port.strip_prefix(':').ok_or_else(refused)?)),
            None => rest.split_once(':').map_or((rest, None), |(host, port)| (host, Some(port))),
        };
        let port = port.map_or(Ok(PORT_DEFAULT), |port| port.parse().map_err(|_| refused()))?;
        let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':');
        match !host.is_empty() && host.chars().all(is_name) && port != 0 {
            true => Ok(Server { tls, host: host.to_owned(), port }),
            false => Err(refused()),
        }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "tls" } else { "tcp" };
        match self.host.contains(':') {
            true => write!(f, "{scheme}://[{}]:{}", self.host, self.port),
            false => write!(f, "{scheme}://{}:{}", self.host, self.port),
        }
    }
}

impl TryFrom<String> for Server {
    type Error = String;
    fn try_from(text: String) -> Result<Server, String> {
        text.parse()
    }
}

impl From<Server> for String {
    fn from(server: Server) -> String {
        server.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_a_scheme_a_host_and_a_port() {
        for (text, shown) in [
            ("tls://logs.example", "tls://logs.example:6514"),
            ("tcp://10.0.0.5:601", "tcp://10.0.0.5:601"),
            ("tls://[fd00::1]:6514", "tls://[fd00::1]:6514"),
            ("tcp://[::1]", "tcp://[::1]:6514"),
        ] {
            assert_eq!(text.parse::<Server>().unwrap().to_string(), shown);
        }
        for text in [
            "logs.example:514",
            "udp://logs.example:514",
            "tls://",
            "tls://:6514",
            "tcp://h:0",
            "tcp://h:x",
            "tcp://h:70000",
            "tls://user:password@h:6514",
            "tls://h/path",
            "tcp://[::1]601",
        ] {
            assert!(text.parse::<Server>().is_err(), "{text}");
        }
    }
}
