//! Processes that the system denies something, as a container or an older kernel would.

use std::collections::BTreeMap;
use std::process::{Child, Command};

use nix::errno::Errno;
use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};

/// Starts a process that is answered EPERM when it sets up a ring, as by a container runtime's filter.
pub fn spawn_without_rings(command: Command) -> std::io::Result<Child> {
    spawn(command, (libc::SYS_io_uring_setup, Vec::new()), Errno::EPERM)
}

/// Starts a process that meets a kernel without SO_PASSRIGHTS.
pub fn spawn_without_passrights(command: Command) -> std::io::Result<Child> {
    let is = |argument, value| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
            .expect("a condition")
    };
    let option = SeccompRule::new(vec![is(1, libc::SOL_SOCKET as u64), is(2, 83)]).expect("a rule");
    spawn(command, (libc::SYS_setsockopt, vec![option]), Errno::ENOPROTOOPT)
}

/// A filter is its thread's, and of the processes that the thread starts.
fn spawn(mut command: Command, denied: (i64, Vec<SeccompRule>), answer: Errno) -> std::io::Result<Child> {
    let arch = std::env::consts::ARCH.try_into().expect("an architecture that can be filtered");
    let answer = SeccompAction::Errno(answer as u32);
    let filter = SeccompFilter::new(BTreeMap::from([denied]), SeccompAction::Allow, answer, arch);
    let program: BpfProgram = filter.expect("a filter").try_into().expect("a program");
    std::thread::scope(|scope| {
        let spawn = scope.spawn(move || {
            apply_filter(&program).expect("a filtered thread");
            command.spawn()
        });
        spawn.join().expect("no panic")
    })
}
