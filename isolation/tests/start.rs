//! An instance starts, runs its app, and its end is told exactly.

mod support;

use std::fs::File;
use std::os::fd::AsFd;

use epagent_isolation::id::JailId;
use epagent_isolation::launch::{LaunchFds, seal_secrets};
use epagent_isolation::monitor::record::{ExitReason, StopCause};
use epagent_isolation::spec::*;
use support::{Node, child_of, environment, eventually, path};

#[test]
fn an_app_runs_and_its_exit_code_is_told() {
    let node = Node::new();
    let (record, output) = node.outcome(&node.shell("hello", "echo hello; echo oops >&2; exit 7"));
    assert_eq!(record.reason, ExitReason::Exited { code: 7 }, "{record:?} {output}");
    assert!(output.contains("hello") && output.contains("oops"), "{output}");
}

#[test]
fn a_missing_command_is_told_apart_from_one_that_fails() {
    let node = Node::new();
    let mut spec = node.shell("missing", "");
    let command = |spec: &mut JailSpec, argv: &[&str]| match &mut spec.program {
        Program::Exec { argv: old, .. } => *old = argv.iter().map(|arg| (*arg).to_owned()).collect(),
        Program::Fd { .. } => unreachable!(),
    };
    command(&mut spec, &["no-such-thing", "x"]);
    let (record, _) = node.outcome(&spec);
    let ExitReason::StartFailed { error, code, .. } = record.reason else { panic!("{record:?}") };
    assert_eq!((error.as_str(), code), ("command not found: no-such-thing", 127));

    spec.id = JailId::new("denied").unwrap();
    command(&mut spec, &["/usr/share"]);
    let (record, _) = node.outcome(&spec);
    let ExitReason::StartFailed { error, code, .. } = record.reason else { panic!("{record:?}") };
    assert!(error.contains("cannot execute /usr/share") && code == 126, "{error}");

    spec.id = JailId::new("fails").unwrap();
    command(&mut spec, &["sh", "-c", "exit 127"]);
    assert_eq!(node.outcome(&spec).0.reason, ExitReason::Exited { code: 127 });
}

#[test]
fn a_missing_working_directory_is_named() {
    let node = Node::new();
    let mut spec = node.shell("cwd", "pwd");
    if let Program::Exec { cwd, .. } = &mut spec.program {
        *cwd = path("/no/such/dir");
    }
    let ExitReason::StartFailed { error, code, .. } = node.outcome(&spec).0.reason else { panic!() };
    assert!(error.contains("/no/such/dir") && code == 125, "{error}");
}

#[test]
fn a_signal_that_ends_the_app_is_told() {
    let node = Node::new();
    let (record, _) = node.outcome(&node.shell("signal", "kill -SEGV $$"));
    assert_eq!(record.reason, ExitReason::Signaled { signal: libc::SIGSEGV, core_dumped: false });
    assert!(!record.oom_killed && record.started_at_us > 0 && record.exited_at_us >= record.started_at_us);
}

#[test]
fn secrets_are_in_the_environment_and_nowhere_else() {
    let node = Node::new();
    let canary = "canary-7c1f";
    let secrets = seal_secrets(&environment(&[("TOKEN", canary)])).unwrap();
    let spec = node.shell(
        "secret",
        "test \"$TOKEN\" = canary-7c1f && test $PLAIN = yes && cat /run/epagent/* || true; sleep 60",
    );
    let mut jail =
        node.start_with(&spec, LaunchFds { secrets: Some(secrets.as_fd()), ..LaunchFds::default() });
    let init = jail.await_started();
    let app = eventually("the app", || child_of(init));
    let environment = std::fs::read(format!("/proc/{app}/environ")).unwrap();
    assert!(String::from_utf8_lossy(&environment).contains(canary), "the app has it");
    for pid in [init, jail.launched.monitor_pid] {
        for file in ["environ", "cmdline"] {
            let bytes = std::fs::read(format!("/proc/{pid}/{file}")).unwrap();
            assert!(!String::from_utf8_lossy(&bytes).contains(canary), "/proc/{pid}/{file}");
        }
    }
    jail.client.kill().unwrap();
    let record = jail.await_exit();
    assert!(!format!("{record:?}").contains(canary));
    assert!(!jail.output().contains(canary));
}

