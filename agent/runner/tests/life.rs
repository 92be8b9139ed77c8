//! Jails from their start to their end, and what of them outlives the runner: all that runs, and nothing else.

mod common;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use common::{AGENT_UID, Client, Node, archive, eventually, is_alive, jail_of, monitor_of, name, start};
use epagent_wire::name::{JailId, ReleaseNumber};
use epagent_wire::runner::{
    ArchiveFormat, Event, Exit, JailState, RefusalCode, Reply, Request, Start, TerminalSize,
};

const SERVER: &str = "import http.server, os\n\
    class H(http.server.BaseHTTPRequestHandler):\n\
    \x20   def do_GET(self):\n\
    \x20       self.send_response(200); self.end_headers(); self.wfile.write(os.environ['WORD'].encode())\n\
    print('listening', flush=True)\n\
    http.server.HTTPServer(('0.0.0.0', 8000), H).serve_forever()\n";

#[track_caller]
fn start_jail(client: &mut Client, jail: &JailId, start: Start) -> String {
    match client.call(Request::Start { jail: jail.clone(), start }) {
        Ok(Reply::Started { address: Some(address), .. }) => address,
        other => panic!("{other:?}"),
    }
}

fn get(address: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect((address, 8000))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

fn stop(client: &mut Client, jail: &JailId) -> Exit {
    client.done(Request::Stop { jail: jail.clone(), signal: "TERM".to_owned(), grace_ms: 5_000 });
    client.exit(jail)
}

#[test]
fn an_instance_serves_is_looked_at_and_goes_without_a_trace() {
    let node = Node::start();
    let mut client = node.connect();
    client.release("shop", 1, &[("server.py", SERVER)]);
    client.done(Request::VolumeEnsure { app: name("shop"), volume: name("data"), quota_bytes: 8 << 20 });
    let jail = jail_of("shop", 1);
    let order = Start {
        env: BTreeMap::from([("WORD".to_owned(), "welcome".to_owned())]),
        volumes: [(name("data"), "/data".to_owned())].into(),
        ..start("shop", "/usr/bin/python3 server.py")
    };
    let address = start_jail(&mut client, &jail, order.clone());
    let (pid, told) = client.running(&jail);
    assert_eq!(told, address);
    eventually("it answers", || get(&address).is_ok_and(|text| text.ends_with("welcome")));
    assert_eq!(start_jail(&mut client, &jail, order), address, "sent again, it is the same jail");
    assert_eq!(client.running(&jail).0, pid);

    let Reply::Inspect(seen) = client.call(Request::Inspect { jail: jail.clone() }).unwrap() else {
        panic!()
    };
    assert!(seen.listening.contains(&"0.0.0.0:8000".to_owned()), "{seen:?}");
    assert!(seen.memory_bytes > 1 << 20 && seen.pids >= 2, "{seen:?}");
    assert!(client.log(&jail).contains("listening"));
    let folder = node.dir.path().join("pool/logs").join(jail.as_str());
    let (folder, log) = (folder.metadata().unwrap(), folder.join("current.log").metadata().unwrap());
    assert_eq!((folder.gid(), folder.mode() & 0o777, log.gid()), (AGENT_UID, 0o750, AGENT_UID));
    assert_eq!(log.mode() & 0o062, 0o040, "the agent reads logs and nobody but root writes them");

    let (read, write) = nix::unistd::pipe().unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let exec = Request::Exec {
        jail: jail.clone(),
        argv: ["/bin/sh", "-c", "echo $WORD; touch /data/x; exit 7"].map(str::to_owned).into(),
        env: BTreeMap::new(),
        terminal: None,
    };
    let (reply, _) = client.call_with(exec, &[null.as_fd(), write.as_fd(), write.as_fd()]).unwrap();
    let Reply::Exec { exec } = reply else { panic!("{reply:?}") };
    drop(write);
    let exit = client.event(|event| match event {
        Event::ExecExited { exec: ended, exit, .. } if *ended == exec => Some(exit.clone()),
        _ => None,
    });
    assert_eq!(exit.code, Some(7));
    let mut text = String::new();
    std::fs::File::from(read).read_to_string(&mut text).unwrap();
    assert_eq!(text, "welcome\n");

    let exit = stop(&mut client, &jail);
    assert_eq!(exit.signal, Some(15), "{exit:?}");
    assert!(matches!(client.jail(&jail).unwrap().state, JailState::Exited(_)));
    eventually("the end of the process", || !is_alive(pid));
    client.done(Request::Forget { jail: jail.clone() });
    client.done(Request::Forget { jail: jail.clone() });
    assert!(client.jail(&jail).is_none());
    assert!(node.cgroup_ids().is_empty(), "{:?}", node.cgroup_ids());
    eventually("the kernel takes its network down", || node.interfaces().is_empty());
    client.done(Request::LogRemove { jail: jail.clone() });
    assert_eq!(client.call(Request::LogOpen { jail }).unwrap_err().code, RefusalCode::NotFound);
    client.done(Request::AppRemove { app: name("shop") });
    let world = client.world();
    assert!(
        world.apps.is_empty()
            && world.releases.is_empty()
            && world.volumes.is_empty()
            && world.logs.is_empty()
    );
}

#[test]
fn secrets_are_in_the_environment_and_nowhere_else() {
    const CANARY: &str = "canary-6b1f";
    let node = Node::start();
    let mut client = node.connect();
    client.release("shop", 1, &[("serve", "#!/bin/sh\necho ${#SECRET}\nexec sleep 1000\n")]);
    let jail = jail_of("shop", 1);
    let start = Start { with_secrets: true, ..start("shop", "./serve") };
    let request = Request::Start { jail: jail.clone(), start };
    let open = memfd(&format!("{{\"SECRET\":\"{CANARY}\"}}"), false);
    assert_eq!(client.call_with(request.clone(), &[open.as_fd()]).unwrap_err().code, RefusalCode::BadRequest);
    let sealed = memfd(&format!("{{\"SECRET\":\"{CANARY}\"}}"), true);
    client.call_with(request, &[sealed.as_fd()]).unwrap();
    client.running(&jail);
    eventually("it has said how long the secret is", || client.log(&jail).contains("o 11"));
    let grep = std::process::Command::new("grep")
        .args(["-raF", "--exclude=pool.img", CANARY])
        .arg(node.dir.path())
        .output()
        .unwrap();
    assert!(grep.stdout.is_empty(), "{}", String::from_utf8_lossy(&grep.stdout));
}

fn memfd(text: &str, seal: bool) -> std::fs::File {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let mut file = std::fs::File::from(memfd_create("secrets", MFdFlags::MFD_ALLOW_SEALING).unwrap());
    file.write_all(text.as_bytes()).unwrap();
    if seal {
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::all())).unwrap();
    }
    file
}

