//! A real runner on this machine, with a pool, a cgroup tree and a network of its own, and the agent's end of its
//! socket. Everything is removed when the [`Node`] is dropped, also after a panic.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::{BTreeMap, VecDeque};
use std::io::{IoSlice, IoSliceMut, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use epagent_wire::name::{AppName, JailId, ReleaseNumber};
use epagent_wire::runner::{
    ArchiveFormat, Call, Command as JailCommand, Event, Exit, Jail, JailState, Message, PACKET_BYTES_MAX,
    PROTOCOL, Refusal, Reply, Request, Start, World,
};
use epagent_wire::spec::Limits;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, bind, connect, listen,
    sendmsg, setsockopt, socket, sockopt::ReceiveTimeout,
};
use nix::sys::time::TimeVal;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

/// Enough for anything that is not a build.
pub const SOON: Duration = Duration::from_secs(20);

/// The uid (and gid) of the agent on these nodes.
pub const AGENT_UID: u32 = 61234;

/// What is expected of the binaries that run in jails: they are static, so cargo's own build of them won't do.
fn jail_binaries() -> PathBuf {
    let built = std::env::var_os("EPAGENT_BIN_DIR").map(PathBuf::from);
    let dir =
        built.unwrap_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/dist")));
    for name in ["epagent-jail", "epagent-unpack"] {
        assert!(dir.join(name).is_file(), "{name} is not in {}: `make build` puts it there", dir.display());
    }
    dir
}

/// One node of its own: number, folders, listener.
pub struct Node {
    pub number: u16,
    pub dir: tempfile::TempDir,
    pub config: PathBuf,
    listener: OwnedFd,
    runner: Option<Child>,
    _number: UnixListener,
}

impl Node {
    /// A running runner on a node of its own.
    pub fn start() -> Node {
        Node::start_with("")
    }

    /// With more lines at the end of its configuration (the `[build]` table).
    pub fn start_with(build: &str) -> Node {
        let mut node = Node::prepare(build);
        node.run();
        node
    }

