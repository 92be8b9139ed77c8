//! The command line of what concerns the balancer: routes, the balancer itself, and watching both.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use epagent::manifest::units::duration_ms;
use epagent_core::name::AppName;
use epagent_core::spec::RouteMatch;

use super::Json;

#[derive(Debug, Args)]
pub struct Reason {
    /// Why, for those who look later
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub reason: String,
}

#[derive(Debug, Subcommand)]
pub enum RouteVerb {
    /// List what is in force: routes of apps, and what operators said over them
    Ls {
        /// All about this one
        #[arg(value_name = "HOST|PORT")]
        target: Option<RouteMatch>,
        #[command(flatten)]
        json: Json,
    },
    /// Lead a host or port to backends that epagent does not run
    Set {
        #[arg(value_name = "HOST|PORT")]
        target: RouteMatch,
        /// A backend; may be given several times
        #[arg(long = "upstream", required = true, value_name = "ADDRESS:PORT")]
        upstreams: Vec<SocketAddr>,
        #[command(flatten)]
        reason: Reason,
    },
    /// Have requests wait until they are released
    Hold {
        #[arg(value_name = "HOST|PORT")]
        target: RouteMatch,
        /// How long each may wait at most: 30s, 5m
        #[arg(long, value_name = "TIME", value_parser = time)]
        max_age: Option<u64>,
        #[command(flatten)]
        reason: Reason,
    },
    /// End a hold
    Release {
        #[arg(value_name = "HOST|PORT")]
        target: RouteMatch,
        #[command(flatten)]
        reason: Reason,
    },
    /// Take one instance or backend out of the balancer; it finishes what it has
    Drain {
        #[arg(value_name = "HOST|PORT")]
        target: RouteMatch,
        /// An instance by its id or place as in `web.0`, or a backend by its address
        #[arg(value_name = "UPSTREAM")]
        upstream: String,
        /// Wait until it has nothing left
        #[arg(long)]
        wait: bool,
        #[command(flatten)]
        reason: Reason,
    },
    /// Answer every request for a host with a page
    Static {
        #[arg(value_name = "HOST")]
        target: RouteMatch,
        /// The page, 64 KiB at most
        #[arg(long, value_name = "FILE")]
        file: PathBuf,
        #[arg(long, default_value_t = 200, value_name = "CODE")]
        status: u16,
        /// By default by the file's ending, else as HTML
        #[arg(long, value_name = "TYPE")]
        content_type: Option<String>,
        #[command(flatten)]
        reason: Reason,
    },
    /// Send every request for a host elsewhere
    Redirect {
        #[arg(value_name = "HOST")]
        target: RouteMatch,
        /// Where to: https://shop.example
        url: String,
        /// 301, 302, 303, 307 or 308
        #[arg(long, default_value_t = 302, value_name = "CODE")]
        status: u16,
        /// With the path and query that were asked for behind it
        #[arg(long)]
        keep_path: bool,
        #[command(flatten)]
        reason: Reason,
    },
    /// Take back what operators said; the app's own route is in force again
    Clear {
        #[arg(value_name = "HOST|PORT")]
        target: RouteMatch,
        /// Only that this one is drained
        #[arg(value_name = "UPSTREAM")]
        upstream: Option<String>,
        #[command(flatten)]
        reason: Reason,
    },
}

#[derive(Debug, Subcommand)]
pub enum BalancerVerb {
    /// Show what the balancer says of itself
    Status(Json),
    /// List open client connections, and what each is doing
    Connections(ConnectionsArgs),
    /// Hand over to the program on disk; no connection is lost
    Reload,
}

#[derive(Debug, Args)]
pub struct ConnectionsArgs {
    /// Only those being served by this app now; what idles between two requests is nobody's
    pub app: Option<AppName>,
    /// Only those being served by this route now
    #[arg(long, value_name = "HOST|PORT")]
    pub route: Option<RouteMatch>,
    /// Most that are shown, up to 10000
    #[arg(long, short = 'n', default_value_t = 1_000, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub limit: u32,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Args)]
pub struct TopArgs {
    /// Of this app only
    pub app: Option<AppName>,
    /// Once, after one second of looking
    #[arg(long)]
    pub once: bool,
}

/// Milliseconds of `30s`, `5m`, `1h`.
fn time(text: &str) -> Result<u64, String> {
    duration_ms(text).ok_or_else(|| "a time is written as one number and ms, s, m or h: 30s".to_owned())
}
