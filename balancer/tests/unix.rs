//! Unix sockets as upstreams: an operator's anywhere, and tenants' below one folder, where a tenant may put
//! anything in their place.

mod common;

use std::io::{IoSlice, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::app::{App, respond};
use common::client::Client;
use common::denied::spawn_without_passrights;
use common::{Balancer, IO_ARGUMENTS, poll, until};
use epagent_balancer::unix::{TenantSockets, UnixSockets};
use nix::errno::Errno;
use nix::fcntl::{RenameFlags, renameat2};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};
use nix::sys::stat::Mode;

const GET: &str = "GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n";

/// A folder in which the tenants have `tenants/`, and the host has everything else.
struct Folder {
    dir: tempfile::TempDir,
}

impl Folder {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        std::fs::create_dir_all(dir.path().join("tenants/web")).expect("a tenant's folder");
        Self { dir }
    }

    /// Where tenants' sockets are connected to.
    fn where_open() -> Option<Self> {
        let folder = Self::new();
        let sockets = UnixSockets::below(Some(&folder.path("tenants"))).expect("the folder");
        if sockets.tenants() == TenantSockets::Unprotected {
            eprintln!("SKIPPED: this kernel has no SO_PASSRIGHTS, so tenants have no unix sockets");
            return None;
        }
        Some(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn balancer(&self) -> Balancer {
        Balancer::start(&["--unix-root", self.path("tenants").to_str().expect("a path in UTF-8")])
    }
}

/// An app on a unix socket; it answers its name to everything, and counts its connections.
struct UnixApp {
    connections: Arc<AtomicU64>,
}

impl UnixApp {
    fn start(path: &Path, name: &'static str) -> Self {
        Self::on(UnixListener::bind(path).expect("the app can listen"), name)
    }

    fn on(listener: UnixListener, name: &'static str) -> Self {
        let app = Self { connections: Arc::default() };
        let connections = app.connections.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                connections.fetch_add(1, Ordering::SeqCst);
                std::thread::spawn(move || serve(stream, name));
            }
        });
        app
    }

    fn connection_count(&self) -> u64 {
        self.connections.load(Ordering::SeqCst)
    }
}

fn serve(mut stream: UnixStream, name: &str) {
    let response = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{name}", name.len());
    let mut said = Vec::new();
    let mut block = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut block) {
        said.extend_from_slice(&block[..count]);
        if said.ends_with(b"\r\n\r\n") {
            said.clear();
            if stream.write_all(response.as_bytes()).is_err() {
                return;
            }
        }
    }
}

