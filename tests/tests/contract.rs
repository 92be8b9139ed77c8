//! What `epagentd` writes is what `epagent-balancer` reads.
//!
//! The balancer imports no crate of ours, so the routing table is defined on both sides. These tests hold the two
//! against each other through their JSON; the balancer parses strictly, so a field too many is an error here.

use epagent_balancer::control::protocol;
use epagent_balancer::control::said::{LINES, SaidQuery};
use epagent_balancer::remark::Remark;
use epagent_balancer::table as theirs;
use epagent_wire::said::Severity;
use epagent_wire::table as ours;

const STATES: [ours::UpstreamState; 3] =
    [ours::UpstreamState::Up, ours::UpstreamState::Draining, ours::UpstreamState::Down];

fn upstreams() -> Vec<ours::Upstream> {
    STATES
        .into_iter()
        .enumerate()
        .map(|(number, state)| ours::Upstream {
            id: format!("shop-abcdefg{number}"),
            address: if number == 1 {
                "[fd65::3]:8000".to_owned()
            } else {
                format!("100.96.0.{number}:8000")
            },
            state,
        })
        .collect()
}

/// A table with every shape of match and action.
fn table() -> ours::Table {
    let hold = ours::Hold { max_requests: 512, max_age_ms: 30_000 };
    let route = |id: &str, matches, action| ours::Route { id: id.to_owned(), matches, action, hold };
    ours::Table {
        version: 7,
        routes: vec![
            route(
                "shop/web/shop.example",
                ours::Match::Host("shop.example".to_owned()),
                ours::Action::Proxy { upstreams: upstreams() },
            ),
            route(
                "shop/web/wild",
                ours::Match::Host("*.shop.example".to_owned()),
                ours::Action::Proxy { upstreams: Vec::new() },
            ),
            route("shop/db/5432", ours::Match::Port(5432), ours::Action::Proxy { upstreams: upstreams() }),
            route("operator/1", ours::Match::Port(5433), ours::Action::Hold {}),
            route(
                "operator/2",
                ours::Match::Host("page.example".to_owned()),
                ours::Action::Static {
                    status: 503,
                    content_type: "text/html; charset=utf-8".to_owned(),
                    body: "soon".to_owned(),
                },
            ),
            route(
                "operator/3",
                ours::Match::Host("*".to_owned()),
                ours::Action::Redirect {
                    to: "https://shop.example".to_owned(),
                    status: 301,
                    keep_path: true,
                },
            ),
        ],
    }
}

#[test]
fn the_balancer_reads_every_table_the_agent_can_write() {
    let text = serde_json::to_string(&table()).unwrap();
    let read: theirs::Table = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    assert_eq!(read.validate(), Ok(()));
    assert_eq!(read.version, 7);
    let states: Vec<_> = read.routes[0].upstreams().iter().map(|upstream| upstream.state).collect();
    assert_eq!(
        states,
        [theirs::UpstreamState::Up, theirs::UpstreamState::Draining, theirs::UpstreamState::Down]
    );
    assert!(matches!(read.routes[2].matches, theirs::Match::Port(5432)));
    let hold = read.routes[0].hold.expect("the bounds of the hold came across");
    assert_eq!((hold.max_requests, hold.max_age_ms), (512, 30_000));
}

#[test]
fn the_agent_reads_what_the_balancer_writes() {
    let text = serde_json::to_string(&table()).unwrap();
    let read: theirs::Table = serde_json::from_str(&text).unwrap();
    let again: ours::Table = serde_json::from_str(&serde_json::to_string(&read).unwrap()).unwrap();
    assert_eq!(again, table());
}

#[test]
fn the_balancer_reads_every_request() {
    let sent = serde_json::to_string(&ours::Request::SetTable(table())).unwrap();
    let read: protocol::Request =
        serde_json::from_str(&sent).unwrap_or_else(|error| panic!("{error}: {sent}"));
    assert!(matches!(read, protocol::Request::SetTable(table) if table.version == 7));

    let sent = serde_json::to_string(&ours::Request::Status { latency: false }).unwrap();
    let read: protocol::Request =
        serde_json::from_str(&sent).unwrap_or_else(|error| panic!("{error}: {sent}"));
    assert!(matches!(read, protocol::Request::Status(_)));
}

