//! The balancer's command line.
//!
//! Without a subcommand it serves: listeners and the control socket (`control`) come by the systemd
//! socket-activation protocol or from `--http`, `--listen` and `--control`; routes come over the control
//! socket, and from the state folder at start; or both come from a file (`--config`). `run` proxies without any of that. `status`, `set-table` and
//! `reload` speak to a running one.

use std::collections::HashSet;
use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use epagent_balancer::access_log::{Format, LogOptions, Target};
use epagent_balancer::config_file::ConfigFile;
use epagent_balancer::control::client::Client;
use epagent_balancer::control::connections::ConnectionsQuery;
use epagent_balancer::core::config::Config;
use epagent_balancer::core::listen::{self, Listen};
use epagent_balancer::doors::{BufferSizes, IoChoice};
use epagent_balancer::handover::endowment::Endowment;
use epagent_balancer::handover::launch::{self, Program};
use epagent_balancer::handover::{LAUNCH_TIMEOUT, READY_TIMEOUT};
use epagent_balancer::listeners::{Bind, listening};
use epagent_balancer::server::{Options, Server, chain, log};
use epagent_balancer::table::{
    Action, Address, ListenerLimits, Match, Proxy, Route, SourceLimits, Table, Upstream, UpstreamState,
};

/// An io_uring TCP and HTTP balancer that can hold a request while the app behind it changes.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: ServeArgs,
}

#[derive(Subcommand)]
enum Command {
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
struct ServeArgs {
    /// Go by this TOML file: its listeners, and its routes, which SIGHUP reads again
    #[arg(long, value_name = "FILE", conflicts_with = "state")]
    config: Option<PathBuf>,
    /// Folder in which the table is kept
    #[arg(long)]
    state: Option<PathBuf>,
    /// Listen for HTTP here, besides inherited listeners (repeatable)
    #[arg(long = "http", value_name = "ADDR:PORT")]
    http: Vec<SocketAddr>,
    /// Listen here as the name says: http, sni or tcp-PORT, followed by .trusted, .proxy or both (repeatable)
    #[arg(long, value_name = "NAME=ADDR:PORT|unix:/PATH")]
    listen: Vec<Bind>,
    /// Bind the control socket here, unless one is inherited
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Besides root, the uid that may use the control socket
    #[arg(long, value_name = "UID", conflicts_with = "control_user")]
    control_uid: Option<u32>,
    /// The same by name
    #[arg(long, value_name = "NAME")]
    control_user: Option<String>,
    /// Where routes by port listen
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDR")]
    port_address: IpAddr,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Args)]