fn route(balancer: &Balancer, address: &str) -> Vec<String> {
    let upstream = format!(r#"{{"id":"a","address":"{address}","state":"up"}}"#);
    let route = format!(
        r#"{{"id":"shop","match":{{"host":"shop.example"}},"action":{{"proxy":{{"upstreams":[{upstream}]}}}}}}"#
    );
    balancer.routes(&route).problems.into_iter().map(|problem| problem.message).collect()
}

#[test]
fn tenants_and_operators_have_unix_sockets() {
    let Some(folder) = Folder::where_open() else { return };
    let tenants = UnixApp::start(&folder.path("tenants/web/app.sock"), "tenant's");
    let operators = UnixApp::start(&folder.path("host.sock"), "operator's");
    let balancer = folder.balancer();
    assert_eq!(balancer.status().tenant_sockets, TenantSockets::Open);
    assert_eq!(route(&balancer, "unix:web/app.sock"), [""; 0]);
    let mut client = Client::connect(balancer.http);
    for _ in 0..10 {
        assert_eq!(client.get("shop.example", "/").text(), "tenant's");
    }
    assert_eq!(tenants.connection_count(), 1, "its connection is kept");
    route(&balancer, &format!("unix:{}", folder.path("host.sock").display()));
    assert_eq!(client.get("shop.example", "/").text(), "operator's");
    assert_eq!(operators.connection_count(), 1);
}

#[test]
fn an_app_that_binds_its_socket_anew_is_found_again() {
    let Some(folder) = Folder::where_open() else { return };
    let path = folder.path("tenants/web/app.sock");
    let old = UnixApp::start(&path, "old");
    let balancer = folder.balancer();
    route(&balancer, "unix:web/app.sock");
    assert_eq!(Client::connect(balancer.http).get("shop.example", "/").text(), "old");
    // As a restart without a gap does it: bound beside the old one, then moved into its place.
    let _new = UnixApp::start(&folder.path("tenants/web/new.sock"), "new");
    std::fs::rename(folder.path("tenants/web/new.sock"), &path).expect("in its place");
    until("the connection to the old one has idled out", || balancer.upstream("a").idle_connections == 0);
    assert_eq!(Client::connect(balancer.http).get("shop.example", "/").text(), "new");
    assert_eq!(old.connection_count(), 1);
}

/// Puts something in the place of `web/app.sock` that leads to the host's socket, or nowhere.
type Impostor = fn(&Folder);

#[test]
fn what_is_no_socket_of_the_tenants_is_refused_for_its_own_reason() {
    let impostors: [(&str, Impostor, &str); 8] = [
        (
            "symlink",
            |f| symlink("../../host.sock", f.path("tenants/web/app.sock")).expect("a link"),
            "symbolic",
        ),
        (
            "absolute symlink",
            |f| symlink(f.path("host.sock"), f.path("tenants/web/app.sock")).expect("a link"),
            "symbolic",
        ),
        (
            "symlinked folder",
            |f| {
                std::fs::rename(f.path("tenants/web"), f.path("tenants/gone")).expect("moved away");
                std::fs::create_dir(f.path("host")).expect("a folder of the host's");
                std::fs::rename(f.path("host.sock"), f.path("host/app.sock")).expect("a socket in it");
                symlink("../host", f.path("tenants/web")).expect("a link");
            },
            "symbolic",
        ),
        (
            "hard link",
            |f| std::fs::hard_link(f.path("host.sock"), f.path("tenants/web/app.sock")).expect("a link"),
            "several names",
        ),
        (
            "fifo",
            |f| nix::unistd::mkfifo(&f.path("tenants/web/app.sock"), Mode::S_IRWXU).expect("a fifo"),
            "no socket",
        ),
        ("file", |f| std::fs::write(f.path("tenants/web/app.sock"), "x").expect("a file"), "no socket"),
        ("folder", |f| std::fs::create_dir(f.path("tenants/web/app.sock")).expect("a folder"), "no socket"),
        (
            "datagram socket",
            |f| drop(UnixDatagram::bind(f.path("tenants/web/app.sock")).expect("a socket")),
            "os error",
        ),
    ];
    for (what, place, reason) in impostors {
        let Some(folder) = Folder::where_open() else { return };
        let host = UnixApp::start(&folder.path("host.sock"), "the host's own");
        place(&folder);
        let balancer = folder.balancer();
        route(&balancer, "unix:web/app.sock");
        Client::connect(balancer.http).send(GET);
        let error = poll(what, || balancer.upstream("a").connect_error);
        assert!(error.contains(reason), "{what}: {error}");
        let counters = balancer.status().counters;
        let counted = [counters.unix_symlink, counters.unix_several_names, counters.unix_no_socket];
        let expected = [reason == "symbolic", reason == "several names", reason == "no socket"];
        assert_eq!(counted.map(|count| count > 0), expected, "{what}");
        assert_eq!(host.connection_count(), 0, "{what} led to the host's socket");
    }
}

/// Ends the swapping, also when a test fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Swaps what stands at a path and a link to the host's socket, as fast as it goes.
fn swap_until(stop: &AtomicBool, folder: &Folder) {
    let at = nix::fcntl::AT_FDCWD;
    let (socket, link) = (folder.path("tenants/web/app.sock"), folder.path("tenants/web/link"));
    while !stop.load(Ordering::Relaxed) {
        renameat2(at, &socket, at, &link, RenameFlags::RENAME_EXCHANGE).expect("swapped");
    }
}

#[test]
fn a_path_that_is_swapped_all_the_time_never_leads_to_the_host() {
    let Some(folder) = Folder::where_open() else { return };
    let host = UnixApp::start(&folder.path("host.sock"), "the host's own");
    let _tenants = UnixApp::start(&folder.path("tenants/web/app.sock"), "tenant's");
    symlink("../../host.sock", folder.path("tenants/web/link")).expect("a link");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| swap_until(&stop, &folder));
        let _stop = StopOnDrop(&stop);
        let sockets = UnixSockets::below(Some(&folder.path("tenants"))).expect("the folder");
        let path = "web/app.sock".parse().expect("a path");
        let (mut connected, mut refused) = (0_u32, 0_u32);
        let deadline = Instant::now() + common::PATIENCE;
        while (connected < 2_000 || refused < 2_000) && Instant::now() < deadline {
            match sockets.connect(&path) {
                Ok(_) => connected += 1,
                Err(error) if error.raw_os_error() == nix::libc::ELOOP => refused += 1,
                // Its queue is full: the app could not keep up.
                Err(error) if error.raw_os_error() == nix::libc::EAGAIN => std::thread::yield_now(),
                Err(error) => panic!("a path that is always there: {error}"),
            }
        }
        assert!(connected > 0 && refused > 0, "{connected} connected, {refused} refused: not swapped");
        assert_eq!(host.connection_count(), 0, "of {connected} connects some led to the host's socket");
        // Whoever goes by the path alone, even looking first, is led there soon.
        let naive = folder.path("tenants/web/app.sock");
        until("going by the path leads to the host's socket", || {
            let is_link = std::fs::symlink_metadata(&naive).is_ok_and(|found| found.is_symlink());
            if !is_link {
                let _ = UnixStream::connect(&naive);
            }
            host.connection_count() > 0
        });
    });
}

