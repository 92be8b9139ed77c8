//! What a listener makes of the connections it accepts.

use std::fmt;
use std::str::FromStr;

/// How connections are understood, and how far what they say of themselves is believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Listen {
    pub mode: Mode,
    /// Clients speak TLS, which ends here.
    pub tls: bool,
    /// Clients are proxies of the operator's own: their forwarding fields are kept and extended.
    pub trusted: bool,
    /// Every connection begins with a PROXY protocol header that names its client; one that does not is
    /// refused. Never guessed: whoever can reach such a listener can claim any address.
    pub proxy_protocol: bool,
}

/// How connections find their route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// HTTP: each request by its host.
    Http,
    /// Plain TCP: by the route of this port.
    Tcp { port: u16 },
    /// TLS that is passed through unopened: by the server name in its first message.
    Sni,
}

impl Listen {
    /// Plain connections, of which nothing is believed.
    pub const fn plain(mode: Mode) -> Self {
        Self { mode, tls: false, trusted: false, proxy_protocol: false }
    }
}

/// The name of a listener is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{name:?} names no kind of listener: use http, https, sni, tcp-PORT or tls-PORT, and after it .trusted, \
     .proxy or both"
)]
pub struct BadName {
    pub name: String,
}

/// `http`, `https`, `sni`, `tcp-PORT` or `tls-PORT`, and what is special as suffixes: `http.trusted.proxy`.
impl FromStr for Listen {
    type Err = BadName;

    fn from_str(name: &str) -> Result<Self, BadName> {
        let bad = || BadName { name: name.to_owned() };
        let mut words = name.split('.');
        let (mode, tls) = match words.next().unwrap_or_default() {
            "http" => (Mode::Http, false),
            "https" => (Mode::Http, true),
            "sni" => (Mode::Sni, false),
            word => match word.split_once('-') {
                Some(("tcp", port)) => (Mode::Tcp { port: read_port(port).ok_or_else(bad)? }, false),
                Some(("tls", port)) => (Mode::Tcp { port: read_port(port).ok_or_else(bad)? }, true),
                _ => return Err(bad()),
            },
        };
        let mut listen = Self { tls, ..Self::plain(mode) };
        for suffix in words {
            let fact = match suffix {
                "trusted" => &mut listen.trusted,
                "proxy" => &mut listen.proxy_protocol,
                _ => return Err(bad()),
            };
            if std::mem::replace(fact, true) {
                return Err(bad());
            }
        }
        Ok(listen)
    }
}

/// A port that can be listened on.
fn read_port(text: &str) -> Option<u16> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?.filter(|port| *port > 0)
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mode {
            Mode::Http => write!(f, "http{}", if self.tls { "s" } else { "" })?,
            Mode::Tcp { port } => write!(f, "{}-{port}", if self.tls { "tls" } else { "tcp" })?,
            Mode::Sni => write!(f, "sni")?,
        }
        let suffixes = [(self.trusted, ".trusted"), (self.proxy_protocol, ".proxy")];
        suffixes.iter().filter(|(set, _)| *set).try_for_each(|(_, suffix)| f.write_str(suffix))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in ["http", "https", "sni", "tcp-5432", "tls-993.proxy", "http.trusted.proxy", "sni.proxy"] {
            assert_eq!(name.parse::<Listen>().map(|listen| listen.to_string()).as_deref(), Ok(name));
        }
        assert_eq!("http.proxy.trusted".parse::<Listen>().unwrap().to_string(), "http.trusted.proxy");
        for name in
            ["", "tcp", "tcp-", "tcp-0", "tcp-+1", "tcp-65536", "HTTP", "http.", "http.x", "http.proxy.proxy"]
        {
            assert_eq!(name.parse::<Listen>(), Err(BadName { name: name.to_owned() }));
        }
    }
}
