//! A record as one line, for people.

use std::io::Write;

use epagent_wire::said::{Record, Severity};

/// Writes it to standard error.
pub fn write(record: &Record) {
    // Where nobody reads it there is nobody to tell.
    let _ = std::io::stderr().write_all(line(record).as_bytes());
}

fn line(record: &Record) -> String {
    let level = match record.severity {
        Severity::Error => "ERROR",
        Severity::Warning => "WARN",
        Severity::Info => "INFO",
        Severity::Debug => "DEBUG",
    };
    let at = i64::try_from(record.at_us).ok().and_then(|us| jiff::Timestamp::from_microsecond(us).ok());
    let at = at.map(|at| format!("{at:.3} ")).unwrap_or_default();
    let mut text = format!("{at}{level} {}", record.message);
    for (name, value) in &record.fields {
        match value.contains([' ', '"', '\n']) {
            true => text.push_str(&format!(" {name}={value:?}")),
            false => text.push_str(&format!(" {name}={value}")),
        }
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_time_the_message_and_every_field() {
        let record = Record {
            at_us: 1_700_000_000_123_456,
            severity: Severity::Warning,
            message: "a jail was lost".to_owned(),
            fields: vec![("app".into(), "shop".into()), ("why".into(), "it is\ngone".into())],
        };
        let expected = "2023-11-14T22:13:20.123Z WARN a jail was lost app=shop why=\"it is\\ngone\"\n";
        assert_eq!(line(&record), expected);
    }
}