/// A TCP socket that takes `seconds` to close: it lingers over bytes that its peer does not take.
fn lingering(seconds: i32) -> (TcpStream, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let mut stream = TcpStream::connect(listener.local_addr().expect("its address")).expect("a connection");
    stream.set_nonblocking(true).expect("a socket that does not block");
    while stream.write(&[0; 65_536]).is_ok() {}
    let linger = nix::libc::linger { l_onoff: 1, l_linger: seconds };
    setsockopt(&stream, sockopt::Linger, &linger).expect("lingering");
    (stream, listener)
}

/// Sends bytes with a lingering socket among them, of which the receiver then has the only copy.
fn send_with_a_lingering_socket(stream: &UnixStream, bytes: &[u8], seconds: i32) -> nix::Result<usize> {
    let (lingering, unread) = lingering(seconds);
    let descriptors = [lingering.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&descriptors)];
    let sent = sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(bytes)], &rights, MsgFlags::empty(), None);
    std::mem::forget(unread);
    if sent.is_err() {
        // It came back, and takes its time to close.
        std::thread::spawn(move || drop(lingering));
    }
    sent
}

#[test]
fn an_app_cannot_stop_the_balancer_with_a_descriptor() {
    let Some(folder) = Folder::where_open() else { return };
    let listener = UnixListener::bind(folder.path("tenants/web/app.sock")).expect("the app can listen");
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut said = [0; 4096];
            let _ = stream.read(&mut said);
            let response = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
            let _ = tell.send(send_with_a_lingering_socket(&stream, response, 4));
            let _ = stream.write_all(response);
        }
    });
    let balancer = folder.balancer();
    route(&balancer, "unix:web/app.sock");
    let start = Instant::now();
    assert_eq!(Client::connect(balancer.http).get("shop.example", "/").text(), "ok");
    assert_eq!(told.recv().expect("what became of it"), Err(Errno::EPERM));
    assert_eq!(balancer.status().counters.responses, 1);
    assert!(start.elapsed() < Duration::from_secs(3), "it was stopped for {:?}", start.elapsed());
}

