//! Many texts, one table. Every key and value keeps the place it was read at, as one number over all texts, so that
//! an error that is found last, when the table becomes the daemon's type, still says where it stands.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, DeValue, Deserializer};

use crate::read::Source;
use crate::{ConfError, Daemon, Loaded, Origins, Place};

pub fn merge<T: DeserializeOwned>(daemon: Daemon, sources: &[Source]) -> Result<Loaded<T>, ConfError> {
    let mut merged = DeTable::new();
    for (number, source) in sources.iter().enumerate() {
        let table = DeTable::parse(&source.text).map_err(|error| {
            syntax(sources, error.message(), error.span().map(|span| moved(span, source.begin)))
        })?;
        let table = moved_table(table.into_inner(), source.begin);
        match number {
            0 => merged = table,
            _ => lay_over(&mut merged, part_of(daemon, table, sources)?),
        }
    }
    let mut places = BTreeMap::new();
    collect(&merged, "", sources, &mut places);
    // The whole has no place: what is missing in it is missing everywhere.
    let config = T::deserialize(Deserializer::from(Spanned::new(0..0, merged)))
        .map_err(|error| syntax(sources, &without_value(error.message()), error.span()))?;
    Ok(Loaded { config, origins: Origins { places } })
}

/// What is wrong with a value, without the value: `env = "URL=https://user:password@host"` where a table belongs is
/// told to logs and bundles.
fn without_value(message: &str) -> String {
    match (message.find("string \""), message.rfind("\", expected")) {
        (Some(start), Some(end)) if start < end => {
            format!("{}string{}", &message[..start], &message[end + 1..])
        }
        _ => message.to_owned(),
    }
}

/// What a file of the folder says to this daemon. What it says to others is theirs to judge, but it has to be to one
/// of them.
fn part_of<'i>(daemon: Daemon, table: DeTable<'i>, sources: &[Source]) -> Result<DeTable<'i>, ConfError> {
    let mut own = DeTable::new();
    for (key, value) in table {
        let name = key.get_ref().as_ref();
        let Some(whose) = Daemon::ALL.into_iter().find(|daemon| daemon.name() == name) else {
            let names = Daemon::ALL.map(|daemon| format!("[{}]", daemon.name())).join(" or ");
            let why = format!("unknown key `{name}`: files of this folder have tables of {names}");
            return Err(syntax(sources, &why, Some(key.span())));
        };
        let span = value.span();
        match value.into_inner() {
            DeValue::Table(table) if whose == daemon => own = table,
            DeValue::Table(_) => {}
            _ => return Err(syntax(sources, &format!("`{name}` is not a table"), Some(span))),
        }
    }
    Ok(own)
}

fn lay_over<'i>(below: &mut DeTable<'i>, above: DeTable<'i>) {
    for (key, value) in above {
        // Taken out first, since a key that is there would keep its old place.
        let (old, span) = (below.remove(&key), value.span());
        let laid = match (old.map(Spanned::into_inner), value.into_inner()) {
            (Some(DeValue::Table(mut old)), DeValue::Table(new)) => {
                lay_over(&mut old, new);
                DeValue::Table(old)
            }
            (_, new) => new,
        };
        below.insert(key, Spanned::new(span, laid));
    }
}

fn collect(table: &DeTable<'_>, above: &str, sources: &[Source], places: &mut BTreeMap<String, Place>) {
    for (key, value) in table {
        let key_here = dotted(above, key.get_ref());
        match value.get_ref() {
            DeValue::Table(table) => collect(table, &key_here, sources, places),
            _ => {
                places.insert(key_here, place(sources, Some(key.span())));
            }
        }
    }
}

pub fn dotted(above: &str, key: &str) -> String {
    match above {
        "" => key.to_owned(),
        above => format!("{above}.{key}"),
    }
}

fn syntax(sources: &[Source], message: &str, span: Option<Range<usize>>) -> ConfError {
    let why = message.lines().collect::<Vec<_>>().join(", ");
    ConfError::Syntax { place: place(sources, span), why }
}

fn place(sources: &[Source], span: Option<Range<usize>>) -> Place {
    let at = span.map_or(0, |span| span.start);
    let source = sources.iter().rev().find(|source| source.begin <= at);
    match (source, sources.first()) {
        (Some(source), _) => {
            let before = &source.text.as_bytes()[..(at - source.begin).min(source.text.len())];
            let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
            Place { path: source.path.clone(), line: Some(line) }
        }
        (None, main) => Place { path: main.map(|main| main.path.clone()).unwrap_or_default(), line: None },
    }
}

fn moved(span: Range<usize>, by: usize) -> Range<usize> {
    span.start + by..span.end + by
}

fn moved_table(table: DeTable<'_>, by: usize) -> DeTable<'_> {
    let entries = table.into_iter().map(|(key, value)| {
        let span = moved(key.span(), by);
        (Spanned::new(span, key.into_inner()), moved_value(value, by))
    });
    entries.collect()
}

fn moved_value(value: Spanned<DeValue<'_>>, by: usize) -> Spanned<DeValue<'_>> {
    let span = moved(value.span(), by);
    let value = match value.into_inner() {
        DeValue::Table(table) => DeValue::Table(moved_table(table, by)),
        DeValue::Array(mut array) => {
            for item in array.iter_mut() {
                let old = std::mem::replace(item, Spanned::new(0..0, DeValue::Boolean(false)));
                *item = moved_value(old, by);
            }
            DeValue::Array(array)
        }
        other => other,
    };
    Spanned::new(span, value)
}
