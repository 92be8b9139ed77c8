//! `epagent debug bundle`: what support needs to know of a node, in one file.
//!
//! What is in it is chosen by type, not by pattern: the agent's answers are read into types that have no place for a
//! secret, a variable's value or a line that an app printed, and only those types are written; settings come with
//! private ones left out by the daemons themselves; of commands and files only those are looked at that hold none of
//! it. So no command lines of processes (`systemctl status` has them), no environments of units, no logs of apps.
//!
//! What a manifest says in the open is in it: commands of builds and releases that failed, static pages, redirects. Who
//! writes a password into one of them has written it into the events too.
//!
//! What can't be had is named in the bundle; a node that is down gets one all the same.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::Serialize;

use super::collect;
use crate::client::Client;
use crate::failure::{Failure, status};
use crate::screen::Screen;
use crate::verbs::{Outcome, written};

/// The most of one thing; of what is longer the end is cut off.
pub const ENTRY_BYTES_MAX: usize = 8 << 20;
const ZSTD_LEVEL: i32 = 3;

/// What was gathered, and what could not be.
#[derive(Debug)]
pub struct Bundle {
    /// Everything lies below it when the bundle is unpacked.
    name: String,
    made_at: Timestamp,
    entries: Vec<(String, Vec<u8>)>,
    missing: Vec<Missing>,
}

/// Something that ought to be in it.
#[derive(Debug, Clone, Serialize)]
pub struct Missing {
    pub what: String,
    pub why: String,
}

#[derive(Serialize)]
struct About<'a> {
    made_at: String,
    command: &'static str,
    missing: &'a [Missing],
}

impl Bundle {
    fn new() -> Bundle {
        let made_at = Timestamp::now();
        let host = nix::unistd::gethostname().unwrap_or_default();
        let host: String =
            host.to_string_lossy().chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
        let name = format!("epagent-bundle-{host}-{}", made_at.strftime("%Y%m%dT%H%M%SZ"));
        Bundle { name, made_at, entries: Vec::new(), missing: Vec::new() }
    }

    pub fn add(&mut self, name: &str, mut bytes: Vec<u8>) {
        bytes.truncate(ENTRY_BYTES_MAX);
        self.entries.push((name.to_owned(), bytes));
    }

    /// Adds it as JSON, or notes why it is not there.
    pub fn add_json<T: Serialize>(&mut self, name: &str, found: Result<T, String>) {
        match found {
            Ok(value) => match serde_json::to_vec_pretty(&value) {
                Ok(bytes) => self.add(name, bytes),
                Err(error) => self.lack(name, error.to_string()),
            },
            Err(why) => self.lack(name, why),
        }
    }

    pub fn lack(&mut self, what: &str, why: String) {
        self.missing.push(Missing { what: what.to_owned(), why });
    }

    fn write(&self, out: impl Write) -> io::Result<()> {
        let mut archive = tar::Builder::new(zstd::Encoder::new(out, ZSTD_LEVEL)?);
        let about = About {
            made_at: self.made_at.to_string(),
            command: env!("CARGO_PKG_VERSION"),
            missing: &self.missing,
        };
        let about = ("about.json".to_owned(), serde_json::to_vec_pretty(&about)?);
        for (name, bytes) in std::iter::once(&about).chain(&self.entries) {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o600);
            header.set_mtime(u64::try_from(self.made_at.as_second()).unwrap_or(0));
            archive.append_data(&mut header, format!("{}/{name}", self.name), bytes.as_slice())?;
        }
        archive.into_inner()?.finish()?.flush()
    }
}

/// Gathers everything and writes it where nobody but its owner can read it.
pub async fn make(client: &Client, etc: &Path, output: Option<&Path>) -> Outcome {
    let mut bundle = Bundle::new();
    // First the file: what can't be written need not be gathered.
    let path = output.map_or_else(|| PathBuf::from(format!("{}.tar.zst", bundle.name)), Path::to_owned);
    let failed = |error: io::Error| {
        let message = format!("writing {}: {error}", path.display());
        Failure::new(
            status::FAILED,
            "output_failed",
            message,
            "name a file that does not exist yet by --output",
        )
    };
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(failed)?;
    collect::gather(&mut bundle, client, etc).await;
    bundle.write(file).map_err(failed)?;
    let screen = Screen::stderr();
    for missing in &bundle.missing {
        screen.say(&format!("missing: {}: {}", missing.what, missing.why));
    }
    written(Screen::stdout().line(&path.display().to_string()))
}
