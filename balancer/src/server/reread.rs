//! Reading the configuration file again: all of its table takes effect, or nothing.

use std::path::PathBuf;

use super::{Server, chain, log};
use crate::config_file::{ConfigFile, ListenerEntry};
use crate::control::audit::Actor;
use crate::control::protocol::Response;
use crate::remark::Remark;

/// The file this balancer goes by.
pub struct ConfigSource {
    path: PathBuf,
    /// What it said of listeners when they were bound.
    listeners: Vec<ListenerEntry>,
}

impl ConfigSource {
    pub fn new(path: PathBuf, file: &ConfigFile) -> Self {
        Self { path, listeners: file.listeners.clone() }
    }
}

impl Server {
    /// Takes over what the file says now. With an error, everything stays as it is.
    pub(super) fn reread(&mut self) {
        let Some(source) = &self.config_source else {
            return log(Remark::warning("SIGHUP: there is no --config FILE to read again"));
        };
        let file = match ConfigFile::load(&source.path) {
            Ok(file) => file,
            Err(error) => {
                let stays = format!("table {} stays: {}", self.table.version, chain(&error));
                return log(Remark::error(stays));
            }
        };
        if file.listeners != source.listeners {
            log(Remark::warning(
                "the listeners in the file have changed: they take effect with `reload` (SIGUSR2)",
            ));
        }
        for warning in file.warnings() {
            log(Remark::warning(warning));
        }
        let table = file.table_after(&self.table);
        match self.change_table(Actor::Process, table) {
            Response::Ack(ack) => {
                for problem in ack.problems {
                    log(super::say::of_problem(&problem));
                }
                log(format!("serving table {} with {} routes", ack.version, self.table.routes.len()));
            }
            Response::Error(error) => {
                log(Remark::error(format!("table {} stays: {}", self.table.version, error.message)));
            }
            _ => {}
        }
    }
}
