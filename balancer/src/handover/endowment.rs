//! What a process starts with, whoever gives it: an old process that hands over, a supervisor that activates
//! it by its sockets, or nobody.

use std::os::fd::OwnedFd;

use super::HandoverError;
use super::launch::Program;
use super::taking::{Handed, Taking, take};
use crate::ring::inherit::{self, InheritError, Inherited};
use crate::table::Table;

/// Everything that was handed over, by what it is for.
#[derive(Debug)]
pub struct Endowment {
    pub listeners: Vec<Inherited>,
    /// `control`: the control socket.
    pub control: Option<OwnedFd>,
    /// `metrics`: where metrics are asked for.
    pub metrics: Option<OwnedFd>,
    pub program: Program,
    /// The way to an old process, and its table.
    pub handed: Option<(Taking, Table)>,
}

/// Why it cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EndowmentError {
    #[error("cannot take over from the old process")]
    Handover(#[from] HandoverError),
    #[error(transparent)]
    Inherit(#[from] InheritError),
}

impl Endowment {
    /// May be called once, before anything else opens a descriptor.
    pub fn take() -> Result<Self, EndowmentError> {
        let (mut sockets, handed, path) = match take()? {
            Some(Handed { taking, table, sockets, program }) => {
                (sockets, Some((taking, table)), Some(program))
            }
            None => (inherit::take()?, None, None),
        };
        let control = by_name(&mut sockets, "control");
        let metrics = by_name(&mut sockets, "metrics");
        // A descriptor of the folder that the program is in.
        let program = Program::of_this_process(by_name(&mut sockets, "program"));
        let program = match path {
            Some(path) => program.at(path),
            None => program,
        };
        Ok(Self { listeners: sockets, control, metrics, program, handed })
    }
}

fn by_name(sockets: &mut Vec<Inherited>, name: &str) -> Option<OwnedFd> {
    let at = sockets.iter().position(|inherited| inherited.name == name)?;
    Some(sockets.remove(at).socket)
}
