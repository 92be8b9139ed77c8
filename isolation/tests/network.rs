//! What an instance reaches, and what reaches it.
//!
//! The probing side inside a jail is this test binary's ignored test [`inside`], told by PROBE what to try.

mod support;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::time::Duration;

use epagent_isolation::launch::LaunchFds;
use epagent_isolation::net::{
    FirewallConfig, disable_forwarding, enable_forwarding, install_firewall, remove_firewall, resolvers,
};
use epagent_isolation::{inspect, sweep};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use support::{Jail, Node, eventually};

const TIMEOUT: Duration = Duration::from_millis(1500);

/// Firewall and forwarding, gone with the guard.
struct Network<'a>(&'a Node);

impl<'a> Network<'a> {
    fn up(node: &'a Node, allowed: &[&str]) -> Network<'a> {
        let allowed = allowed.iter().map(|block| block.parse().unwrap()).collect();
        let config = FirewallConfig { node: node.number, resolvers: resolvers().unwrap(), allowed };
        install_firewall(&config).unwrap();
        enable_forwarding(node.number).unwrap();
        Network(node)
    }
}

impl Drop for Network<'_> {
    fn drop(&mut self) {
        disable_forwarding(self.0.number).unwrap();
        remove_firewall(self.0.number).unwrap();
    }
}

fn probe(node: &Node, id: &str, slot: u32, what: &str) -> Jail {
    let (mut spec, binary) = node.itself(id, "inside", &[("PROBE", what)]);
    spec.network = Some(node.network(slot));
    node.start_with(&spec, LaunchFds { mounts: vec![binary.as_fd()], ..LaunchFds::default() })
}

fn probed(node: &Node, id: &str, slot: u32, what: &str) -> String {
    let mut jail = probe(node, id, slot, what);
    jail.await_exit();
    jail.output()
}

#[test]
#[ignore = "runs inside a jail, started by the other tests"]
fn inside() {
    println!();
    for word in std::env::var("PROBE").unwrap_or_default().split_whitespace() {
        let (kind, rest) = word.split_once('=').unwrap();
        let answer = match kind {
            "serve" => serve(rest),
            "tcp" => tcp(rest),
            "dns" => dns(rest),
            "abstract" => abstract_socket(rest),
            "spoof" => spoof(rest),
            _ => "?".to_owned(),
        };
        println!("{word} {answer}");
    }
}

/// Accepts on all addresses and echoes, for ever.
fn serve(port: &str) -> String {
    let listener = TcpListener::bind(format!("[::]:{port}")).unwrap();
    println!("serving");
    loop {
        let (mut stream, _) = listener.accept().unwrap();
        let mut bytes = [0; 64];
        let length = stream.read(&mut bytes).unwrap_or(0);
        let _ = stream.write_all(&bytes[..length]);
    }
}

fn tcp(address: &str) -> String {
    match TcpStream::connect_timeout(&address.parse::<SocketAddr>().unwrap(), TIMEOUT) {
        Ok(_) => "connected".to_owned(),
        Err(e) => format!("no: {e}"),
    }
}

/// Asks a name server for an address record of a name.
fn dns(question: &str) -> String {
    let (server, name) = question.split_once('/').unwrap();
    let server: IpAddr = server.parse().unwrap();
    let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(label.len() as u8);
        query.extend(label.as_bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    for _ in 0..3 {
        let _ = socket.send_to(&query, (server, 53));
        let mut reply = [0; 512];
        if let Ok((length, _)) = socket.recv_from(&mut reply)
            && length > 12
            && reply[..2] == [0x12, 0x34]
        {
            return format!("answered {}", reply[3] & 15);
        }
    }
    "no".to_owned()
}

fn abstract_socket(name: &str) -> String {
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name).unwrap();
    match std::os::unix::net::UnixStream::connect_addr(&address) {
        Ok(_) => "connected".to_owned(),
        Err(e) => format!("no: {e}"),
    }
}

