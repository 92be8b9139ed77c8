//! What the service manager is told, and what it keeps for us: the protocol of sd_notify(3), with the test in
//! the place of systemd.

mod common;

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use common::app::App;
use common::client::Client;
use common::generations::{Generations, lives};
use common::{Balancer, free_address, host_route, poll, port_route, until};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

/// The manager's end.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

/// One notification: its lines, and the descriptor that came with it.
struct Notice {
    text: String,
    descriptor: Option<OwnedFd>,
}

impl Notice {
    fn says(&self, line: &str) -> bool {
        self.text.lines().any(|known| known == line)
    }
}

impl Manager {
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).expect("a socket");
        Self { socket, path, _dir: dir }
    }

    /// What a service is started with.
    fn set(&self, command: &mut Command) {
        command.env("NOTIFY_SOCKET", &self.path);
    }

    /// The next notice, if one comes in time.
    fn next(&self, patience: Duration) -> Option<Notice> {
        self.socket.set_read_timeout(Some(patience)).expect("a timeout");
        let mut text = vec![0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got =
            rustix::net::recvmsg(&self.socket, &mut [IoSliceMut::new(&mut text)], &mut beside, flags).ok()?;
        let mut rights = beside.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => Some(rights),
            _ => None,
        });
        let descriptor = rights.next().and_then(|mut rights| rights.next());
        text.truncate(got.bytes);
        Some(Notice { text: String::from_utf8(text).expect("text"), descriptor })
    }

    /// Takes notices until one says this line.
    fn await_line(&self, line: &str) -> Notice {
        poll(line, || self.next(Duration::from_millis(100)).filter(|notice| notice.says(line)))
    }
}

#[test]
fn it_says_when_it_serves_hands_over_and_stops() {
    let manager = Manager::start();
    let balancer = Generations::of(|| Balancer::start_copy(&[], |command| manager.set(command)));
    assert!(manager.await_line("READY=1").text.contains("STATUS=serving table 0"));
    let pid = balancer.reload().expect("it hands over");
    let reloading = manager.await_line("RELOADING=1");
    let stamp = reloading.text.lines().find_map(|line| line.strip_prefix("MONOTONIC_USEC="));
    assert!(stamp.is_some_and(|stamp| stamp.parse::<u64>().is_ok_and(|usec| usec > 0)));
    // In one message, since from then on the manager listens to the new one alone.
    assert!(manager.await_line(&format!("MAINPID={pid}")).says("READY=1"));
    // One that fails ends the reload too.
    std::fs::remove_file(balancer.program()).expect("the program is removed");
    balancer.reload().expect_err("there is no program");
    manager.await_line("RELOADING=1");
    let failed = manager.await_line("READY=1");
    assert!(failed.text.contains("STATUS=a handover failed"), "{}", failed.text);
    let pid = balancer.pid();
    nix::sys::signal::kill(Pid::from_raw(pid as i32), Signal::SIGTERM).expect("it can be told to stop");
    manager.await_line("STOPPING=1");
    until("it has ended", || !lives(pid));
}

#[test]
fn sockets_it_has_bound_itself_outlive_a_crash() {
    let manager = Manager::start();
    let app = App::named("shop");
    let balancer = Balancer::start_copy(&[], |command| manager.set(command));
    let http = manager.await_line("FDNAME=http.bound");
    assert!(http.says("FDSTORE=1"));
    let port = free_address().port();
    let route = port_route(port, &[("a", app.address, "up")]);
    balancer.routes(&[route.as_str(), &host_route("shop.example", &[("a", app.address, "up")])].join(","));
    let stored = manager.await_line(&format!("FDNAME=tcp-{port}.route"));
    let dir = balancer.kill();
    // Nobody accepts, and nobody is refused.
    let mut queued = Client::connect(([127, 0, 0, 1], port).into());
    queued.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    let socket = stored.descriptor.expect("the socket");
    let name = format!("tcp-{port}.route");
    let handed = [(name.as_str(), socket.as_fd())];
    let balancer = Balancer::inheriting_all(&handed, dir, |command| manager.set(command));
    assert_eq!(queued.read().text(), "shop");
    // It goes with its route, also from the store.
    drop(socket);
    balancer.routes(&host_route("shop.example", &[("a", app.address, "up")]));
    assert!(manager.await_line("FDSTOREREMOVE=1").says(&format!("FDNAME={name}")));
    until("nobody listens", || TcpStream::connect(("127.0.0.1", port)).is_err());
}

#[test]
fn sockets_that_were_handed_to_it_are_not_stored() {
    let manager = Manager::start();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let dir = tempfile::tempdir().expect("a folder");
    let handed = [("http", listener.as_fd())];
    let _balancer = Balancer::inheriting_all(&handed, dir, |command| manager.set(command));
    let mut notices = std::iter::from_fn(|| manager.next(Duration::from_millis(200)));
    assert!(notices.all(|notice| !notice.says("FDSTORE=1")));
}

#[test]
fn a_stuck_data_path_thread_silences_the_watchdog() {
    let manager = Manager::start();
    let balancer = Balancer::start_copy(&["--threads", "2"], |command| {
        manager.set(command);
        command.env("WATCHDOG_USEC", "300000");
    });
    for _ in 0..3 {
        manager.await_line("WATCHDOG=1");
    }
    // One thread of the data path stands still; the others, the control thread among them, go on.
    let tasks = std::fs::read_dir(format!("/proc/{}/task", balancer.pid())).expect("its threads").flatten();
    let of_data_path = tasks.filter(|task| {
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        name.trim().ends_with("-1")
    });
    let stuck = of_data_path.last().expect("a data-path thread").file_name();
    let stuck = Pid::from_raw(stuck.to_str().and_then(|tid| tid.parse().ok()).expect("a thread id"));
    ptrace::seize(stuck, ptrace::Options::empty()).expect("it can be traced");
    ptrace::interrupt(stuck).expect("it can be stopped");
    nix::sys::wait::waitpid(stuck, Some(nix::sys::wait::WaitPidFlag::__WALL)).expect("it stands still");
    // What was on its way, then silence for longer than the period.
    let start = Instant::now();
    let mut said = 0;
    while start.elapsed() < Duration::from_secs(1) {
        let notice = manager.next(Duration::from_millis(100));
        said += u32::from(notice.is_some_and(|notice| notice.says("WATCHDOG=1")));
    }
    assert!(said <= 1, "it claimed {said} times to live");
    ptrace::detach(stuck, None).expect("it goes on");
    manager.await_line("WATCHDOG=1");
}
