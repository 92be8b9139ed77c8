//! What people see: tables, ages, sizes, colours, and nothing that a tenant could steer the terminal with.
//!
//! Results go to stdout, progress to stderr, so that the one can be piped while the other is watched. Colour only
//! on a terminal and never with NO_COLOR (no-color.org).

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};

use jiff::Timestamp;

/// How something is set off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    Plain,
    Bold,
    Dim,
    Good,
    Warn,
    Bad,
}

/// One of the two streams, and what it can show.
#[derive(Debug, Clone, Copy)]
pub struct Screen {
    stream: Stream,
    colour: bool,
    terminal: bool,
}

#[derive(Debug, Clone, Copy)]
enum Stream {
    Out,
    Err,
}

impl Screen {
    pub fn stdout() -> Self {
        Self::new(Stream::Out, io::stdout().is_terminal())
    }

    pub fn stderr() -> Self {
        Self::new(Stream::Err, io::stderr().is_terminal())
    }

    fn new(stream: Stream, terminal: bool) -> Self {
        let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Self { stream, terminal, colour: terminal && !set("NO_COLOR") && !dumb }
    }

    /// A line. A reader that has gone away (`epagent logs | head`) is an error of the pipe, told to the caller.
    pub fn line(&self, text: &str) -> io::Result<()> {
        match self.stream {
            Stream::Out => writeln!(io::stdout(), "{text}"),
            Stream::Err => writeln!(io::stderr(), "{text}"),
        }
    }

    /// A line of progress, which nobody misses when nobody can read it.
    pub fn say(&self, text: &str) {
        let _ = self.line(text);
    }

    pub fn paint<'a>(&self, tone: Tone, text: &'a str) -> Cow<'a, str> {
        let code = match tone {
            Tone::Plain => return Cow::Borrowed(text),
            _ if !self.colour => return Cow::Borrowed(text),
            Tone::Bold => 1,
            Tone::Dim => 2,
            Tone::Good => 32,
            Tone::Warn => 33,
            Tone::Bad => 31,
        };
        Cow::Owned(format!("\x1b[{code}m{text}\x1b[0m"))
    }

    /// Text that comes from an app: on a terminal, what is no plain character is shown as what it is.
    pub fn foreign<'a>(&self, text: &'a str) -> Cow<'a, str> {
        if !self.terminal || !text.chars().any(steers) {
            return Cow::Borrowed(text);
        }
        let mut shown = String::with_capacity(text.len() + 16);
        for c in text.chars() {
            match steers(c) {
                true => shown.extend(c.escape_unicode()),
                false => shown.push(c),
            }
        }
        Cow::Owned(shown)
    }
}

/// Control characters but tab, and those that turn the direction of writing.
fn steers(c: char) -> bool {
    (c.is_control() && c != '\t') || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Rows under headings, as wide as they must be.
#[derive(Debug, Default)]
pub struct Table {
    headings: Vec<&'static str>,
    rows: Vec<Vec<(String, Tone)>>,
}

impl Table {
    pub fn new(headings: &[&'static str]) -> Self {
        Self { headings: headings.to_vec(), rows: Vec::new() }
    }

    pub fn row(&mut self, cells: Vec<(String, Tone)>) {
        self.rows.push(cells);
    }

    /// Prints to stdout; `empty` when there is no row, to stderr, since it is no result.
    pub fn print(&self, empty: &str) -> io::Result<()> {
        if self.rows.is_empty() {
            Screen::stderr().say(empty);
            return Ok(());
        }
        let screen = Screen::stdout();
        self.lines(&screen).iter().try_for_each(|line| screen.line(line))
    }

    /// As they are printed.
    pub fn lines(&self, screen: &Screen) -> Vec<String> {
        let width = |column: usize| {
            let cells =
                self.rows.iter().filter_map(|row| row.get(column)).map(|(text, _)| text.chars().count());
            cells.chain(self.headings.get(column).map(|text| text.len())).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.headings.len()).map(width).collect();
        let headings: Vec<(String, Tone)> =
            self.headings.iter().map(|text| (text.to_string(), Tone::Bold)).collect();
        let shown = std::iter::once(&headings).chain(&self.rows).map(|row| {
            let mut line = String::new();
            for (place, ((text, tone), width)) in row.iter().zip(&widths).enumerate() {
                let text = screen.foreign(text);
                line.push_str(&screen.paint(*tone, &text));
                if place + 1 < row.len() {
                    let gap = width.saturating_sub(text.chars().count()) + 2;
                    line.extend(std::iter::repeat_n(' ', gap));
                }
            }
            line.trim_end().to_owned()
        });
        shown.collect()
    }
}

/// A plain cell.
pub fn cell(text: impl Into<String>) -> (String, Tone) {
    (text.into(), Tone::Plain)
}

/// A state, in the tone of how it is.
pub fn state_cell(state: &str) -> (String, Tone) {
    let tone = match state {
        "running" | "healthy" | "serving" | "done" | "ok" | "up" | "valid" => Tone::Good,
        "degraded" | "unhealthy" | "waiting" | "warn" | "down" | "draining" | "expires soon"
        | "not yet valid" => Tone::Warn,
        "failed" | "fail" | "exited" | "unreachable" | "expired" => Tone::Bad,
        _ => Tone::Plain,
    };
    (state.to_owned(), tone)
}

/// `17 s`, `4 min`, `3 h`, `12 d`: how long ago a time of the API is. As it is when it is no time.
pub fn age(at: &str, now: Timestamp) -> String {
    let Ok(at_time) = at.parse::<Timestamp>() else {
        return at.to_owned();
    };
    span((now.as_second() - at_time.as_second()).max(0).unsigned_abs())
}

/// The same of so many seconds.
pub fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// `512 B`, `1.5 MiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ => format!("{value:.1} {}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Screen = Screen { stream: Stream::Out, colour: false, terminal: false };
    const TERMINAL: Screen = Screen { stream: Stream::Out, colour: true, terminal: true };

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["APP", "STATE"]);
        table.row(vec![cell("shop"), state_cell("running")]);
        table.row(vec![cell("überlang"), cell("x")]);
        assert_eq!(table.lines(&PLAIN), ["APP       STATE", "shop      running", "überlang  x"]);
        assert!(table.lines(&TERMINAL)[1].ends_with("\x1b[32mrunning\x1b[0m"));
    }

    #[test]
    fn an_app_does_not_steer_the_terminal() {
        let hostile = "a\x1b]0;title\x07\tb\u{202e}c";
        assert_eq!(TERMINAL.foreign(hostile), "a\\u{1b}]0;title\\u{7}\tb\\u{202e}c");
        assert_eq!(PLAIN.foreign(hostile), hostile);
    }

    #[test]
    fn ages_and_sizes_are_short() {
        let now: Timestamp = "2026-01-02T00:00:00Z".parse().unwrap();
        assert_eq!(age("2026-01-01T23:59:43Z", now), "17 s");
        assert_eq!(age("2026-01-01T20:00:00.5Z", now), "4 h");
        assert_eq!(age("2027-01-01T20:00:00Z", now), "0 s");
        assert_eq!(age("soon", now), "soon");
        assert_eq!([size(512), size(1536), size(3 << 30)], ["512 B", "1.5 KiB", "3.0 GiB"]);
    }
}
