//! What may be asked of the program, and the options that follow from it.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use epagent_balancer::access_log::{Format, LogOptions, Target};
use epagent_balancer::core::config::Config;
use epagent_balancer::doors::{BufferSizes, IoChoice};
use epagent_balancer::handover::launch::{self, Program};
use epagent_balancer::listeners::Bind;
use epagent_balancer::server::Options;
use epagent_balancer::table::{Address, ListenerLimits, SourceLimits, Table};

/// An io_uring TCP and HTTP balancer that can hold a request while the app behind it changes.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub serve: ServeArgs,
}

#[derive(Subcommand)]
pub enum Command {
    /// Serve tables pushed over the control socket (the default)
    Serve(ServeArgs),
    /// Proxy from one address to others, without any control
    Run(RunArgs),
    /// Say whether a configuration file is valid
    Check {
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Show the state of a running balancer, as JSON
    Status(ControlArgs),
    /// Have a running balancer hand over to a new process of its program on disk
    Reload(ControlArgs),
    /// Have a running balancer read its folder of certificates again; fails when some are refused
    ReloadCertificates(ControlArgs),
    /// What a balancer executes to hand over
    #[command(name = launch::SUBCOMMAND, hide = true)]
    HandoverLaunch {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<OsString>,
    },
    /// Show the metrics of a running balancer, as Prometheus would get them
    Metrics(ControlArgs),
    /// Show a running balancer's client connections, as one JSON object per line
    Connections {
        #[command(flatten)]
        control: ControlArgs,
        /// Only those being served by this route (repeatable)
        #[arg(long = "route", value_name = "ID")]
        routes: Vec<String>,
    },
    /// Show the last changes of a running balancer and who made them, as one JSON object per line
    Audit(ControlArgs),
    /// Give a running balancer the table in a JSON file
    SetTable {
        #[command(flatten)]
        control: ControlArgs,
        file: PathBuf,
    },
}

#[derive(Args)]
pub struct ServeArgs {
    /// Go by this TOML file: its listeners, and its routes, which SIGHUP reads again
    #[arg(long, value_name = "FILE", conflicts_with = "state")]
    pub config: Option<PathBuf>,
    /// Folder in which the table is kept
    #[arg(long)]
    pub state: Option<PathBuf>,
    /// Listen for HTTP here, besides inherited listeners (repeatable)
    #[arg(long = "http", value_name = "ADDR:PORT")]
    pub http: Vec<SocketAddr>,
    /// Listen here as the name says: http, sni or tcp-PORT, followed by .trusted, .proxy or both (repeatable)
    #[arg(long, value_name = "NAME=ADDR:PORT|unix:/PATH")]
    pub listen: Vec<Bind>,
    /// Bind the control socket here, unless one is inherited
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    /// Besides root, the uid that may use the control socket
    #[arg(long, value_name = "UID", conflicts_with = "control_user")]
    pub control_uid: Option<u32>,
    /// The same by name
    #[arg(long, value_name = "NAME")]
    pub control_user: Option<String>,
    /// Where routes by port listen
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDR")]
    pub port_address: IpAddr,
    #[command(flatten)]
    pub common: CommonArgs,
}

#[derive(Args)]
pub struct RunArgs {
    /// Where to listen (repeatable); [::] takes IPv4 clients too
    #[arg(long, value_name = "ADDR:PORT|unix:/PATH", required = true)]
    pub listen: Vec<Address>,
    /// Clients speak TLS, which ends here, with the certificates of --tls-dir (modes tcp and http)
    #[arg(long, requires = "tls_dir")]
    pub tls: bool,
    /// Keep and extend the X-Forwarded-* and Forwarded fields of clients
    #[arg(long)]
    pub trusted: bool,
    /// Require a PROXY protocol header (version 1 or 2) of every client
    #[arg(long)]
    pub proxy_protocol: bool,
    /// Tell upstreams of each client with a PROXY protocol header (modes tcp and sni)
    #[arg(long)]
    pub upstream_proxy_protocol: bool,
    /// Where to (repeatable)
    #[arg(long, value_name = "ADDR:PORT|unix:PATH", required = true)]
    pub upstream: Vec<Address>,
    #[arg(long, value_enum, default_value = "http")]
    pub mode: Mode,
    #[command(flatten)]
    pub common: CommonArgs,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum LogFormat {
    Json,
    Common,
    Combined,
}

impl From<LogFormat> for Format {
    fn from(format: LogFormat) -> Self {
        match format {
            LogFormat::Json => Self::Json,
            LogFormat::Common => Self::Common,
            LogFormat::Combined => Self::Combined,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Mode {
    Tcp,
    Http,
    /// TLS passed through unopened
    Sni,
}

#[derive(Args)]
pub struct ControlArgs {
    /// The control socket
    #[arg(long, value_name = "PATH")]
    pub control: PathBuf,
}

#[derive(Args)]
pub struct CommonArgs {
    /// Data-path threads, each with a door of its own
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub threads: u32,
    /// What to reach the network by; auto is io_uring where it is to be had, else epoll
    #[arg(long, value_enum, default_value = "auto")]
    pub io: IoChoice,
    /// Unix sockets of tenants lie below this folder: the upstreams at unix:REL
    #[arg(long, value_name = "DIR")]
    pub unix_root: Option<PathBuf>,
    /// Certificates for TLS listeners: NAME.crt with NAME.key, or NAME/fullchain.pem with NAME/privkey.pem
    #[arg(long, value_name = "DIR")]
    pub tls_dir: Option<PathBuf>,
    /// Answer ACME http-01 challenges from here, the --webroot of an ACME client, on plain HTTP listeners
    #[arg(long, value_name = "DIR")]
    pub acme_dir: Option<PathBuf>,
    /// Most client connections [default: what the descriptor limit allows]
    #[arg(long, value_name = "COUNT")]
    pub max_connections: Option<u64>,
    /// Answer `GET /metrics` here, for Prometheus: ADDR:PORT or unix:/PATH, unless a socket is inherited
    #[arg(long, value_name = "ADDR")]
    pub metrics: Option<Address>,
    /// Most connections of each listener that is not in a configuration file
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    pub listener_max_connections: Option<u32>,
    /// Most connections of one source (an IPv4 address or an IPv6 /64) at each such listener
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    pub source_max_connections: Option<u32>,
    /// Most new connections per second of one source at each such listener
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    pub source_connections_per_second: Option<u32>,
    /// How long clients wait for room among the connections before they are reset
    #[arg(long, default_value_t = 1_000, value_name = "MS")]
    pub overload_grace_ms: u64,
    /// Log every request and connection to this file; `-` is standard output, `journald` systemd's journal
    #[arg(long, value_name = "PATH")]
    pub access_log: Option<Target>,
    /// json, common or combined; the journal has fields of its own
    #[arg(long, value_enum, default_value = "json")]
    pub access_log_format: LogFormat,
    /// Log one in so many of what went well, and all of what did not
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub access_log_sample: u32,
    /// Receive buffers per thread, a power of two
    #[arg(long, default_value_t = 512, value_name = "COUNT")]
    pub buffers: u16,
    /// Size of a receive buffer, in bytes
    #[arg(long, default_value_t = 32 * 1024, value_name = "BYTES")]
    pub buffer_bytes: usize,
    /// How long a request's header may take
    #[arg(long, default_value_t = 10_000, value_name = "MS")]
    pub header_timeout_ms: u64,
    /// How long a client may idle between two requests
    #[arg(long, default_value_t = 60_000, value_name = "MS")]
    pub idle_timeout_ms: u64,
    /// How long a body may stall, either way
    #[arg(long, default_value_t = 60_000, value_name = "MS")]
    pub body_timeout_ms: u64,
    /// How long an app may say nothing while it owes a response
    #[arg(long, default_value_t = 300_000, value_name = "MS")]
    pub response_timeout_ms: u64,
    /// How long a connect to an app may take
    #[arg(long, default_value_t = 3_000, value_name = "MS")]
    pub connect_timeout_ms: u64,
    /// How long nothing may move in a TCP or upgraded connection
    #[arg(long, default_value_t = 3_600_000, value_name = "MS")]
    pub tunnel_timeout_ms: u64,
    /// How long to finish what is under way after a handover to a new process
    #[arg(long, default_value_t = 300_000, value_name = "MS")]
    pub drain_timeout_ms: u64,
    /// How long to finish what is under way when told to stop
    #[arg(long, default_value_t = 5_000, value_name = "MS")]
    pub stop_timeout_ms: u64,
}

impl CommonArgs {
    fn listener_limits(&self) -> ListenerLimits {
        let per_source = SourceLimits {
            connections_max: self.source_max_connections,
            requests_per_second: self.source_connections_per_second,
            burst: None,
        };
        ListenerLimits { connections_max: self.listener_max_connections, per_source: Some(per_source) }
    }

    pub fn options(&self) -> Options {
        Options {
            threads: self.threads,
            config: Config {
                head_timeout_ms: self.header_timeout_ms,
                client_idle_timeout_ms: self.idle_timeout_ms,
                body_timeout_ms: self.body_timeout_ms,
                response_timeout_ms: self.response_timeout_ms,
                connect_timeout_ms: self.connect_timeout_ms,
                tunnel_idle_timeout_ms: self.tunnel_timeout_ms,
                overload_grace_ms: self.overload_grace_ms,
                listener_limits: self.listener_limits(),
                ..Config::default()
            },
            connections_max: self.max_connections,
            buffers: BufferSizes { count: self.buffers, size_bytes: self.buffer_bytes },
            io: self.io,
            unix_root: self.unix_root.clone(),
            tls_dir: self.tls_dir.clone(),
            acme_dir: self.acme_dir.clone(),
            access_log: self.access_log.clone().map(|target| LogOptions {
                target,
                format: self.access_log_format.into(),
                sample: self.access_log_sample,
            }),
            state_dir: None,
            port_address: IpAddr::from([127, 0, 0, 1]),
            control_uid: None,
            control: None,
            metrics: None,
            inherited: Vec::new(),
            bind: Vec::new(),
            table: Table::empty(),
            config_file: None,
            stop_timeout: Duration::from_millis(self.stop_timeout_ms),
            drain_timeout: Duration::from_millis(self.drain_timeout_ms),
            program: Program::of_this_process(None),
            handed: None,
        }
    }
}
