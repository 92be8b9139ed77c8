//! The balancer itself, and who is connected to it.

use std::collections::BTreeMap;

use epagent_wire::api::Route;
use epagent_wire::table::{
    CertificateStatus, Certificates, Connection, Connections, MemoryStatus, RefusedCertificate, Reloaded,
    Status,
};
use hyper::Method;

use super::{Outcome, print_json, written};
use crate::args::{BalancerVerb, ConnectionsArgs};
use crate::client::{Client, encoded};
use crate::screen::{Screen, Table, Tone, cell, size, span, state_cell};

/// Certificates that are listed; the others expire later.
const CERTIFICATES_SHOWN: usize = 20;
/// Names of one that are listed.
const NAMES_SHOWN: usize = 3;

pub async fn balancer(client: &Client, verb: BalancerVerb) -> Outcome {
    match verb {
        BalancerVerb::Status(json) if json.json => print_json(client, "/v1/balancer").await,
        BalancerVerb::Status(_) => status(client).await,
        BalancerVerb::Connections(args) => connections(client, &args).await,
        BalancerVerb::Reload => {
            let reloaded: Reloaded = client.order(Method::POST, "/v1/balancer/reload").await?;
            let line = format!("process {} is in charge; the one before finishes what it has", reloaded.pid);
            written(Screen::stdout().line(&line))
        }
    }
}

async fn status(client: &Client) -> Outcome {
    let status: Status = client.get("/v1/balancer").await?;
    let screen = Screen::stdout();
    let count = |name: &str| status.counters.get(name).copied().unwrap_or(0);
    let listeners: Vec<String> =
        status.listeners.iter().map(|listener| format!("{} {}", listener.name, listener.address)).collect();
    let active: u64 = status.routes.iter().map(|route| route.active).sum();
    let held: u64 = status.routes.iter().map(|route| route.held).sum();
    let mut facts = vec![
        ("process", format!("{}, {} threads, {}", status.pid, status.threads, status.io)),
        ("table", format!("version {}, {} routes", status.table_version, status.routes.len())),
        ("listeners", if listeners.is_empty() { "none".to_owned() } else { listeners.join(", ") }),
        (
            "connections",
            format!(
                "{} of clients, {} to apps",
                count("connections_open"),
                count("upstream_connections_open")
            ),
        ),
        ("now", format!("{active} requests and connections, {held} of them held")),
        ("so far", format!("{} connections, {} requests", count("connections_accepted"), count("requests"))),
        (
            "bytes",
            format!(
                "{} from clients, {} from apps",
                size(count("bytes_from_clients")),
                size(count("bytes_from_upstreams"))
            ),
        ),
        ("app sockets", status.tenant_sockets.replace('_', " ")),
    ];
    facts.extend(memory(&status.memory));
    written(facts.iter().try_for_each(|(name, value)| screen.line(&format!("{name:<12} {value}"))))?;
    for old in &status.draining {
        let seconds = old.drains_for_ms / 1000;
        let line = format!(
            "{:<12} process {} for {seconds} s, {} connections",
            "draining", old.pid, old.connections
        );
        written(screen.line(&line))?;
    }
    let warnings = troubles(&status).into_iter().chain(refused(&status.certificates));
    written(warnings.into_iter().try_for_each(|line| {
        let line = screen.foreign(&line);
        screen.line(&screen.paint(Tone::Warn, &line))
    }))?;
    upstreams(&status)?;
    certificates(&status.certificates)
}

/// Counters that say that something was turned away or went wrong: those that are not zero.
fn troubles(status: &Status) -> Vec<String> {
    const FINE: [&str; 13] = [
        "connections_open",
        "upstream_connections_open",
        "connections_accepted",
        "requests",
        "responses",
        "answered_by_action",
        "tls_handshakes",
        "tls_resumed",
        "retried_stale",
        "client_aborted",
        "upgrades",
        "bytes_from_clients",
        "bytes_from_upstreams",
    ];
    let told = status.counters.iter().filter(|(name, count)| **count > 0 && !FINE.contains(&name.as_str()));
    let told: Vec<String> = told.map(|(name, count)| format!("{} {count}", name.replace('_', " "))).collect();
    match told.is_empty() {
        true => Vec::new(),
        false => vec![format!("{:<12} {}", "not served", told.join(", "))],
    }
}

/// How much it may come to use, and what for; nothing of a balancer that does not say.
fn memory(memory: &MemoryStatus) -> Vec<(&'static str, String)> {
    let bound = &memory.bound;
    if bound.total_bytes == 0 {
        return Vec::new();
    }
    let parts = [
        ("buffers", bound.receive_buffers_bytes),
        ("waiting", bound.waiting_bytes),
        ("connections", bound.connections_bytes),
        ("heads and bodies kept", bound.kept_bytes),
        ("TLS", bound.tls_bytes),
        ("sources", bound.sources_bytes),
        ("table", bound.table_bytes),
        ("control", bound.control_bytes),
        ("process", bound.process_bytes),
    ];
    let parts = parts.iter().filter(|(_, bytes)| *bytes > 0);
    let parts: Vec<String> = parts.map(|(name, bytes)| format!("{name} {}", size(*bytes))).collect();
    vec![
        ("memory", format!("{} at most: {}", size(bound.total_bytes), parts.join(", "))),
        ("", format!("the kernel's for sockets: {} at most", size(bound.kernel_sockets_bytes))),
    ]
}