/// Sends from an address that is not ours: `source@destination`.
fn spoof(pair: &str) -> String {
    let (source, destination) = pair.split_once('@').unwrap();
    // Without CAP_NET_ADMIN there is no way to get the address; with transparent or raw sockets refused, none at all.
    match UdpSocket::bind((source.parse::<IpAddr>().unwrap(), 0)) {
        Ok(socket) => format!("bound: {:?}", socket.send_to(b"x", destination)),
        Err(e) => format!("no: {e}"),
    }
}

#[test]
fn an_instance_answers_on_its_addresses_and_its_listener_is_seen() {
    let node = Node::new();
    let _network = Network::up(&node, &[]);
    let net = node.network(1);
    let mut jail = probe(&node, "server", 1, "serve=8080");
    jail.await_started();
    eventually("serving", || jail.output_now().contains("serving").then_some(()));
    for address in [IpAddr::V4(net.v4.unwrap().inside), IpAddr::V6(net.v6.unwrap().inside)] {
        let mut stream = TcpStream::connect_timeout(&(address, 8080).into(), TIMEOUT).unwrap();
        stream.write_all(b"ping").unwrap();
        let mut reply = [0; 4];
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(&reply, b"ping");
    }
    let listening = inspect::listening(jail.init_pid()).unwrap();
    assert_eq!(listening.iter().map(ToString::to_string).collect::<Vec<_>>(), ["[::]:8080"]);
}

#[test]
fn the_host_is_not_reachable_whatever_it_listens_on() {
    let node = Node::new();
    let _network = Network::up(&node, &[]);
    let any = TcpListener::bind("[::]:0").unwrap();
    let port = any.local_addr().unwrap().port();
    let name = format!("epagent-{}", node.number);
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
    let _abstract = std::os::unix::net::UnixListener::bind_addr(&address).unwrap();
    let net = node.network(2);
    let (v4, v6) = (net.v4.unwrap(), net.v6.unwrap());
    let mut targets =
        vec![format!("{}:{port}", v4.host), format!("[{}]:{port}", v6.host), format!("127.0.0.1:{port}")];
    targets.extend(host_address().map(|host| format!("{host}:{port}")));
    let probes: Vec<String> = targets.iter().map(|target| format!("tcp={target}")).collect();
    let output = probed(&node, "inmate", 2, &format!("{} abstract={name}", probes.join(" ")));
    for target in targets.iter().map(|target| format!("tcp={target} ")).chain([format!("abstract={name} ")]) {
        assert!(output.contains(&format!("{target}no")), "{target}: {output}");
    }

    // The test would fail without the table.
    remove_firewall(node.number).unwrap();
    let output = probed(&node, "inmate-open", 2, &format!("tcp={}:{port}", v4.host));
    assert!(output.contains("connected"), "{output}");
}

#[test]
fn neighbours_do_not_reach_each_other() {
    let node = Node::new();
    let _network = Network::up(&node, &[]);
    let mut server = probe(&node, "server", 3, "serve=8080");
    server.await_started();
    eventually("serving", || server.output_now().contains("serving").then_some(()));
    let net = node.network(3);
    let (v4, v6) = (net.v4.unwrap().inside, net.v6.unwrap().inside);
    let probes = format!("tcp={v4}:8080 tcp=[{v6}]:8080 spoof={v4}@192.0.2.1:9");
    let output = probed(&node, "neighbour", 4, &probes);
    for target in [format!("tcp={v4}:8080 no"), format!("tcp=[{v6}]:8080 no"), "9 no".to_owned()] {
        assert!(output.contains(&target), "{target}: {output}");
    }
    assert!(TcpStream::connect_timeout(&(IpAddr::V4(v4), 8080).into(), TIMEOUT).is_ok(), "the host does");
}

