//! How a line is written: as JSON with every fact, or as web servers have always done (NCSA common and combined).

use std::io::{self, Write};
use std::time::Duration;

use serde::Serialize;

use crate::core::access::Access;

/// The form of a line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Format {
    /// One JSON object.
    #[default]
    Json,
    /// `client - - [time] "request" status bytes`.
    Common,
    /// The same, and `"referer" "user agent"`.
    Combined,
}

#[derive(Serialize)]
struct Line<'a> {
    /// RFC 3339, in UTC, to the millisecond.
    time: String,
    #[serde(flatten)]
    access: &'a Access,
}

impl Format {
    /// Writes a line with its end. `at` is since 1970.
    pub fn write(self, mut out: impl Write, at: Duration, access: &Access) -> io::Result<()> {
        match self {
            Format::Json => serde_json::to_writer(&mut out, &Line { time: rfc3339(at), access })?,
            Format::Common => ncsa(&mut out, at, access)?,
            Format::Combined => {
                ncsa(&mut out, at, access)?;
                write!(out, " \"{}\" \"{}\"", or_dash(&access.referer), or_dash(&access.user_agent))?;
            }
        }
        out.write_all(b"\n")
    }
}

/// Bytes are those to the client, header included. A plain connection has the name of its route for a request.
fn ncsa(out: &mut impl Write, at: Duration, access: &Access) -> io::Result<()> {
    match access.client {
        Some(client) => write!(out, "{client}")?,
        None => out.write_all(b"-")?,
    }
    write!(out, " - - [{}] \"{}\" ", ncsa_time(at), request_line(access))?;
    match access.status {
        Some(status) => write!(out, "{status}")?,
        None => out.write_all(b"-")?,
    }
    write!(out, " {}", access.bytes_out)
}

/// What was asked, as one line of text without quotes or controls of its own.
pub fn request_line(access: &Access) -> String {
    match (&access.method, &access.route) {
        (method, _) if !method.is_empty() => {
            format!("{} {} {}", escaped(method), escaped(&access.target), access.protocol)
        }
        (_, Some(route)) => format!("TCP {}", escaped(route)),
        (_, None) => "-".to_owned(),
    }
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { escaped(text) }
}

/// Quotes, backslashes and controls as Apache writes them.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '"' | '\\' => out.extend(['\\', char]),
            char if char.is_control() => out.extend(format!("\\x{:02x}", u32::from(char)).chars()),
            char => out.push(char),
        }
    }
    out
}

const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

fn rfc3339(at: Duration) -> String {
    let (year, month, day) = date(at.as_secs() / 86_400);
    let (hour, minute, second) = time_of_day(at);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", at.subsec_millis())
}

fn ncsa_time(at: Duration) -> String {
    let (year, month, day) = date(at.as_secs() / 86_400);
    let (hour, minute, second) = time_of_day(at);
    let month = MONTHS[(month - 1) as usize];
    format!("{day:02}/{month}/{year:04}:{hour:02}:{minute:02}:{second:02} +0000")
}

fn time_of_day(at: Duration) -> (u64, u64, u64) {
    let seconds = at.as_secs() % 86_400;
    (seconds / 3_600, seconds / 60 % 60, seconds % 60)
}

/// Year, month and day of a day since 1970, in the Gregorian calendar. Years begin in March here, so that the
/// odd day of a leap year is the last; a period of 400 years has 146,097 days.
fn date(day: u64) -> (u64, u64, u64) {
    let shifted = day + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(format: Format, access: &Access) -> String {
        let mut out = Vec::new();
        // 2026-11-22 07:08:09.010.
        format.write(&mut out, Duration::from_millis(1_795_331_289_010), access).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn access() -> Access {
        Access {
            client: Some("192.0.2.1".parse().unwrap()),
            protocol: "HTTP/1.1",
            method: "GET".to_owned(),
            target: "/a\"b?c".to_owned(),
            status: Some(200),
            outcome: "answered",
            bytes_out: 1_234,
            user_agent: "curl\\8\n".to_owned(),
            ..Access::default()
        }
    }

    #[test]
    fn lines_are_as_web_servers_write_them() {
        let common = "192.0.2.1 - - [22/Nov/2026:07:08:09 +0000] \"GET /a\\\"b?c HTTP/1.1\" 200 1234";
        assert_eq!(text(Format::Common, &access()), format!("{common}\n"));
        assert_eq!(text(Format::Combined, &access()), format!("{common} \"-\" \"curl\\\\8\\x0a\"\n"));
        let plain =
            Access { route: Some("db".to_owned()), outcome: "closed", protocol: "tcp", ..Access::default() };
        assert_eq!(text(Format::Common, &plain), "- - - [22/Nov/2026:07:08:09 +0000] \"TCP db\" - 0\n");
    }

    #[test]
    fn json_has_what_there_is_and_nothing_else() {
        let line: serde_json::Value = serde_json::from_str(&text(Format::Json, &access())).unwrap();
        assert_eq!(line["time"], "2026-11-22T07:08:09.010Z");
        assert_eq!((&line["target"], &line["status"]), (&"/a\"b?c".into(), &200.into()));
        assert!(line.get("upstream").is_none() && line.get("sample").is_none());
    }

    #[test]
    fn dates_are_right_around_leap_days_and_centuries() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (951_868_800, "2000-03-01T00:00:00.000Z"),
            (1_709_164_800, "2024-02-29T00:00:00.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(Duration::from_secs(seconds)), expected);
        }
    }
}