fn refused(certificates: &Certificates) -> Vec<String> {
    let line = |refused: &RefusedCertificate| {
        let id = if refused.id.is_empty() { "all" } else { &refused.id };
        let kept = if refused.kept { "; the one before stays in force" } else { "" };
        format!("{:<12} certificate {id}: {}{kept}", "refused", refused.reason)
    };
    certificates.refused.iter().map(line).collect()
}

/// Those that expire first.
fn certificates(certificates: &Certificates) -> Outcome {
    let mut sorted: Vec<&CertificateStatus> = certificates.in_force.iter().collect();
    sorted.sort_by_key(|certificate| certificate.not_after_unix_s);
    if sorted.is_empty() {
        return Ok(crate::failure::status::OK);
    }
    let mut table = Table::new(&["CERTIFICATE", "STATE", "NOT AFTER", "NAMES"]);
    for certificate in sorted.iter().take(CERTIFICATES_SHOWN) {
        let mut names = certificate.names.iter().take(NAMES_SHOWN).cloned().collect::<Vec<_>>().join(", ");
        if certificate.names.len() > NAMES_SHOWN {
            names.push_str(&format!(" and {} more", certificate.names.len() - NAMES_SHOWN));
        }
        let default = if certificate.is_default { " (default)" } else { "" };
        table.row(vec![
            cell(format!("{}{default}", certificate.id)),
            state_cell(&certificate.state.replace('_', " ")),
            cell(&certificate.not_after),
            cell(names),
        ]);
    }
    let shown = written(table.print(""))?;
    if let left @ 1.. = sorted.len().saturating_sub(CERTIFICATES_SHOWN) {
        Screen::stderr().say(&format!("{left} more certificates expire later: --json lists them"));
    }
    Ok(shown)
}

async fn connections(client: &Client, args: &ConnectionsArgs) -> Outcome {
    let mut path = format!("/v1/balancer/connections?limit={}", args.limit);
    if let Some(app) = &args.app {
        path.push_str(&format!("&app={app}"));
    }
    if let Some(route) = &args.route {
        path.push_str(&format!("&route={}", encoded(&route.to_string())));
    }
    if args.json.json {
        return print_json(client, &path).await;
    }
    let page: Connections = client.get(&path).await?;
    let routes: Vec<Route> = client.get("/v1/routes").await?;
    let targets: BTreeMap<&str, &str> =
        routes.iter().map(|route| (route.route.as_str(), route.target.as_str())).collect();
    let headings =
        ["CLIENT", "LISTENER", "STATE", "ROUTE", "UPSTREAM", "AGE", "IDLE", "REQUESTS", "IN", "OUT"];
    let mut table = Table::new(&headings);
    page.rows.iter().for_each(|row| table.row(connection(row, &targets)));
    let shown = written(table.print("no connections"))?;
    if page.next.is_some() {
        Screen::stderr().say(&format!("there are more than these {}: --limit N shows more", page.rows.len()));
    }
    Ok(shown)
}

fn connection(row: &Connection, targets: &BTreeMap<&str, &str>) -> Vec<(String, Tone)> {
    let route = row.route.as_deref().map(|id| targets.get(id).copied().unwrap_or(id));
    vec![
        cell(row.client.as_deref().unwrap_or("-")),
        cell(&row.listener),
        (row.state.clone(), if row.state == "held" { Tone::Warn } else { Tone::Plain }),
        cell(route.unwrap_or("-")),
        cell(row.upstream.as_deref().unwrap_or("-")),
        cell(span(row.age_ms / 1_000)),
        cell(span(row.idle_ms / 1_000)),
        cell(row.requests.to_string()),
        cell(size(row.bytes_in)),
        cell(size(row.bytes_out)),
    ]
}

fn upstreams(status: &Status) -> Outcome {
    if status.upstreams.is_empty() {
        return Ok(crate::failure::status::OK);
    }
    let mut table =
        Table::new(&["UPSTREAM", "ADDRESS", "STATE", "IN FLIGHT", "REQUESTS", "NO CONNECT", "BROKEN", "WHY"]);
    for upstream in &status.upstreams {
        let state = if upstream.unreachable { "unreachable" } else { upstream.state.as_str() };
        table.row(vec![
            cell(&upstream.id),
            cell(&upstream.address),
            state_cell(state),
            cell((upstream.active_requests + upstream.active_connections).to_string()),
            cell(upstream.requests_total.to_string()),
            cell(upstream.connect_errors_total.to_string()),
            cell(upstream.request_errors_total.to_string()),
            cell(upstream.connect_error.as_deref().unwrap_or("")),
        ]);
    }
    written(table.print(""))
}
