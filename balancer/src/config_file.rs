//! A whole balancer in one TOML file: what it listens on, and the table it routes by.
//!
//! ```toml
//! [[listeners]]
//! name = "web"
//! address = "[::]:80"
//! mode = "http"
//!
//! [[routes]]
//! id = "shop"
//! match = { host = "shop.example" }
//! action.proxy.upstreams = [{ id = "shop-0", address = "10.90.0.2:8080" }]
//! ```
//!
//! Everything a table on the control socket may have (`routes`, `defaults`, `pages`) is here under the same
//! names; `version` is the balancer's to count. Parsing is strict, errors say line and column, and
//! [`ConfigFile::warnings`] tells what is allowed but hardly meant. The file is the only source of the table:
//! it is read again on SIGHUP, and one that is no longer valid changes nothing.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::core::listen::{Listen, Mode};
use crate::listeners::Bind;
use crate::table::actions::Pages;
use crate::table::{Address, Defaults, ListenerLimits, Match, Route, Table, TableError};

/// Largest file, in bytes: as much as the control socket takes.
pub const BYTES_MAX: u64 = 4 * 1024 * 1024;
/// Most listeners.
pub const LISTENERS_MAX: usize = 256;

/// What the file says.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigFile {
    pub listeners: Vec<ListenerEntry>,
    #[serde(default)]
    pub routes: Vec<Route>,
    #[serde(default)]
    pub defaults: Defaults,
    #[serde(default)]
    pub pages: Pages,
}

/// One listener.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenerEntry {
    /// What messages call it.
    pub name: String,
    /// `ip:port`, where `[::]` takes IPv4 clients too, or `unix:` and an absolute path.
    pub address: Address,
    pub mode: ModeEntry,
    /// TLS ends here.
    #[serde(default)]
    pub tls: bool,
    /// Forwarding fields of clients are kept and extended.
    #[serde(default)]
    pub trusted: bool,
    /// A PROXY protocol header is required of every client.
    #[serde(default)]
    pub proxy_protocol: bool,
    /// Its own, in place of those that all listeners have.
    #[serde(default)]
    pub limits: Option<ListenerLimits>,
}

/// How a listener's connections find their route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModeEntry {
    /// By the host of each request.
    Http,
    /// By the listener's port.
    Tcp,
    /// By the server name of the TLS hello; TLS goes through unopened.
    Sni,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} is larger than {BYTES_MAX} bytes")]
    TooLarge { path: PathBuf },
    #[error("{path} is not a valid configuration")]
    Parse {
        path: PathBuf,
        #[source]
        source: toml::de::Error,
    },
    #[error("{path} has a table that cannot be served")]
    Table {
        path: PathBuf,
        #[source]
        source: TableError,
    },
    #[error("{path}: {fault}")]
    Listener { path: PathBuf, fault: ListenerFault },
}

/// What is wrong with a listener.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ListenerFault {
    #[error("there are more than {LISTENERS_MAX} listeners")]
    TooMany,
    #[error("two listeners have the name {name:?}")]
    SameName { name: String },
    #[error("the listener {name:?} has the address {address}, which an earlier one has too")]
    SameAddress { name: String, address: Address },
    #[error("the listener {name:?} has the mode tcp and needs a port, by which its route is found")]
    NoPort { name: String },
    #[error("the listener {name:?} has the address {address}, which is no absolute path")]
    Relative { name: String, address: Address },
    #[error("the listener {name:?} has the mode sni, which passes TLS through: `tls` has no meaning there")]
    TlsTwice { name: String },
    #[error("the listener {name:?} has limits that make no sense: {what}")]
    BadLimit { name: String, what: &'static str },
    #[error("the listener {name:?} is no HTTP listener: `trusted` has no meaning there")]
    NothingToTrust { name: String },
}

