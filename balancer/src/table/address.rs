//! Where an upstream listens: a TCP address, or the path of a unix socket.
//!
//! ```text
//!   10.90.0.2:8080      TCP
//!   [fd00::2]:8080      TCP
//!   unix:web/app.sock   a socket below the folder given by --unix-root, where tenants write
//!   unix:/run/app.sock  a socket of the operator's
//! ```
//!
//! Parsing admits only what has one meaning, so an [`Address`] that exists needs no further check: no `..`,
//! no empty component, nothing that does not print. Whether a path leads where it seems to is another
//! matter, looked at on each connect.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Longest path of a unix socket, in bytes: what a socket address holds (unix(7)), less its final zero.
pub const UNIX_PATH_BYTES_MAX: usize = 107;

/// Where an upstream listens. Cloning is cheap: each connect takes one along.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Address {
    Tcp(SocketAddr),
    Unix(UnixPath),
}

/// The path of a unix socket, relative to the tenants' folder or absolute.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UnixPath(Arc<str>);

impl UnixPath {
    /// The path as it was given.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it lies below the tenants' folder, so that a tenant may have put anything in its place.
    pub fn is_tenants(&self) -> bool {
        !self.0.starts_with('/')
    }
}

/// Why a text is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    #[error("{text:?} is neither IP:PORT nor unix:PATH")]
    Neither { text: String },
    #[error("the socket path {path:?} is empty or longer than {UNIX_PATH_BYTES_MAX} bytes")]
    Length { path: String },
    #[error("the socket path {path:?} has an empty component, or one that is . or ..")]
    Component { path: String },
    #[error("the socket path {path:?} has a character that does not print")]
    Unprintable { path: String },
}

impl Address {
    /// The port, of a TCP address.
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Tcp(address) => Some(address.port()),
            Self::Unix(_) => None,
        }
    }
}

impl FromStr for UnixPath {
    type Err = AddressError;

    fn from_str(path: &str) -> Result<Self, AddressError> {
        let owned = || path.to_owned();
        if path.is_empty() || path.len() > UNIX_PATH_BYTES_MAX {
            return Err(AddressError::Length { path: owned() });
        }
        if path.chars().any(char::is_control) {
            return Err(AddressError::Unprintable { path: owned() });
        }
        let below = path.strip_prefix('/').unwrap_or(path);
        if below.split('/').any(|component| matches!(component, "" | "." | "..")) {
            return Err(AddressError::Component { path: owned() });
        }
        Ok(Self(path.into()))
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        match text.strip_prefix("unix:") {
            Some(path) => path.parse().map(Self::Unix),
            None => match text.parse() {
                Ok(address) => Ok(Self::Tcp(address)),
                Err(_) => Err(AddressError::Neither { text: text.to_owned() }),
            },
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.as_str()),
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }
}

impl TryFrom<String> for Address {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_reads_as_it_is_written() {
        for text in ["10.90.0.2:8080", "[fd00::2]:8080", "unix:web/app.sock", "unix:a", "unix:/run/a b.sock"]
        {
            let address: Address = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
            let json = serde_json::to_string(&address).unwrap();
            assert_eq!(serde_json::from_str::<Address>(&json).unwrap(), address);
        }
    }

    #[test]
    fn what_is_below_the_tenants_folder_is_told_from_the_operators_own() {
        let tenants = |text: &str| text.parse::<UnixPath>().unwrap().is_tenants();
        assert!(tenants("web/app.sock") && tenants("..a/b..") && !tenants("/run/app.sock"));
    }

    #[test]
    fn paths_without_one_meaning_are_refused() {
        let long = format!("unix:{}", "x".repeat(UNIX_PATH_BYTES_MAX + 1));
        for text in [
            "",
            "10.0.0.1",
            "shop:80",
            "unix",
            "unix:",
            "unix:/",
            "unix://a",
            "unix:a//b",
            "unix:a/",
            "unix:..",
            "unix:../a",
            "unix:a/../b",
            "unix:/a/..",
            "unix:./a",
            "unix:a\0b",
            "unix:a\nb",
            "UNIX:a",
            &long,
        ] {
            assert!(text.parse::<Address>().is_err(), "{text:?}");
        }
    }
}
