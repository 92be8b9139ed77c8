//! Names and ranges, parsed once.
//!
//! A [`JailId`] becomes a directory name in cgroupfs and a word in messages; an [`IdRange`] becomes a uid map;
//! a [`JailPath`] is resolved below the instance's root. Each is checked here, when it is made or
//! deserialised, so that no later code has to ask what a tenant or a compromised caller may have put into it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Longest accepted [`JailId`], in bytes.
pub const JAIL_ID_LEN_MAX: usize = 48;
/// Longest accepted [`JailPath`], in bytes.
pub const JAIL_PATH_LEN_MAX: usize = 1024;
/// Ids in one app's range. Fixed, so that ranges can be handed out by number alone.
pub const IDS_PER_RANGE: u32 = 65_536;

/// A name or range that cannot be accepted, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    #[error("jail id {0:?}: 1 to {JAIL_ID_LEN_MAX} of a-z, 0-9 and '-', not starting with '-'")]
    JailId(String),
    #[error("path {path:?} inside the instance: {why}")]
    Path { path: String, why: &'static str },
    #[error("id range starting at {0}: ranges start at a multiple of {IDS_PER_RANGE}, above 0")]
    Range(u32),
}

/// The name of one instance or job: `[a-z0-9-]`, at most 48 bytes, not starting with `-`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JailId(String);

impl JailId {
    /// Checks and takes a name.
    pub fn new(name: impl Into<String>) -> Result<JailId, IdError> {
        let name = name.into();
        let known = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if name.is_empty() || name.len() > JAIL_ID_LEN_MAX || !known || name.starts_with('-') {
            return Err(IdError::JailId(name));
        }
        Ok(JailId(name))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for JailId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for JailId {
    type Error = IdError;
    fn try_from(name: String) -> Result<JailId, IdError> {
        JailId::new(name)
    }
}

impl From<JailId> for String {
    fn from(id: JailId) -> String {
        id.0
    }
}

/// One app's host ids: `first .. first + 65536`, mapped to 0..65536 inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct IdRange {
    first: u32,
}

impl IdRange {
    /// The range starting at `first`, which must be a non-zero multiple of 65536 (never the host's own ids).
    pub fn new(first: u32) -> Result<IdRange, IdError> {
        let whole = first.checked_add(IDS_PER_RANGE - 1).is_some_and(|last| last < u32::MAX);
        if first == 0 || !first.is_multiple_of(IDS_PER_RANGE) || !whole {
            return Err(IdError::Range(first));
        }
        Ok(IdRange { first })
    }

    /// The host id that is 0 inside.
    pub fn first(self) -> u32 {
        self.first
    }
}

impl TryFrom<u32> for IdRange {
    type Error = IdError;
    fn try_from(first: u32) -> Result<IdRange, IdError> {
        IdRange::new(first)
    }
}

impl From<IdRange> for u32 {
    fn from(range: IdRange) -> u32 {
        range.first
    }
}

/// An absolute path as the instance sees it: no `..`, no `.`, no empty part, no NUL or newline.
///
/// This only bounds what may be asked; where it leads is decided by `openat2` below the instance's root.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JailPath(String);

impl JailPath {
    /// Checks and takes a path.
    pub fn new(path: impl Into<String>) -> Result<JailPath, IdError> {
        let path = path.into();
        match path_fault(&path) {
            Some(why) => Err(IdError::Path { path, why }),
            None => Ok(JailPath(path)),
        }
    }

    /// The path as text, with its leading `/`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The path below the root: without its leading `/`; `.` for the root itself.
    pub fn relative(&self) -> &str {
        match self.0.trim_start_matches('/') {
            "" => ".",
            relative => relative,
        }
    }

    /// Whether `self` is `dir` or lies below it.
    pub fn is_in(&self, dir: &str) -> bool {
        self.0 == dir || dir == "/" || self.0.strip_prefix(dir).is_some_and(|rest| rest.starts_with('/'))
    }
}

fn path_fault(path: &str) -> Option<&'static str> {
    let Some(relative) = path.strip_prefix('/') else { return Some("must be absolute") };
    if path.len() > JAIL_PATH_LEN_MAX {
        return Some("is too long");
    }
    if path.bytes().any(|b| b < 0x20 || b == 0x7f) {
        return Some("contains a control character");
    }
    if !relative.is_empty() && relative.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Some("contains an empty part, '.' or '..'");
    }
    None
}

impl fmt::Display for JailPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for JailPath {
    type Error = IdError;
    fn try_from(path: String) -> Result<JailPath, IdError> {
        JailPath::new(path)
    }
}

impl From<JailPath> for String {
    fn from(path: JailPath) -> String {
        path.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_could_lead_elsewhere_are_refused() {
        for bad in ["", "..", "a/b", "a\n", "-a", "A", "a.b", "a b", &"x".repeat(JAIL_ID_LEN_MAX + 1)] {
            assert!(JailId::new(bad).is_err(), "{bad:?}");
        }
        assert_eq!(JailId::new("shop-web-3").map(String::from), Ok("shop-web-3".to_owned()));
    }

    #[test]
    fn paths_are_absolute_and_plain() {
        for bad in ["", "app", "/a/../b", "/./a", "//a", "/a/", "/a\nb", "/a\0b"] {
            assert!(JailPath::new(bad).is_err(), "{bad:?}");
        }
        let data = JailPath::new("/data/db").map_err(|e| e.to_string());
        assert_eq!(data.as_ref().map(JailPath::relative), Ok("data/db"));
        assert!(data.is_ok_and(|p| p.is_in("/data") && !p.is_in("/dat") && p.is_in("/")));
    }

    #[test]
    fn ranges_never_touch_host_ids() {
        assert!(IdRange::new(0).is_err());
        assert!(IdRange::new(1000).is_err());
        assert!(IdRange::new(u32::MAX - 65_535).is_err(), "the last range holds the invalid id -1");
        assert_eq!(IdRange::new(1 << 20).map(IdRange::first), Ok(1 << 20));
    }
}
