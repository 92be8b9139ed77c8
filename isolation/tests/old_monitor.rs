//! Versions: a monitor that was started months ago meets today's runner, and the other way round.

mod support;

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::thread;

use epagent_isolation::monitor::protocol::{Event, ExecCall, State, TtySize};
use epagent_isolation::monitor::record::ExitReason;
use epagent_isolation::monitor::{Client, ClientError};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use support::{Node, eventually, path};

/// A version 1 monitor as it spoke: what it is asked, what it answers, byte for byte. It also sends what no version
/// has (an event, a field), since a later 1.x may have.
const RECORDED: [(&str, &[&str]); 6] = [
    (r#""type":"hello""#, &[r#"{"seq":1,"type":"hello","version":1,"id":"shop-web-1"}"#]),
    (
        r#""type":"subscribe""#,
        &[
            r#"{"event":{"type":"weather","sunny":true}}"#,
            r#"{"seq":2,"type":"ok"}"#,
            r#"{"event":{"type":"started","pid":4711,"started_at_us":1700000000000000}}"#,
        ],
    ),
    (
        r#""type":"status""#,
        &[
            r#"{"seq":3,"type":"status","id":"shop-web-1","state":"running","pid":4711,"started_at_us":1700000000000000,"colour":"blue"}"#,
        ],
    ),
    (r#""type":"signal""#, &[r#"{"seq":4,"type":"ok"}"#]),
    (
        r#""type":"stop""#,
        &[
            r#"{"seq":5,"type":"ok"}"#,
            r#"{"event":{"type":"exited","record":{"id":"shop-web-1","reason":{"type":"exited","code":0},"cause":"stop","oom_killed":false,"started_at_us":1700000000000000,"exited_at_us":1700000000500000,"memory_peak_bytes":null,"cpu_us":1200,"log_dropped_bytes":0}}}"#,
        ],
    ),
    (r#""type":"release""#, &[r#"{"seq":6,"type":"ok"}"#]),
];

fn socket() -> OwnedFd {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}

fn old_monitor(path: &PathBuf) -> thread::JoinHandle<()> {
    let listener = socket();
    rustix::net::bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    thread::spawn(move || {
        let client = rustix::net::accept(&listener).unwrap();
        for (request, answers) in RECORDED {
            let mut bytes = [0; 4096];
            let (length, _) = rustix::net::recv(&client, &mut bytes, RecvFlags::empty()).unwrap();
            let text = String::from_utf8_lossy(&bytes[..length]);
            assert!(text.contains(request), "expected {request}, got {text}");
            for answer in answers {
                rustix::net::send(&client, answer.as_bytes(), SendFlags::NOSIGNAL).unwrap();
            }
        }
    })
}

#[test]
fn an_old_monitor_is_understood_and_not_asked_for_what_it_lacks() {
    let node = Node::new();
    let control = node.dir.join("old.sock");
    let monitor = old_monitor(&control);
    let mut client = Client::connect(&control).unwrap();
    assert_eq!((client.version(), client.id()), (1, "shop-web-1"));
    client.subscribe().unwrap();
    let event = eventually("an event", || client.next_event().unwrap());
    assert_eq!(event, Event::Started { pid: 4711, started_at_us: 1_700_000_000_000_000 });
    let call = ExecCall {
        argv: vec!["sh".into()],
        cwd: path("/"),
        env: Default::default(),
        user: None,
        tty: Some(TtySize { rows: 24, columns: 80 }),
    };
    // Not sent: the recording has no place for it.
    assert!(matches!(client.exec(call, &[]), Err(ClientError::TooOld { version: 1, needed: 2, .. })));
    let status = client.status().unwrap();
    assert_eq!((status.state, status.pid, status.log_dropped_bytes), (State::Running, Some(4711), 0));
    client.signal(libc::SIGUSR1).unwrap();
    client.stop(libc::SIGTERM, 1000).unwrap();
    let Event::Exited { record } = eventually("the end", || client.next_event().unwrap()) else { panic!() };
    assert_eq!(record.reason, ExitReason::Exited { code: 0 });
    client.release().unwrap();
    monitor.join().unwrap();
}

/// What a version 1 runner sends, as text.
struct OldRunner(OwnedFd);

impl OldRunner {
    fn connect(path: &PathBuf) -> OldRunner {
        let socket = socket();
        rustix::net::connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
        OldRunner(socket)
    }

    fn say(&self, text: &str) -> String {
        rustix::net::send(&self.0, text.as_bytes(), SendFlags::NOSIGNAL).unwrap();
        self.hear()
    }

    fn hear(&self) -> String {
        let mut bytes = [0; 8192];
        let (length, _) = rustix::net::recv(&self.0, &mut bytes, RecvFlags::empty()).unwrap();
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    }
}

#[test]
fn an_old_runner_is_served_in_its_own_words() {
    let node = Node::new();
    let mut jail = node.running(&node.shell("today", "sleep 300"));
    let runner = OldRunner::connect(&node.socket("today"));
    assert!(runner.say(r#"{"seq":1,"type":"status"}"#).contains("say hello first"));
    let hello = runner.say(r#"{"seq":2,"type":"hello","versions":[1]}"#);
    assert!(hello.contains(r#""seq":2"#) && hello.contains(r#""version":1"#), "{hello}");
    let unknown = runner.say(r#"{"seq":3,"type":"teleport","to":"mars"}"#);
    assert!(unknown.contains(r#""type":"unsupported""#) && unknown.contains("teleport"), "{unknown}");
    let newer = runner.say(r#"{"seq":4,"type":"exec-signal","session":1,"signal":9}"#);
    assert!(newer.contains(r#""type":"unsupported""#), "{newer}");
    let status = runner.say(r#"{"seq":5,"type":"status","verbosity":"a field of the future"}"#);
    assert!(status.contains(r#""state":"running""#), "{status}");
    assert!(runner.say(r#"{"seq":6,"type":"kill"}"#).contains(r#""type":"ok""#));
    jail.await_exit();
    assert!(runner.say(r#"{"seq":7,"type":"subscribe"}"#).contains("ok"));
    let events = [runner.hear(), runner.hear()].join("\n");
    assert!(events.contains(r#""type":"started""#) && events.contains(r#""type":"exited""#), "{events}");
}

#[test]
fn a_runner_of_the_future_is_told_the_versions_there_are() {
    let node = Node::new();
    let _jail = node.running(&node.shell("future", "sleep 300"));
    let runner = OldRunner::connect(&node.socket("future"));
    assert!(runner.say(r#"{"seq":1,"type":"hello","versions":[7,8]}"#).contains("versions 1 to 2"));
    assert!(runner.say(r#"{"seq":2,"type":"hello","versions":[2,7]}"#).contains(r#""version":2"#));
}

#[test]
fn noise_on_the_socket_costs_the_connection_and_nothing_else() {
    let node = Node::new();
    let mut jail = node.running(&node.shell("noise", "sleep 300"));
    for noise in ["", "{", "[]", "\0\0\0", r#"{"type":"kill"}"#, r#"{"seq":-1,"type":"kill"}"#] {
        let runner = OldRunner::connect(&node.socket("noise"));
        rustix::net::send(&runner.0, noise.as_bytes(), SendFlags::NOSIGNAL).unwrap();
        rustix::net::sockopt::set_socket_timeout(
            &runner.0,
            rustix::net::sockopt::Timeout::Recv,
            Some(std::time::Duration::from_secs(5)),
        )
        .unwrap();
        assert_eq!(runner.hear(), "", "{noise:?}");
    }
    assert_eq!(jail.state(), State::Running);
}

#[test]
fn only_root_may_speak_to_a_monitor() {
    let node = Node::new();
    let mut jail = node.running(&node.shell("rooted", "sleep 300"));
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(std::fs::metadata(node.socket("rooted")).unwrap().permissions().mode() & 0o777, 0o600);
    // Opened up on purpose: the peer's credentials still decide.
    std::fs::set_permissions(node.socket("rooted"), std::fs::Permissions::from_mode(0o666)).unwrap();
    let path = node.socket("rooted");
    // A connection made by another uid: the credentials are those of the moment of connect.
    let (read, write) = rustix::pipe::pipe().unwrap();
    let child = thread::spawn(move || {
        // The raw call changes this thread alone; nothing else runs on it.
        rustix::thread::set_thread_res_uid(
            rustix::fs::Uid::from_raw(65534),
            rustix::fs::Uid::from_raw(65534),
            rustix::fs::Uid::from_raw(65534),
        )
        .unwrap();
        let runner = OldRunner::connect(&path);
        let _ =
            rustix::net::send(&runner.0, br#"{"seq":1,"type":"hello","versions":[1]}"#, SendFlags::NOSIGNAL);
        let mut bytes = [0; 64];
        let heard =
            rustix::net::recv(&runner.0, &mut bytes, RecvFlags::empty()).map_or(0, |(length, _)| length);
        std::fs::File::from(write).write_all(&[heard as u8]).unwrap();
    });
    let mut heard = [9];
    rustix::io::read(read.as_fd(), &mut heard).unwrap();
    child.join().unwrap();
    assert_eq!(heard, [0], "the connection was closed without a word");
    assert_eq!(jail.state(), State::Running);
}
