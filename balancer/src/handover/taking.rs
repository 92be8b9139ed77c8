//! The new process's side of a handover, until it is in charge.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::channel::{Channel, ChannelError, Elder, Message, Parcel, read_body};
use super::{ENVIRONMENT, HandoverError, PROTOCOL, READY_TIMEOUT};
use crate::control::protocol::Counters;
use crate::ring::inherit::Inherited;
use crate::table::Table;

/// How often a ready process looks whether it is its turn. It is woken earlier by any message.
const TURN_WAIT: Duration = Duration::from_secs(60);

/// What a new process is handed.
#[derive(Debug)]
pub struct Handed {
    pub taking: Taking,
    pub table: Table,
    /// Listening sockets, the control socket and whatever else has a name.
    pub sockets: Vec<Inherited>,
    /// What to execute at the next handover.
    pub program: PathBuf,
}

/// The way to the old process.
#[derive(Debug)]
pub struct Taking {
    channel: Channel,
}

/// What being in charge comes with.
#[derive(Debug)]
pub enum Turn {
    /// Sockets that the old process has bound meanwhile...
    Sockets(Vec<Inherited>),
    /// ...for a table that it was given.
    Table(Table),
    /// Accept from now on.
    Go(Box<Estate>),
}

/// What the old process leaves to the new one.
#[derive(Debug, Default)]
pub struct Estate {
    pub peers: Vec<OwnedFd>,
    /// The pid of the old process, if it lives.
    pub by: Option<u32>,
    /// Those that drain already.
    pub draining: Vec<(Elder, Channel)>,
    pub past: Counters,
}

/// Takes over what an old process hands us; none when we were started in the ordinary way.
pub fn take() -> Result<Option<Handed>, HandoverError> {
    if std::env::var_os(ENVIRONMENT).is_none() {
        return Ok(None);
    }
    let channel = Channel::from_stdin().map_err(|error| match error.kind() {
        ErrorKind::InvalidInput => HandoverError::NoChannel,
        _ => HandoverError::System { what: "take over the channel", source: error },
    })?;
    let deadline = Instant::now() + READY_TIMEOUT;
    let Parcel { message, mut descriptors } = channel.wait(deadline)?;
    let Message::Hello { protocol, program, lifeline } = message else {
        return Err(HandoverError::Missing { what: "greeting" });
    };
    if protocol != PROTOCOL {
        // It says so itself when it learns which version we speak.
        channel.send(&Message::Ready { protocol: PROTOCOL }, &[])?;
        return Err(HandoverError::Protocol { theirs: protocol });
    }
    lifeline.hold();
    let table = descriptors.pop().ok_or(HandoverError::Missing { what: "table" })?;
    let table = read_body(table)?;
    let mut sockets = Vec::new();
    loop {
        let Parcel { message, descriptors } = channel.wait(deadline)?;
        match message {
            Message::Sockets { names } => {
                sockets.extend(named(names, descriptors));
            }
            Message::Given {} => break,
            _ => return Err(HandoverError::Missing { what: "socket" }),
        }
    }
    Ok(Some(Handed { taking: Taking { channel }, table, sockets, program }))
}

fn named(names: Vec<String>, sockets: Vec<OwnedFd>) -> impl Iterator<Item = Inherited> {
    names.into_iter().zip(sockets).map(|(name, socket)| Inherited { name, socket })
}

impl Taking {
    /// Another handle, to say later that this process ends.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self { channel: self.channel.try_clone()? })
    }

    /// Says that this process ends, and why.
    pub fn fail(&self, why: &str) {
        // Whoever does not hear it sees the channel close.
        let _ = self.channel.send(&Message::Failed { why: why.to_owned() }, &[]);
    }

    /// Says that everything is in place but accepting.
    pub fn ready(&self) -> Result<(), HandoverError> {
        Ok(self.channel.send(&Message::Ready { protocol: PROTOCOL }, &[])?)
    }

    /// Waits for the word. An old process that ends between our being ready and its word leaves us in charge:
    /// everything is here, and nobody else would serve.
    pub fn turn(&self) -> Result<Turn, HandoverError> {
        loop {
            let parcel = match self.channel.wait(Instant::now() + TURN_WAIT) {
                Ok(parcel) => parcel,
                Err(ChannelError::Late) => continue,
                Err(ChannelError::Closed) => return Ok(Turn::Go(Box::default())),
                Err(error) => return Err(error.into()),
            };
            let Parcel { message, mut descriptors } = parcel;
            match message {
                Message::Sockets { names } => return Ok(Turn::Sockets(named(names, descriptors).collect())),
                Message::Table { .. } => {
                    let table = descriptors.pop().ok_or(HandoverError::Missing { what: "table" })?;
                    return Ok(Turn::Table(read_body(table)?));
                }
                Message::Go { by, peers, draining, past } => {
                    let channels = descriptors.split_off(peers.min(descriptors.len()));
                    let channels = channels.into_iter().map(Channel::from_descriptor);
                    let draining = draining.into_iter().zip(channels).collect();
                    let by = Some(by);
                    let estate = Estate { peers: descriptors, by, draining, past: *past };
                    return Ok(Turn::Go(Box::new(estate)));
                }
                _ => return Err(HandoverError::Missing { what: "word to begin" }),
            }
        }
    }

    /// The channel, once this process is in charge.
    pub fn into_channel(self) -> Channel {
        self.channel
    }
}
