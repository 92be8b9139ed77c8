//! Sending what is logged to a syslog server: what the agent's own processes say, and what apps print.
//!
//! ```text
//!  own records ─────┐
//!  the runner's ────┼─▶ a batch, at most BATCH_BYTES ─▶ the server ──arrived──▶ positions move on, and are saved
//!  the balancer's ──┤                                      └─ did not ─▶ the same batch again, with backoff
//!  logs of jails ───┘
//! ```
//!
//! There is no queue of its own here: what waits, waits where it is anyway, in the rings of the processes and in the
//! log files of the apps, and each of those has its bound. Nothing that logs ever waits for a server. What a ring or
//! a file has thrown away before it could be sent is told in its place in the stream. Positions outlive the agent,
//! so a restart repeats at most what was sent since the last save.

mod daemons;
mod jails;
mod positions;

use std::path::PathBuf;
use std::time::Duration;

use epagent_log::Recent;
use epagent_syslog::{Link, Message, Trust};

use crate::apps::Parts;
use crate::clock;
use crate::config::LogConfig;
use crate::supervise::chain;
use jails::Jails;
use positions::{Positions, Seen};

/// The most that is sent before it is waited for; at least one source is read into it, whatever that has.
const BATCH_BYTES: usize = 256 << 10;
/// Between two looks when there was nothing to send.
const INTERVAL: Duration = Duration::from_millis(500);
/// Between two tries, doubled from the first to the last.
const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(15);
/// What the status page calls it.
pub const NAME: &str = "syslog";

/// What is sent next, and where all sources stand once it has arrived.
struct Batch {
    frames: Vec<u8>,
    hostname: String,
    positions: Positions,
}

impl Batch {
    fn put(&mut self, message: &Message) {
        message.frame(&self.hostname, &mut self.frames);
    }

    fn is_full(&self) -> bool {
        self.frames.len() >= BATCH_BYTES
    }
}

pub struct Forwarder {
    parts: Parts,
    recent: Recent,
    link: Link,
    jails: Option<Jails>,
    positions: Positions,
    file: PathBuf,
    hostname: String,
}

impl Forwarder {
    /// None when no server is configured.
    pub fn new(parts: &Parts, recent: Recent, config: &LogConfig) -> Option<Forwarder> {
        let server = config.syslog.clone()?;
        let trust = config.ca.clone().map_or(Trust::System, Trust::File);
        let hostname = nix::unistd::gethostname().unwrap_or_default().to_string_lossy().into_owned();
        Some(Forwarder {
            link: Link::new(server, trust),
            jails: config.apps.then(|| Jails::new(parts.clone())),
            positions: Positions::default(),
            file: parts.config.state_dir.join(positions::FILE),
            parts: parts.clone(),
            recent,
            hostname,
        })
    }

    /// Sends for ever. Only the disk that positions are saved on can fail it.
    pub async fn run(&mut self) -> Result<(), std::io::Error> {
        self.positions = self.first_positions()?;
        // At once, or a restart before the first batch has arrived would take what it has for history.
        self.positions.save_when_due(&self.file)?;
        loop {
            let batch = self.gather().await;
            if batch.frames.is_empty() {
                tokio::time::sleep(INTERVAL).await;
            } else {
                self.deliver(&batch.frames).await;
            }
            self.positions = batch.positions;
            self.positions.save_when_due(&self.file)?;
        }
    }

    /// Where the last run was; at the very first, what is in the logs already is history.
    fn first_positions(&self) -> Result<Positions, std::io::Error> {
        let now_us = clock::now_ms() * 1_000;
        let saved = Positions::read(&self.file)?;
        let mut positions = saved.unwrap_or_else(|| Positions::since(Message::timestamp_of(now_us)));
        positions.agent = Seen { run: self.recent.run(), last: 0 };
        Ok(positions)
    }

    async fn gather(&mut self) -> Batch {
        let positions = self.positions.clone();
        let mut batch = Batch { frames: Vec::new(), hostname: self.hostname.clone(), positions };
        daemons::gather(&mut batch, &self.recent, &self.parts).await;
        if let Some(jails) = &mut self.jails {
            jails.gather(&mut batch).await;
        }
        batch
    }

    async fn deliver(&mut self, frames: &[u8]) {
        let mut wait = RETRY_FIRST;
        let mut was_away = false;
        while let Err(error) = self.link.send(frames).await {
            let why = chain(&error);
            if !was_away {
                tracing::warn!("logs can't be sent: {why}");
            }
            self.parts.board.set(NAME, why);
            was_away = true;
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(RETRY_MAX);
        }
        if was_away {
            tracing::info!("logs are sent to {} again", self.link.server());
            self.parts.board.set(NAME, "ok".to_owned());
        }
    }
}
