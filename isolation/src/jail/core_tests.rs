//! The monitor's promises, without a kernel.

use super::*;

const CLIENT: ClientId = 1;

fn running() -> Core {
    let mut core = Core::new("t".into(), None);
    core.handle(Input::InitCloned { pid: 10 }, 0, 0);
    core.handle(Input::FromInit(FromInit::Started { notes: Vec::new() }), 0, 5);
    hello(&mut core, CLIENT, &[1, 2]);
    core
}

fn hello(core: &mut Core, client: ClientId, versions: &[u32]) -> Vec<Action> {
    call(core, client, Call::Hello { versions: versions.to_vec() }, 0)
}

fn call(core: &mut Core, client: ClientId, call: Call, now_ms: u64) -> Vec<Action> {
    core.handle(Input::Call { client, seq: 1, call, fds: 0 }, now_ms, 0)
}

fn finish(core: &mut Core) -> ExitRecord {
    core.handle(Input::InitEnded, 0, 0);
    assert!(core.waits_for_empty());
    let actions = core.handle(Input::Emptied { usage: LastUsage::default() }, 0, 0);
    match &actions[0] {
        Action::WriteRecord(record) => record.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_app_that_ends_by_itself_keeps_its_code() {
    let mut core = running();
    let actions = core.handle(Input::FromInit(FromInit::AppExited { code: 3 }), 0, 0);
    assert_eq!(actions, [Action::KillInstance]);
    let record = finish(&mut core);
    assert_eq!((record.reason, record.cause), (ExitReason::Exited { code: 3 }, None));
}

#[test]
fn init_killed_without_a_word_is_a_kill_and_out_of_memory_is_told() {
    let mut core = running();
    core.handle(Input::OutOfMemory, 0, 0);
    let record = finish(&mut core);
    assert_eq!((record.reason, record.oom_killed), (ExitReason::Killed, true));
}

#[test]
fn a_stop_kills_after_its_grace_and_not_before() {
    let mut core = running();
    let actions = call(&mut core, CLIENT, Call::Stop { signal: 15, grace_ms: 100 }, 1000);
    assert_eq!(actions[0], to_init(ToInit::Signal { signal: 15 }));
    assert_eq!(core.deadline_ms(), Some(1100));
    assert_eq!(core.handle(Input::Tick, 1099, 0), []);
    assert_eq!(core.handle(Input::Tick, 1100, 0), [Action::KillInstance]);
    assert_eq!(finish(&mut core).cause, Some(StopCause::StopForced));
}

#[test]
fn a_second_stop_may_shorten_the_grace_but_not_lengthen_it() {
    let mut core = running();
    call(&mut core, CLIENT, Call::Stop { signal: 15, grace_ms: 1000 }, 0);
    call(&mut core, CLIENT, Call::Stop { signal: 15, grace_ms: 9000 }, 0);
    assert_eq!(core.deadline_ms(), Some(1000));
    call(&mut core, CLIENT, Call::Stop { signal: 15, grace_ms: 10 }, 0);
    assert_eq!(core.deadline_ms(), Some(10));
}

#[test]
fn a_job_past_its_deadline_dies_in_any_phase() {
    let mut core = Core::new("t".into(), Some(50));
    core.handle(Input::InitCloned { pid: 10 }, 0, 0);
    assert_eq!(core.handle(Input::Tick, 50, 0), [Action::KillInstance]);
    assert_eq!(finish(&mut core).cause, Some(StopCause::Deadline));
    assert_eq!(core.deadline_ms(), None);
}

#[test]
fn release_is_refused_until_the_end_and_then_ends_the_monitor() {
    let mut core = running();
    let refused = call(&mut core, CLIENT, Call::Release, 0);
    assert!(matches!(&refused[..], [Action::Answer { answer: Answer::Refused { .. }, .. }]));
    core.handle(Input::FromInit(FromInit::AppExited { code: 0 }), 0, 0);
    finish(&mut core);
    assert_eq!(call(&mut core, CLIENT, Call::Release, 0).last(), Some(&Action::End));
}

#[test]
fn a_late_subscriber_is_told_what_is_past() {
    let mut core = running();
    core.handle(Input::FromInit(FromInit::AppExited { code: 0 }), 0, 0);
    finish(&mut core);
    let events: Vec<_> = call(&mut core, CLIENT, Call::Subscribe, 0)
        .into_iter()
        .filter_map(|action| match action {
            Action::Event { event, .. } => Some(event),
            _ => None,
        })
        .collect();
    assert!(matches!(&events[..], [Event::Started { .. }, Event::Exited { .. }]), "{events:?}");
}

#[test]
fn an_old_client_gets_nothing_newer_than_it_knows() {
    let mut core = running();
    let agreed = hello(&mut core, 9, &[1]);
    assert!(matches!(&agreed[..], [Action::Answer { answer: Answer::Hello { version: 1, .. }, .. }]));
    call(&mut core, 9, Call::Subscribe, 0);
    assert_eq!(core.handle(Input::LogDropped { total_bytes: 7 }, 0, 0), []);
    let exec_signal = call(&mut core, 9, Call::ExecSignal { session: 1, signal: 1 }, 0);
    assert!(matches!(&exec_signal[..], [Action::Answer { answer: Answer::Unsupported { .. }, .. }]));
    let none = hello(&mut core, 8, &[3]);
    assert!(matches!(&none[..], [Action::Answer { answer: Answer::Refused { .. }, .. }]));
}

#[test]
fn a_vanished_client_takes_its_commands_along_and_nobody_elses() {
    let mut core = running();
    hello(&mut core, 2, &[2]);
    let exec = |size| {
        let cwd = crate::id::JailPath::new("/").unwrap();
        let tty = Some(crate::monitor::protocol::TtySize { rows: size, columns: size });
        Call::Exec(crate::monitor::protocol::ExecCall {
            argv: vec!["sh".into()],
            cwd,
            env: BTreeMap::new(),
            user: None,
            tty,
        })
    };
    call(&mut core, CLIENT, exec(1), 0);
    call(&mut core, 2, exec(2), 0);
    core.handle(Input::FromInit(FromInit::ExecStarted { session: 2, pid: 5 }), 0, 0);
    let foreign = call(&mut core, CLIENT, Call::ExecSignal { session: 2, signal: 9 }, 0);
    assert!(matches!(&foreign[..], [Action::Answer { answer: Answer::Refused { .. }, .. }]));
    let gone = core.handle(Input::ClientGone { client: CLIENT }, 0, 0);
    assert_eq!(gone, [to_init(ToInit::ExecHangUp { session: 1 })]);
    let late = core.handle(Input::FromInit(FromInit::ExecStarted { session: 1, pid: 6 }), 0, 0);
    assert_eq!(late, [to_init(ToInit::ExecHangUp { session: 1 })], "it started after its client had gone");
}

/// Any order of inputs: a record is written at most once, nothing runs after it, and an end can always be reached.
#[test]
fn every_order_of_events_ends_in_one_record() {
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    for _ in 0..2000 {
        let mut core = Core::new("t".into(), Some(500));
        let mut records = 0;
        core.handle(Input::InitCloned { pid: 10 }, 0, 0);
        hello(&mut core, CLIENT, &[2]);
        for now_ms in 0..20 {
            let input = match random(9) {
                0 => Input::FromInit(FromInit::Started { notes: Vec::new() }),
                1 => Input::FromInit(FromInit::AppExited { code: 0 }),
                2 => Input::OutOfMemory,
                3 => Input::Call { client: CLIENT, seq: 1, call: Call::Kill, fds: 0 },
                4 => Input::Call {
                    client: CLIENT,
                    seq: 1,
                    call: Call::Stop { signal: 15, grace_ms: 3 },
                    fds: 0,
                },
                5 => Input::StartFailed { step: "s".into(), error: "e".into() },
                6 => Input::InitEnded,
                7 => Input::Emptied { usage: LastUsage::default() },
                _ => Input::Tick,
            };
            let actions = core.handle(input, now_ms, 1);
            records += actions.iter().filter(|action| matches!(action, Action::WriteRecord(_))).count();
            assert!(records <= 1);
        }
        let end = [Input::Tick, Input::InitEnded, Input::Emptied { usage: LastUsage::default() }];
        for input in end {
            let actions = core.handle(input, 500, 1);
            records += actions.iter().filter(|action| matches!(action, Action::WriteRecord(_))).count();
        }
        assert_eq!(records, 1);
        assert_eq!(call(&mut core, CLIENT, Call::Release, 500).last(), Some(&Action::End));
    }
}
