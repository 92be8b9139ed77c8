//! A table of the document that knows where each of its values stands.
//!
//! Reading by hand instead of by serde: every complaint, also one about what a value means, points at its place.

use std::ops::{Range, RangeInclusive};

use toml::de::{DeTable, DeValue};

use super::ManifestError;
use super::error::{Source, nearest, quoted};
use super::units::{duration_ms, percent, show_duration, show_size, size_bytes};

/// Words that other tools use for one of our keys.
const SYNONYMS: [(&str, &str); 14] = [
    ("name", "app"),
    ("environment", "env"),
    ("processes", "process"),
    ("services", "process"),
    ("volumes", "volume"),
    ("routes", "route"),
    ("cmd", "command"),
    ("run", "command"),
    ("replicas", "instances"),
    ("count", "instances"),
    ("strategy", "deploy"),
    ("mem", "memory"),
    ("size", "quota"),
    ("domain", "host"),
];

#[derive(Debug, Clone)]
pub(super) struct Table<'d> {
    source: Source<'d>,
    entries: &'d DeTable<'d>,
    /// What it is called: `[process.web]`; empty for the document itself.
    name: String,
    span: Range<usize>,
}

/// A value under its key.
#[derive(Debug, Clone)]
pub(super) struct Item<'d> {
    source: Source<'d>,
    /// From the top: `process.web.instances`.
    pub path: String,
    pub key: &'d str,
    pub key_span: Range<usize>,
    pub span: Range<usize>,
    value: &'d DeValue<'d>,
}

impl<'d> Table<'d> {
    pub(super) fn of_document(source: Source<'d>, entries: &'d DeTable<'d>) -> Self {
        Self { source, entries, name: String::new(), span: 0..0 }
    }

    /// Every key must be one of `known` or begin with `x-`.
    pub(super) fn only(&self, known: &[&str]) -> Result<(), ManifestError> {
        let unknown = self
            .items()
            .filter(|item| !known.contains(&item.key) && !item.key.starts_with("x-"))
            .min_by_key(|item| item.key_span.start);
        let Some(Item { key, key_span, .. }) = unknown else { return Ok(()) };
        let error = self.source.error(key_span, format!("unknown key {}", quoted(key)));
        let synonym = SYNONYMS.iter().find(|&&(word, ours)| word == key && known.contains(&ours));
        Err(match nearest(key, known.iter().copied()).or(synonym.map(|&(_, ours)| ours)) {
            Some(meant) => error.with_help(format!("did you mean `{meant}`?")),
            None => error.with_help(format!("the keys {} are {}", self.place(), list(known))),
        })
    }

    pub(super) fn get(&self, key: &str) -> Option<Item<'d>> {
        self.items().find(|item| item.key == key)
    }

    pub(super) fn require(&self, key: &str, example: &str) -> Result<Item<'d>, ManifestError> {
        self.get(key).ok_or_else(|| {
            let message = match self.name.as_str() {
                "" => format!("the key `{key}` is missing"),
                name => format!("the key `{key}` is missing in {name}"),
            };
            let error = match self.name.as_str() {
                "" => self.source.error_nowhere(message),
                _ => self.source.error(self.span.clone(), message),
            };
            error.with_help(format!("add `{example}`"))
        })
    }

    /// All entries in the order of the text, those that begin with `x-` left out.
    pub(super) fn named(&self) -> Vec<Item<'d>> {
        let mut items: Vec<_> = self.items().filter(|item| !item.key.starts_with("x-")).collect();
        items.sort_by_key(|item| item.key_span.start);
        items
    }

    pub(super) fn error(&self, message: impl Into<String>) -> ManifestError {
        self.source.error(self.span.clone(), message)
    }

    fn items(&self) -> impl Iterator<Item = Item<'d>> {
        self.entries.iter().map(|(key, value)| Item {
            source: self.source,
            path: match self.name.trim_matches(['[', ']']) {
                "" => key.get_ref().to_string(),
                prefix => format!("{prefix}.{}", key.get_ref()),
            },
            key: key.get_ref(),
            key_span: key.span(),
            span: value.span(),
            value: value.get_ref(),
        })
    }

    fn place(&self) -> String {
        match self.name.as_str() {
            "" => "at the top".to_owned(),
            name => format!("in {name}"),
        }
    }
}