#[test]
fn requests_on_one_object_are_done_in_the_order_they_came() {
    let node = Node::start();
    let mut client = node.connect();
    let app = name("shop");
    let ensure = Request::AppEnsure { app };
    let volume = Request::VolumeEnsure { app: name("shop"), volume: name("data"), quota_bytes: 8 << 20 };
    let remove = Request::AppRemove { app: name("shop") };
    let requests = [ensure.clone(), volume.clone(), remove.clone(), volume, ensure, remove];
    for (id, request) in requests.into_iter().enumerate() {
        let call = epagent_wire::runner::Call { id: id as u64, request };
        client.send_raw(&serde_json::to_vec(&call).unwrap(), &[]).unwrap();
    }
    let mut refused = Vec::new();
    for _ in 0..6 {
        let (id, result, _) = client.reply().unwrap();
        refused.extend(result.is_err().then_some(id));
    }
    assert_eq!(refused, [3], "only the volume of the removed app is refused");
    let world = client.world();
    assert!(world.apps.is_empty() && world.volumes.is_empty());
}

#[test]
fn check_says_what_the_machine_has() {
    let node = Node::prepare("");
    let check = || {
        let runner = env!("CARGO_BIN_EXE_epagent-runner");
        std::process::Command::new(runner).args(["check", "--config"]).arg(&node.config).output().unwrap()
    };
    let output = check();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let text = std::fs::read_to_string(&node.config).unwrap();
    std::fs::write(&node.config, text.replace("epagent-jail", "epagent-gaol")).unwrap();
    let output = check();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("FAULT jail_binary"));
    std::fs::write(&node.config, text).unwrap();
}

