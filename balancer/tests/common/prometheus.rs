//! A strict reading of Prometheus' text format 0.0.4: stricter than Prometheus itself where sloppiness would hide
//! a mistake.

use std::collections::{BTreeMap, BTreeSet};

/// A name and its labels.
type Series = (String, BTreeMap<String, String>);

/// Everything a scrape said, by name and labels.
#[derive(Debug, Default)]
pub struct Scrape {
    samples: BTreeMap<Series, f64>,
}

impl Scrape {
    /// Panics over anything that is not in order.
    pub fn read(text: &str) -> Self {
        assert!(text.ends_with('\n'), "the last line has no end");
        let mut scrape = Self::default();
        let (mut family, mut kind) = (String::new(), String::new());
        let mut families = BTreeSet::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').expect("a help text");
                assert!(families.insert(name.to_owned()), "{name} comes twice");
                assert!(!help.is_empty() && is_name(name), "{line}");
                (family, kind) = (name.to_owned(), String::new());
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, what) = rest.split_once(' ').expect("a type");
                assert!(name == family && kind.is_empty(), "{line}");
                assert!(["counter", "gauge", "histogram"].contains(&what), "{line}");
                assert_eq!(what == "counter", name.ends_with("_total"), "{line}");
                kind = what.to_owned();
            } else {
                scrape.sample(line, &family, &kind);
            }
        }
        scrape.check_histograms();
        scrape
    }

    /// One sample.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let key = (format!("epagent_balancer_{name}"), labels);
        *self.samples.get(&key).unwrap_or_else(|| panic!("no {key:?}"))
    }

    /// All samples of a name that have these labels among theirs, added up.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let name = format!("epagent_balancer_{name}");
        let fits = |has: &BTreeMap<String, String>| {
            labels.iter().all(|(name, value)| has.get(*name).map(String::as_str) == Some(*value))
        };
        self.samples.iter().filter(|((has, of), _)| *has == name && fits(of)).map(|(_, value)| value).sum()
    }

    fn sample(&mut self, line: &str, family: &str, kind: &str) {
        let end = line.find(['{', ' ']).expect("a name");
        let (name, mut rest) = line.split_at(end);
        let suffix = name.strip_prefix(family).unwrap_or_else(|| panic!("{line} is not of {family}"));
        let fits = match kind {
            "histogram" => ["_bucket", "_sum", "_count"].contains(&suffix),
            _ => suffix.is_empty(),
        };
        assert!(fits && !kind.is_empty(), "{line} in a {kind}");
        let mut labels = BTreeMap::new();
        if let Some(inside) = rest.strip_prefix('{') {
            let mut left = inside;
            loop {
                let (label, after) = left.split_once("=\"").expect("a label");
                assert!(is_name(label) && !label.contains(':'), "{line}");
                let (value, after) = quoted(after);
                assert!(labels.insert(label.to_owned(), value).is_none(), "{line} has {label} twice");
                match after.strip_prefix(',') {
                    Some(more) => left = more,
                    None => {
                        rest = after.strip_prefix('}').expect("the end of the labels");
                        break;
                    }
                }
            }
        }
        let value: f64 = rest.strip_prefix(' ').and_then(|value| value.parse().ok()).expect("a number");
        assert!(value.is_finite() && value >= 0.0, "{line}");
        assert!(kind != "counter" || value.fract() == 0.0, "{line}");
        assert!(self.samples.insert((name.to_owned(), labels), value).is_none(), "{line} comes twice");
    }

    fn check_histograms(&self) {
        let mut buckets: BTreeMap<Series, Vec<(f64, f64)>> = BTreeMap::new();
        for ((name, labels), count) in &self.samples {
            let Some(base) = name.strip_suffix("_bucket") else { continue };
            let mut labels = labels.clone();
            let le: f64 = labels.remove("le").expect("le").parse().expect("a bound");
            buckets.entry((base.to_owned(), labels)).or_default().push((le, *count));
        }
        for ((base, labels), mut bounds) in buckets {
            bounds.sort_by(|a, b| a.0.total_cmp(&b.0));
            assert!(bounds.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "{base} {labels:?}: {bounds:?}");
            let total = self.samples[&(format!("{base}_count"), labels.clone())];
            assert_eq!(bounds.last(), Some(&(f64::INFINITY, total)), "{base} {labels:?}");
            assert!(self.samples.contains_key(&(format!("{base}_sum"), labels)), "{base} has no sum");
        }
    }
}

/// The value of a label up to its closing quote, and what follows.
fn quoted(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, char)) = chars.next() {
        match char {
            '"' => return (value, &text[at + 1..]),
            '\\' => match chars.next().expect("an escaped character").1 {
                'n' => value.push('\n'),
                other => {
                    assert!(matches!(other, '\\' | '"'), "\\{other} is no escape");
                    value.push(other);
                }
            },
            other => value.push(other),
        }
    }
    panic!("a label value without an end: {text}");
}

fn is_name(name: &str) -> bool {
    let starts = name.starts_with(|char: char| char.is_ascii_alphabetic() || char == '_' || char == ':');
    starts && name.chars().all(|char| char.is_ascii_alphanumeric() || char == '_' || char == ':')
}