#[test]
fn names_resolve_through_the_gateway_and_connections_go_out() {
    let node = Node::new();
    let _network = Network::up(&node, &[]);
    let servers = resolvers().unwrap();
    let Some(server) = servers.iter().find(|server| server.is_ipv4()) else {
        eprintln!("SKIPPED: this host has no IPv4 name server of its own");
        return;
    };
    let host_answer = dns(&format!("{server}/deb.debian.org"));
    if !host_answer.starts_with("answered") {
        eprintln!("SKIPPED: the host's own name server {server} does not answer");
        return;
    }
    let gateway = node.network(5).v4.unwrap().host;
    let mut probes = format!("dns={gateway}/deb.debian.org dns={server}/deb.debian.org");
    let outside =
        std::net::ToSocketAddrs::to_socket_addrs("deb.debian.org:80").ok().and_then(|mut all| all.next());
    let outside = outside.filter(|address| TcpStream::connect_timeout(address, TIMEOUT).is_ok());
    probes.extend(outside.map(|address| format!(" tcp={address}")));
    let output = probed(&node, "client", 5, &probes);
    assert!(output.contains(&format!("dns={gateway}/deb.debian.org {host_answer}")), "{output}");
    let private = matches!(server, IpAddr::V4(v4) if v4.is_private());
    if private {
        assert!(
            output.contains(&format!("dns={server}/deb.debian.org no")),
            "only by the redirect: {output}"
        );
    }
    match outside {
        Some(address) => assert!(output.contains(&format!("tcp={address} connected")), "{output}"),
        None => eprintln!("SKIPPED in part: the host itself has no way out"),
    }
}

#[test]
fn forwarding_is_put_back_by_the_last_node() {
    let node = Node::new();
    let read = || std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/forwarding").unwrap_or_default();
    let network = Network::up(&node, &[]);
    assert_ne!(read().trim(), "0");
    // A second node of the same test process; it leaves first.
    let other = node.number.wrapping_add(7_777).max(1);
    install_firewall(&FirewallConfig { node: other, resolvers: vec![], allowed: vec![] }).unwrap();
    enable_forwarding(other).unwrap();
    disable_forwarding(other).unwrap();
    remove_firewall(other).unwrap();
    assert_ne!(read().trim(), "0", "still needed by the first");
    drop(network);
    sweep::remove_links(node.number, &[]).unwrap();
}

/// What a setting below /proc/sys/net is in the network of the calling thread.
fn setting(name: &str) -> String {
    std::fs::read_to_string(format!("/proc/sys/net/{name}")).unwrap().trim().to_owned()
}

fn ip(line: &str) {
    let ran = std::process::Command::new("ip").args(line.split(' ')).status().unwrap();
    assert!(ran.success(), "ip {line}");
}

/// At boot a node begins before the host has an address.
#[test]
fn an_uplink_that_comes_late_forwards_too_and_keeps_its_router() {
    let test = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(none, "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();
        ip("link add up0 type veth peer name far0");
        std::fs::write("/proc/sys/net/ipv4/conf/up0/forwarding", "0").unwrap();
        std::fs::write("/proc/sys/net/ipv6/conf/up0/accept_ra", "1").unwrap();

        enable_forwarding(9).unwrap();
        assert_eq!(
            (setting("ipv6/conf/up0/accept_ra"), setting("ipv4/conf/up0/forwarding")),
            ("2".into(), "0".into())
        );
        assert_eq!(enable_forwarding(9).unwrap(), Vec::<String>::new(), "nothing is new");
        for line in [
            "link set far0 up",
            "link set up0 up",
            "address add 192.0.2.2/24 dev up0",
            "route add default via 192.0.2.1",
        ] {
            ip(line);
        }
        assert_eq!(enable_forwarding(9).unwrap(), ["ipv4/conf/up0/forwarding"]);
        assert_eq!(setting("ipv4/conf/up0/forwarding"), "1");
        disable_forwarding(9).unwrap();
        assert_eq!(
            (setting("ipv6/conf/up0/accept_ra"), setting("ipv4/conf/up0/forwarding")),
            ("1".into(), "0".into())
        );
    });
    test.join().unwrap();
}

#[test]
fn removing_twice_and_installing_twice_are_fine() {
    let number = Node::new().number;
    let config =
        FirewallConfig { node: number, resolvers: vec!["192.0.2.53".parse().unwrap()], allowed: vec![] };
    for _ in 0..2 {
        install_firewall(&config).unwrap();
    }
    for _ in 0..2 {
        remove_firewall(number).unwrap();
    }
}

/// An address of the host on its uplink.
fn host_address() -> Option<Ipv4Addr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    match socket.local_addr().ok()?.ip() {
        IpAddr::V4(v4) => Some(v4),
        IpAddr::V6(_) => None,
    }
}