#[test]
fn a_terminal_is_passed_through() {
    let node = Node::start();
    let mut client = node.connect();
    client.release("shop", 1, &[("serve", "#!/bin/sh\nexec sleep 1000\n")]);
    let jail = jail_of("shop", 1);
    start_jail(&mut client, &jail, start("shop", "./serve"));
    client.running(&jail);
    let exec = Request::Exec {
        jail: jail.clone(),
        argv: ["/bin/sh", "-c", "stty size; exec sleep 1000"].map(str::to_owned).into(),
        env: BTreeMap::new(),
        terminal: Some(TerminalSize { rows: 31, columns: 97 }),
    };
    let (reply, mut descriptors) = client.call_with(exec, &[]).unwrap();
    let Reply::Exec { exec } = reply else { panic!("{reply:?}") };
    let mut master = std::fs::File::from(descriptors.pop().expect("the terminal's master"));
    let mut seen = Vec::new();
    eventually("the terminal has its size", || {
        let mut buffer = [0; 64];
        let count = master.read(&mut buffer).unwrap_or(0);
        seen.extend_from_slice(&buffer[..count]);
        String::from_utf8_lossy(&seen).contains("31 97")
    });
    client.done(Request::ExecResize {
        jail: jail.clone(),
        exec,
        size: TerminalSize { rows: 10, columns: 20 },
    });
    client.done(Request::ExecKill { jail, exec });
    let exit = client.event(|event| match event {
        Event::ExecExited { exit, .. } => Some(exit.clone()),
        _ => None,
    });
    assert_eq!(exit.signal, Some(1), "{exit:?}");
}

#[test]
fn a_killed_runner_leaves_instances_running_and_finds_them_again() {
    let mut node = Node::start();
    let mut client = node.connect();
    client.release("shop", 1, &[("server.py", SERVER)]);
    let jail = jail_of("shop", 1);
    let order = Start {
        env: BTreeMap::from([("WORD".to_owned(), "still".to_owned())]),
        ..start("shop", "/usr/bin/python3 server.py")
    };
    let address = start_jail(&mut client, &jail, order);
    let (pid, _) = client.running(&jail);
    eventually("it answers", || get(&address).is_ok());

    node.kill();
    assert!(get(&address).unwrap().ends_with("still"), "it serves without the runner");
    node.run();
    let mut client = node.connect();
    assert_eq!(client.running(&jail), (pid, address.clone()));
    assert!(get(&address).unwrap().ends_with("still"));
    let exit = stop(&mut client, &jail);
    assert_eq!(exit.signal, Some(15));
    node.kill();
    node.run();
    let mut client = node.connect();
    let JailState::Exited(after) = client.jail(&jail).unwrap().state else { panic!("it has ended") };
    assert_eq!(after.signal, Some(15), "the end is known to the next runner");
    client.done(Request::Forget { jail });
}

#[test]
fn an_end_while_the_runner_is_away_is_told_by_the_next() {
    let mut node = Node::start();
    let mut client = node.connect();
    client.release("shop", 1, &[("serve", "#!/bin/sh\nsleep 1\nexit 9\n")]);
    let jail = jail_of("shop", 1);
    start_jail(&mut client, &jail, start("shop", "./serve"));
    let (pid, _) = client.running(&jail);
    node.kill();
    eventually("it ends", || !is_alive(pid));
    node.run();
    let mut client = node.connect();
    let JailState::Exited(exit) = client.jail(&jail).unwrap().state else { panic!("it has ended") };
    assert_eq!(exit.code, Some(9));
}