/// What the test above would meet otherwise: a receive that does not block, blocks.
#[test]
fn without_the_option_a_descriptor_stops_its_receiver() {
    let (theirs, ours) = UnixStream::pair().expect("two sockets");
    ours.set_nonblocking(true).expect("a socket that does not block");
    assert_eq!(send_with_a_lingering_socket(&theirs, b"x", 2), Ok(1));
    let start = Instant::now();
    assert_eq!((&ours).read(&mut [0; 16]).expect("a byte"), 1);
    assert!(start.elapsed() > Duration::from_secs(1), "only {:?}", start.elapsed());
}

#[test]
fn a_full_queue_holds_requests_and_neither_spins_nor_stops_others() {
    let Some(folder) = Folder::where_open() else { return };
    // It listens, and accepts nobody; one fits into its queue, and the one at its head.
    let listener = UnixListener::bind(folder.path("tenants/web/app.sock")).expect("the app can listen");
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(1).expect("a number")).expect("less");
    let balancer = folder.balancer();
    route(&balancer, "unix:web/app.sock");
    let mut clients: Vec<Client> = (0..50).map(|_| Client::connect(balancer.http)).collect();
    for client in &mut clients {
        client.send(GET);
    }
    let held = || balancer.status().routes[0].held;
    until("the rest is held", || held() >= 47);
    let before = common::cpu_ticks(balancer.pid());
    std::thread::sleep(Duration::from_millis(500));
    let used = common::cpu_ticks(balancer.pid()) - before;
    assert!(used < 20, "it used {used} ticks of 10 ms in half a second");
    assert!(balancer.status().counters.unix_queue_full > 0);
    assert!(!balancer.upstream("a").unreachable, "it is there, and only busy");
    // Others are served meanwhile: the thread does not wait.
    assert_eq!(Client::connect(balancer.http).get("other.example", "/").status, 404);
    let _app = UnixApp::on(listener, "late");
    for client in &mut clients {
        assert_eq!(client.read().text(), "late");
    }
}

#[test]
fn without_a_folder_a_tenants_socket_is_a_problem_that_says_so() {
    let folder = Folder::new();
    let _app = UnixApp::start(&folder.path("host.sock"), "operator's");
    let balancer = Balancer::start(&[]);
    assert_eq!(balancer.status().tenant_sockets, TenantSockets::NoFolder);
    let problems = route(&balancer, "unix:web/app.sock");
    assert!(problems.len() == 1 && problems[0].contains("--unix-root"), "{problems:?}");
    assert_eq!(route(&balancer, &format!("unix:{}", folder.path("host.sock").display())), [""; 0]);
    assert_eq!(Client::connect(balancer.http).get("shop.example", "/").text(), "operator's");
}

#[test]
fn where_the_kernel_cannot_protect_it_only_operators_have_unix_sockets() {
    let folder = Folder::new();
    let tenants = UnixApp::start(&folder.path("tenants/web/app.sock"), "tenant's");
    let _operators = UnixApp::start(&folder.path("host.sock"), "operator's");
    let root = folder.path("tenants");
    let arguments = [&IO_ARGUMENTS[..], &["--unix-root", root.to_str().expect("a path in UTF-8")]].concat();
    let balancer = Balancer::start_with(&arguments, spawn_without_passrights);
    assert_eq!(balancer.status().tenant_sockets, TenantSockets::Unprotected);
    let problems = route(&balancer, "unix:web/app.sock");
    assert!(problems.len() == 1 && problems[0].contains("SO_PASSRIGHTS"), "{problems:?}");
    Client::connect(balancer.http).send(GET);
    until("a connect is refused", || balancer.status().counters.unix_unavailable > 0);
    assert_eq!(tenants.connection_count(), 0);
    assert_eq!(route(&balancer, &format!("unix:{}", folder.path("host.sock").display())), [""; 0]);
    assert_eq!(Client::connect(balancer.http).get("shop.example", "/").text(), "operator's");
}

