//! `epagent top`: the traffic of every route, a second at a time.
//!
//! Two pictures of the balancer's counters make one of what happened between them. On a terminal the table is drawn over
//! the one before, and what was on the screen is there again at the end; elsewhere each is printed below the last.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use epagent_wire::api::Route;
use epagent_wire::table::{Histogram, RouteStatus, Status};

use super::{Outcome, written};
use crate::args::TopArgs;
use crate::client::Client;
use crate::failure::{Failure, status};
use crate::screen::{Screen, Table, Tone, cell, size};
use crate::terminal;

const INTERVAL: Duration = Duration::from_secs(1);
/// The terminal's own second screen, without a cursor; and back (xterm's control sequences, ctlseqs).
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

/// What the balancer had counted at one moment.
struct Picture {
    at: Instant,
    status: Status,
    routes: Vec<Route>,
}

/// One route between two pictures.
#[derive(Debug, PartialEq)]
struct Row {
    target: String,
    app: String,
    requests_per_second: f64,
    errors_per_second: f64,
    bytes_per_second: u64,
    p50_us: Option<u64>,
    p99_us: Option<u64>,
    active: u64,
    held: u64,
    upstreams: String,
}

/// The second screen, until it is dropped.
struct Drawn;

impl Drop for Drawn {
    fn drop(&mut self) {
        let _ = io::stdout().write_all(LEAVE.as_bytes()).and_then(|()| io::stdout().flush());
    }
}

pub async fn top(client: &Client, args: &TopArgs) -> Outcome {
    let first = look(client).await?;
    let drawn = (io::stdout().is_terminal() && !args.once).then_some(Drawn);
    if drawn.is_some() {
        written(io::stdout().write_all(ENTER.as_bytes()))?;
    }
    tokio::select! {
        ended = watch(client, args, first, drawn.is_some()) => ended,
        _ = tokio::signal::ctrl_c() => Ok(status::OK),
    }
}

async fn watch(client: &Client, args: &TopArgs, mut before: Picture, is_drawn: bool) -> Outcome {
    loop {
        tokio::time::sleep(INTERVAL).await;
        let now = match look(client).await {
            Ok(now) => now,
            // The agent or the balancer is being restarted; what is on the screen says when it was.
            Err(failure) if is_drawn && failure.status == status::UNREACHABLE => continue,
            Err(failure) => return Err(failure),
        };
        let mut rows = rows(&before, &now);
        rows.retain(|row| args.app.as_ref().is_none_or(|app| row.app == app.as_str()));
        let mut lines = heading(&before, &now);
        lines.extend(table(&rows).lines(&Screen::stdout()));
        let shown = if is_drawn { draw(&lines) } else { print(&lines) };
        if let Err(error) = shown {
            return written(Err(error));
        }
        if args.once {
            return Ok(status::OK);
        }
        before = now;
    }
}

async fn look(client: &Client) -> Result<Picture, Failure> {
    let status: Status = client.get("/v1/balancer?latency=true").await?;
    let at = Instant::now();
    Ok(Picture { at, status, routes: client.get("/v1/routes").await? })
}

/// The busiest first.
fn rows(before: &Picture, now: &Picture) -> Vec<Row> {
    let seconds = now.at.duration_since(before.at).as_secs_f64().max(0.001);
    let old: BTreeMap<&str, &RouteStatus> =
        before.status.routes.iter().map(|route| (route.id.as_str(), route)).collect();
    let known: BTreeMap<&str, &Route> =
        now.routes.iter().map(|route| (route.route.as_str(), route)).collect();
    let fresh = RouteStatus::default();
    let mut rows: Vec<Row> = now
        .status
        .routes
        .iter()
        .map(|route| {
            // Counts that fell are another process's: they begin anew.
            let old = old.get(route.id.as_str()).copied().unwrap_or(&fresh);
            let old = if old.requests_total > route.requests_total { &fresh } else { old };
            let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
            let took = took(route).since(&took(old));
            let named = known.get(route.id.as_str());
            Row {
                target: named.map_or_else(|| route.id.clone(), |named| named.target.clone()),
                app: named.and_then(|named| named.app.clone()).unwrap_or_else(|| "-".to_owned()),
                requests_per_second: rate(route.requests_total, old.requests_total),
                errors_per_second: rate(errors(route), errors(old)),
                bytes_per_second: rate(route.bytes_out_total, old.bytes_out_total) as u64,
                p50_us: took.quantile_us(0.5),
                p99_us: took.quantile_us(0.99),
                active: route.active,
                held: route.held,
                upstreams: named.map_or_else(String::new, |named| upstreams(named, &now.status)),
            }
        })
        .collect();
    rows.sort_by(|a, b| {
        b.requests_per_second.total_cmp(&a.requests_per_second).then(a.target.cmp(&b.target))
    });
    rows
}

fn took(route: &RouteStatus) -> Histogram {
    route.latency.as_ref().map(|latency| latency.duration.clone()).unwrap_or_default()
}

/// Answers of 500 and above, whoever gave them, and responses that were cut short.
fn errors(route: &RouteStatus) -> u64 {
    let of = |map: &BTreeMap<String, u64>, name: &str| map.get(name).copied().unwrap_or(0);
    of(&route.responses, "5xx") + of(&route.ends, "cut")
}