impl<'d> Item<'d> {
    pub(super) fn error(&self, message: impl Into<String>) -> ManifestError {
        self.source.error(self.span.clone(), message)
    }

    pub(super) fn error_at_key(&self, message: impl Into<String>) -> ManifestError {
        self.source.error(self.key_span.clone(), message)
    }

    pub(super) fn line(&self) -> usize {
        self.source.line_of(self.span.start)
    }

    /// A text without a NUL byte, which neither an argument nor a path can hold.
    pub(super) fn string(&self) -> Result<&'d str, ManifestError> {
        match self.value {
            DeValue::String(text) if text.contains('\0') => {
                Err(self.error(format!("`{}` contains a NUL byte", self.path)))
            }
            DeValue::String(text) => Ok(text),
            DeValue::Integer(_) | DeValue::Float(_) | DeValue::Boolean(_) => {
                Err(self.wrong_type("a string").with_help("put it in quotes"))
            }
            _ => Err(self.wrong_type("a string")),
        }
    }

    /// A string, or a list of them.
    pub(super) fn strings(&self) -> Result<Vec<Item<'d>>, ManifestError> {
        match self.value {
            DeValue::Array(_) => self.elements("a list of strings"),
            DeValue::String(_) => Ok(vec![self.clone()]),
            _ => Err(self.wrong_type("a string or a list of strings")),
        }
    }

    pub(super) fn elements(&self, what: &str) -> Result<Vec<Item<'d>>, ManifestError> {
        let DeValue::Array(values) = self.value else { return Err(self.wrong_type(what)) };
        let item = |(at, value): (usize, &'d toml::Spanned<DeValue<'d>>)| Item {
            path: format!("{}[{at}]", self.path),
            span: value.span(),
            value: value.get_ref(),
            ..self.clone()
        };
        Ok(values.iter().enumerate().map(item).collect())
    }

    pub(super) fn integer(&self, allowed: RangeInclusive<u32>) -> Result<u32, ManifestError> {
        let DeValue::Integer(integer) = self.value else {
            let error = self.wrong_type("a number");
            return Err(match self.value {
                DeValue::String(_) => error.with_help("write it without quotes"),
                _ => error,
            });
        };
        i64::from_str_radix(integer.as_str(), integer.radix())
            .ok()
            .and_then(|number| u32::try_from(number).ok())
            .filter(|number| allowed.contains(number))
            .ok_or_else(|| self.out_of_range(&integer.to_string(), allowed.start(), allowed.end()))
    }

    /// `true`; `false` would say what leaving the key out says.
    pub(super) fn only_true(&self) -> Result<(), ManifestError> {
        match self.value {
            DeValue::Boolean(true) => Ok(()),
            DeValue::Boolean(false) => {
                Err(self.error(format!("`{}` can only be true", self.path)).with_help("leave it out"))
            }
            _ => Err(self.wrong_type("true")),
        }
    }

    pub(super) fn duration_ms(&self, allowed: RangeInclusive<u64>) -> Result<u64, ManifestError> {
        const HELP: &str = "write one number and ms, s, m or h: \"500ms\", \"10s\", \"5m\"";
        if let DeValue::Integer(_) | DeValue::Float(_) = self.value {
            return Err(self.error(format!("`{}` has no unit", self.path)).with_help(HELP));
        }
        let text = self.string()?;
        let ms = duration_ms(text)
            .ok_or_else(|| self.error(format!("{} is not a duration", quoted(text))).with_help(HELP))?;
        if allowed.contains(&ms) {
            return Ok(ms);
        }
        Err(self.out_of_range(text, &show_duration(*allowed.start()), &show_duration(*allowed.end())))
    }

    pub(super) fn size_bytes(&self, allowed: RangeInclusive<u64>) -> Result<u64, ManifestError> {
        const HELP: &str = "write one number and K, M, G or T: \"512K\", \"256M\", \"1G\"; or plain bytes";
        self.bytes(allowed, "a size", HELP)
    }

    /// Bytes per second, or none for `"none"`.
    pub(super) fn rate(&self, allowed: RangeInclusive<u64>) -> Result<Option<u64>, ManifestError> {
        const HELP: &str =
            "write bytes per second as one number and K, M, G or T: \"50M\"; or \"none\" for no limit";
        match self.value {
            DeValue::String(text) if &**text == "none" => Ok(None),
            _ => self.bytes(allowed, "a rate", HELP).map(Some),
        }
    }

    fn bytes(&self, allowed: RangeInclusive<u64>, what: &str, help: &str) -> Result<u64, ManifestError> {
        let text = match self.value {
            DeValue::Integer(integer) if integer.radix() == 10 => integer.as_str(),
            _ => self.string()?,
        };
        let bytes = size_bytes(text)
            .ok_or_else(|| self.error(format!("{} is not {what}", quoted(text))).with_help(help))?;
        if allowed.contains(&bytes) {
            return Ok(bytes);
        }
        Err(self.out_of_range(text, &show_size(*allowed.start()), &show_size(*allowed.end())))
    }

    pub(super) fn percent(&self, allowed: RangeInclusive<u32>) -> Result<u32, ManifestError> {
        const HELP: &str =
            "write a share of one processor in percent: \"50%\" is half of one, \"200%\" is two";
        if let DeValue::Integer(_) | DeValue::Float(_) = self.value {
            return Err(self.error(format!("`{}` has no unit", self.path)).with_help(HELP));
        }
        let text = self.string()?;
        let number = percent(text).ok_or_else(|| {
            self.error(format!("{} is not a share of a processor", quoted(text))).with_help(HELP)
        })?;
        u32::try_from(number).ok().filter(|number| allowed.contains(number)).ok_or_else(|| {
            self.out_of_range(text, &format!("{}%", allowed.start()), &format!("{}%", allowed.end()))
        })
    }

    pub(super) fn table(&self) -> Result<Table<'d>, ManifestError> {
        match self.value {
            DeValue::Table(entries) => Ok(Table {
                source: self.source,
                entries,
                name: format!("[{}]", self.path),
                // A header's span is the header; what has none (`a.b = 1`) is found by its key.
                span: if self.span.is_empty() { self.key_span.clone() } else { self.span.clone() },
            }),
            _ => Err(self.wrong_type("a table")),
        }
    }

    pub(super) fn wrong_type(&self, expected: &str) -> ManifestError {
        let found = match self.value {
            DeValue::String(_) => "a string",
            DeValue::Integer(_) => "a number",
            DeValue::Float(_) => "a number with a fraction",
            DeValue::Boolean(_) => "true or false",
            DeValue::Datetime(_) => "a date",
            DeValue::Array(_) => "a list",
            DeValue::Table(_) => "a table",
        };
        self.error(format!("`{}` must be {expected}, and is {found}", self.path))
    }

    fn out_of_range(
        &self,
        found: &str,
        least: &dyn std::fmt::Display,
        most: &dyn std::fmt::Display,
    ) -> ManifestError {
        self.error(format!(
            "`{}` is {}; it may be {least} to {most}",
            self.path,
            quoted(found).trim_matches('`')
        ))
    }
}

/// `` `a`, `b` and `c` ``.
pub(super) fn list(words: &[&str]) -> String {
    match words {
        [] => String::new(),
        [only] => format!("`{only}`"),
        [most @ .., last] => {
            let most: Vec<String> = most.iter().map(|word| format!("`{word}`")).collect();
            format!("{} and `{last}`", most.join(", "))
        }
    }
}