    pub fn prepare(build: &str) -> Node {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests make namespaces, cgroups and mounts: run them as root"
        );
        let (number, held) = free_number();
        let dir = tempfile::Builder::new().prefix("epagent-runner-").tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let run = dir.path().join("run");
        std::fs::create_dir(&run).unwrap();
        let listener = listen_on(&run.join("runner.sock"));
        let config = dir.path().join("runner.toml");
        std::fs::write(&config, config_text(number, dir.path(), build)).unwrap();
        Node { number, dir, config, listener, runner: None, _number: held }
    }

    /// Starts the runner as `epagent dev` does: with the listener, by socket activation.
    pub fn run(&mut self) {
        self.runner = Some(self.command().spawn().unwrap());
    }

    /// The same, of one that ends by itself.
    pub fn run_to_end(&self) -> std::process::Output {
        let mut child = self.command().stderr(Stdio::piped()).spawn().unwrap();
        let deadline = Instant::now() + SOON;
        while child.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                child.kill().unwrap();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        child.wait_with_output().unwrap()
    }

    fn command(&self) -> Command {
        let script = "LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=runner exec \"$0\" run --config \"$1\" 3<&0 </dev/null";
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", script, env!("CARGO_BIN_EXE_epagent-runner")])
            .arg(&self.config)
            .stdin(Stdio::from(self.listener.try_clone().unwrap()));
        command
    }

    pub fn pid(&self) -> u32 {
        self.runner.as_ref().expect("the runner was started").id()
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        if let Some(mut runner) = self.runner.take() {
            runner.kill().unwrap();
            runner.wait().unwrap();
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("run/runner.sock")
    }

    pub fn connect(&self) -> Client {
        let mut client = Client::silent(&self.socket());
        client.hello();
        client
    }

    pub fn teardown(&mut self) -> std::process::Output {
        self.teardown_with("--grace-ms", "1000")
    }

    pub fn teardown_with(&mut self, option: &str, value: &str) -> std::process::Output {
        self.kill();
        Command::new(env!("CARGO_BIN_EXE_epagent-runner"))
            .args(["teardown", "--config"])
            .arg(&self.config)
            .args([option, value])
            .output()
            .unwrap()
    }

    /// What of this node is in the kernel: mounts, loop devices, cgroups, interfaces, tables.
    pub fn leftovers(&self) -> Vec<String> {
        let dir = self.dir.path().to_str().unwrap();
        let mut found = Vec::new();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        found.extend(mounts.lines().filter(|line| line.contains(dir)).map(|line| format!("mount {line}")));
        for device in std::fs::read_dir("/sys/block").unwrap() {
            let backing = device.unwrap().path().join("loop/backing_file");
            let file = std::fs::read_to_string(&backing).unwrap_or_default();
            found.extend(file.contains(dir).then(|| format!("loop device {}", backing.display())));
        }
        for hierarchy in std::fs::read_dir("/sys/fs/cgroup").unwrap() {
            let path = hierarchy.unwrap().path();
            let own = if path.ends_with(self.cgroup()) { path } else { path.join(self.cgroup()) };
            found.extend(own.exists().then(|| format!("cgroup {}", own.display())));
        }
        found.extend(self.interfaces().into_iter().map(|link| format!("interface {link}")));
        let tables = Command::new("nft").args(["list", "tables"]).output().unwrap();
        let table = format!("epagent_{}", self.number);
        let tables = String::from_utf8_lossy(&tables.stdout).into_owned();
        found.extend(tables.lines().filter(|line| line.ends_with(&table)).map(|line| format!("nft {line}")));
        found
    }

    pub fn interfaces(&self) -> Vec<String> {
        let prefix = format!("ep{}-", self.number);
        let names = std::fs::read_dir("/sys/class/net").unwrap().map(|entry| entry.unwrap().file_name());
        names.map(|name| name.into_string().unwrap()).filter(|name| name.starts_with(&prefix)).collect()
    }

    fn cgroup(&self) -> String {
        format!("epagent-{}", self.number)
    }

    /// Ids that have a cgroup of any hierarchy.
    pub fn cgroup_ids(&self) -> Vec<String> {
        let mut ids = std::collections::BTreeSet::new();
        let roots = std::fs::read_dir("/sys/fs/cgroup")
            .unwrap()
            .map(|entry| entry.unwrap().path().join(self.cgroup()));
        for root in roots.chain([Path::new("/sys/fs/cgroup").join(self.cgroup())]) {
            let entries = std::fs::read_dir(root).into_iter().flatten().map(|entry| entry.unwrap());
            ids.extend(
                entries
                    .filter(|entry| entry.path().is_dir())
                    .map(|entry| entry.file_name().into_string().unwrap()),
            );
        }
        ids.into_iter().collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let output = self.teardown();
        if !output.status.success() && !std::thread::panicking() {
            panic!("teardown: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
}

/// A number that no other node on this kernel has, held for as long as the socket lives.
fn free_number() -> (u16, UnixListener) {
    (64..=127)
        .rev()
        .find_map(|number| {
            let address = SocketAddr::from_abstract_name(format!("epagent-node-{number}")).unwrap();
            let cgroup = format!("epagent-{number}");
            let taken = Path::new("/sys/fs/cgroup/unified").join(&cgroup).exists()
                || Path::new("/sys/fs/cgroup").join(&cgroup).exists();
            UnixListener::bind_addr(&address).ok().filter(|_| !taken).map(|held| (number, held))
        })
        .expect("a free node number")
}

fn listen_on(path: &Path) -> OwnedFd {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    // Open to all, so that it is the runner's own check that refuses.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666)).unwrap();
    listen(&fd, Backlog::new(16).unwrap()).unwrap();
    fd
}

fn config_text(number: u16, dir: &Path, build: &str) -> String {
    let (dir, binaries) = (dir.display(), jail_binaries());
    let binaries = binaries.display();
    let resolver = std::fs::read_to_string("/etc/resolv.conf").unwrap();
    let resolver =
        resolver.lines().find_map(|line| line.strip_prefix("nameserver ")).unwrap_or("192.0.2.1").trim();
    let base = 0x8000_0000u32 + u32::from(number) * (256 << 16);
    let v4 = u32::from(std::net::Ipv4Addr::new(100, 96, 0, 0)) + u32::from(number) * 4096;
    let v4 = std::net::Ipv4Addr::from(v4);
    format!(
        "node = {number}\nstate_dir = \"{dir}/runner\"\nrun_dir = \"{dir}/run\"\n\
         jail_binary = \"{binaries}/epagent-jail\"\nunpack_binary = \"{binaries}/epagent-unpack\"\n\
         brain_uid = {AGENT_UID}\nhost_image = true\n\
         [pool]\nmount = \"{dir}/pool\"\nfile = \"{dir}/pool.img\"\nsize = \"1G\"\n\
         [cgroup]\nroot = \"epagent-{number}\"\n\
         [ids]\nbase = {base}\nranges = 256\n\
         [network]\nv4 = \"{v4}/20\"\nv6 = \"fd65:7061:6765:{number:x}::/64\"\nresolvers = [\"{resolver}\"]\n\
         [build]\ndisk = \"400M\"\n{build}\n"
    )
}

/// The agent's end.
pub struct Client {
    socket: OwnedFd,
    next: u64,
    pub events: VecDeque<Event>,
}

impl Client {
    /// Connected, and nothing said yet.
    pub fn silent(path: &Path) -> Client {
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        connect(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
        let client = Client { socket: fd, next: 1, events: VecDeque::new() };
        client.set_patience(SOON);
        client
    }

    pub fn hello(&mut self) {
        let reply = self.call(Request::Hello { protocol: PROTOCOL }).unwrap();
        assert!(matches!(reply, Reply::Hello { protocol: PROTOCOL, .. }));
    }

    pub fn send_raw(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> nix::Result<()> {
        let raw: Vec<_> = descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)
            .map(drop)
    }

    /// The next message; None when the runner has ended the connection.
    pub fn receive(&mut self) -> Option<(Message, Vec<OwnedFd>)> {
        let mut buffer = vec![0; PACKET_BYTES_MAX];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let got = match rustix::net::recvmsg(&self.socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)
        {
            Ok(got) => got,
            Err(rustix::io::Errno::CONNRESET) => return None,
            Err(error) => panic!("no message from the runner: {error}"),
        };
        let rights = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        });
        let descriptors = rights.flatten().collect();
        (got.bytes > 0).then(|| (serde_json::from_slice(&buffer[..got.bytes]).unwrap(), descriptors))
    }

    /// The next reply, whatever call it answers.
    pub fn reply(&mut self) -> Option<(u64, Result<Reply, Refusal>, Vec<OwnedFd>)> {
        loop {
            match self.receive()? {
                (Message::Event(event), _) => self.events.push_back(event),
                (Message::Reply { id, result }, descriptors) => return Some((id, result, descriptors)),
            }
        }
    }

    pub fn call_with(
        &mut self,
        request: Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>), Refusal> {
        let id = self.next;
        self.next += 1;
        self.send_raw(&serde_json::to_vec(&Call { id, request }).unwrap(), descriptors).unwrap();
        let (answered, result, descriptors) = self.reply().expect("the runner ended the connection");
        assert_eq!(answered, id);
        result.map(|reply| (reply, descriptors))
    }

    pub fn call(&mut self, request: Request) -> Result<Reply, Refusal> {
        self.call_with(request, &[]).map(|(reply, _)| reply)
    }

    #[track_caller]
    pub fn done(&mut self, request: Request) {
        match self.call(request.clone()) {
            Ok(Reply::Done) => {}
            other => panic!("{request:?}: {other:?}"),
        }
    }

    pub fn world(&mut self) -> World {
        match self.call(Request::Observe).unwrap() {
            Reply::World(world) => *world,
            other => panic!("{other:?}"),
        }
    }

    pub fn jail(&mut self, jail: &JailId) -> Option<Jail> {
        self.world().jails.into_iter().find(|known| known.id == *jail)
    }

    /// Waits until the jail runs, and tells its pid and address.
    #[track_caller]
    pub fn running(&mut self, jail: &JailId) -> (i32, String) {
        let deadline = Instant::now() + SOON;
        loop {
            let known = self.jail(jail).expect("the jail exists");
            match known.state {
                JailState::Running => return (known.pid.unwrap(), known.address.unwrap()),
                JailState::Exited(exit) => panic!("jail {jail} {exit}"),
                JailState::Starting => assert!(Instant::now() < deadline, "jail {jail} does not start"),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until the jail runs, one without an address as well.
    #[track_caller]
    pub fn runs(&mut self, jail: &JailId) {
        eventually("the jail runs", || self.jail(jail).expect("the jail exists").state == JailState::Running);
    }

    /// The same as [`Client::exit`], for what takes long.
    #[track_caller]
    pub fn exit_within(&mut self, jail: &JailId, time: Duration) -> Exit {
        self.set_patience(time);
        let exit = self.exit(jail);
        self.set_patience(SOON);
        exit
    }

    fn set_patience(&self, time: Duration) {
        setsockopt(&self.socket, ReceiveTimeout, &TimeVal::new(time.as_secs() as i64, 0)).unwrap();
    }

    /// Waits for the event of the jail's end.
    #[track_caller]
    pub fn exit(&mut self, jail: &JailId) -> Exit {
        self.event(|event| match event {
            Event::Exited { jail: ended, exit } if ended == jail => Some(exit.clone()),
            _ => None,
        })
    }

    #[track_caller]
    pub fn event<T>(&mut self, pick: impl Fn(&Event) -> Option<T>) -> T {
        loop {
            if let Some(place) = self.events.iter().position(|event| pick(event).is_some()) {
                let event = self.events.remove(place).unwrap();
                return pick(&event).unwrap();
            }
            match self.receive().expect("the runner ended the connection") {
                (Message::Event(event), _) => self.events.push_back(event),
                (Message::Reply { .. }, _) => panic!("a reply nobody waits for"),
            }
        }
    }

    /// Starts a job and waits for its end.
    #[track_caller]
    pub fn job(&mut self, request: Request, stream: &[BorrowedFd<'_>]) -> (JailId, Exit) {
        let (reply, _) = self.call_with(request, stream).unwrap();
        let Reply::Started { jail, .. } = reply else { panic!("{reply:?}") };
        let exit = self.exit(&jail);
        (jail, exit)
    }

    /// A sealed release of `app` on the image `host` with these files in `/app`.
    #[track_caller]
    pub fn release(&mut self, app: &str, release: u32, files: &[(&str, &str)]) {
        self.release_built(app, release, files, None);
    }

    /// The same, with a build command.
    #[track_caller]
    pub fn release_built(&mut self, app: &str, release: u32, files: &[(&str, &str)], command: Option<&str>) {
        self.done(Request::AppEnsure { app: name(app) });
        let (app, release): (AppName, _) = (name(app), ReleaseNumber(release));
        let request = Request::BuildUnpack {
            app: app.clone(),
            release,
            image: name("host"),
            format: ArchiveFormat::Tar,
        };
        self.good_job(request, &[archive(files).as_fd()]);
        if let Some(command) = command.map(str::to_owned) {
            self.good_job(
                Request::BuildRun { app: app.clone(), release, command, env: BTreeMap::new() },
                &[],
            );
        }
        self.done(Request::BuildSeal { app, release });
    }

    #[track_caller]
    fn good_job(&mut self, request: Request, stream: &[BorrowedFd<'_>]) {
        let (jail, exit) = self.job(request, stream);
        assert!(exit.success(), "job {jail} {exit}\n{}", self.log(&jail));
        self.done(Request::Forget { jail });
    }

    /// All that a jail has written.
    pub fn log(&mut self, jail: &JailId) -> String {
        let (reply, folder) = self.call_with(Request::LogOpen { jail: jail.clone() }, &[]).unwrap();
        assert!(matches!(reply, Reply::Log));
        let path = format!("/proc/self/fd/{}/current.log", folder[0].as_raw_fd());
        let mut text = String::new();
        if let Ok(mut file) = std::fs::File::open(path) {
            file.read_to_string(&mut text).unwrap();
        }
        text
    }
}

/// A tar file with these files, all executable.
pub fn archive(files: &[(&str, &str)]) -> std::fs::File {
    let dir = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    let status =
        Command::new("tar").arg("-cf").arg(file.path()).arg("-C").arg(dir.path()).arg(".").status().unwrap();
    assert!(status.success());
    file.reopen().unwrap()
}

pub fn name<T: std::str::FromStr>(text: &str) -> T
where
    T::Err: std::fmt::Debug,
{
    text.parse().unwrap()
}

/// A start of release 1 with nothing special.
pub fn start(app: &str, command: &str) -> Start {
    Start {
        app: name(app),
        release: ReleaseNumber(1),
        command: JailCommand::Shell(command.to_owned()),
        env: BTreeMap::new(),
        limits: Limits::default(),
        volumes: BTreeMap::new(),
        with_secrets: false,
        socket: false,
        deadline_ms: None,
    }
}

/// The id of the app's jail number `salt`.
pub fn jail_of(app: &str, salt: u64) -> JailId {
    JailId::new(&name::<AppName>(app), salt)
}

/// Polls until it holds.
#[track_caller]
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {SOON:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether a process of that number exists and is more than a status nobody has asked for.
pub fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next()).is_some_and(|state| state != "Z")
}

/// The process that watches an instance: the parent of its init.
pub fn monitor_of(pid: i32) -> nix::unistd::Pid {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)).unwrap();
    nix::unistd::Pid::from_raw(parent.parse().unwrap())
}