/// `2 up 1 draining`, or what is in force in place of upstreams.
fn upstreams(route: &Route, status: &Status) -> String {
    if route.action != "proxy" {
        return route.action.clone();
    }
    let lost = |id: &str| status.upstreams.iter().any(|upstream| upstream.id == id && upstream.unreachable);
    let mut counts: BTreeMap<&str, u32> = BTreeMap::new();
    for upstream in &route.upstreams {
        let state = if lost(&upstream.id) { "unreachable" } else { upstream.state.as_str() };
        *counts.entry(state).or_default() += 1;
    }
    let shown: Vec<String> = counts.iter().rev().map(|(state, count)| format!("{count} {state}")).collect();
    if shown.is_empty() { "none".to_owned() } else { shown.join(" ") }
}

fn heading(before: &Picture, now: &Picture) -> Vec<String> {
    let seconds = now.at.duration_since(before.at).as_secs_f64().max(0.001);
    let count = |picture: &Picture, name: &str| picture.status.counters.get(name).copied().unwrap_or(0);
    let rate = |name: &str| count(now, name).saturating_sub(count(before, name)) as f64 / seconds;
    let held: u64 = now.status.routes.iter().map(|route| route.held).sum();
    vec![
        format!(
            "{} connections, {:.0} new/s, {:.0} requests/s, {held} held; table {}, process {}, {}",
            count(now, "connections_open"),
            rate("connections_accepted"),
            rate("requests"),
            now.status.table_version,
            now.status.pid,
            now.status.io
        ),
        String::new(),
    ]
}

fn table(rows: &[Row]) -> Table {
    let headings = ["ROUTE", "APP", "REQ/S", "P50", "P99", "ERR/S", "OUT/S", "ACTIVE", "HELD", "UPSTREAMS"];
    let mut table = Table::new(&headings);
    let tone = |bad: bool| if bad { Tone::Warn } else { Tone::Plain };
    for row in rows {
        table.row(vec![
            cell(&row.target),
            cell(&row.app),
            cell(format!("{:.1}", row.requests_per_second)),
            cell(row.p50_us.map_or_else(|| "-".to_owned(), span)),
            cell(row.p99_us.map_or_else(|| "-".to_owned(), span)),
            (format!("{:.1}", row.errors_per_second), tone(row.errors_per_second > 0.0)),
            cell(size(row.bytes_per_second)),
            cell(row.active.to_string()),
            (row.held.to_string(), tone(row.held > 0)),
            (row.upstreams.clone(), tone(row.upstreams.contains("unreachable") || row.upstreams == "none")),
        ]);
    }
    table
}

/// `830 µs`, `12 ms`, `3.4 s`.
fn span(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..10_000 => format!("{:.1} ms", us as f64 / 1_000.0),
        10_000..1_000_000 => format!("{} ms", us / 1_000),
        _ => format!("{:.1} s", us as f64 / 1_000_000.0),
    }
}

/// Over what was drawn before, as much as the terminal has room for. Colours make a line longer than it looks, so that
/// a line is left to the terminal to cut (autowrap off).
fn draw(lines: &[String]) -> io::Result<()> {
    let (rows, _) = terminal::size();
    let mut text = "\x1b[H\x1b[?7l".to_owned();
    for line in lines.iter().take(usize::from(rows).saturating_sub(1)) {
        text.push_str(line);
        text.push_str("\x1b[K\r\n");
    }
    text.push_str("\x1b[J\x1b[?7h");
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush())
}

fn print(lines: &[String]) -> io::Result<()> {
    let screen = Screen::stdout();
    lines.iter().try_for_each(|line| screen.line(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(at: Instant, requests: u64, fives: u64, buckets: Vec<(u32, u64)>) -> Picture {
        let latency = epagent_wire::table::Latency {
            duration: Histogram { sum_us: 0, max_us: 1_000_000, buckets },
            ..Default::default()
        };
        let route = RouteStatus {
            id: "shop/web/0".to_owned(),
            requests_total: requests,
            responses: BTreeMap::from([("5xx".to_owned(), fives)]),
            latency: Some(latency),
            ..RouteStatus::default()
        };
        Picture { at, status: Status { routes: vec![route], ..Status::default() }, routes: Vec::new() }
    }

    #[test]
    fn a_row_is_what_happened_between_two_looks() {
        let begin = Instant::now();
        let before = picture(begin, 100, 1, vec![(40, 100)]);
        let now = picture(begin + Duration::from_secs(2), 150, 11, vec![(40, 100), (44, 50)]);
        let row = &rows(&before, &now)[0];
        assert_eq!((row.requests_per_second, row.errors_per_second), (25.0, 5.0));
        // What was slow or fast before these two seconds is not in it.
        assert_eq!(row.p50_us, Some(4_607));
        // A balancer that was restarted counts from zero.
        let restarted = picture(begin + Duration::from_secs(3), 10, 0, vec![(40, 10)]);
        assert_eq!(rows(&now, &restarted)[0].requests_per_second, 10.0);
    }

    #[test]
    fn spans_are_short() {
        assert_eq!([7, 4_607, 81_000, 2_500_000].map(span), ["7 µs", "4.6 ms", "81 ms", "2.5 s"]);
    }
}
