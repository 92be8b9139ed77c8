//! The command line of what helps to find out.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Json;

#[derive(Debug, Subcommand)]
pub enum DebugVerb {
    /// Write what support needs to know of this node to one file; secrets, variables and logs of apps are not in it, what
    /// manifests say in the open is
    Bundle {
        #[command(flatten)]
        node: OfNode,
        /// The file to make, a tar packed by zstd [default: one of the host's name and the time, here]
        #[arg(long, short, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Show the configuration in force, and the file and line each value comes from
    Config {
        #[command(flatten)]
        node: OfNode,
        #[command(flatten)]
        json: Json,
    },
}

/// Whose files are looked at: those of the node that the socket belongs to.
#[derive(Debug, Args)]
pub struct OfNode {
    /// The folder of the configuration [default: /etc/epagent, or `etc` beside a socket given by --socket]
    #[arg(long, value_name = "DIR")]
    pub etc: Option<PathBuf>,
}
