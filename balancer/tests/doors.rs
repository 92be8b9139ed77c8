//! Which door is used where io_uring is denied, as it is in most containers.

mod common;

use std::io::Read;
use std::process::{Command, Stdio};

use common::app::App;
use common::client::Client;
use common::denied::spawn_without_rings;
use common::{Balancer, IO_ARGUMENTS, poll};
use epagent_balancer::doors::Io;

#[test]
fn where_rings_are_denied_it_serves_by_epoll_and_says_so() {
    let app = App::named("shop");
    let piped = |mut command: Command| {
        command.stderr(Stdio::piped());
        spawn_without_rings(command)
    };
    let mut balancer = Balancer::start_with(&[], piped);
    assert_eq!(balancer.status().io, Io::Epoll);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    assert_eq!(Client::connect(balancer.http).get("shop.example", "/").text(), "shop");
    let mut said = balancer.child.stderr.take().expect("its standard error");
    drop(balancer);
    let mut text = String::new();
    said.read_to_string(&mut text).expect("what it said");
    assert!(text.contains("using epoll, since io_uring is not to be had"), "{text}");
    assert!(text.contains("Operation not permitted"), "{text}");
}

#[test]
fn where_rings_are_denied_and_asked_for_it_ends_and_says_why() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut command = Command::new(env!("CARGO_BIN_EXE_epagent-balancer"));
    command.args(["--io", "uring", "--control"]).arg(dir.path().join("control.sock")).stderr(Stdio::piped());
    let mut child = spawn_without_rings(command).expect("it starts");
    let status = poll("it has ended", || child.try_wait().expect("its state"));
    let mut text = String::new();
    child.stderr.take().expect("its standard error").read_to_string(&mut text).expect("what it said");
    assert!(!status.success());
    for part in ["io_uring", "kernel.io_uring_disabled", "seccomp", "--io epoll", "Operation not permitted"] {
        assert!(text.contains(part), "{part} is missing in: {text}");
    }
}

#[test]
fn where_rings_are_to_be_had_they_are_used() {
    let asked = Balancer::start_with(&IO_ARGUMENTS, |mut command| command.spawn());
    let unasked = Balancer::start_with(&[], |mut command| command.spawn());
    assert_eq!((asked.status().io, unasked.status().io), (Io::Uring, Io::Uring));
}
