//! What an operator can see: open connections, who changed what, and what everything amounts to.

mod common;

use std::net::TcpListener;

use common::app::App;
use common::client::Client;
use common::{Balancer, host_route, poll, port_route, until};
use epagent_balancer::control::audit::Actor;
use epagent_balancer::control::connections::{Connection, ConnectionState, ConnectionsQuery};
use epagent_balancer::control::protocol::ErrorCode;

fn all(balancer: &Balancer, limit: usize) -> Vec<Connection> {
    let mut rows = Vec::new();
    let mut query = ConnectionsQuery { limit, ..ConnectionsQuery::default() };
    loop {
        let page = balancer.control().connections(query.clone()).expect("a page");
        assert!(page.rows.len() <= limit, "{} rows", page.rows.len());
        rows.extend(page.rows);
        if page.next.is_none() {
            return rows;
        }
        query.after = page.next;
    }
}

#[test]
fn each_connection_shows_what_it_is_doing() {
    let app = App::named("shop");
    // Accepts in its queue and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = common::free_address().port();
    let balancer = Balancer::start(&[]);
    balancer.routes(
        &[
            host_route("shop.example", &[("shop", app.address, "up")]),
            host_route("silent.example", &[("silent", silent.local_addr().expect("its address"), "up")]),
            host_route("held.example", &[]),
            port_route(port, &[("tcp", silent.local_addr().expect("its address"), "up")]),
        ]
        .join(","),
    );
    let mut idle = Client::connect(balancer.http);
    idle.get("shop.example", "/");
    let mut busy = Client::connect(balancer.http);
    let said = "POST / HTTP/1.1\r\nHost: silent.example\r\nContent-Length: 100\r\n\r\nhello";
    busy.send(said);
    let mut held = Client::connect(balancer.http);
    held.send("GET / HTTP/1.1\r\nHost: held.example\r\n\r\n");
    let mut head = Client::connect(balancer.http);
    head.send("GET / HT");
    let mut plain = Client::connect(([127, 0, 0, 1], port).into());
    plain.send("said");
    let rows = poll("all five are there", || {
        let rows = all(&balancer, 2);
        let of = |client: &Client| {
            let address = client.stream.get_ref().local_addr().expect("its address").to_string();
            rows.iter().find(|row| row.client.as_deref() == Some(&address)).cloned()
        };
        let rows = [of(&idle)?, of(&busy)?, of(&held)?, of(&head)?, of(&plain)?];
        let settled = rows[1].bytes_in == said.len() as u64
            && rows[4].bytes_in == 4
            && rows[3].state == ConnectionState::Head;
        (settled && rows[2].state == ConnectionState::Held).then_some(rows)
    });
    let facts = |n: usize| (rows[n].state, rows[n].route.as_deref(), rows[n].upstream.as_deref());
    assert_eq!(facts(0), (ConnectionState::Idle, None, None));
    assert_eq!(facts(1), (ConnectionState::Exchange, Some("silent.example"), Some("silent")));
    assert_eq!(facts(2), (ConnectionState::Held, Some("held.example"), None));
    assert_eq!(facts(3), (ConnectionState::Head, None, None));
    let tunnel = format!("port-{port}");
    assert_eq!(facts(4), (ConnectionState::Tunnel, Some(tunnel.as_str()), Some("tcp")));
    assert_eq!((rows[0].listener.as_str(), rows[0].requests), ("http", 1));
    assert_eq!(rows[4].listener, format!("tcp-{port}"));
    for (routes, count) in
        [(&["held.example"][..], 1), (&["held.example", "silent.example"], 2), (&["none.example"], 0)]
    {
        let routes = routes.iter().map(|id| (*id).to_owned()).collect();
        let query = ConnectionsQuery { routes, ..ConnectionsQuery::default() };
        assert_eq!(balancer.control().connections(query).expect("a page").rows.len(), count);
    }
}

#[test]
fn pages_show_each_connection_once_over_all_threads() {
    let balancer = Balancer::start(&["--threads", "3"]);
    let clients: Vec<Client> = (0..50).map(|_| Client::connect(balancer.http)).collect();
    until("all are accepted", || balancer.status().counters.connections_open == 50);
    for limit in [1, 7, 50, 1_000] {
        let mut shown: Vec<String> = all(&balancer, limit).into_iter().filter_map(|row| row.client).collect();
        shown.sort();
        shown.dedup();
        assert_eq!(shown.len(), clients.len(), "in pages of {limit}");
    }
}

#[test]
fn every_change_of_the_table_is_kept_with_who_made_it() {
    let app = App::named("shop");
    let balancer = Balancer::start(&[]);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    balancer.route("shop.example", &[("a", app.address, "draining"), ("b", app.address, "up")]);
    let table = r#"{"version":1,"routes":[]}"#;
    balancer.control().set_table(&serde_json::from_str(table).expect("a table")).expect_err("it is stale");
    let entries = balancer.control().audit().expect("the audit").entries;
    assert_eq!(entries.len(), 3);
    let me = Actor::Peer { uid: nix::unistd::getuid().as_raw(), pid: std::process::id() as i32 };
    assert!(entries.iter().all(|entry| entry.by == me), "{entries:?}");
    assert_eq!((entries[0].version, entries[0].changes.routes_added), (Some(1), 1));
    assert_eq!(entries[1].changes.upstreams, ["a: up → draining", "b: new, up"]);
    assert_eq!((entries[2].refused, entries[2].version), (Some(ErrorCode::StaleVersion), Some(1)));
}

#[test]
fn setting_a_route_again_keeps_what_it_counted() {
    let app = App::named("shop");
    let balancer = Balancer::start(&[]);
    let mut client = Client::connect(balancer.http);
    for action in ["up", "draining", "up"] {
        balancer.route("shop.example", &[("a", app.address, "up"), ("b", app.address, action)]);
        client.get("shop.example", "/");
    }
    let status = balancer.status();
    assert_eq!((status.routes[0].requests_total, status.routes[0].responses.success), (3, 3));
    assert!(status.uptime_ms > 0 && status.pid == balancer.pid() && !status.version.is_empty());
}
