//! What a listener makes of the connections it accepts.

use std::fmt;

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

/// `http`, `https`, `sni`, `tcp-PORT` or `tls-PORT`, and what is special as suffixes: `http.trusted.proxy`.
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
