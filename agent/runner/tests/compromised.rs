//! The runner as a compromised agent meets it: each request outside of the closed list is refused with a clear
//! error, nothing changes by it, and the connection goes on.

mod common;

use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use common::{Client, Node, jail_of, name, start};
use epagent_wire::name::ReleaseNumber;
use epagent_wire::runner::{PACKET_BYTES_MAX, RefusalCode, Reply, Request, Start};

/// What a raw packet is answered with.
#[track_caller]
fn refusal(client: &mut Client, packet: &str) -> String {
    client.send_raw(packet.as_bytes(), &[]).unwrap();
    let (_, result, _) = client.reply().expect("the runner ended the connection");
    let refusal = result.expect_err(packet);
    assert_eq!(refusal.code, RefusalCode::BadRequest, "{}", refusal.message);
    refusal.message
}

#[track_caller]
fn refused(client: &mut Client, code: RefusalCode, request: Request) -> String {
    match client.call(request.clone()) {
        Err(refusal) if refusal.code == code => refusal.message,
        other => panic!("{request:?}: {other:?}"),
    }
}

fn call(request: &str) -> String {
    format!(r#"{{"id":7,"request":{request}}}"#)
}

#[test]
fn requests_outside_of_the_list_are_refused_and_change_nothing() {
    let node = Node::start();
    let mut client = node.connect();
    client.done(Request::AppEnsure { app: name("shop") });

    for (packet, word) in [
        ("", "JSON"),
        ("{\"id\":7", "JSON"),
        (call("\"reboot\"").as_str(), "closed list"),
        (call(r#"{"mount":{"source":"/dev/vda","target":"/mnt"}}"#).as_str(), "closed list"),
        (call(r#"{"app_ensure":{"app":"shop","range":0}}"#).as_str(), "range"),
        (call(r#"{"app_ensure":{"app":"shop","path":"/"}}"#).as_str(), "path"),
        (r#"{"id":7,"request":"observe","address":"10.0.0.1"}"#, "address"),
        (call(r#"{"app_remove":{"app":"../shop"}}"#).as_str(), "not valid"),
        (call(r#"{"app_remove":{"app":"shop\n"}}"#).as_str(), "not valid"),
        (call(r#"{"app_remove":{"app":"/shop"}}"#).as_str(), "not valid"),
        (call(r#"{"image_remove":{"image":".."}}"#).as_str(), "not valid"),
        (call(r#"{"volume_remove":{"app":"shop","volume":"a/../b"}}"#).as_str(), "not valid"),
        (call(r#"{"log_open":{"jail":"../../etc"}}"#).as_str(), "not valid"),
        (call(r#"{"build_seal":{"app":"shop","release":"../1"}}"#).as_str(), "closed list"),
    ] {
        if packet.is_empty() {
            continue;
        }
        let message = refusal(&mut client, packet);
        assert!(message.contains(word), "{packet}: {message}");
    }
    let large = format!("{}{}", call("\"observe\""), " ".repeat(PACKET_BYTES_MAX));
    assert!(refusal(&mut client, &large).contains("larger"));

    let world = client.world();
    assert_eq!(world.apps, [name("shop")].into());
    assert!(world.jails.is_empty());
}

#[test]
fn another_apps_objects_are_refused() {
    let node = Node::start();
    let mut client = node.connect();
    client.release("shop", 1, &[("serve", "#!/bin/sh\nexec sleep 1000\n")]);
    client.done(Request::AppEnsure { app: name("blog") });
    client.done(Request::VolumeEnsure { app: name("shop"), volume: name("data"), quota_bytes: 8 << 20 });
    let theirs = jail_of("shop", 1);
    let with_data = |app: &str, path: &str| Start {
        volumes: [(name("data"), path.to_owned())].into(),
        ..start(app, "./serve")
    };
    let reply =
        client.call(Request::Start { jail: theirs.clone(), start: with_data("shop", "/data") }).unwrap();
    assert!(matches!(reply, Reply::Started { .. }));

    // A jail, a release, a volume, an image of somebody else, of nobody, and paths of its own choosing.
    for (code, jail, start, word) in [
        (RefusalCode::NotYours, theirs.clone(), start("blog", "id"), "not one of app blog"),
        (RefusalCode::NotYours, jail_of("shop", 2), start("blog", "id"), "not one of app blog"),
        (RefusalCode::NotFound, jail_of("blog", 2), start("blog", "id"), "no release r1"),
        (
            RefusalCode::NotFound,
            jail_of("shop", 2),
            Start { release: ReleaseNumber(9), ..start("shop", "id") },
            "no release r9",
        ),
        (RefusalCode::NotFound, jail_of("none", 2), start("none", "id"), "no app none"),
        (RefusalCode::BadRequest, jail_of("shop", 2), with_data("shop", "/proc/sys"), "system's"),
        (RefusalCode::BadRequest, jail_of("shop", 2), with_data("shop", "/data/../../etc"), "normalised"),
        (RefusalCode::BadRequest, jail_of("shop", 2), with_data("shop", "data"), "absolute"),
    ] {
        let message = refused(&mut client, code, Request::Start { jail, start });
        assert!(message.contains(word), "{message}");
    }
    let unpack = Request::BuildUnpack {
        app: name("blog"),
        release: ReleaseNumber(1),
        image: name("none"),
        format: epagent_wire::runner::ArchiveFormat::Tar,
    };
    let null = std::fs::File::open("/dev/null").unwrap();
    let refusal = client.call_with(unpack, &[null.as_fd()]).unwrap_err();
    assert_eq!((refusal.code, refusal.message.as_str()), (RefusalCode::NotFound, "there is no image none"));
    refused(
        &mut client,
        RefusalCode::Conflict,
        Request::VolumeRemove { app: name("shop"), volume: name("data") },
    );
    refused(
        &mut client,
        RefusalCode::NotFound,
        Request::BuildSeal { app: name("blog"), release: ReleaseNumber(1) },
    );
    refused(&mut client, RefusalCode::Conflict, Request::AppRemove { app: name("shop") });

    let world = client.world();
    assert_eq!((world.jails.len(), world.releases.len()), (1, 1));
}

#[test]
fn descriptors_that_lead_out_of_a_jail_are_refused() {
    let node = Node::start();
    let mut client = node.connect();
    client.done(Request::AppEnsure { app: name("shop") });
    let unpack = Request::BuildUnpack {
        app: name("shop"),
        release: ReleaseNumber(1),
        image: name("host"),
        format: epagent_wire::runner::ArchiveFormat::Tar,
    };
    let root = std::fs::File::open("/").unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    for descriptors in [&[][..], &[root.as_fd()], &[null.as_fd(), null.as_fd()], &[null.as_fd(); 3]] {
        let refusal = client.call_with(unpack.clone(), descriptors);
        let refusal = match refusal {
            Err(refusal) => refusal,
            Ok(reply) => panic!("{} descriptors: {reply:?}", descriptors.len()),
        };
        assert_eq!(refusal.code, RefusalCode::BadRequest, "{}", refusal.message);
    }
    let refusal = client.call_with(Request::Observe, &[null.as_fd()]).unwrap_err();
    assert_eq!(refusal.code, RefusalCode::BadRequest);
    client.send_raw(call("\"observe\"").as_bytes(), &[null.as_fd(); 30]).unwrap();
    let (_, result, _) = client.reply().unwrap();
    assert_eq!(result.unwrap_err().code, RefusalCode::BadRequest);
    assert!(client.world().releases.is_empty());
}

#[test]
fn only_root_and_the_agents_user_may_speak() {
    let node = Node::start();
    node.connect();
    let script = "import socket,sys\n\
                  s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n\
                  s.connect(sys.argv[1])\n\
                  try: s.send(b'{\"id\":1,\"request\":{\"hello\":{\"protocol\":1}}}')\n\
                  except BrokenPipeError: pass\n\
                  try: print(s.recv(65536).decode())\n\
                  except ConnectionResetError: print(s.recv(65536).decode())";
    let speak = |uid: u32| {
        let output = Command::new("/usr/bin/python3")
            .args(["-c", script])
            .arg(node.socket())
            .uid(uid)
            .gid(uid)
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert!(speak(61235).contains("uid 61235 may not speak to the runner"));
    assert!(speak(61234).contains("hello"), "the agent's own uid is heard");
}

#[test]
fn nothing_is_heard_before_hello() {
    let node = Node::start();
    let mut client = Client::silent(&node.socket());
    let refusal = client.call(Request::Observe).unwrap_err();
    assert_eq!(refusal.code, RefusalCode::BadRequest);
    let refusal = client.call(Request::Hello { protocol: 99 }).unwrap_err();
    assert!(refusal.message.contains("99"), "{}", refusal.message);
    client.hello();
    client.world();
}

#[test]
fn a_symlink_on_the_way_of_a_mount_leads_nowhere() {
    let node = Node::start();
    let mut client = node.connect();
    // The release has links where the volume is to be mounted: to the host's /etc, were one followed from outside.
    let files = [("serve", "#!/bin/sh\nexec sleep 1000\n")];
    client.release_built("shop", 1, &files, Some("ln -s /etc media && ln -s .. up"));
    client.done(Request::VolumeEnsure { app: name("shop"), volume: name("data"), quota_bytes: 8 << 20 });
    for (salt, path) in [(1, "/app/media"), (2, "/app/media/cron.d"), (3, "/app/up/srv/data")] {
        let jail = jail_of("shop", salt);
        let start = Start { volumes: [(name("data"), path.to_owned())].into(), ..start("shop", "./serve") };
        client.call(Request::Start { jail: jail.clone(), start }).unwrap();
        let why = client.exit(&jail).start_error.expect("it could not be started");
        assert!(why.contains(path), "{why}");
        client.done(Request::Forget { jail });
    }
    assert!(node.cgroup_ids().is_empty(), "{:?}", node.cgroup_ids());
}
