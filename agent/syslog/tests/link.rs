//! What arrives at a real server, over TCP and TLS, and what becomes of it when the way breaks.

mod common;

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use common::{Authority, Listener};
use epagent_syslog::{Facility, Link, Message, Server, Trust};
use tokio::runtime::{Builder, Runtime};

const LOCAL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

fn tcp(address: SocketAddr) -> Link {
    Link::new(Server { tls: false, host: address.ip().to_string(), port: address.port() }, Trust::System)
}

fn tls(host: &str, port: u16, authority: &Authority) -> Link {
    let trust = Trust::File(authority.ca.clone());
    Link::new(Server { tls: true, host: host.to_owned(), port }, trust)
}

/// Frames with these texts.
fn frames(texts: impl IntoIterator<Item = String>) -> Vec<u8> {
    let mut out = Vec::new();
    for text in texts {
        let message = Message {
            facility: Facility::Local0,
            severity: 6,
            timestamp: Message::timestamp_of(1_700_000_000_000_000),
            app_name: "shop".to_owned(),
            proc_id: "web.0".to_owned(),
            msg_id: "stdout".to_owned(),
            data: vec![("app".to_owned(), "shop".to_owned())],
            text: text.into_bytes(),
        };
        message.frame("node1", &mut out);
    }
    out
}

fn one(text: &str) -> Vec<u8> {
    frames([text.to_owned()])
}

/// Sends until it is taken, as the agent does.
async fn insist(link: &mut Link, frames: &[u8]) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while let Err(error) = link.send(frames).await {
        assert!(Instant::now() < deadline, "{error}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn texts(got: &[String]) -> Vec<String> {
    got.iter().map(|message| message.rsplit("] ").next().unwrap_or_default().to_owned()).collect()
}

#[test]
fn everything_arrives_once_in_order_and_in_its_frame() {
    let listener = Listener::start(LOCAL, None);
    let authority = Authority::new("localhost");
    let secure = Listener::start(LOCAL, Some(authority.config.clone()));
    for (listener, mut link) in
        [(&listener, tcp(listener.address)), (&secure, tls("localhost", secure.address.port(), &authority))]
    {
        // Text of a tenant: ends of lines, what looks like a frame, characters of many bytes.
        let text = |number: usize| format!("{number} 9 <0>1 - -\n{}", "ü".repeat(number % 700));
        runtime().block_on(async {
            for batch in 0..10 {
                let numbers = batch * 100..(batch + 1) * 100;
                link.send(&frames(numbers.map(text))).await.unwrap();
            }
        });
        listener.wait_for(&text(999));
        let expected: Vec<String> = (0..1000).map(text).collect();
        assert_eq!(texts(&listener.got()), expected);
    }
}

#[test]
fn a_server_that_nobody_trusted_vouches_for_gets_nothing() {
    let authority = Authority::new("localhost");
    let listener = Listener::start(LOCAL, Some(authority.config.clone()));
    let port = listener.address.port();
    let mut stranger = tls("localhost", port, &Authority::new("localhost"));
    let mut misnamed = tls("127.0.0.1", port, &authority);
    let mut everyone = Link::new(format!("tls://localhost:{port}").parse().unwrap(), Trust::System);
    runtime().block_on(async {
        for link in [&mut stranger, &mut misnamed, &mut everyone] {
            let error = link.send(&one("secret")).await.unwrap_err();
            assert!(
                error.to_string().contains("connect") || error.to_string().contains("authorities"),
                "{error}"
            );
        }
        insist(&mut tls("localhost", port, &authority), &one("good")).await;
    });
    listener.wait_for("good");
    assert_eq!(texts(&listener.stop()), ["good"]);
}

#[test]
fn a_server_that_is_restarted_gets_what_came_meanwhile() {
    let first = Listener::start(LOCAL, None);
    let address = first.address;
    let mut link = tcp(address);
    let runtime = runtime();
    runtime.block_on(insist(&mut link, &one("before")));
    first.wait_for("before");
    assert_eq!(texts(&first.stop()), ["before"]);

    // Nobody is there: nothing is taken for sent.
    assert!(runtime.block_on(link.send(&one("meanwhile"))).is_err());
    let second = Listener::start(address, None);
    runtime.block_on(insist(&mut link, &one("meanwhile")));
    runtime.block_on(insist(&mut link, &one("after")));
    second.wait_for("after");
    assert_eq!(texts(&second.stop()), ["meanwhile", "after"]);
}

#[test]
fn what_is_said_into_a_partition_arrives_when_it_is_healed() {
    // Both ends are in namespaces of this test, which end with its threads.
    let sender = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let (tell_task, task) = mpsc::channel();
        let (ready, is_ready) = mpsc::channel();
        let (orders, told) = mpsc::channel::<&'static str>();
        let far = std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            tell_task.send(nix::unistd::gettid()).unwrap();
            assert_eq!(told.recv().unwrap(), "begin");
            ip("addr add 10.77.0.2/30 dev far");
            ip("link set far up");
            let listener = Listener::start("10.77.0.2:601".parse().unwrap(), None);
            ready.send(Some(listener.address)).unwrap();
            for order in told.iter() {
                match order {
                    "cut" => ip("link set far down"),
                    "heal" => ip("link set far up"),
                    text => listener.wait_for(text),
                }
                ready.send(None).unwrap();
            }
            listener.stop()
        });
        let order = |word: &'static str| {
            orders.send(word).unwrap();
            is_ready.recv().unwrap()
        };
        ip(&format!("link add near type veth peer name far netns {}", task.recv().unwrap()));
        ip("addr add 10.77.0.1/30 dev near");
        ip("link set near up");
        let mut link = tcp(order("begin").unwrap());
        let runtime = runtime();
        runtime.block_on(insist(&mut link, &one("before")));
        order("cut");
        // Written into the void, it is not taken for sent...
        let waited = runtime
            .block_on(async { tokio::time::timeout(Duration::from_secs(2), link.send(&one("lost"))).await });
        assert!(waited.is_err(), "{waited:?}");
        order("heal");
        // ...and the caller says it again.
        runtime.block_on(insist(&mut link, &one("again")));
        order("again");
        drop(orders);
        far.join().unwrap()
    });
    let got = texts(&sender.join().unwrap());
    assert_eq!((got.first().unwrap().as_str(), got.last().unwrap().as_str()), ("before", "again"), "{got:?}");
}

/// In the network namespace of the calling thread.
#[track_caller]
fn ip(words: &str) {
    let ran = Command::new("ip").args(words.split(' ')).output().unwrap();
    assert!(ran.status.success(), "ip {words}: {}", String::from_utf8_lossy(&ran.stderr));
}