#[test]
fn the_agent_reads_every_answer() {
    let problem = protocol::Problem { route: Some("shop".to_owned()), message: "port 80: taken".to_owned() };
    let ack = protocol::Response::Ack(protocol::Ack { version: 7, problems: vec![problem] });
    match serde_json::from_str(&serde_json::to_string(&ack).unwrap()).unwrap() {
        ours::Response::Ack(ack) => {
            assert_eq!(ack.version, 7);
            assert_eq!(ack.problems[0].route.as_deref(), Some("shop"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn both_sides_bound_a_line_alike() {
    assert_eq!(ours::LINE_BYTES_MAX, protocol::LINE_BYTES_MAX);
}

#[test]
fn both_sides_mean_the_same_by_a_wait() {
    let sent = serde_json::to_string(&ours::Request::Wait { since: 3, timeout_ms: 20_000 }).unwrap();
    let read: protocol::Request =
        serde_json::from_str(&sent).unwrap_or_else(|error| panic!("{error}: {sent}"));
    match read {
        protocol::Request::Wait(query) => assert_eq!((query.since, query.timeout_ms), (3, 20_000)),
        other => panic!("{other:?}"),
    }
    let sent = serde_json::to_string(&ours::Request::Said { run: 7, after: 9 }).unwrap();
    match serde_json::from_str(&sent).unwrap() {
        protocol::Request::Said(query) => assert_eq!((query.run, query.after), (7, 9)),
        other => panic!("{sent} was understood as {other:?}"),
    }
    LINES.push(Remark::warning("a line").with("route", "shop"));
    let said = LINES.after(SaidQuery { run: 0, after: 0 });
    let text = serde_json::to_string(&protocol::Response::Said(said.clone())).unwrap();
    match serde_json::from_str(&text).unwrap() {
        ours::Response::Said(read) => {
            assert_eq!((read.run, read.last, read.lost), (said.run, said.last, said.lost));
            let line = read.records.last().unwrap();
            assert_eq!((line.severity, line.message.as_str()), (Severity::Warning, "a line"));
            assert_eq!(line.fields, [("route".to_owned(), "shop".to_owned())]);
        }
        other => panic!("{text} was understood as {other:?}"),
    }

    let waited = protocol::Waited { sequence: 4, routes: vec!["shop/web/0".to_owned()] };
    let text = serde_json::to_string(&protocol::Response::Waited(waited)).unwrap();
    match serde_json::from_str(&text).unwrap() {
        ours::Response::Waited(waited) => {
            assert_eq!((waited.sequence, waited.routes), (4, vec!["shop/web/0".to_owned()]));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_agent_reads_the_balancers_counts_and_times() {
    let mut duration = epagent_balancer::core::histogram::Histogram::default();
    (1..=1_000).for_each(|number| duration.record(number * number));
    let (p50, p99) = (duration.quantile_us(0.5), duration.quantile_us(0.99));
    let latency = epagent_balancer::control::traffic::Latency { duration, ..Default::default() };
    let route = protocol::RouteStatus {
        id: "shop/web/0".to_owned(),
        requests_total: 1_000,
        latency: Some(latency),
        ..Default::default()
    };
    let status = protocol::Status { table_version: 7, routes: vec![route], ..Default::default() };
    let text = serde_json::to_string(&protocol::Response::Status(Box::new(status))).unwrap();
    let ours::Response::Status(read) = serde_json::from_str(&text).unwrap() else { panic!("{text}") };
    assert_eq!(read.table_version, 7);
    assert!(read.counters.contains_key("connections_accepted"), "{:?}", read.counters);
    let took = &read.routes[0].latency.as_ref().unwrap().duration;
    assert_eq!((took.count(), took.quantile_us(0.5), took.quantile_us(0.99)), (1_000, Some(p50), Some(p99)));

    for request in [ours::Request::Status { latency: true }, ours::Request::Reload {}] {
        let sent = serde_json::to_string(&request).unwrap();
        serde_json::from_str::<protocol::Request>(&sent).unwrap_or_else(|error| panic!("{error}: {sent}"));
    }
}

#[test]
fn both_sides_mean_the_same_by_a_connection() {
    use epagent_balancer::control::connections as their;
    let query =
        ours::ConnectionsQuery { limit: 5, after: Some(1 << 32), routes: ["shop/web/0".to_owned()].into() };
    let sent = serde_json::to_string(&ours::Request::Connections(query)).unwrap();
    match serde_json::from_str(&sent).unwrap_or_else(|error| panic!("{error}: {sent}")) {
        protocol::Request::Connections(query) => {
            assert_eq!((query.limit, query.after), (5, Some(1 << 32)));
            assert_eq!(query.routes, ["shop/web/0".to_owned()].into());
        }
        other => panic!("{other:?}"),
    }
    let row = their::Connection {
        client: Some("192.0.2.7:4711".to_owned()),
        listener: "https".to_owned(),
        state: their::ConnectionState::Held,
        route: Some("shop/web/0".to_owned()),
        upstream: Some("shop-a".to_owned()),
        age_ms: 1,
        idle_ms: 2,
        requests: 3,
        bytes_in: 4,
        bytes_out: 5,
    };
    let text = serde_json::to_string(&protocol::Response::Connections(their::Connections {
        rows: vec![row],
        next: Some(6),
    }))
    .unwrap();
    let ours::Response::Connections(read) = serde_json::from_str(&text).unwrap() else { panic!("{text}") };
    // Every field, by what both write.
    let again = serde_json::to_string(&ours::Response::Connections(read)).unwrap();
    assert_eq!(again, text);
}

#[test]
fn the_agent_reads_every_field_of_a_certificate() {
    use epagent_balancer::control::certificates as their;
    let certificate = their::CertificateStatus {
        id: "shop".to_owned(),
        names: vec!["shop.example".to_owned()],
        not_before: "2026-01-01T00:00:00Z".to_owned(),
        not_after: "2026-04-01T00:00:00Z".to_owned(),
        not_after_unix_s: 1_775_001_600,
        state: their::CertificateState::ExpiresSoon,
        is_default: true,
    };
    let refused = their::RefusedCertificate { id: "b".to_owned(), reason: "no key".to_owned(), kept: true };
    let certificates = their::Certificates { in_force: vec![certificate], refused: vec![refused] };
    let said = serde_json::to_value(&certificates).unwrap();
    let status = protocol::Status { certificates, ..Default::default() };
    let read: ours::Status = serde_json::from_str(&serde_json::to_string(&status).unwrap()).unwrap();
    assert_eq!(serde_json::to_value(&read.certificates).unwrap(), said);
}

#[test]
fn the_agent_reads_every_part_of_the_bound_of_memory() {
    use epagent_balancer::control::memory as their;
    let bound = their::MemoryBound {
        total_bytes: 45,
        receive_buffers_bytes: 1,
        waiting_bytes: 2,
        connections_bytes: 3,
        kept_bytes: 4,
        tls_bytes: 5,
        sources_bytes: 6,
        table_bytes: 7,
        control_bytes: 8,
        process_bytes: 9,
        kernel_sockets_bytes: 10,
    };
    let said = serde_json::to_value(&bound).unwrap();
    let memory =
        their::MemoryStatus { waiting_bytes: 11, waiting_bytes_max: 12, bound, ..Default::default() };
    let status = protocol::Status { memory, ..Default::default() };
    let read: ours::Status = serde_json::from_str(&serde_json::to_string(&status).unwrap()).unwrap();
    assert_eq!(serde_json::to_value(&read.memory.bound).unwrap(), said);
    assert_eq!((read.memory.waiting_bytes, read.memory.waiting_bytes_max), (11, 12));
}
