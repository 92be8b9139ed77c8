//! What helps to find out: the configuration in force, and a bundle of all that support needs.

mod bundle;
mod cgroups;
mod collect;
mod config;

use std::path::{Path, PathBuf};

use super::Outcome;
use crate::args::{DebugVerb, OfNode, SOCKET_DEFAULT};
use crate::client::Client;

pub async fn debug(client: &Client, verb: DebugVerb) -> Outcome {
    match verb {
        DebugVerb::Bundle { node, output } => {
            bundle::make(client, &etc(&node, client.socket()), output.as_deref()).await
        }
        DebugVerb::Config { node, json } => config::print(&etc(&node, client.socket()), &json),
    }
}

/// Where the node's configuration is.
fn etc(node: &OfNode, socket: &Path) -> PathBuf {
    match (&node.etc, socket.parent()) {
        (Some(folder), _) => folder.clone(),
        (None, Some(state)) if socket != Path::new(SOCKET_DEFAULT) => state.join("etc"),
        (None, _) => PathBuf::from("/etc/epagent"),
    }
}
