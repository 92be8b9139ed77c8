//! `.epagentignore`: what is not sent.
//!
//! One pattern per line, as in `.gitignore` where they overlap; a later line wins.
//!
//! | pattern | leaves out |
//! |---|---|
//! | `*.log` | every file and folder of such a name, at any depth |
//! | `/build` or `docs/draft` | that path from the top, since it has a slash |
//! | `cache/` | folders of that name only |
//! | `a/**/b` | `a/b`, `a/x/b`, `a/x/y/b` |
//! | `!keep.log` | nothing: it is kept after all, unless a folder above it is left out |
//! | `# …`, empty | |
//!
//! `*` and `?` stand for anything but a slash. `.git` at the top is always left out.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::PackError;

pub const FILE_NAME: &str = ".epagentignore";
/// The longest file of patterns.
pub const FILE_BYTES_MAX: u64 = 1 << 20;
/// The longest pattern; matching takes time in proportion to it and the path.
const PATTERN_BYTES_MAX: usize = 1024;

/// The patterns of one folder.
#[derive(Debug, Default)]
pub struct Ignore {
    patterns: Vec<Pattern>,
}

#[derive(Debug)]
struct Pattern {
    segments: Vec<Vec<u8>>,
    keeps: bool,
    folders_only: bool,
}

impl Ignore {
    /// Reads patterns; `path` is for messages only.
    pub fn parse(path: &Path, text: &str) -> Result<Self, PackError> {
        let mut patterns = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim_end();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let pattern = Pattern::parse(line).map_err(|reason| PackError::Pattern {
                path: path.to_owned(),
                line: number + 1,
                pattern: line.chars().take(64).collect(),
                reason,
            })?;
            patterns.push(pattern);
        }
        Ok(Self { patterns })
    }

    /// Whether the entry at `path`, relative to the folder, is left out.
    pub fn leaves_out(&self, path: &Path, is_folder: bool) -> bool {
        if path == Path::new(".git") {
            return true;
        }
        let segments: Vec<&[u8]> = path.iter().map(OsStr::as_bytes).collect();
        let last = self.patterns.iter().rev().find(|pattern| {
            (is_folder || !pattern.folders_only) && path_matches(&pattern.segments, &segments)
        });
        last.is_some_and(|pattern| !pattern.keeps)
    }
}

impl Pattern {
    fn parse(line: &str) -> Result<Self, &'static str> {
        if line.len() > PATTERN_BYTES_MAX {
            return Err("it is too long");
        }
        let (keeps, rest) = match line.strip_prefix('!') {
            Some(rest) => (true, rest),
            None => (false, line),
        };
        let (folders_only, rest) = match rest.strip_suffix('/') {
            Some(rest) => (true, rest),
            None => (false, rest),
        };
        let from_top = rest.contains('/');
        let rest = rest.strip_prefix('/').unwrap_or(rest);
        let mut segments: Vec<Vec<u8>> = rest.split('/').map(|part| part.as_bytes().to_vec()).collect();
        if segments.iter().any(|part| part.is_empty() || part == b"." || part == b"..") {
            return Err("it has an empty part, or `.` or `..`");
        }
        if !from_top {
            segments.insert(0, b"**".to_vec());
        }
        Ok(Self { segments, keeps, folders_only })
    }
}

/// `**` stands for any number of segments, none included. As in [`text_matches`], only the last star is ever tried
/// again, since an earlier one could not do better.
fn path_matches(pattern: &[Vec<u8>], path: &[&[u8]]) -> bool {
    matches_with_star(pattern, path, |part| part == b"**", |part, segment| text_matches(part, segment))
}

fn text_matches(pattern: &[u8], text: &[u8]) -> bool {
    matches_with_star(pattern, text, |byte| *byte == b'*', |byte, other| *byte == b'?' || byte == other)
}

/// Wildcard matching in time proportional to the product of the lengths.
fn matches_with_star<P, T>(
    pattern: &[P],
    text: &[T],
    is_star: impl Fn(&P) -> bool,
    equals: impl Fn(&P, &T) -> bool,
) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where the last star stood, and where what it stands for ends.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(part) if is_star(part) => {
                star = Some((p, t));
                p += 1;
            }
            Some(part) if equals(part, &text[t]) => {
                p += 1;
                t += 1;
            }
            _ => match star {
                None => return false,
                Some((place, end)) => {
                    star = Some((place, end + 1));
                    (p, t) = (place + 1, end + 1);
                }
            },
        }
    }
    pattern[p..].iter().all(is_star)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, left_out: &[&str], kept: &[&str]) {
        let ignore = Ignore::parse(Path::new(FILE_NAME), text).unwrap();
        let is = |path: &str| ignore.leaves_out(Path::new(path.trim_end_matches('/')), path.ends_with('/'));
        for path in left_out {
            assert!(is(path), "{path} is kept by {text:?}");
        }
        for path in kept {
            assert!(!is(path), "{path} is left out by {text:?}");
        }
    }

    #[test]
    fn patterns_mean_what_they_mean_elsewhere() {
        check("", &[".git/", ".git"], &["a", "sub/.git/", ".gitignore"]);
        check("*.log\n# x\n\n", &["a.log", "x/y/b.log", ".log"], &["a.logs", "log", "# x"]);
        check("/build\ndocs/draft", &["build/", "docs/draft"], &["x/build/", "x/docs/draft"]);
        check("cache/", &["cache/", "x/cache/"], &["cache", "x/cache"]);
        check("a/**/b", &["a/b", "a/x/b", "a/x/y/b"], &["b", "x/a/b", "a/b/c"]);
        check("**/b", &["b", "x/b"], &["xb"]);
        check("*.log\n!keep.log", &["a.log"], &["keep.log", "x/keep.log"]);
        check("?.txt", &["a.txt"], &["ab.txt", ".txt", "a/.txt"]);
        check("a*b*c", &["abc", "axxbxxbc"], &["ab", "a/b/c", "abcd"]);
    }

    #[test]
    fn nonsense_is_refused_with_its_line() {
        for text in ["a\n..", "a//b", "./a", "!", "/"] {
            assert!(Ignore::parse(Path::new("x"), text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_hostile_pattern_takes_no_time() {
        let text = format!("{}b", "*a".repeat(200));
        let ignore = Ignore::parse(Path::new("x"), &text).unwrap();
        assert!(!ignore.leaves_out(Path::new(&"a".repeat(255)), false));
    }
}