#[test]
fn a_jail_whose_monitor_was_killed_is_lost_and_told() {
    let mut node = Node::start();
    let mut client = node.connect();
    client.release("shop", 1, &[("serve", "#!/bin/sh\nexec sleep 1000\n")]);
    let jail = jail_of("shop", 1);
    start_jail(&mut client, &jail, start("shop", "./serve"));
    let (pid, _) = client.running(&jail);
    nix::sys::signal::kill(monitor_of(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    let exit = client.exit(&jail);
    assert!(exit.monitor_lost, "{exit:?}");
    eventually("the end of the process", || !is_alive(pid));
    node.kill();
    node.run();
    let mut client = node.connect();
    let JailState::Exited(after) = client.jail(&jail).unwrap().state else { panic!("it has ended") };
    assert!(after.monitor_lost, "the next runner knows it too: {after:?}");
    client.done(Request::Forget { jail });
    assert!(node.cgroup_ids().is_empty(), "{:?}", node.cgroup_ids());
    eventually("the kernel takes its network down", || node.interfaces().is_empty());
}

#[test]
fn teardown_ends_everything_also_without_a_runner() {
    let mut node = Node::start();
    let mut client = node.connect();
    client.release("shop", 1, &[("serve", "#!/bin/sh\ntrap '' TERM\nwhile :; do sleep 1; done\n")]);
    let mut pids = Vec::new();
    for salt in 0..3 {
        let jail = jail_of("shop", salt);
        start_jail(&mut client, &jail, start("shop", "./serve"));
        pids.push(client.running(&jail).0);
    }
    assert!(!node.leftovers().is_empty());
    node.kill();
    let output = node.teardown();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(node.leftovers(), Vec::<String>::new());
    assert!(pids.iter().all(|pid| !is_alive(*pid)));
    let output = node.teardown();
    assert!(output.status.success(), "a second time: {}", String::from_utf8_lossy(&output.stderr));

    // The release is still on the pool, and a new runner serves it.
    node.run();
    let mut client = node.connect();
    assert!(client.world().jails.is_empty());
    start_jail(&mut client, &jail_of("shop", 9), start("shop", "./serve"));
    client.running(&jail_of("shop", 9));
}

#[test]
fn builds_run_in_order_and_say_how_they_end() {
    let node = Node::start_with("deadline = \"2s\"\nenv = { INDEX = \"the-operators\" }");
    let mut client = node.connect();
    client.done(Request::AppEnsure { app: name("shop") });
    let (app, release) = (name("shop"), ReleaseNumber(1));
    let files = archive(&[("hello", "hello")]);
    let unpack = Request::BuildUnpack { app, release, image: name("host"), format: ArchiveFormat::Tar };
    let (_, exit) = client.job(unpack.clone(), &[files.as_fd()]);
    assert!(exit.success(), "{exit}");
    let mut run = |command: &str| {
        let env = BTreeMap::from([("MINE".to_owned(), "manifest".to_owned())]);
        let request = Request::BuildRun { app: name("shop"), release, command: command.to_owned(), env };
        let (jail, exit) = client.job(request, &[]);
        (exit, client.log(&jail))
    };
    let (exit, log) = run("cat hello > made && echo $INDEX $MINE && pwd");
    assert!(exit.success(), "{exit}");
    assert!(log.contains("the-operators manifest") && log.contains("/app"), "{log}");
    assert_eq!(run("cat made && exit 3").0.code, Some(3));
    assert!(run("sleep 100").0.past_deadline);
    let no_such = run("no-such-command").0;
    assert_eq!(no_such.code, Some(127), "{no_such:?}");

    client.done(Request::BuildSeal { app: name("shop"), release });
    client.done(Request::BuildSeal { app: name("shop"), release });
    assert_eq!(client.call_with(unpack, &[files.as_fd()]).unwrap_err().code, RefusalCode::Conflict);
    let world = client.world();
    assert!(world.releases.iter().all(|release| release.sealed) && world.releases.len() == 1);
    client.done(Request::ReleaseRemove { app: name("shop"), release });
    assert!(client.world().releases.is_empty());
}

#[test]
fn a_hostile_archive_fails_its_own_job_alone() {
    let node = Node::start();
    let mut client = node.connect();
    client.done(Request::AppEnsure { app: name("shop") });
    let (app, release) = (name("shop"), ReleaseNumber(1));
    let mut noise = tempfile::tempfile().unwrap();
    noise.write_all(&[0x55; 4096]).unwrap();
    std::io::Seek::rewind(&mut noise).unwrap();
    let unpack = Request::BuildUnpack { app, release, image: name("host"), format: ArchiveFormat::Tar };
    let (jail, exit) = client.job(unpack, &[noise.as_fd()]);
    assert!(!exit.success());
    assert!(!client.log(&jail).is_empty(), "the unpacker says why");
    client.done(Request::Forget { jail });
    client.done(Request::BuildAbort { app: name("shop"), release });
    assert!(client.world().releases.is_empty());
}
