//! What is counted, under which names.
//!
//! Names follow Prometheus' conventions: base units (seconds, bytes), `_total` for what only grows. One name is
//! in one place below, with its labels and its help.

use super::text::{Kind, Labels, Text};
use crate::control::certificates::Certificates;
use crate::control::protocol::{Counters, RouteStatus, ShownState, Status, UpstreamStatus};
use crate::control::traffic::Latency;

/// Routes with series of their own, in the order of their ids.
pub const ROUTES_MAX: usize = 500;
/// Upstreams with series of their own, in the order of their ids.
pub const UPSTREAMS_MAX: usize = 1_000;
/// Certificates with series of their own: those that expire first.
pub const CERTIFICATES_MAX: usize = 500;
/// The name of all that have none.
pub const OTHERS: &str = "(others)";

/// Writes a status that has its histograms.
pub fn render(status: &Status) -> String {
    let mut text = Text::default();
    process(&mut text, status);
    counters(&mut text, &status.counters);
    certificates(&mut text, &status.certificates);
    routes(&mut text, &bounded_routes(&status.routes));
    upstreams(&mut text, &bounded_upstreams(&status.upstreams));
    text.finish()
}

fn process(text: &mut Text, status: &Status) {
    text.family("build_info", Kind::Gauge, "Always 1; which program this is and how it does its I/O.");
    let io = format!("{:?}", status.io).to_lowercase();
    text.sample(&[("version", &status.version), ("io", &io)], 1);
    text.family("uptime_seconds", Kind::Gauge, "Since this process started.");
    text.sample(&[], status.uptime_ms as f64 / 1_000.0);
    text.family("table_version", Kind::Gauge, "The version of the table in force.");
    text.sample(&[], status.table_version);
    text.family("threads", Kind::Gauge, "Data-path threads.");
    text.sample(&[], status.threads);
    text.family(
        "draining_processes",
        Kind::Gauge,
        "Processes that have handed over and finish what they carry.",
    );
    text.sample(&[], status.draining.len());
    let memory = &status.memory;
    text.family("receive_buffers_bytes", Kind::Gauge, "All receive buffers; used ones take memory.");
    text.sample(&[], memory.buffers_bytes);
    text.family("lent_buffers", Kind::Gauge, "Receive buffers lent to sends that wait for a peer.");
    text.sample(&[], memory.lent_buffers);
    text.family("lent_buffers_max", Kind::Gauge, "Most receive buffers that may be lent.");
    text.sample(&[], memory.lent_buffers_max);
    text.family("waiting_bytes", Kind::Gauge, "Bytes that wait in memory for peers that do not keep up.");
    text.sample(&[], memory.waiting_bytes);
    text.family("waiting_bytes_max", Kind::Gauge, "Most bytes that may wait in memory.");
    text.sample(&[], memory.waiting_bytes_max);
    text.family(
        "kept_bytes",
        Kind::Gauge,
        "Bytes kept of unfinished heads and of bodies with nowhere to go.",
    );
    text.sample(&[], memory.kept_bytes);
    text.family("kept_bytes_max", Kind::Gauge, "Beyond so many, who keeps much is turned away.");
    text.sample(&[], memory.kept_bytes_max);
    text.family("memory_bound_bytes", Kind::Gauge, "The most memory the process may come to use, by part.");
    for (part, bytes) in memory.bound.parts() {
        text.sample(&[("part", part)], bytes);
    }
    text.family("kernel_sockets_bound_bytes", Kind::Gauge, "The most the kernel may use for its sockets.");
    text.sample(&[], memory.bound.kernel_sockets_bytes);
    text.family("routes", Kind::Gauge, "Routes of the table.");
    text.sample(&[], status.routes.len());
    text.family("upstreams", Kind::Gauge, "Upstreams by state.");
    for state in [ShownState::Up, ShownState::Draining, ShownState::Down, ShownState::Removed] {
        let count = status.upstreams.iter().filter(|upstream| upstream.state == state).count();
        text.sample(&[("state", state.name())], count);
    }
}

