//! `[[route]]`: which host name or port leads to which process.

use std::collections::BTreeMap;

use epagent_core::name::ProcessName;
use epagent_core::route;
use epagent_core::spec::{RouteMatch, RouteSpec};

use super::ManifestError;
use super::error::{nearest, quoted};
use super::table::{Item, Table};

/// Routes of one app.
const ROUTES_MAX: usize = 64;

pub(super) fn routes(
    top: &Table<'_>,
    processes: &[(ProcessName, Table<'_>)],
) -> Result<Vec<RouteSpec>, ManifestError> {
    let Some(all) = top.get("route") else { return Ok(Vec::new()) };
    let items = all.elements("a list of tables").map_err(|error| match all.table() {
        Ok(_) => error.with_help("write `[[route]]`, with two brackets on each side"),
        Err(_) => error,
    })?;
    if items.len() > ROUTES_MAX {
        return Err(all.error(format!("there are {} routes; the most is {ROUTES_MAX}", items.len())));
    }
    let mut seen: BTreeMap<RouteMatch, usize> = BTreeMap::new();
    let mut routes = Vec::new();
    for item in items {
        let table = item.table()?;
        table.only(&["host", "port", "process"])?;
        let (place, matches) = route_match(&table)?;
        if let Some(line) = seen.insert(matches.clone(), place.line()) {
            let error = place.error(format!("this {} is routed already", place.key));
            return Err(error.with_help(format!("the first route is on line {line}")));
        }
        let process = process(&table.require("process", "process = \"web\"")?, processes)?;
        routes.push(RouteSpec { matches, process });
    }
    Ok(routes)
}

fn route_match<'d>(table: &Table<'d>) -> Result<(Item<'d>, RouteMatch), ManifestError> {
    match (table.get("host"), table.get("port")) {
        (Some(host), None) => {
            let name = normal_host(&host)?;
            Ok((host, RouteMatch::Host(name)))
        }
        (None, Some(port)) => {
            let number = port.integer(1..=u32::from(u16::MAX))?;
            // In range by the line above.
            let number = u16::try_from(number).unwrap_or(u16::MAX);
            Ok((port, RouteMatch::Port(number)))
        }
        (Some(_), Some(port)) => {
            let error = port.error_at_key("a route has a `host` or a `port`, not both");
            Err(error.with_help("write two routes"))
        }
        (None, None) => {
            Err(table.error("a route needs a `host` or a `port`").with_help("add `host = \"shop.example\"`"))
        }
    }
}

/// A host name in lower case, or `*.` and one.
fn normal_host(item: &Item<'_>) -> Result<String, ManifestError> {
    let host = item.string()?;
    let refused = |why: &str| item.error(format!("{} is not a host name: {why}", quoted(host)));
    if host.contains("://") || host.contains('/') {
        return Err(refused("it is a URL").with_help("write the name alone: `shop.example`"));
    }
    if !host.is_ascii() {
        return Err(refused("it has letters past ASCII").with_help("write its `xn--` form"));
    }
    if host.contains(':') {
        return Err(refused("it has a port")
            .with_help("the balancer's listeners are the host's own affair: write the name alone"));
    }
    route::normal_host(host).map_err(refused)
}

fn process(item: &Item<'_>, processes: &[(ProcessName, Table<'_>)]) -> Result<ProcessName, ManifestError> {
    let name = item.string()?;
    if let Some((process, _)) = processes.iter().find(|(process, _)| process.as_str() == name) {
        return Ok(process.clone());
    }
    let error = item.error(format!("there is no process {}", quoted(name)));
    Err(match nearest(name, processes.iter().map(|(process, _)| process.as_str())) {
        Some(meant) => error.with_help(format!("did you mean `{meant}`?")),
        None => {
            let known: Vec<&str> = processes.iter().map(|(process, _)| process.as_str()).collect();
            error.with_help(format!("this app has {}", super::table::list(&known)))
        }
    })
}