struct RunArgs {
    /// Where to listen (repeatable); [::] takes IPv4 clients too
    #[arg(long, value_name = "ADDR:PORT|unix:/PATH", required = true)]
    listen: Vec<Address>,
    /// Clients speak TLS, which ends here, with the certificates of --tls-dir (modes tcp and http)
    #[arg(long, requires = "tls_dir")]
    tls: bool,
    /// Keep and extend the X-Forwarded-* and Forwarded fields of clients
    #[arg(long)]
    trusted: bool,
    /// Require a PROXY protocol header (version 1 or 2) of every client
    #[arg(long)]
    proxy_protocol: bool,
    /// Tell upstreams of each client with a PROXY protocol header (modes tcp and sni)
    #[arg(long)]
    upstream_proxy_protocol: bool,
    /// Where to (repeatable)
    #[arg(long, value_name = "ADDR:PORT|unix:PATH", required = true)]
    upstream: Vec<Address>,
    #[arg(long, value_enum, default_value = "http")]
    mode: Mode,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
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
enum Mode {
    Tcp,
    Http,
    /// TLS passed through unopened
    Sni,
}

#[derive(Args)]
struct ControlArgs {
    /// The control socket
    #[arg(long, value_name = "PATH")]
    control: PathBuf,
}

#[derive(Args)]
struct CommonArgs {
    /// Data-path threads, each with a door of its own
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    threads: u32,
    /// What to reach the network by; auto is io_uring where it is to be had, else epoll
    #[arg(long, value_enum, default_value = "auto")]
    io: IoChoice,
    /// Unix sockets of tenants lie below this folder: the upstreams at unix:REL
    #[arg(long, value_name = "DIR")]
    unix_root: Option<PathBuf>,
    /// Certificates for TLS listeners: NAME.crt with NAME.key, or NAME/fullchain.pem with NAME/privkey.pem
    #[arg(long, value_name = "DIR")]
    tls_dir: Option<PathBuf>,
    /// Answer ACME http-01 challenges from here, the --webroot of an ACME client, on plain HTTP listeners
    #[arg(long, value_name = "DIR")]
    acme_dir: Option<PathBuf>,
    /// Most client connections [default: what the descriptor limit allows]
    #[arg(long, value_name = "COUNT")]
    max_connections: Option<u64>,
    /// Answer `GET /metrics` here, for Prometheus: ADDR:PORT or unix:/PATH, unless a socket is inherited
    #[arg(long, value_name = "ADDR")]
    metrics: Option<Address>,
    /// Most connections of each listener that is not in a configuration file
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    listener_max_connections: Option<u32>,
    /// Most connections of one source (an IPv4 address or an IPv6 /64) at each such listener
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    source_max_connections: Option<u32>,
    /// Most new connections per second of one source at each such listener
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    source_connections_per_second: Option<u32>,
    /// How long clients wait for room among the connections before they are reset
    #[arg(long, default_value_t = 1_000, value_name = "MS")]
    overload_grace_ms: u64,
    /// Log every request and connection to this file; `-` is standard output, `journald` systemd's journal
    #[arg(long, value_name = "PATH")]
    access_log: Option<Target>,
    /// json, common or combined; the journal has fields of its own
    #[arg(long, value_enum, default_value = "json")]
    access_log_format: LogFormat,
    /// Log one in so many of what went well, and all of what did not
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    access_log_sample: u32,
    /// Receive buffers per thread, a power of two
    #[arg(long, default_value_t = 512, value_name = "COUNT")]
    buffers: u16,
    /// Size of a receive buffer, in bytes
    #[arg(long, default_value_t = 32 * 1024, value_name = "BYTES")]
    buffer_bytes: usize,
    /// How long a request's header may take
    #[arg(long, default_value_t = 10_000, value_name = "MS")]
    header_timeout_ms: u64,
    /// How long a client may idle between two requests
    #[arg(long, default_value_t = 60_000, value_name = "MS")]
    idle_timeout_ms: u64,
    /// How long a body may stall, either way
    #[arg(long, default_value_t = 60_000, value_name = "MS")]
    body_timeout_ms: u64,
    /// How long an app may say nothing while it owes a response
    #[arg(long, default_value_t = 300_000, value_name = "MS")]
    response_timeout_ms: u64,
    /// How long a connect to an app may take
    #[arg(long, default_value_t = 3_000, value_name = "MS")]
    connect_timeout_ms: u64,
    /// How long nothing may move in a TCP or upgraded connection
    #[arg(long, default_value_t = 3_600_000, value_name = "MS")]
    tunnel_timeout_ms: u64,
    /// How long to finish what is under way after a handover to a new process
    #[arg(long, default_value_t = 300_000, value_name = "MS")]
    drain_timeout_ms: u64,
    /// How long to finish what is under way when told to stop
    #[arg(long, default_value_t = 5_000, value_name = "MS")]
    stop_timeout_ms: u64,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        None => start(|endowment| serve(cli.serve, endowment)),
        Some(Command::Serve(args)) => start(|endowment| serve(args, endowment)),
        Some(Command::Run(args)) => start(|endowment| run(args, endowment)),
        Some(Command::Check { config }) => check(&config),
        Some(Command::Status(args)) => status(&args.control),
        Some(Command::Reload(args)) => reload(&args.control),
        Some(Command::ReloadCertificates(args)) => reload_certificates(&args.control),
        Some(Command::HandoverLaunch { command }) => {
            launch::be_launcher(&command).map_err(|error| chain(&error))
        }
        Some(Command::Metrics(args)) => metrics(&args.control),
        Some(Command::Connections { control, routes }) => connections(&control.control, routes),
        Some(Command::Audit(args)) => audit(&args.control),
        Some(Command::SetTable { control, file }) => set_table(&control.control, &file),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            log(&message);
            ExitCode::FAILURE
        }
    }
}

