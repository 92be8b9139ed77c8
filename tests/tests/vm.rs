//! Throwaway machines, and epagent on them: systemd as the first process, cgroup v2 alone, kernels 6.12 and 6.1.
//!
//! Only with `EPAGENT_TEST_VM=1`, since emulated machines take minutes: `make vm-test [T=name]`.

use std::time::Duration;

use epagent_tests::vm::{Release, Vm};

/// Whether machines are wanted; says so when not.
fn wanted() -> bool {
    let wanted = std::env::var("EPAGENT_TEST_VM").is_ok_and(|value| value == "1");
    if !wanted {
        eprintln!("SKIPPED: VMs are not asked for; EPAGENT_TEST_VM=1 or `make vm-test` runs this");
    }
    wanted
}

const RELEASES: [Release; 2] = [Release::Trixie, Release::Bookworm];

#[test]
fn machine_is_a_stock_debian_on_pure_cgroup_v2() {
    if !wanted() {
        return;
    }
    for release in RELEASES {
        let vm = Vm::start(release);
        assert_eq!(vm.succeed("stat -fc %T /sys/fs/cgroup").trim(), "cgroup2fs");
        assert_eq!(vm.succeed("ps -o comm= 1").trim(), "systemd");
        vm.wait_for_unit("systemd-journald");
        let failed = vm.succeed("systemctl --failed --no-legend");
        assert_eq!(failed, "");
        let kernel = vm.succeed("uname -r");
        println!(
            "{}: Linux {}, {}, forked: {}, ready after {:?}",
            release.name(),
            kernel.trim(),
            vm.accel.name(),
            vm.forked,
            vm.took
        );
        vm.fail("exit 3");
        assert_eq!(vm.run("exit 3").code, Some(3));
        assert_eq!(vm.wait_until_succeeds("echo there", Duration::from_secs(1)), "there\n");
    }
}