#[test]
fn an_unsealed_memfd_is_not_believed() {
    let node = Node::new();
    let open = rustix::fs::memfd_create("open", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let fds = LaunchFds { secrets: Some(open.as_fd()), ..LaunchFds::default() };
    let mut jail = node.start_with(&node.shell("unsealed", "true"), fds);
    let ExitReason::StartFailed { error, .. } = jail.await_exit().reason else { panic!() };
    assert!(error.contains("not sealed"), "{error}");
}

#[test]
fn files_and_the_three_of_etc_are_the_instances_own() {
    let node = Node::new();
    let mut spec = node.shell("files", "cat /run/epagent/app/conf /etc/hostname /etc/hosts /etc/resolv.conf; hostname; touch /run/epagent/x; touch /new");
    spec.files = vec![FileSpec {
        path: path("/run/epagent/app/conf"),
        content: "from the spec\n".into(),
        mode: 0o400,
    }];
    spec.resolv_conf = Some("nameserver 192.0.2.53\n".into());
    let (_, output) = node.outcome(&spec);
    for part in ["from the spec", "files\n", "127.0.0.1 localhost", "nameserver 192.0.2.53"] {
        assert!(output.contains(part), "{part:?} in {output}");
    }
    assert_eq!(output.matches("Read-only file system").count(), 2, "{output}");
}

#[test]
fn a_helper_by_descriptor_runs_in_an_empty_root_with_stdin() {
    let node = Node::new();
    let helper = static_helper(&node);
    let empty = node.dir.join("empty");
    std::fs::create_dir(&empty).unwrap();
    std::os::unix::fs::chown(&empty, Some(0), Some(0)).unwrap();
    let root = File::open(&empty).unwrap();
    let upload = node.dir.join("upload");
    std::fs::write(&upload, "bytes of an upload").unwrap();
    let upload = File::open(upload).unwrap();
    let mut spec = node.shell("helper", "");
    spec.root = RootSpec::Directory { read_only: false, idmap: true };
    spec.mounts.clear();
    spec.program = Program::Fd { argv: vec!["helper".into()], cwd: path("/"), env: environment(&[]) };
    let fds = LaunchFds {
        root: Some(root.as_fd()),
        program: Some(helper.as_fd()),
        stdin: Some(upload.as_fd()),
        ..LaunchFds::default()
    };
    let mut jail = node.start_with(&spec, fds);
    let record = jail.await_exit();
    assert_eq!(record.reason, ExitReason::Exited { code: 0 }, "{record:?}");
    assert_eq!(std::fs::read_to_string(empty.join("unpacked")).unwrap(), "bytes of an upload");
    use std::os::unix::fs::MetadataExt;
    assert_eq!(
        empty.join("unpacked").metadata().unwrap().uid(),
        0,
        "stored with the ids of the image, not shifted"
    );
}

/// A static program that copies stdin to /unpacked.
fn static_helper(node: &Node) -> File {
    let source = node.dir.join("helper.c");
    let program = node.dir.join("helper");
    std::fs::write(
        &source,
        "#include <fcntl.h>\n#include <unistd.h>\nint main(){char b[64];int f=open(\"/unpacked\",O_CREAT|O_WRONLY,0644);long n;while((n=read(0,b,64))>0)if(write(f,b,n)!=n)return 2;return f<0;}",
    )
    .unwrap();
    let built =
        std::process::Command::new("cc").args(["-static", "-o"]).arg(&program).arg(&source).status().unwrap();
    assert!(built.success());
    File::open(program).unwrap()
}

#[test]
fn a_job_ends_at_its_deadline() {
    let node = Node::new();
    let mut spec = node.shell("job", "sleep 60");
    spec.deadline_ms = Some(150);
    let (record, _) = node.outcome(&spec);
    assert_eq!(record.cause, Some(StopCause::Deadline));
    let took_ms = (record.exited_at_us - record.started_at_us) / 1000;
    assert!((50..5000).contains(&took_ms), "{took_ms} ms");
}

#[test]
fn another_user_and_rlimits_are_what_the_spec_says() {
    let node = Node::new();
    let mut spec = node
        .shell("user", "id -u; id -g; ulimit -n; ulimit -c; grep -E '^Cap(Eff|Inh|Amb)' /proc/self/status");
    spec.user = User { uid: 1000, gid: 1001 };
    spec.limits.open_files = 333;
    let (_, output) = node.outcome(&spec);
    assert!(output.starts_with("1000\n1001\n333\n0\n"), "{output}");
    assert_eq!(output.matches("0000000000000000").count(), 3, "{output}");
}

#[test]
fn output_can_be_opened_by_name_whoever_the_app_is() {
    let node = Node::new();
    for (id, uid) in [("by-root", 0), ("by-user", 1000)] {
        let mut spec = node.shell(id, "echo out > /dev/stdout; echo err > /dev/stderr");
        spec.user = User { uid, gid: uid };
        let (_, output) = node.outcome(&spec);
        assert!(output.contains("out") && output.contains("err") && !output.contains("denied"), "{output}");
    }
}
