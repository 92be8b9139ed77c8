//! Commands run beside the app: with pipes, with a terminal, and without their client.

mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use epagent_isolation::monitor::protocol::{Event, ExecCall, ExecOutcome, TtySize};
use epagent_isolation::monitor::{Client, ClientError};
use support::{Jail, Node, eventually, path};

fn shell(script: &str, tty: Option<TtySize>) -> ExecCall {
    let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
    ExecCall { argv, cwd: path("/"), env: BTreeMap::new(), user: None, tty }
}

fn outcome(client: &mut Client, wanted: u32) -> ExecOutcome {
    eventually("the command's end", || match client.next_event().unwrap() {
        Some(Event::ExecExited { session, outcome }) if session == wanted => Some(outcome),
        _ => None,
    })
}

fn exec(client: &mut Client, call: ExecCall) -> (u32, File) {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let null = File::open("/dev/null").unwrap();
    let stdio: [BorrowedFd<'_>; 3] = [null.as_fd(), write.as_fd(), write.as_fd()];
    let session = client.exec(call, &stdio).unwrap();
    (session.session, File::from(read))
}

fn read_all(mut file: File) -> String {
    let mut text = Vec::new();
    // A master whose slave is closed ends with EIO.
    let _ = file.read_to_end(&mut text);
    String::from_utf8_lossy(&text).into_owned()
}

fn app(node: &Node) -> Jail {
    node.running(&node.shell("app", "sleep 300"))
}

#[test]
fn a_command_runs_inside_under_the_same_lockdown() {
    let node = Node::new();
    let mut jail = app(&node);
    let script = "hostname; echo $PLAIN $MORE; grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status; ls -d /proc/[0-9]*; exit 4";
    let call = ExecCall { env: support::environment(&[("MORE", "more")]), ..shell(script, None) };
    let (session, output) = exec(&mut jail.client, call);
    let output = read_all(output);
    assert!(output.starts_with("app\nyes more\n"), "{output}");
    assert!(output.contains("CapEff:\t00000000000004fb") && output.contains("Seccomp:\t2"), "{output}");
    assert!(output.contains("/proc/1\n"), "{output}");
    assert_eq!(outcome(&mut jail.client, session), ExecOutcome::Exited { code: 4 });
}

#[test]
fn a_command_that_is_not_there_is_told() {
    let node = Node::new();
    let mut jail = app(&node);
    let call = ExecCall { argv: vec!["nope".into()], ..shell("", None) };
    let (session, _) = exec(&mut jail.client, call);
    let expected = ExecOutcome::Failed { error: "command not found: nope".into(), code: 127 };
    assert_eq!(outcome(&mut jail.client, session), expected);
}

#[test]
fn a_terminal_has_its_size_from_the_first_moment_and_resizes() {
    let node = Node::new();
    let mut jail = app(&node);
    let size = TtySize { rows: 41, columns: 133 };
    let script = "stty size; tty; trap 'stty size; exit 0' WINCH; echo ready; while :; do sleep 0.05; done";
    let mut session = jail.client.exec(shell(script, Some(size)), &[]).unwrap();
    let mut master = File::from(session.master.take().unwrap());
    let mut seen = String::new();
    let mut read_until = |wanted: &str, master: &mut File| {
        while !seen.contains(wanted) {
            let mut chunk = [0; 256];
            match master.read(&mut chunk) {
                Ok(length) if length > 0 => seen.push_str(&String::from_utf8_lossy(&chunk[..length])),
                _ => panic!("ended before {wanted:?}: {seen:?}"),
            }
        }
    };
    read_until("ready", &mut master);
    jail.client.exec_resize(session.session, TtySize { rows: 50, columns: 90 }).unwrap();
    read_until("50 90", &mut master);
    assert!(seen.contains("41 133") && seen.contains("/dev/pts/0"), "{seen:?}");
    assert_eq!(outcome(&mut jail.client, session.session), ExecOutcome::Exited { code: 0 });
}

#[test]
fn keys_reach_the_command_and_ctrl_c_its_group() {
    let node = Node::new();
    let mut jail = app(&node);
    let size = TtySize { rows: 24, columns: 80 };
    let mut session =
        jail.client.exec(shell("read line; echo got $line; sleep 100", Some(size)), &[]).unwrap();
    let mut master = File::from(session.master.take().unwrap());
    master.write_all(b"hello\n").unwrap();
    let mut seen = String::new();
    while !seen.contains("got hello") {
        let mut chunk = [0; 256];
        let length = master.read(&mut chunk).unwrap();
        seen.push_str(&String::from_utf8_lossy(&chunk[..length]));
    }
    // Again until it works: a shell that is just forking may lose one.
    let ended = eventually("the command's end", || {
        let _ = master.write_all(b"\x03");
        std::thread::sleep(std::time::Duration::from_millis(20));
        match jail.client.next_event().unwrap() {
            Some(Event::ExecExited { outcome, .. }) => Some(outcome),
            _ => None,
        }
    });
    assert_eq!(ended, ExecOutcome::Signaled { signal: libc::SIGINT });
}

#[test]
fn output_before_the_end_is_not_lost() {
    let node = Node::new();
    let mut jail = app(&node);
    let size = TtySize { rows: 24, columns: 80 };
    let mut session = jail.client.exec(shell("seq 1 200", Some(size)), &[]).unwrap();
    let master = File::from(session.master.take().unwrap());
    outcome(&mut jail.client, session.session);
    assert!(read_all(master).contains("\n200\r\n"));
}

#[test]
fn a_vanished_client_ends_its_command_and_the_app_stays() {
    let node = Node::new();
    let mut jail = app(&node);
    let mut other = Client::connect(&node.socket("app")).unwrap();
    let (_, output) = exec(&mut other, shell("trap '' HUP TERM; echo here; sleep 300 & wait", None));
    let mut first = [0; 5];
    let mut output = output;
    output.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"here\n");
    drop(other);
    // The pipe ends when the last process of the command's group is gone.
    assert_eq!(read_all(output), "");
    assert_eq!(jail.state(), epagent_isolation::monitor::protocol::State::Running);
}

#[test]
fn what_cannot_be_run_is_refused() {
    let node = Node::new();
    let mut jail = app(&node);
    let refused = |result: Result<_, ClientError>| matches!(result, Err(ClientError::Refused { .. }));
    assert!(refused(jail.client.exec(shell("true", None), &[])), "no descriptors");
    let call = ExecCall { argv: vec![], ..shell("", Some(TtySize { rows: 1, columns: 1 })) };
    assert!(refused(jail.client.exec(call, &[])), "no command");
    assert!(matches!(jail.client.exec_signal(99, 9), Err(ClientError::Refused { .. })), "no session");
}