fn counters(text: &mut Text, counters: &Counters) {
    text.family("received_bytes_total", Kind::Counter, "Bytes received, by who sent them.");
    text.sample(&[("from", "clients")], counters.bytes_from_clients);
    text.sample(&[("from", "upstreams")], counters.bytes_from_upstreams);
    for (name, help, value) in counters.each() {
        match name {
            "bytes_from_clients" | "bytes_from_upstreams" => continue,
            name if Counters::GAUGES.contains(&name) => text.family(name, Kind::Gauge, help),
            // Those of one route have the plain names.
            "requests" | "responses" => text.family(&format!("http_{name}_total"), Kind::Counter, help),
            name => text.family(&format!("{name}_total"), Kind::Counter, help),
        }
        text.sample(&[], value);
    }
}

fn certificates(text: &mut Text, certificates: &Certificates) {
    let mut shown: Vec<(i64, &str)> = certificates
        .in_force
        .iter()
        .map(|certificate| (certificate.not_after_unix_s, certificate.id.as_str()))
        .collect();
    shown.sort_unstable();
    let name = "certificate_not_after_timestamp_seconds";
    text.family(name, Kind::Gauge, "When a certificate in force expires, in seconds since 1970.");
    for (not_after_unix_s, id) in shown.into_iter().take(CERTIFICATES_MAX) {
        text.sample(&[("certificate", id)], not_after_unix_s);
    }
    text.family("certificates", Kind::Gauge, "Certificates in force, and those that cannot be used.");
    text.sample(&[("state", "in_force")], certificates.in_force.len());
    text.sample(&[("state", "refused")], certificates.refused.len());
}

fn routes(text: &mut Text, routes: &[RouteStatus]) {
    let mut each = |name: &str, kind, help: &str, value: fn(&RouteStatus) -> u64| {
        text.family(name, kind, help);
        routes.iter().for_each(|route| text.sample(&[("route", &route.id)], value(route)));
    };
    use Kind::{Counter, Gauge};
    each("requests_total", Counter, "Requests and plain connections of a route.", |route| {
        route.requests_total
    });
    each("requests_active", Gauge, "Of a route, those it has now.", |route| route.active);
    each("requests_held", Gauge, "Of a route, those it holds now.", |route| route.held);
    each("requests_held_total", Counter, "Of a route, those it ever held.", |route| route.held_total);
    each("requests_shed_total", Counter, "Of a route, those shed from its full hold queue.", |route| {
        route.hold_shed_total
    });
    each("requests_expired_total", Counter, "Of a route, those held for too long.", |route| {
        route.hold_expired_total
    });
    each("request_bytes_total", Counter, "From clients of a route, head and framing included.", |route| {
        route.bytes_in_total
    });
    each("response_bytes_total", Counter, "To clients of a route, head and framing included.", |route| {
        route.bytes_out_total
    });
    each("route_upstreams_usable", Gauge, "Upstreams of a route that may be given traffic.", |route| {
        route.fleet.usable
    });
    text.family("requests_ended_total", Counter, "How a route's requests and plain connections ended.");
    for route in routes {
        for (outcome, count) in route.ends.each() {
            text.sample(&[("route", &route.id), ("outcome", outcome)], count);
        }
    }
    text.family("responses_total", Counter, "What a route's clients were answered, by class of status.");
    for route in routes {
        for (code, count) in route.responses.each() {
            text.sample(&[("route", &route.id), ("code", code)], count);
        }
    }
    let mut times = |name: &str, help: &str, values: fn(&Latency) -> &crate::core::histogram::Histogram| {
        text.family(name, Kind::Histogram, help);
        for route in routes {
            if let Some(latency) = route.latency.as_ref().filter(|latency| values(latency).count() > 0) {
                text.histogram(&[("route", &route.id)], values(latency));
            }
        }
    };
    times("request_duration_seconds", "From a request's complete head to its end.", |all| &all.duration);
    times("first_byte_seconds", "From giving a request to an upstream to its first byte.", |all| {
        &all.first_byte
    });
    times("held_seconds", "In the hold queue, of those that were held.", |all| &all.held);
}