/// What `serve` is started with: by the command line, and by whoever started us.
fn serve(args: ServeArgs, endowment: Endowment) -> Result<Options, String> {
    let control = match (endowment.control, &args.control) {
        (Some(socket), _) => Some(socket),
        (None, Some(path)) => Some(bind_control(path)?.into()),
        (None, None) => None,
    };
    let config_file = args.config.map(|path| load_config(&path).map(|file| (path, file))).transpose()?;
    let common = args.common;
    Ok(Options {
        config_file,
        state_dir: args.state,
        port_address: args.port_address,
        control_uid: args.control_user.map(|name| uid_of(&name)).transpose()?.or(args.control_uid),
        control,
        metrics: metrics_socket(endowment.metrics, common.metrics.as_ref())?,
        inherited: endowment.listeners,
        program: endowment.program,
        handed: endowment.handed,
        bind: args.http.into_iter().map(Bind::http).chain(args.listen).collect(),
        ..common.options()
    })
}

/// What `run` is started with.
fn run(args: RunArgs, endowment: Endowment) -> Result<Options, String> {
    let upstreams = args.upstream.iter().enumerate().map(|(index, address)| Upstream {
        id: format!("upstream-{index}"),
        address: address.clone(),
        state: UpstreamState::Up,
        weight: 1,
        proxy_protocol: args.upstream_proxy_protocol,
    });
    let action = Action::Proxy(Proxy { upstreams: upstreams.collect(), ..Proxy::default() });
    let (mut bind, mut routes) = (Vec::new(), Vec::<Route>::new());
    let mut ports = args.listen.iter().filter_map(Address::port).collect::<HashSet<u16>>();
    for address in args.listen {
        // A route of plain TCP goes by a port, for a unix socket by one that nothing else here has.
        let spare = || (1..=u16::MAX).find(|port| ports.insert(*port)).unwrap_or_default();
        let port = address.port().unwrap_or_else(spare);
        let (mode, matches) = match args.mode {
            Mode::Http => (listen::Mode::Http, Match::Host("*".to_owned())),
            Mode::Tcp => (listen::Mode::Tcp { port }, Match::Port(port)),
            Mode::Sni => (listen::Mode::Sni, Match::Sni("*".to_owned())),
        };
        if args.tls && mode == listen::Mode::Sni {
            return Err("--tls ends TLS, which --mode sni passes through: choose one".to_owned());
        }
        let listen =
            Listen { mode, tls: args.tls, trusted: args.trusted, proxy_protocol: args.proxy_protocol };
        bind.push(Bind::new(listen, address).map_err(|error| chain(&error))?);
        if !routes.iter().any(|route| route.matches == matches) {
            let id = format!("run-{}", routes.len());
            routes.push(Route { id, matches, action: action.clone(), hold: None, limits: None });
        }
    }
    let table = Table { routes, ..Table::empty() };
    table.validate().map_err(|error| chain(&error))?;
    Ok(Options {
        bind,
        table,
        metrics: metrics_socket(endowment.metrics, args.common.metrics.as_ref())?,
        inherited: endowment.listeners,
        program: endowment.program,
        handed: endowment.handed,
        ..args.common.options()
    })
}

/// Serves. What hinders it from the start, an old process is told that hands over to us.
fn start(options: impl FnOnce(Endowment) -> Result<Options, String>) -> Result<(), String> {
    let endowment = Endowment::take().map_err(|error| chain(&error))?;
    let old = endowment.handed.as_ref().and_then(|(taking, _)| taking.try_clone().ok());
    let started = options(endowment)
        .and_then(|options| Server::start(options).map_err(|error| chain(&error)))
        .inspect_err(|why| old.iter().for_each(|old| old.fail(why)));
    drop(old);
    started?.run().map_err(|error| chain(&error))
}

fn uid_of(name: &str) -> Result<u32, String> {
    match nix::unistd::User::from_name(name) {
        Ok(Some(user)) => Ok(user.uid.as_raw()),
        Ok(None) => Err(format!("there is no user {name:?}")),
        Err(errno) => Err(format!("cannot look up the user {name:?}: {errno}")),
    }
}