/// Asks for `/` over a unix socket, and returns what is answered.
fn ask(path: &Path) -> String {
    let mut stream = UnixStream::connect(path).expect("a connection");
    stream.set_read_timeout(Some(common::PATIENCE)).expect("a timeout");
    stream.write_all(b"GET / HTTP/1.1\r\nHost: shop.example\r\nConnection: close\r\n\r\n").expect("taken");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

#[test]
fn clients_come_by_a_unix_socket_too() {
    let folder = Folder::new();
    let front = folder.path("front.sock");
    let app = App::start(|request, stream| {
        respond(stream, format!("from {:?}", request.field("x-forwarded-for")).as_bytes())
    });
    let listen = format!("http=unix:{}", front.display());
    let balancer = Balancer::start(&["--listen", &listen]);
    balancer.route("shop.example", &[("a", app.address, "up")]);
    let answer = ask(&front);
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("from None"), "{answer}");
    let shown = |address: &str| balancer.status().listeners.iter().any(|shown| shown.address == address);
    assert!(shown(&format!("unix:{}", front.display())));
    // A reset is one here, too.
    let mut gone = UnixStream::connect(&front).expect("a connection");
    gone.write_all(b"GET / HT").expect("taken");
    drop(gone);
    until("it is noticed", || balancer.status().counters.connections_open == 0);
}

#[test]
fn a_dead_balancers_socket_is_replaced_and_a_live_ones_is_not() {
    let folder = Folder::new();
    let front = folder.path("front.sock");
    let listen = format!("http=unix:{}", front.display());
    let first = Balancer::start(&["--listen", &listen]);
    let control = folder.path("second.sock");
    let mut second = std::process::Command::new(env!("CARGO_BIN_EXE_epagent-balancer"))
        .args(["--listen", &listen, "--control", control.to_str().expect("a path in UTF-8")])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("it starts");
    let status = poll("the second one gives up", || second.try_wait().expect("its state"));
    let mut said = String::new();
    second.stderr.take().expect("its standard error").read_to_string(&mut said).expect("what it said");
    assert!(!status.success() && said.contains("another process listens there"), "{said}");
    assert!(ask(&front).starts_with("HTTP/1.1 503 "), "the first one still serves");
    first.kill();
    let _third = Balancer::start(&["--listen", &listen]);
    assert!(ask(&front).starts_with("HTTP/1.1 503 "));
}

#[test]
fn plain_tcp_runs_between_unix_sockets() {
    let folder = Folder::new();
    let (front, back) = (folder.path("front.sock"), folder.path("back.sock"));
    let app = UnixListener::bind(&back).expect("an app");
    std::thread::spawn(move || {
        for mut stream in app.incoming().flatten() {
            // It answers only once all is said: a half-close that is lost would hang here.
            let (said, _) = common::read_all(&stream);
            let _ = stream.write_all(&said);
        }
    });
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_epagent-balancer"))
        .args(["run", "--mode", "tcp", "--listen", &format!("unix:{}", front.display())])
        .args(["--upstream", &format!("unix:{}", back.display())])
        .args(IO_ARGUMENTS)
        .spawn()
        .expect("it starts");
    let client = poll("it listens", || UnixStream::connect(&front).ok());
    let body = common::noise(7, 16_000_000);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            common::write_all(&client, &body);
            client.shutdown(std::net::Shutdown::Write).expect("half-closed");
        });
        let (heard, end) = common::read_all(&client);
        assert_eq!((heard.len(), common::checksum(&heard), end), (body.len(), common::checksum(&body), None));
    });
    let _ = child.kill();
    let _ = child.wait();
}
