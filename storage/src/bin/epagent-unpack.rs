//! `epagent-unpack`: unpacks its standard input below a folder, inside the jail of whoever sent it.
//!
//! ```text
//! epagent-unpack --into DIR [--policy app|image] [--format auto|tar|tar.gz|tar.zst|layers]
//!                --max-bytes N --max-entries N
//! ```
//!
//! On success one JSON line (what was unpacked) goes to standard output. On failure one line goes to standard error,
//! and the exit code says why ([`UnpackError::exit_code`]); what was unpacked so far is left for the caller to discard.

#![forbid(unsafe_code)]

use std::io::{self, BufReader};
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use epagent_storage::unpack::{Format, Options, Policy, UnpackError, unpack};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

const USAGE: &str = "usage: epagent-unpack --into DIR [--policy app|image] \
    [--format auto|tar|tar.gz|tar.zst|layers] --max-bytes N --max-entries N";
const READ_BYTES: usize = 128 << 10;

fn main() -> ExitCode {
    let (into, options) = match parse(std::env::args().skip(1)) {
        Ok(parsed) => parsed,
        Err(problem) => {
            eprintln!("{problem}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let unpacked = open_folder(&into).and_then(|folder| {
        unpack(BufReader::with_capacity(READ_BYTES, io::stdin().lock()), folder, &options)
    });
    match unpacked {
        Ok(summary) => {
            // The figures are plain numbers; there is nothing that could fail to serialize.
            println!("{}", serde_json::to_string(&summary).unwrap_or_default());
            ExitCode::SUCCESS
        }
        Err(error) => {
            match std::error::Error::source(&error) {
                Some(source) => eprintln!("{error}: {source}"),
                None => eprintln!("{error}"),
            }
            ExitCode::from(error.exit_code())
        }
    }
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<(String, Options), String> {
    let (mut into, mut policy, mut format) = (None, Policy::App, None);
    let (mut max_bytes, mut max_entries) = (None, None);
    while let Some(flag) = args.next() {
        let value = args.next().ok_or_else(|| format!("{flag} needs a value"))?;
        let number = || value.parse::<u64>().map_err(|_| format!("{flag} needs a number, not {value}"));
        match flag.as_str() {
            "--into" => into = Some(value),
            "--policy" => {
                policy = match value.as_str() {
                    "app" => Policy::App,
                    "image" => Policy::Image,
                    _ => return Err(format!("no policy {value}")),
                }
            }
            "--format" => {
                format = match value.as_str() {
                    "auto" => None,
                    "tar" => Some(Format::Tar),
                    "tar.gz" => Some(Format::TarGz),
                    "tar.zst" => Some(Format::TarZst),
                    "layers" => Some(Format::Layers),
                    _ => return Err(format!("no format {value}")),
                }
            }
            "--max-bytes" => max_bytes = Some(number()?),
            "--max-entries" => max_entries = Some(number()?),
            _ => return Err(format!("no option {flag}")),
        }
    }
    let into = into.ok_or("--into is missing")?;
    let max_bytes = max_bytes.ok_or("--max-bytes is missing")?;
    let max_entries = max_entries.ok_or("--max-entries is missing")?;
    Ok((into, Options { policy, format, max_bytes, max_entries }))
}

/// Opens the folder to unpack into, making the last one where it is missing (an image need not have an `/app`).
fn open_folder(into: &str) -> Result<OwnedFd, UnpackError> {
    let failed = |op, e: Errno| UnpackError::Io { op, name: Some(into.to_owned()), source: e.into() };
    match rustix::fs::mkdir(into, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(failed("create", e)),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(into, flags, Mode::empty()).map_err(|e| failed("open", e))
}
