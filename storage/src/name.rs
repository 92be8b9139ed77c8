//! The names by which objects in the pool are addressed.
//!
//! Nobody hands this crate a path. A name is parsed once into one of the types below and can then only be a single,
//! harmless file name: `[a-z0-9-]`, 1 to 48 bytes, not starting with `-`. Without `.` and `/` there is no `..`, no
//! hidden file and no separator; `.` is left free for this crate's own staging names (see [`crate::place`]).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest accepted name, in bytes.
pub const NAME_LEN_MAX: usize = 48;

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("{kind} name is empty")]
    Empty { kind: &'static str },
    #[error("{kind} name is {len} bytes long; {NAME_LEN_MAX} are allowed")]
    TooLong { kind: &'static str, len: usize },
    #[error("{kind} name {name:?} has {bad:?}; only a-z, 0-9 and - are allowed, and no - in front")]
    BadCharacter { kind: &'static str, name: String, bad: char },
    #[error("image id {text:?} is not NAME@VERSION")]
    BadImageId { text: String },
}

fn check(kind: &'static str, text: &str) -> Result<(), NameError> {
    if text.is_empty() {
        return Err(NameError::Empty { kind });
    }
    if text.len() > NAME_LEN_MAX {
        return Err(NameError::TooLong { kind, len: text.len() });
    }
    let bad = text
        .char_indices()
        .find(|&(at, c)| !(c.is_ascii_lowercase() || c.is_ascii_digit() || (c == '-' && at > 0)));
    match bad {
        Some((_, bad)) => Err(NameError::BadCharacter { kind, name: text.to_owned(), bad }),
        None => Ok(()),
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// Parses and checks a name.
            pub fn new(text: impl Into<String>) -> Result<Self, NameError> {
                let text = text.into();
                check($kind, &text)?;
                Ok(Self(text))
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                Self::new(text)
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
    /// An app; releases and volumes live below it.
    AppName, "app"
);
name!(
    /// An image, without its version.
    ImageName, "image"
);
name!(
    /// One release of an app; unique within the app and never reused.
    ReleaseId, "release"
);
name!(
    /// One instance (or job); unique in the pool.
    InstanceId, "instance"
);
name!(
    /// A volume of an app.
    VolumeName, "volume"
);
name!(
    /// A staging area, named by the caller so that a repeated call finds what the first one made.
    StagingId, "staging"
);

/// One immutable version of an image, written `NAME@VERSION`. Versions of a name only grow; the highest is current.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageId {
    pub name: ImageName,
    pub version: u64,
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.name, self.version)
    }
}

impl FromStr for ImageId {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let bad = || NameError::BadImageId { text: text.to_owned() };
        let (name, version) = text.split_once('@').ok_or_else(bad)?;
        Ok(Self { name: ImageName::new(name)?, version: parse_version(version).ok_or_else(bad)? })
    }
}

impl TryFrom<String> for ImageId {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<ImageId> for String {
    fn from(id: ImageId) -> String {
        id.to_string()
    }
}

/// A version in its one spelling: decimal, no sign, no leading zero.
pub(crate) fn parse_version(text: &str) -> Option<u64> {
    let version: u64 = text.parse().ok()?;
    (version.to_string() == text).then_some(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_harmless_single_names_pass() {
        for good in ["a", "shop", "r-12", "0", &"x".repeat(NAME_LEN_MAX)] {
            assert!(AppName::new(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a.b", "A", "-a", "a\n", "a\0", "ä", &"x".repeat(NAME_LEN_MAX + 1)]
        {
            assert!(AppName::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_are_checked_when_read_from_json() {
        assert!(serde_json::from_str::<AppName>("\"../x\"").is_err());
        assert!(serde_json::from_str::<ImageId>("\"py@07\"").is_err());
        let id: ImageId = serde_json::from_str("\"py@7\"").unwrap();
        assert_eq!((id.name.as_str(), id.version), ("py", 7));
    }
}
