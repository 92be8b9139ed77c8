//! The configuration in force, as the daemons themselves read it: each is asked, since each alone knows its defaults.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use epagent_conf::{Daemon, Setting};

use crate::args::Json;
use crate::dev::checks;
use crate::failure::{Failure, status};
use crate::screen::{Screen, Tone};
use crate::verbs::{Outcome, written};

/// Where the packages put the daemons.
const INSTALLED: &str = "/usr/lib/epagent";

/// Every value of one daemon.
pub fn settings(daemon: Daemon, etc: &Path) -> Result<Vec<Setting>, Failure> {
    let failed = |why: String| {
        let message = format!("reading the configuration of {}: {why}", daemon.name());
        Failure::new(status::FAILED, "bad_config", message, "put right what is named, or remove the file")
    };
    let file = etc.join(format!("{}.toml", daemon.name()));
    let mut command = match daemon {
        Daemon::Runner => Command::new(programs().join("epagent-runner")),
        Daemon::Agent => Command::new(programs().join("epagentd")),
    };
    command.arg(match daemon {
        Daemon::Runner => "config",
        Daemon::Agent => "--show-config",
    });
    let ran = command.arg("--config").arg(file).output().map_err(|error| failed(error.to_string()))?;
    if !ran.status.success() {
        return Err(failed(String::from_utf8_lossy(&ran.stderr).trim().to_owned()));
    }
    serde_json::from_slice(&ran.stdout).map_err(|error| failed(error.to_string()))
}

/// Beside this program, as in a checkout, or where the packages put them.
pub fn programs() -> PathBuf {
    checks::binaries().unwrap_or_else(|_| PathBuf::from(INSTALLED))
}

pub fn print(etc: &Path, json: &Json) -> Outcome {
    let mut all = BTreeMap::new();
    for daemon in Daemon::ALL {
        all.insert(daemon.name(), settings(daemon, etc)?);
    }
    let screen = Screen::stdout();
    if json.json {
        let text = serde_json::to_string(&all);
        return written(text.map_err(std::io::Error::from).and_then(|text| screen.line(&text)));
    }
    written(all.iter().try_for_each(|(daemon, settings)| {
        screen.line(&format!("[{daemon}]"))?;
        settings.iter().try_for_each(|setting| {
            let value = format!("{} = {}", setting.key, setting.value);
            let origin = screen.paint(Tone::Dim, &format!("# {}", setting.origin)).into_owned();
            screen.line(&format!("{value:<50} {origin}"))
        })
    }))
}
