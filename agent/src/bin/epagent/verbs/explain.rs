//! `epagent explain CODE`, and the tests that keep the list of codes whole.

use super::codes::CODES;
use super::{Outcome, written};
use crate::args::ExplainArgs;
use crate::failure::{Failure, status};
use crate::screen::{Screen, Tone};

pub fn explain(args: &ExplainArgs) -> Outcome {
    let screen = Screen::stdout();
    let Some(wanted) = &args.code else {
        let width = CODES.iter().map(|code| code.code.len()).max().unwrap_or(0);
        return written(CODES.iter().try_for_each(|code| {
            screen.line(&format!(
                "{}  {}",
                screen.paint(Tone::Bold, &format!("{:<width$}", code.code)),
                code.what
            ))
        }));
    };
    match CODES.iter().find(|code| code.code == wanted) {
        Some(code) => written(screen.line(&format!(
            "{}\n\n{}\n\nwhy:   {}\nnext:  {}",
            screen.paint(Tone::Bold, code.code),
            code.what,
            code.why,
            code.next
        ))),
        None => {
            let message = format!("there is no error code {wanted:?}");
            let hint = match nearest(wanted) {
                Some(near) => format!("did you mean {near}?"),
                None => "`epagent explain` lists all of them".to_owned(),
            };
            Err(Failure::new(status::NOT_FOUND, "no_such_code", message, hint))
        }
    }
}

fn nearest(wanted: &str) -> Option<&'static str> {
    let by_distance = CODES.iter().map(|code| (strsim::damerau_levenshtein(code.code, wanted), code.code));
    by_distance.min().filter(|(distance, _)| *distance <= 3).map(|(_, code)| code)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;

    fn is_explained(code: &str) -> bool {
        CODES.iter().any(|known| known.code == code)
    }

    #[test]
    fn codes_are_sorted_and_unlike() {
        assert!(CODES.windows(2).all(|pair| pair[0].code < pair[1].code));
        assert_eq!(nearest("wrong_prot"), Some("wrong_port"));
        assert_eq!(nearest("something else"), None);
    }

    #[test]
    fn every_verdict_is_explained() {
        for code in epagent_core::verdict::CODES {
            assert!(is_explained(code), "{code}");
        }
    }

    /// What gives an error a code: after each of these, the first text that looks like one is one.
    const GIVERS: [&str; 6] = [
        "Failure::new(",
        "Failure::conflict(",
        "Self::new(StatusCode",
        "ErrorReport::new(",
        "fn code(&self)",
        "note(",
    ];

    #[test]
    fn every_code_in_use_is_explained() {
        let mut found = Vec::new();
        for file in sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/bin")) {
            let text = std::fs::read_to_string(&file).unwrap();
            let code = text.split("#[cfg(test)]").next().unwrap();
            for giver in GIVERS {
                for (place, _) in code.match_indices(giver) {
                    // A list of codes goes on to its closing brace, any other giver has one.
                    let rest = &code[place + giver.len()..];
                    let codes = texts(&rest[..rest.len().min(1_500)]);
                    let wanted = if giver.starts_with("fn code") { 30 } else { 1 };
                    let end =
                        if giver.starts_with("fn code") { rest.find("\n    }\n").unwrap() } else { 200 };
                    found.extend(
                        codes
                            .filter(|(at, text)| *at < end && looks_like_a_code(text))
                            .take(wanted)
                            .map(|(_, text)| (text.to_owned(), file.clone())),
                    );
                }
            }
        }
        assert!(found.len() > 40, "the search finds nothing any more: {}", found.len());
        for (code, file) in found {
            assert!(is_explained(&code), "{code}, given in {}", file.display());
        }
    }

    fn sources(folder: &Path) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let files = entries.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] });
        files.filter(|path| path.extension().is_some_and(|ending| ending == "rs")).collect()
    }

    /// Texts in quotes, with their places.
    fn texts(code: &str) -> impl Iterator<Item = (usize, &str)> {
        let mut place = 0;
        code.split('"').enumerate().filter_map(move |(number, part)| {
            let at = place;
            place += part.len() + 1;
            (number % 2 == 1).then_some((at, part))
        })
    }

    fn looks_like_a_code(text: &str) -> bool {
        text.contains('_') && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
    }
}
