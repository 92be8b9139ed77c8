//! Several agents on one kernel, each with its own of everything.

use std::collections::BTreeSet;

use epagent_tests::AppDir;
use epagent_tests::host::DevHost;

#[test]
fn three_agents_run_side_by_side() {
    let hosts: Vec<DevHost> = (0..3).map(|_| DevHost::start()).collect();
    let numbers: BTreeSet<u32> = hosts.iter().map(|host| host.node().number).collect();
    assert_eq!(numbers.len(), 3, "two agents have one node number");
    for (number, host) in hosts.iter().enumerate() {
        // The same app everywhere: names belong to an agent, not to the machine.
        host.deploy(&AppDir::server("shop", &format!("of agent {number}"), "")).ok();
    }
    let mut addresses = BTreeSet::new();
    for (number, host) in hosts.iter().enumerate() {
        assert!(host.fetch("shop.test", "/").starts_with(&format!("hello of agent {number}\n")));
        let rows = host.healthy("shop");
        assert_eq!(rows.len(), 1);
        assert!(addresses.insert(rows[0].address.clone().unwrap()), "two instances have one address");
    }

    // An instance of one agent does not reach one of another.
    let target = hosts[1].healthy("shop")[0].address.clone().unwrap();
    let (address, port) = target.rsplit_once(':').unwrap_or((&target, "8000"));
    let address = address.trim_matches(['[', ']']);
    let script = format!("import socket; socket.create_connection(('{address}', {port}), 1)");
    let ran = hosts[0].cli(&["exec", "shop", "--", "python3", "-c", &script]);
    assert_ne!(ran.code, Some(0), "{address} of another agent was reached");

    // The end of one is nothing to the others.
    let mut hosts = hosts.into_iter();
    let first = hosts.next().unwrap();
    let rest: Vec<DevHost> = hosts.collect();
    let loads: Vec<_> = rest.iter().map(|host| host.load("shop.test", "hello of agent")).collect();
    first.stop();
    for load in loads {
        load.wait_for(50, std::time::Duration::from_secs(30));
        load.finish().assert_none_failed();
    }
    for host in rest {
        host.deploy(&AppDir::server("shop", "again", "")).ok();
        assert!(host.fetch("shop.test", "/").starts_with("hello again"));
        host.stop();
    }
}
