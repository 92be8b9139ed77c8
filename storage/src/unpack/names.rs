//! Names inside an archive, taken apart once and never looked up as they came.

use std::hash::{DefaultHasher, Hash, Hasher};

use super::UnpackError;

/// PATH_MAX of Linux, without the NUL.
pub(super) const NAME_BYTES_MAX: usize = 4095;
const COMPONENT_BYTES_MAX: usize = 255;
/// Deeper trees are not made by people, and each level costs a descriptor when one is removed.
pub(super) const DEPTH_MAX: usize = 128;

/// A name relative to the archive's root: no `..`, no `.`, nothing empty. No components at all is the root itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Name {
    components: Vec<Vec<u8>>,
}

/// A tenant's bytes as text for a message.
pub(super) fn shown(bytes: &[u8]) -> String {
    const SHOWN_MAX: usize = 256;
    let cut = &bytes[..bytes.len().min(SHOWN_MAX)];
    String::from_utf8_lossy(cut).chars().flat_map(char::escape_debug).collect()
}

impl Name {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, UnpackError> {
        let bad = |why| UnpackError::BadName { name: shown(bytes), why };
        if bytes.is_empty() {
            return Err(bad("the name is empty"));
        }
        if bytes.len() > NAME_BYTES_MAX {
            return Err(bad("the name is too long"));
        }
        if bytes.contains(&0) {
            return Err(bad("the name has a NUL byte"));
        }
        if bytes[0] == b'/' {
            return Err(UnpackError::AbsoluteName { name: shown(bytes) });
        }
        let mut components = Vec::new();
        for part in bytes.split(|&byte| byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." => return Err(UnpackError::ParentName { name: shown(bytes) }),
                part if part.len() > COMPONENT_BYTES_MAX => {
                    return Err(bad("a part of the name is too long"));
                }
                part => components.push(part.to_vec()),
            }
        }
        match components.len() > DEPTH_MAX {
            true => Err(bad("the name is too deep")),
            false => Ok(Self { components }),
        }
    }

    pub(super) fn is_root(&self) -> bool {
        self.components.is_empty()
    }

    pub(super) fn depth(&self) -> usize {
        self.components.len()
    }

    pub(super) fn first(&self) -> Option<&[u8]> {
        self.components.first().map(Vec::as_slice)
    }

    /// The folder it is in, and its own name there; `None` for the root.
    pub(super) fn split(&self) -> Option<(Name, &[u8])> {
        let (leaf, parent) = self.components.split_last()?;
        Some((Name { components: parent.to_vec() }, leaf))
    }

    pub(super) fn join(&self, leaf: &[u8]) -> Name {
        let mut components = self.components.clone();
        components.push(leaf.to_vec());
        Name { components }
    }

    /// As a relative path; `.` for the root.
    pub(super) fn path(&self) -> Vec<u8> {
        match self.is_root() {
            true => b".".to_vec(),
            false => self.components.join(&b'/'),
        }
    }

    pub(super) fn shown(&self) -> String {
        shown(&self.path())
    }

    /// Stands for the name in sets that may hold millions.
    pub(super) fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.components.hash(&mut hasher);
        hasher.finish()
    }
}

/// Whether a symbolic link at `depth` folders below the root stays inside, wherever other links may lead.
///
/// `..` is allowed in front only. There it starts from the real folder the link is in (no link is on the way to an
/// entry, see [`super::tree`]), so it climbs at most to the root. Behind a name it would climb from wherever that name,
/// if it is itself a link, leads, and no count of parts can tell how deep that is.
pub(super) fn symlink_stays_inside(depth: usize, target: &[u8]) -> bool {
    if target.first() == Some(&b'/') {
        return false;
    }
    let (mut climbed, mut descended) = (0, false);
    for part in target.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." if descended => return false,
            b".." => climbed += 1,
            _ => descended = true,
        }
    }
    climbed <= depth
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_out_are_refused_by_reason() {
        assert!(matches!(Name::parse(b"../x"), Err(UnpackError::ParentName { .. })));
        assert!(matches!(Name::parse(b"a/../../x"), Err(UnpackError::ParentName { .. })));
        assert!(matches!(Name::parse(b"/etc/passwd"), Err(UnpackError::AbsoluteName { .. })));
        assert!(matches!(Name::parse(b"a\0b"), Err(UnpackError::BadName { .. })));
        assert!(matches!(Name::parse(&b"a/".repeat(200)), Err(UnpackError::BadName { .. })));
        assert!(matches!(Name::parse(&[b'a'; 256]), Err(UnpackError::BadName { .. })));
        assert_eq!(Name::parse(b"./a//b/.").unwrap().path(), b"a/b");
        assert!(Name::parse(b"./").unwrap().is_root());
    }

    #[test]
    fn symlinks_stay_inside_or_not() {
        for (depth, target, inside) in [
            (0, &b"b"[..], true),
            (0, b"./b/c", true),
            (1, b"../b", true),
            (2, b"../../b", true),
            (0, b"../b", false),
            (1, b"../../etc/passwd", false),
            (3, b"/etc/passwd", false),
            (3, b"a/..", false),
        ] {
            assert_eq!(symlink_stays_inside(depth, target), inside, "{depth} {target:?}");
        }
    }
}
