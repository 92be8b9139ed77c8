//! Where the words of a daemon go.
//!
//! ```text
//!                     ┌─▶ the journal, a field for each fact, where standard error is the journal
//!  tracing's events ──┼─▶ else a line on standard error
//!                     └─▶ [`Recent`]: the last of them, numbered, for who sends them on (epagentd, to a syslog server)
//! ```
//!
//! Nothing waits here: the runner has one thread, and nothing may hold it up. So the journal's socket does not block;
//! what it does not take is counted and told with the next record that it does. (tracing-journald 0.3.2 does neither:
//! its socket blocks, and what can't be sent is gone without a word.)

#![forbid(unsafe_code)]

mod journal;
mod line;
mod recent;

use std::fmt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use epagent_wire::said::{Record, Severity};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use journal::Journal;
pub use recent::Recent;

/// What is logged, as `info` or `info,sqlx=debug`.
pub const VARIABLE: &str = "EPAGENT_LOG";
/// The longest text of a message or a field; what is longer is cut.
const TEXT_BYTES_MAX: usize = 16 << 10;

/// Where records are shown.
enum Shown {
    Journal(Mutex<Journal>),
    Stderr,
}

struct Words {
    shown: Shown,
    recent: Recent,
}

/// Takes all events of this process from here on. `name` is the daemon's, as its program is called.
pub fn start(name: &'static str) -> Recent {
    let recent = Recent::new();
    let journal = match journal::is_stderr() {
        true => Journal::open(name, Path::new(journal::SOCKET)).ok(),
        false => None,
    };
    let shown = journal.map_or(Shown::Stderr, |journal| Shown::Journal(Mutex::new(journal)));
    let words = Words { shown, recent: recent.clone() };
    // Started twice, the first one keeps everything.
    let _ = tracing_subscriber::registry().with(words.with_filter(filter())).try_init();
    recent
}

fn filter() -> Targets {
    let asked = std::env::var(VARIABLE).ok().and_then(|text| text.parse().ok());
    asked.unwrap_or_else(|| Targets::new().with_default(Level::INFO))
}

impl<S: Subscriber> Layer<S> for Words {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let record = record(event);
        match &self.shown {
            Shown::Journal(journal) => journal.lock().unwrap_or_else(PoisonError::into_inner).write(&record),
            Shown::Stderr => line::write(&record),
        }
        self.recent.push(record);
    }
}

fn record(event: &Event<'_>) -> Record {
    let severity = match *event.metadata().level() {
        Level::ERROR => Severity::Error,
        Level::WARN => Severity::Warning,
        Level::INFO => Severity::Info,
        Level::DEBUG | Level::TRACE => Severity::Debug,
    };
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let at_us = u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
    let mut facts = Facts(Record { at_us, severity, message: String::new(), fields: Vec::new() });
    event.record(&mut facts);
    let target = event.metadata().target();
    if !target.starts_with("epagent") {
        facts.put("target", target.to_owned());
    }
    facts.0
}

struct Facts(Record);

impl Facts {
    fn put(&mut self, name: &str, mut text: String) {
        if text.len() > TEXT_BYTES_MAX {
            text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
        }
        match name {
            "message" => self.0.message = text,
            name => self.0.fields.push((name.to_owned(), text)),
        }
    }
}

impl Visit for Facts {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field.name(), value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field.name(), format!("{value:?}"));
    }
}
