//! What the operator is told: lines on standard error.

use std::io::{self, Write};
use std::sync::mpsc::{self, SyncSender};

use crate::control::said::LINES;

/// Most lines of the data path that wait to be written.
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

/// A line on standard error, at changes of state only.
pub fn log(line: &str) {
    LINES.push(line);
    // Where nobody reads it there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "epagent-balancer: {line}");
}

/// A thread that writes what the data path remarks, which itself must never wait for whoever reads the log.
pub fn start_remarking() -> io::Result<SyncSender<String>> {
    let (remarks, lines) = mpsc::sync_channel::<String>(REMARKS_MAX);
    let write = move || lines.iter().for_each(|line| log(&line));
    std::thread::Builder::new().name("remarks".to_owned()).spawn(write)?;
    Ok(remarks)
}
