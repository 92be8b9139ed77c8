//! Names, parsed once.
//!
//! Every object of a tenant is addressed by a name of one of these types and never by a path. All of them share
//! one alphabet, lower-case letters, digits and inner hyphens (the letters of a DNS label, RFC 1123), so that a
//! name is at the same time a valid host name label, cgroup name, subvolume name and file name, and can hold no
//! `/`, `..` or newline. Deserializing parses, so a message with a bad name never becomes a value.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} name {text:?} is not valid: {reason}")]
pub struct NameError {
    what: &'static str,
    text: String,
    reason: &'static str,
}

fn check(what: &'static str, text: &str, len_max: usize) -> Result<(), NameError> {
    let reason = if text.is_empty() {
        "it is empty"
    } else if text.len() > len_max {
        "it is too long"
    } else if !text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-') {
        "only the letters a-z, the digits and the hyphen are allowed"
    } else if text.starts_with('-') || text.ends_with('-') {
        "it begins or ends with a hyphen"
    } else {
        return Ok(());
    };
    // An error message repeats at most 64 characters of what was given, escaped by `{:?}`.
    Err(NameError { what, text: text.chars().take(64).collect(), reason })
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal, $len_max:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// The longest text that is accepted, in bytes.
            pub const LEN_MAX: usize = $len_max;

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                check($what, text, $len_max)?;
                Ok(Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                check($what, &text, $len_max)?;
                Ok(Self(text))
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// An app. Short enough that a jail's id can begin with it.
    AppName, "app", 30
);
name!(
    /// A process type of an app: `web`, `worker`.
    ProcessName, "process", 24
);
name!(
    /// A volume of an app.
    VolumeName, "volume", 30
);
name!(
    /// An image; `host` is the host's own /usr, in `epagent dev` only.
    ImageName, "image", 40
);
name!(
    /// One jail: an instance or a job. The app's name, a hyphen and eight letters drawn at random.
    JailId, "jail", 48
);

/// The number of a release of an app, counted from 1. Written `r7`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ReleaseNumber(pub u32);

impl fmt::Display for ReleaseNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r{}", self.0)
    }
}

impl FromStr for ReleaseNumber {
    type Err = NameError;

    /// Accepts `7` and `r7`.
    fn from_str(text: &str) -> Result<Self, NameError> {
        let digits = text.strip_prefix('r').unwrap_or(text);
        match digits.parse() {
            Ok(number) if number > 0 && digits.bytes().all(|b| b.is_ascii_digit()) => Ok(Self(number)),
            _ => Err(NameError {
                what: "release",
                text: text.chars().take(64).collect(),
                reason: "a release is written r7 or 7",
            }),
        }
    }
}

/// A deploy of any app on this node, counted from 1. Written `d12`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DeployId(pub i64);

impl fmt::Display for DeployId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "d{}", self.0)
    }
}

impl JailId {
    /// The id of a new jail of `app`; `salt` is drawn by the caller.
    pub fn new(app: &AppName, salt: u64) -> Self {
        const LETTERS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
        let mut id = format!("{app}-");
        for place in 0..8 {
            id.push(char::from(LETTERS[(salt >> (place * 5)) as usize & 31]));
        }
        Self(id)
    }

    /// The app whose jail this is; none when the id was not made by [`JailId::new`].
    pub fn app(&self) -> Option<AppName> {
        let (app, salt) = self.0.rsplit_once('-')?;
        if salt.len() == 8 { app.parse().ok() } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_are_refused() {
        for text in ["", "-a", "a-", "a/b", "..", "a.b", "A", "a b", "a\n", "a\0", "ä", &"a".repeat(31)] {
            assert!(text.parse::<AppName>().is_err(), "{text:?} was accepted");
        }
        for text in ["a", "shop", "shop-2", "0", &"a".repeat(30)] {
            assert!(text.parse::<AppName>().is_ok(), "{text:?} was refused");
        }
    }

    #[test]
    fn deserializing_parses() {
        assert!(serde_json::from_str::<AppName>("\"../etc\"").is_err());
        assert_eq!(serde_json::from_str::<AppName>("\"shop\"").unwrap().as_str(), "shop");
    }

    #[test]
    fn a_jail_id_is_a_name_and_begins_with_its_app() {
        let app: AppName = "a".repeat(30).parse().unwrap();
        for salt in [0, 1, u64::MAX, 0x1234_5678_9abc_def0] {
            let id = JailId::new(&app, salt);
            assert!(id.as_str().parse::<JailId>().is_ok());
            assert_eq!(id.app(), Some(app.clone()));
        }
    }

    #[test]
    fn releases_are_written_with_and_without_the_letter() {
        assert_eq!("r7".parse::<ReleaseNumber>().unwrap(), ReleaseNumber(7));
        assert_eq!("7".parse::<ReleaseNumber>().unwrap(), ReleaseNumber(7));
        for text in ["", "r", "r0", "-1", "+1", "rr1", "7 "] {
            assert!(text.parse::<ReleaseNumber>().is_err(), "{text:?} was accepted");
        }
    }
}
