//! What the operator is told.

use std::io::{self, Write};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::mpsc::{self, SyncSender};

use crate::control::protocol::Problem;
use crate::control::said::LINES;
use crate::journal::{self, Entry, Journal};
use crate::remark::Remark;

/// Most remarks of the data path that wait to be written.
const REMARKS_MAX: usize = 64;

/// An error and its causes, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Says something, at changes of state only: in the journal where standard error leads there, else in a line on it.
pub fn log(remark: impl Into<Remark>) {
    let remark = remark.into();
    if !journal().is_some_and(|journal| journal.write(&entry(&remark))) {
        // Where nobody reads it there is nobody to tell.
        let _ = writeln!(io::stderr(), "epagent-balancer: {}", remark.message);
    }
    LINES.push(remark);
}

/// What is wrong with a part of a table.
pub fn of_problem(problem: &Problem) -> Remark {
    let Some(route) = &problem.route else { return Remark::warning(problem.message.clone()) };
    Remark::warning(format!("route {route}: {}", problem.message)).with("route", route)
}

fn journal() -> Option<&'static Journal> {
    static JOURNAL: OnceLock<Option<Journal>> = OnceLock::new();
    let open = || journal::is_stderr().then(|| Journal::open(Path::new(journal::SOCKET)).ok()).flatten();
    JOURNAL.get_or_init(open).as_ref()
}

fn entry(remark: &Remark) -> Entry {
    let mut entry = Entry::new(&remark.message, remark.severity.number());
    for (name, value) in &remark.facts {
        entry.fact(name, value);
    }
    entry
}

/// A thread that writes what the data path remarks, which itself must never wait for whoever reads the log.
pub fn start_remarking() -> io::Result<SyncSender<Remark>> {
    let (remarks, heard) = mpsc::sync_channel::<Remark>(REMARKS_MAX);
    let write = move || heard.iter().for_each(log);
    std::thread::Builder::new().name("remarks".to_owned()).spawn(write)?;
    Ok(remarks)
}
