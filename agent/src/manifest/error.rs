//! One complaint about a manifest, shown the way rustc shows one.
//!
//! ```text
//! error: unknown key `imge`
//!  --> epagent.toml:3:1
//!   |
//! 3 | imge = "py"
//!   | ^^^^
//!   = help: did you mean `image`?
//! ```

use std::fmt;
use std::ops::Range;

/// The longest piece of a source line that is shown, in characters.
const SHOWN_CHARS_MAX: usize = 120;
/// How much of it is shown before the caret when the line is longer.
const SHOWN_BEFORE_CHARS: usize = 40;
/// The longest piece of the author's own text a message repeats, in characters.
const QUOTED_CHARS_MAX: usize = 64;

/// Why a manifest was refused. `Display` gives the whole picture, on several lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestError(Box<Complaint>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Complaint {
    file: String,
    place: Option<Place>,
    message: String,
    help: Option<String>,
}

/// Where in the text, counted as an editor counts: from 1, in characters.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    line: usize,
    column: usize,
    /// The line, or the part of it around the fault, without anything a terminal would obey.
    shown: String,
    /// Blanks before the carets, and carets.
    indent: usize,
    carets: usize,
}

impl ManifestError {
    pub fn message(&self) -> &str {
        &self.0.message
    }

    pub fn help(&self) -> Option<&str> {
        self.0.help.as_deref()
    }

    /// Line and column, from 1; none when the fault is that something is not there.
    pub fn line_column(&self) -> Option<(usize, usize)> {
        self.0.place.as_ref().map(|place| (place.line, place.column))
    }

    pub(super) fn with_help(mut self, help: impl Into<String>) -> Self {
        self.0.help = Some(help.into());
        self
    }
}

impl std::error::Error for ManifestError {}

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Complaint { file, place, message, help } = &*self.0;
        writeln!(f, "error: {message}")?;
        let mut gutter = 1;
        match place {
            None => write!(f, " --> {file}")?,
            Some(Place { line, column, shown, indent, carets }) => {
                gutter = line.to_string().len();
                writeln!(f, "{:gutter$}--> {file}:{line}:{column}", "")?;
                writeln!(f, "{:gutter$} |", "")?;
                writeln!(f, "{line} | {shown}")?;
                write!(f, "{:gutter$} | {:indent$}{:^>carets$}", "", "", "")?;
            }
        }
        if let Some(help) = help {
            write!(f, "\n{:gutter$} = help: {help}", "")?;
        }
        Ok(())
    }
}

/// A manifest's text under its name.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'t> {
    pub file: &'t str,
    pub text: &'t str,
}

impl Source<'_> {
    /// A complaint about the bytes `span` of the text.
    pub(super) fn error(&self, span: Range<usize>, message: impl Into<String>) -> ManifestError {
        self.complain(Some(self.place(span)), message.into())
    }

    /// A complaint about something that is nowhere in the text.
    pub(super) fn error_nowhere(&self, message: impl Into<String>) -> ManifestError {
        self.complain(None, message.into())
    }

    fn complain(&self, place: Option<Place>, message: String) -> ManifestError {
        ManifestError(Box::new(Complaint { file: self.file.to_owned(), place, message, help: None }))
    }

    /// The line of a byte of the text, from 1.
    pub(super) fn line_of(&self, at: usize) -> usize {
        let at = self.text.floor_char_boundary(at);
        self.text[..at].matches('\n').count() + 1
    }

    fn place(&self, span: Range<usize>) -> Place {
        let text = self.text;
        let start = text.floor_char_boundary(span.start);
        let line_start = text[..start].rfind('\n').map_or(0, |at| at + 1);
        let line_end = text[line_start..].find('\n').map_or(text.len(), |at| line_start + at);
        let line_text = text[line_start..line_end].trim_end_matches('\r');
        // A span may begin at the very end of its line, or go on past it.
        let start = start.min(line_start + line_text.len());
        let end = text.ceil_char_boundary(span.end.min(line_start + line_text.len())).max(start);

        let column = text[line_start..start].chars().count() + 1;
        let width = text[start..end].chars().count().max(1);
        let skipped = if line_text.chars().count() > SHOWN_CHARS_MAX {
            (column - 1).saturating_sub(SHOWN_BEFORE_CHARS)
        } else {
            0
        };
        let mut shown = Shown::default();
        if skipped > 0 {
            shown.push('…');
        }
        for (at, letter) in line_text.chars().enumerate().skip(skipped).take(SHOWN_CHARS_MAX) {
            if at + 1 == column {
                shown.fault_begins();
            }
            if at + 1 == column + width {
                shown.fault_ends();
            }
            shown.push(letter);
        }
        let (indent, carets) = shown.fault();
        Place { line: self.line_of(line_start), column, shown: shown.text, indent, carets }
    }
}

/// A line as it is shown, and where in it the fault begins and ends.
#[derive(Default)]
struct Shown {
    text: String,
    width: usize,
    begin: Option<usize>,
    end: Option<usize>,
}

impl Shown {
    fn push(&mut self, letter: char) {
        let before = self.text.len();
        match letter {
            '\t' => self.text.push_str("    "),
            letter if letter.is_control() => self.text.push('\u{fffd}'),
            letter => self.text.push(letter),
        }
        self.width += self.text[before..].chars().count();
    }

    fn fault_begins(&mut self) {
        self.begin = Some(self.width);
    }

    fn fault_ends(&mut self) {
        self.end = Some(self.width);
    }

    fn fault(&self) -> (usize, usize) {
        let begin = self.begin.unwrap_or(self.width);
        (begin, self.end.unwrap_or(self.width).saturating_sub(begin).max(1))
    }
}

/// The author's text in backquotes, short and without anything a terminal would obey.
pub(super) fn quoted(text: &str) -> String {
    let mut shown: String = text
        .chars()
        .take(QUOTED_CHARS_MAX)
        .map(|letter| if letter.is_control() { '\u{fffd}' } else { letter })
        .collect();
    if text.chars().nth(QUOTED_CHARS_MAX).is_some() {
        shown.push('…');
    }
    format!("`{shown}`")
}

/// ` did you mean …` for a word that is nearly one of `known`.
pub(super) fn nearest<'k>(word: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    // Names are short; a word that is much longer than any of them is not a slip of the finger.
    if word.len() > QUOTED_CHARS_MAX {
        return None;
    }
    let word = word.to_lowercase();
    let slips_max = (word.chars().count() / 3).max(1);
    known
        .into_iter()
        .map(|known| (strsim::osa_distance(&word, &known.to_lowercase()), known))
        .filter(|&(slips, known)| slips <= slips_max || (word.len() >= 3 && known.starts_with(&word)))
        .min()
        .map(|(_, known)| known)
}