impl ConfigFile {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let failed = |source| ConfigError::Read { path: path.to_owned(), source };
        let mut text = String::new();
        let file = File::open(path).map_err(failed)?;
        file.take(BYTES_MAX + 1).read_to_string(&mut text).map_err(failed)?;
        if text.len() as u64 > BYTES_MAX {
            return Err(ConfigError::TooLarge { path: path.to_owned() });
        }
        Self::parse(&text, path)
    }

    /// Checks a file's text; `path` is for errors.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let parsed: Self =
            toml::from_str(text).map_err(|source| ConfigError::Parse { path: path.to_owned(), source })?;
        let failed = |fault| ConfigError::Listener { path: path.to_owned(), fault };
        parsed.check_listeners().map_err(failed)?;
        let checked = parsed.table(1).validate();
        checked.map_err(|source| ConfigError::Table { path: path.to_owned(), source })?;
        Ok(parsed)
    }

    /// The table, as this version.
    pub fn table(&self, version: u64) -> Table {
        Table {
            version,
            routes: self.routes.clone(),
            defaults: self.defaults.clone(),
            pages: self.pages.clone(),
        }
    }

    /// The table to follow the running one: the same when it says the same.
    pub fn table_after(&self, running: &Table) -> Table {
        let table = self.table(running.version);
        if table == *running { table } else { self.table(running.version + 1) }
    }

    /// The sockets to bind.
    pub fn binds(&self) -> Vec<Bind> {
        self.listeners.iter().map(ListenerEntry::bind).collect()
    }

    /// Routes that nothing leads to.
    pub fn warnings(&self) -> Vec<String> {
        let any = |mode: ModeEntry| self.listeners.iter().any(|listener| listener.mode == mode);
        let reached = |matches: &Match| match matches {
            Match::Host(_) => any(ModeEntry::Http),
            Match::Sni(_) => any(ModeEntry::Sni),
            Match::Port(port) => self
                .listeners
                .iter()
                .any(|listener| listener.mode == ModeEntry::Tcp && listener.port() == *port),
        };
        let lost = self.routes.iter().filter(|route| !reached(&route.matches));
        lost.map(|route| match &route.matches {
            Match::Port(port) => format!(
                "route {}: no listener has the port {port}; it will be listened on at --port-address",
                route.id
            ),
            matches => format!("route {} matches {matches}, and there is no listener for that", route.id),
        })
        .collect()
    }

    fn check_listeners(&self) -> Result<(), ListenerFault> {
        if self.listeners.len() > LISTENERS_MAX {
            return Err(ListenerFault::TooMany);
        }
        let (mut names, mut addresses) = (HashSet::new(), HashSet::new());
        for listener in &self.listeners {
            let (name, address) = (listener.name.clone(), listener.address.clone());
            if !names.insert(name.clone()) {
                return Err(ListenerFault::SameName { name });
            }
            if let Address::Unix(path) = &address
                && path.is_tenants()
            {
                return Err(ListenerFault::Relative { name, address });
            }
            let any_port = matches!(address, Address::Tcp(_)) && listener.port() == 0;
            if !any_port && !addresses.insert(address.clone()) {
                return Err(ListenerFault::SameAddress { name, address });
            }
            if let Some(what) = listener.limits.and_then(|limits| limits.fault()) {
                return Err(ListenerFault::BadLimit { name, what });
            }
            match listener.mode {
                ModeEntry::Tcp if listener.port() == 0 => return Err(ListenerFault::NoPort { name }),
                ModeEntry::Sni if listener.tls => return Err(ListenerFault::TlsTwice { name }),
                ModeEntry::Tcp | ModeEntry::Sni if listener.trusted => {
                    return Err(ListenerFault::NothingToTrust { name });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl ListenerEntry {
    /// 0 where there is none.
    fn port(&self) -> u16 {
        match &self.address {
            Address::Tcp(address) => address.port(),
            Address::Unix(_) => 0,
        }
    }

    fn bind(&self) -> Bind {
        let mode = match self.mode {
            ModeEntry::Http => Mode::Http,
            ModeEntry::Tcp => Mode::Tcp { port: self.port() },
            ModeEntry::Sni => Mode::Sni,
        };
        let Self { tls, trusted, proxy_protocol, .. } = *self;
        let listen = Listen { mode, tls, trusted, proxy_protocol };
        Bind { listen, address: self.address.clone(), limits: self.limits }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::chain;

    const EXAMPLE: &str = include_str!("../examples/balancer.toml");

    fn parse(text: &str) -> Result<ConfigFile, String> {
        ConfigFile::parse(text, Path::new("x.toml")).map_err(|error| chain(&error))
    }

    /// The example with one thing changed.
    fn with(known: &str, other: &str) -> Result<ConfigFile, String> {
        assert!(EXAMPLE.contains(known), "{known}");
        parse(&EXAMPLE.replacen(known, other, 1))
    }

    #[test]
    fn the_example_is_valid_and_says_what_it_seems_to() {
        let config = parse(EXAMPLE).unwrap();
        assert_eq!(config.warnings(), [] as [&str; 0]);
        let names: Vec<String> = config.binds().iter().map(|bind| bind.listen.to_string()).collect();
        assert_eq!(names, ["http", "http.trusted.proxy", "tcp-5432", "sni"]);
        let table = config.table_after(&Table::empty());
        assert_eq!((table.version, config.table_after(&table)), (1, table));
    }

    #[test]
    fn a_mistake_is_shown_where_it_is() {
        let error = with("mode = \"http\"", "mode = \"htpp\"").unwrap_err();
        for part in ["x.toml is not a valid configuration", "line 9, column 8", "htpp", "expected one of"] {
            assert!(error.contains(part), "{part:?} is missing in {error}");
        }
        let error = with("trusted = true", "trustd = true").unwrap_err();
        assert!(error.contains("line") && error.contains("unknown field `trustd`"), "{error}");
        let error = with("10.90.0.2:8080", "10.90.0.2").unwrap_err();
        assert!(error.contains("line") && error.contains("10.90.0.2"), "{error}");
    }

    #[test]
    fn what_has_no_one_meaning_is_refused() {
        for (known, other, fault) in [
            ("name = \"inner\"", "name = \"web\"", "two listeners have the name \"web\""),
            ("\"127.0.0.1:8081\"", "\"[::]:8080\"", "which an earlier one has too"),
            ("\"[::]:5432\"", "\"[::]:0\"", "needs a port"),
            ("mode = \"sni\"", "mode = \"sni\"\ntls = true", "passes TLS through"),
            ("mode = \"sni\"", "mode = \"sni\"\ntrusted = true", "is no HTTP listener"),
            ("connections_max = 1000", "connections_max = 0", "limits that make no sense"),
            ("id = \"shop\"", "id = \"db\"", "two routes have the id \"db\""),
        ] {
            let error = with(known, other).unwrap_err();
            assert!(error.contains(fault), "{error}");
        }
    }

    #[test]
    fn routes_that_nothing_leads_to_are_told_of() {
        let warnings = with("mode = \"sni\"", "mode = \"http\"").unwrap().warnings();
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains("server name") && warnings[0].contains("no listener"), "{warnings:?}");
        let warnings = with("{ port = 5432 }", "{ port = 5433 }").unwrap().warnings();
        assert!(warnings[0].contains("--port-address"), "{warnings:?}");
    }
}
