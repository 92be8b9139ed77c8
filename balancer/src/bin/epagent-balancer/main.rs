//! The balancer's command line.
//!
//! Without a subcommand it serves: listeners and the control socket (`control`) come by the systemd
//! socket-activation protocol or from `--http`, `--listen` and `--control`; routes come over the control
//! socket, and from the state folder at start; or both come from a file (`--config`). `run` proxies without any
//! of that. `status`, `set-table` and `reload` speak to a running one.

mod args;

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use epagent_balancer::config_file::ConfigFile;
use epagent_balancer::control::client::Client;
use epagent_balancer::control::connections::ConnectionsQuery;
use epagent_balancer::core::listen::{self, Listen};
use epagent_balancer::handover::endowment::Endowment;
use epagent_balancer::handover::{LAUNCH_TIMEOUT, READY_TIMEOUT, launch};
use epagent_balancer::listeners::{Bind, listening};
use epagent_balancer::remark::Remark;
use epagent_balancer::server::{Options, Server, chain, log};
use epagent_balancer::table::{Action, Address, Match, Proxy, Route, Table, Upstream, UpstreamState};

use args::{Cli, Command, Mode, RunArgs, ServeArgs};

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
            log(Remark::error(message));
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
        log(Remark::warning(warning));
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
