//! Handing over to a new process: nobody notices, and what does not come up changes nothing.

mod common;

use std::net::TcpStream;

use common::app::App;
use common::client::Client;
use common::generations::{Generations, lives};
use common::{free_address, host_route, port_route, until};

/// The inode of a listening socket that a process has, by its port.
fn inode(port: u16) -> String {
    let table = std::fs::read_to_string("/proc/net/tcp").expect("the sockets of this namespace");
    let local = format!(":{port:04X}");
    let line = table.lines().find(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields.len() > 9 && fields[1].ends_with(&local) && fields[3] == "0A"
    });
    line.expect("a listening socket").split_whitespace().nth(9).expect("an inode").to_owned()
}

#[test]
fn a_new_process_takes_over_with_listeners_table_and_counts() {
    let app = App::named("shop");
    let balancer = Generations::start(&[]);
    let port = free_address().port();
    let routes = [
        host_route("shop.example", &[("a", app.address, "up")]),
        port_route(port, &[("a", app.address, "up")]),
    ];
    balancer.routes(&routes.join(","));
    assert_eq!(Client::connect(balancer.http).get("shop.example", "/").text(), "shop");
    let before = (inode(balancer.http.port()), inode(port));
    let old = balancer.pid();
    let pid = balancer.reload().expect("it hands over");
    assert_ne!(pid, old);
    assert_eq!(balancer.pid(), pid, "the control socket is the new one's");
    until("the old one has drained", || !lives(old));
    assert_eq!((inode(balancer.http.port()), inode(port)), before);
    assert_eq!(Client::connect(balancer.http).get("shop.example", "/").text(), "shop");
    assert_eq!(Client::connect(([127, 0, 0, 1], port).into()).get("any", "/").text(), "shop");
    let status = balancer.status();
    let counted = (status.table_version, status.counters.requests, status.draining.len());
    assert_eq!(counted, (1, 2, 0), "totals go on");
    // The listener still belongs to its route.
    balancer.routes(&routes[0]);
    until("nobody listens", || TcpStream::connect(("127.0.0.1", port)).is_err());
}