/// Binds a control socket, in place of one that a dead process left behind.
fn bind_control(path: &Path) -> Result<UnixListener, String> {
    let failed =
        |error: std::io::Error| format!("cannot bind the control socket {}: {error}", path.display());
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(format!("another balancer uses the control socket {}", path.display()));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    UnixListener::bind(path).map_err(failed)
}

fn load_config(path: &Path) -> Result<ConfigFile, String> {
    let file = ConfigFile::load(path).map_err(|error| chain(&error))?;
    for warning in file.warnings() {
        log(&warning);
    }
    Ok(file)
}

fn check(path: &Path) -> Result<(), String> {
    let file = load_config(path)?;
    println!("{}: {} listeners and {} routes", path.display(), file.listeners.len(), file.routes.len());
    Ok(())
}

fn status(control: &Path) -> Result<(), String> {
    let status = connect(control)?.status().map_err(|error| chain(&error))?;
    let text = serde_json::to_string_pretty(&status).map_err(|error| error.to_string())?;
    println!("{text}");
    Ok(())
}

fn reload(control: &Path) -> Result<(), String> {
    let patience = READY_TIMEOUT + LAUNCH_TIMEOUT + Duration::from_secs(5);
    let mut client = Client::connect(control, patience).map_err(|error| chain(&error))?;
    let reloaded = client.reload().map_err(|error| chain(&error))?;
    println!("process {} is in charge", reloaded.pid);
    Ok(())
}

fn metrics(control: &Path) -> Result<(), String> {
    print!("{}", connect(control)?.metrics().map_err(|error| chain(&error))?);
    Ok(())
}

/// Where metrics are asked for: what was handed over, else what is asked for.
fn metrics_socket(handed: Option<OwnedFd>, wanted: Option<&Address>) -> Result<Option<OwnedFd>, String> {
    match (handed, wanted) {
        (Some(socket), _) => Ok(Some(socket)),
        (None, Some(address)) => listening(address).map(Some).map_err(|error| chain(&error)),
        (None, None) => Ok(None),
    }
}

fn connections(control: &Path, routes: Vec<String>) -> Result<(), String> {
    let mut client = connect(control)?;
    let mut query = ConnectionsQuery { routes: routes.into_iter().collect(), ..ConnectionsQuery::default() };
    loop {
        let page = client.connections(query.clone()).map_err(|error| chain(&error))?;
        print_lines(&page.rows)?;
        if page.next.is_none() {
            return Ok(());
        }
        query.after = page.next;
    }
}

fn audit(control: &Path) -> Result<(), String> {
    print_lines(&connect(control)?.audit().map_err(|error| chain(&error))?.entries)
}

fn print_lines<T: serde::Serialize>(rows: &[T]) -> Result<(), String> {
    for row in rows {
        println!("{}", serde_json::to_string(row).map_err(|error| error.to_string())?);
    }
    Ok(())
}

fn reload_certificates(control: &Path) -> Result<(), String> {
    let patience = Duration::from_secs(30);
    let mut client = Client::connect(control, patience).map_err(|error| chain(&error))?;
    let certificates = client.reload_certificates().map_err(|error| chain(&error))?;
    for certificate in &certificates.in_force {
        println!("{}: {} until {}", certificate.id, certificate.names.join(", "), certificate.not_after);
    }
    match certificates.refused.as_slice() {
        [] => Ok(()),
        refused => {
            let each = refused.iter().map(|refused| format!("{} is refused: {}", refused.id, refused.reason));
            Err(each.collect::<Vec<_>>().join("; "))
        }
    }
}

fn set_table(control: &Path, file: &Path) -> Result<(), String> {
    let text = std::fs::read(file).map_err(|error| format!("cannot read {}: {error}", file.display()))?;
    let table: Table =
        serde_json::from_slice(&text).map_err(|error| format!("{} is no table: {error}", file.display()))?;
    let ack = connect(control)?.set_table(&table).map_err(|error| chain(&error))?;
    println!("table {} is in force", ack.version);
    for problem in ack.problems {
        println!("problem with {}: {}", problem.route.as_deref().unwrap_or("the table"), problem.message);
    }
    Ok(())
}

fn connect(control: &Path) -> Result<Client, String> {
    Client::connect(control, Duration::from_secs(5)).map_err(|error| chain(&error))
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

    fn options(&self) -> Options {
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