fn upstreams(text: &mut Text, upstreams: &[UpstreamStatus]) {
    let labelled: Vec<(&UpstreamStatus, String)> =
        upstreams.iter().map(|upstream| (upstream, upstream.address.to_string())).collect();
    let labels = |upstream: &UpstreamStatus, address: &str, then: &mut dyn FnMut(&Labels<'_>)| match upstream
        .id
        .as_str()
    {
        OTHERS => then(&[("upstream", OTHERS), ("address", "")]),
        id => then(&[("upstream", id), ("address", address)]),
    };
    let mut each = |name: &str, kind, help: &str, value: fn(&UpstreamStatus) -> u64| {
        text.family(&format!("upstream_{name}"), kind, help);
        for (upstream, address) in &labelled {
            labels(upstream, address, &mut |labels| text.sample(labels, value(upstream)));
        }
    };
    use Kind::{Counter, Gauge};
    each("up", Gauge, "Whether it may be given traffic, as the table says.", |upstream| {
        u64::from(upstream.state == ShownState::Up)
    });
    each("unreachable", Gauge, "Whether the last connect failed.", |upstream| {
        u64::from(upstream.unreachable)
    });
    each("requests_active", Gauge, "Requests it is answering.", |upstream| upstream.active_requests);
    each("connections_active", Gauge, "Plain and upgraded connections it carries.", |upstream| {
        upstream.active_connections
    });
    each("connections_idle", Gauge, "Kept-alive connections that wait for a request.", |upstream| {
        upstream.idle_connections
    });
    each("requests_total", Counter, "Requests and plain connections given to it.", |upstream| {
        upstream.requests_total
    });
    each("connections_total", Counter, "Connections made to it.", |upstream| upstream.connections_total);
    each("connect_errors_total", Counter, "Connects that failed or timed out.", |upstream| {
        upstream.connect_errors_total
    });
    each("request_errors_total", Counter, "Requests lost after it was given them.", |upstream| {
        upstream.request_errors_total
    });
    text.family("upstream_responses_total", Counter, "What clients were answered, by class of status.");
    for (upstream, address) in &labelled {
        labels(upstream, address, &mut |labels| {
            for (code, count) in upstream.responses.each() {
                let mut labels = labels.to_vec();
                labels.push(("code", code));
                text.sample(&labels, count);
            }
        });
    }
    text.family(
        "upstream_first_byte_seconds",
        Kind::Histogram,
        "From giving it a request to its first byte.",
    );
    for (upstream, address) in &labelled {
        if let Some(values) = upstream.first_byte.as_ref().filter(|values| values.count() > 0) {
            labels(upstream, address, &mut |labels| text.histogram(labels, values));
        }
    }
}

fn bounded_routes(routes: &[RouteStatus]) -> Vec<RouteStatus> {
    let (own, rest) = routes.split_at(routes.len().min(ROUTES_MAX));
    let mut shown = own.to_vec();
    if let Some((first, others)) = rest.split_first() {
        let mut sum = RouteStatus { id: OTHERS.to_owned(), ..first.clone() };
        others.iter().for_each(|route| sum.add(route));
        shown.push(sum);
    }
    shown
}

fn bounded_upstreams(upstreams: &[UpstreamStatus]) -> Vec<UpstreamStatus> {
    let (own, rest) = upstreams.split_at(upstreams.len().min(UPSTREAMS_MAX));
    let mut shown = own.to_vec();
    if let Some((first, others)) = rest.split_first() {
        let mut sum = UpstreamStatus { id: OTHERS.to_owned(), ..first.clone() };
        others.iter().for_each(|upstream| sum.add(upstream));
        shown.push(sum);
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn however_many_routes_there_are_the_text_is_bounded_and_its_sums_are_right() {
        let route = |n: usize| RouteStatus {
            id: format!("route-{n:05}"),
            requests_total: 3,
            latency: Some(Latency::default()),
            ..RouteStatus::default()
        };
        let status = Status { routes: (0..20_000).map(route).collect(), ..Status::default() };
        let text = render(&status);
        let counts: Vec<u64> = text
            .lines()
            .filter(|line| line.starts_with("epagent_balancer_requests_total{"))
            .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
            .collect();
        assert_eq!((counts.len(), counts.iter().sum::<u64>()), (ROUTES_MAX + 1, 60_000));
        assert!(text.contains("requests_total{route=\"(others)\"} 58500\n"));
    }
}
