//! Throwaway machines, and epagent on them: systemd as the first process, cgroup v2 alone, kernels 6.12 and 6.1.
//!
//! Only with `EPAGENT_TEST_VM`, since an emulated machine takes minutes for what takes seconds here: `make test` runs a
//! few of these (`VM=none`: none), `make vm-test [T=name]` all.

use std::time::Duration;

use epagent_tests::vm::cable::Cable;
use epagent_tests::vm::payload::Payload;
use epagent_tests::vm::suite::{self, Outcome};
use epagent_tests::vm::{Extent, Options, Release, Vm, wanted};

const STATE: &str = "/var/lib/node";
/// Tests that show nothing in a machine, and why not.
const NOT_HERE: [(&str, &str); 3] = [
    ("isolation::figures::", "it measures the processor, and this one is emulated"),
    ("isolation::start::a_helper_by_descriptor", "it needs a C compiler, and a host of epagent has none"),
    ("isolation::start::a_job_ends_at_its_deadline", "its 150 ms are over before an emulated start is"),
];
/// Of the end-to-end suites, those in which the machine decides: its cgroups, its systemd, its kernel.
const AGENT_SUITES: [&str; 4] = ["tests::inside", "tests::own_trouble", "tests::redeploy", "tests::unix"];
/// Others, on the main target alone: they take long where each step is emulated. The rest of the end-to-end suites is
/// about words and files, which no machine changes.
const LONG_SUITES: [&str; 4] = ["tests::kills", "tests::routes", "tests::verdicts", "tests::zero"];
/// Of the balancer's suites, those in which the kernel decides: what its sockets and its io_uring do.
const BALANCER_SUITES: [&str; 20] = [
    "balancer::actions",
    "balancer::bytes",
    "balancer::deploy",
    "balancer::doors",
    "balancer::faults",
    "balancer::handover",
    "balancer::health",
    "balancer::hold",
    "balancer::http",
    "balancer::limits",
    "balancer::memory",
    "balancer::preface",
    "balancer::process",
    "balancer::promises",
    "balancer::service",
    "balancer::slow_readers",
    "balancer::tcp",
    "balancer::tls",
    "balancer::unix",
    "balancer::wake",
];
/// What the manifest of examples/hello asks for.
const HELLO_MEMORY_BYTES: &str = "134217728";
const HELLO_PIDS: &str = "64";
const HELLO_IO_BYTES_PER_S: &str = "52428800";

/// Whether it is known what was built; the whole of two crates' tests is for `make vm-test` alone.
fn listed() -> bool {
    let listed = std::env::var_os("EPAGENT_TEST_LIST").is_some();
    if !listed {
        eprintln!("SKIPPED: EPAGENT_TEST_LIST names no list of test binaries; `make vm-test` does");
    }
    listed
}

/// A machine with the agent's binaries and the examples on it.
#[track_caller]
fn with_agent(release: Release) -> Vm {
    let vm = Vm::with(release, Options { payload: Payload::agent(), ..Options::default() });
    println!("{}: {} forked={} in {:?}", vm.name, release.name(), vm.forked, vm.took);
    vm
}

/// Runs `epagent dev` as a unit of its own and waits until it is ready.
#[track_caller]
fn start_node(vm: &Vm) {
    vm.succeed(&format!(
        "systemd-run --quiet --unit=node --property=KillMode=mixed --property=TimeoutStopSec=180 \
         epagent dev --state {STATE} --http 0.0.0.0:8080 --size 4G"
    ));
    let ready = format!("test -e {STATE}/ready || {{ systemctl status node >&2; false; }}");
    vm.wait_until_succeeds(&ready, Duration::from_secs(30));
}

/// Ends it in order; nothing may be left.
#[track_caller]
fn stop_node(vm: &Vm) {
    vm.run_within("systemctl stop node", Duration::from_secs(30)).ok();
    assert_eq!(vm.succeed("systemctl is-failed node || true").trim(), "inactive");
    let left = vm.succeed(
        "find /sys/fs/cgroup -maxdepth 1 -name 'epagent*'; ip -o link | grep 'ep[0-9]' || true; \
         nft list tables | grep epagent || true; grep /var/lib/node /proc/mounts || true; losetup -a; \
         pgrep -a epagent || true",
    );
    assert_eq!(left, "", "left behind");
}

#[track_caller]
fn epagent(vm: &Vm, arguments: &str) -> epagent_tests::Ran {
    vm.run_within(&format!("EPAGENT_SOCKET={STATE}/admin.sock epagent {arguments}"), Duration::from_secs(60))
}

/// Pids of the healthy instances of an app, as the agent tells them.
#[track_caller]
fn pids(vm: &Vm, app: &str) -> Vec<i64> {
    let rows: serde_json::Value = serde_json::from_str(&epagent(vm, "ps --json").ok()).unwrap();
    let rows = rows.as_array().unwrap().iter();
    let mut pids: Vec<i64> = rows
        .filter(|row| row["app"] == app && row["state"] == "healthy")
        .filter_map(|row| row["pid"].as_i64())
        .collect();
    pids.sort_unstable();
    pids
}

#[track_caller]
fn fetch(vm: &Vm, host: &str) -> String {
    vm.succeed(&format!("curl -sS --fail --max-time 60 -H 'Host: {host}' http://127.0.0.1:8080/"))
}

#[test]
fn machine_is_a_stock_debian_on_pure_cgroup_v2_on_trixie() {
    if wanted(Extent::Short) {
        machine_is_a_stock_debian_on_pure_cgroup_v2(Release::Trixie);
    }
}

#[test]
fn machine_is_a_stock_debian_on_pure_cgroup_v2_on_bookworm() {
    if wanted(Extent::Whole) {
        machine_is_a_stock_debian_on_pure_cgroup_v2(Release::Bookworm);
    }
}

fn machine_is_a_stock_debian_on_pure_cgroup_v2(release: Release) {
    let vm = Vm::start(release);
    assert_eq!(vm.succeed("stat -fc %T /sys/fs/cgroup").trim(), "cgroup2fs");
    assert_eq!(vm.succeed("ps -o comm= 1").trim(), "systemd");
    vm.wait_for_unit("systemd-journald");
    assert_eq!(vm.succeed("systemctl --failed --no-legend"), "");
    let kernel = vm.succeed("uname -r");
    let (name, accel) = (release.name(), vm.accel.name());
    println!("{name}: Linux {}, {accel}, forked={} in {:?}", kernel.trim(), vm.forked, vm.took);
    assert_eq!(vm.fail("echo said; exit 3").code, Some(3));
    assert_eq!(vm.wait_until_succeeds("echo there", Duration::from_secs(1)), "there\n");
}

#[test]
fn forks_of_one_machine_are_different_machines() {
    if !wanted(Extent::Short) {
        return;
    }
    let one = Vm::start(Release::Trixie);
    let other = Vm::start(Release::Trixie);
    for what in ["cat /etc/machine-id", "hostname", "head -c 16 /dev/urandom | base64"] {
        assert_ne!(one.succeed(what), other.succeed(what), "{what}");
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let there: u64 = one.succeed("date +%s").trim().parse().unwrap();
    assert!(there.abs_diff(now) < 10, "the clock of a fork is {there}, it is {now}");
    one.succeed("echo mine > /etc/changed; sync");
    other.fail("test -e /etc/changed");
}

#[test]
fn power_cut_loses_what_was_not_written_and_keeps_what_was() {
    if !wanted(Extent::Short) {
        return;
    }
    let mut vm = Vm::start(Release::Trixie);
    vm.succeed("echo kept > /var/tmp/kept; sync; sysctl -qw vm.dirty_writeback_centisecs=0");
    vm.succeed("echo lost > /var/tmp/lost");
    vm.power_cut();
    assert_eq!(vm.succeed("cat /var/tmp/kept"), "kept\n");
    assert_eq!(vm.succeed("cat /var/tmp/lost 2>/dev/null || true"), "");
    assert_eq!(vm.succeed("hostname").trim(), vm.name);
    vm.succeed("echo orderly > /var/tmp/orderly");
    vm.reboot();
    assert_eq!(vm.succeed("cat /var/tmp/orderly"), "orderly\n");
}

#[test]
fn hello_runs_confined_and_survives_kills_on_trixie() {
    if wanted(Extent::Whole) {
        hello_runs_confined_and_survives_kills(Release::Trixie);
    }
}

#[test]
fn hello_runs_confined_and_survives_kills_on_bookworm() {
    if wanted(Extent::Whole) {
        hello_runs_confined_and_survives_kills(Release::Bookworm);
    }
}

fn hello_runs_confined_and_survives_kills(release: Release) {
    let vm = with_agent(release);
    start_node(&vm);
    epagent(&vm, "deploy /root/examples/hello").ok();
    let body = fetch(&vm, "hello.localhost");
    assert!(body.starts_with("Hello from epagent"), "{body}");
    let doctor = epagent(&vm, "doctor").stdout;
    println!("{doctor}");
    assert!(
        doctor.lines().any(|line| line.contains("io.max") && line.contains("present")),
        "io.max is absent"
    );

    assert_limits(&vm);
    // systemd rewrites the controllers of the root for its own units; those of the instances stay.
    vm.succeed("systemctl daemon-reload; systemd-run --quiet --wait --property=CPUWeight=50 true; systemctl daemon-reexec");
    assert_limits(&vm);

    let before = pids(&vm, "hello");
    assert_eq!(before.len(), 2, "{before:?}");
    for part in ["epagentd", "epagent-runner", "epagent-lease"] {
        kill_part(&vm, part);
        assert_eq!(fetch(&vm, "hello.localhost").split(',').next(), Some("Hello from epagent"));
    }
    vm.wait_until_succeeds(
        &format!("EPAGENT_SOCKET={STATE}/admin.sock epagent ps --json | grep -q healthy"),
        Duration::from_secs(20),
    );
    assert_eq!(pids(&vm, "hello"), before, "an instance did not survive");

    a_writer_is_held_to_its_rate(&vm);
    hog_dies_as_a_whole(&vm);
    assert_eq!(pids(&vm, "hello"), before, "a neighbour of the hog did not survive");
    stop_node(&vm);
}

/// The limits that the kernel holds for every instance of hello.
#[track_caller]
fn assert_limits(vm: &Vm) {
    let apps = vm.succeed("find /sys/fs/cgroup/epagent-* -mindepth 2 -maxdepth 2 -type d -name app");
    assert_eq!(apps.lines().count(), 2, "{apps}");
    let disk = vm.succeed("losetup --noheadings --output MAJ:MIN").trim().to_owned();
    for cgroup in apps.lines() {
        let read = |file: &str| vm.succeed(&format!("cat {cgroup}/{file}")).trim().to_owned();
        assert_eq!(read("memory.max"), HELLO_MEMORY_BYTES);
        assert_eq!(read("memory.oom.group"), "1");
        assert_eq!(read("pids.max"), HELLO_PIDS);
        assert!(!read("cpu.max").starts_with("max"), "no processor limit: {}", read("cpu.max"));
        let rates =
            format!("{disk} rbps={HELLO_IO_BYTES_PER_S} wbps={HELLO_IO_BYTES_PER_S} riops=max wiops=max");
        assert_eq!(read("io.max"), rates);
        let shown = "cd $0; grep -H . cgroup.controllers cpu.max cpu.weight memory.high memory.swap.max io.max || true";
        println!("{}", vm.succeed(&shown.replace("$0", cgroup)));
    }
}

/// `kill -9`; waits until the part runs again.
#[track_caller]
fn kill_part(vm: &Vm, part: &str) {
    // By the executable: parts that are started from a descriptor have a number for a name.
    let find = format!("find /proc -maxdepth 2 -name exe -lname '*/{part}' 2>/dev/null | cut -d/ -f3");
    let old = vm.succeed(&find);
    assert_eq!(old.lines().count(), 1, "{part}: {old:?}");
    vm.succeed(&format!("kill -9 {old}"));
    let again = format!("now=$({find}); test -n \"$now\" && test \"$now\" != {}", old.trim());
    vm.wait_until_succeeds(&again, Duration::from_secs(20));
}

/// What goes through the page cache counts to the app that wrote it, whoever flushes it.
fn a_writer_is_held_to_its_rate(vm: &Vm) {
    vm.succeed(
        r#"mkdir -p /srv/writer && cat > /srv/writer/epagent.toml <<'END'
app = "writer"
image = "host"
[process.web]
command = "sleep 1004"
[process.web.limits]
io = "1M"
END"#,
    );
    epagent(vm, "deploy /srv/writer").ok();
    // `8388608 bytes (8.4 MB, 8.0 MiB) copied, 8.09 s, 1.0 MB/s`, flushing included.
    let took_s = |app: &str| -> f64 {
        let write = "dd if=/dev/zero of=/app/written bs=256k count=32 conv=fsync";
        let ran = epagent(vm, &format!("exec {app} -- {write}"));
        println!("{app}: {}", ran.stderr.trim());
        let told = ran.stderr.rsplit("copied, ").next().and_then(|rest| rest.split(' ').next()?.parse().ok());
        told.unwrap_or_else(|| panic!("{ran}"))
    };
    let (writer, neighbour) = (took_s("writer"), took_s("hello"));
    assert!(writer > 6.0, "eight mebibytes went at a rate of one per second in {writer} s");
    assert!(neighbour < writer / 2.0, "the neighbour took {neighbour} s, the writer {writer} s");
}

/// One process of several takes more memory than the instance may: all of them die, and the verdict says why.
fn hog_dies_as_a_whole(vm: &Vm) {
    vm.succeed(
        r#"mkdir -p /srv/hog && cat > /srv/hog/epagent.toml <<'END'
app = "hog"
image = "host"
[process.web]
command = "sleep 1001 & sleep 1002 & python3 -c 'b = bytearray(300 << 20)'; sleep 1003"
[process.web.limits]
memory = "64M"
[process.web.health]
http = "/"
deadline = "120s"
END"#,
    );
    let ran = epagent(vm, "deploy /srv/hog");
    ran.clone().fails(3, &["out_of_memory"]);
    println!("{}", ran.stderr);
    vm.fail("pgrep -af 'sleep 100[123]'");
}

#[test]
fn power_cut_in_a_deploy_leaves_the_old_release_or_the_new() {
    if !wanted(Extent::Whole) {
        return;
    }
    let mut vm = with_agent(Release::Trixie);
    start_node(&vm);
    epagent(&vm, "deploy /root/examples/hello").ok();
    let old = fetch(&vm, "hello.localhost");
    assert!(old.contains("version 1"), "{old}");
    vm.succeed("sed -i 's/version 1/version 2/' /root/examples/hello/version.txt; sync");
    // `d2`
    let cut = epagent(&vm, "deploy --detach /root/examples/hello").ok();
    vm.power_cut();
    start_node(&vm);
    let fetching = "curl -sS --fail --max-time 20 -H 'Host: hello.localhost' http://127.0.0.1:8080/";
    let after = vm.wait_until_succeeds(fetching, Duration::from_secs(60));
    assert!(after.contains("version 1") || after.contains("version 2"), "{after}");
    println!("after the power cut: {}", after.trim());
    // The deploy that was cut goes on and ends, well or not; then it can be deployed again.
    let watched = epagent(&vm, &format!("deploy --watch {}", cut.trim().trim_start_matches('d')));
    println!("{watched}");
    assert!(matches!(watched.code, Some(0 | 3)), "{watched}");
    epagent(&vm, "deploy /root/examples/hello").ok();
    assert!(fetch(&vm, "hello.localhost").contains("version 2"));
    stop_node(&vm);
}

#[test]
fn three_machines_reach_each_other_until_they_are_parted() {
    if !wanted(Extent::Whole) {
        return;
    }
    let cable = Cable::with_ends(3);
    let mut machines: Vec<Vm> = (0..3)
        .map(|index| {
            let name = format!("node{}", index + 1);
            Vm::with(Release::Trixie, Options { name, plug: Some(cable.plug(index)), ..Options::default() })
        })
        .collect();
    let address = |index: usize| cable.plug(index).address();
    let reach = |machines: &[Vm], from: usize, to: usize| {
        machines[from].wait_until_succeeds(&format!("ping -c 1 -W 5 {}", address(to)), Duration::from_secs(5))
    };
    let lost = |machines: &[Vm], from: usize, to: usize| {
        machines[from].fail(&format!("ping -c 2 -W 2 {}", address(to)))
    };
    for (from, to) in [(0, 1), (1, 2), (2, 0)] {
        reach(&machines, from, to);
    }
    // Between two of them: both still reach the third.
    cable.cut(0, 1);
    lost(&machines, 0, 1);
    lost(&machines, 1, 0);
    reach(&machines, 0, 2);
    reach(&machines, 1, 2);
    cable.heal(0, 1);
    reach(&machines, 0, 1);
    // At a machine's own end: it sees its carrier go.
    machines[2].set_link(false);
    machines[2]
        .wait_until_succeeds("test \"$(cat /sys/class/net/eth0/carrier)\" = 0", Duration::from_secs(5));
    lost(&machines, 0, 2);
    machines[2].set_link(true);
    reach(&machines, 2, 0);
    // One loses its power; the others go on.
    machines[1].power_cut();
    reach(&machines, 0, 2);
    let setup = cable.plug(1).setup();
    machines[1].succeed(&setup);
    reach(&machines, 0, 1);
}

#[test]
fn isolation_and_storage_keep_their_promises_on_trixie() {
    if wanted(Extent::Whole) && listed() {
        suites_pass(Release::Trixie, &["isolation", "storage"], &[]);
    }
}

#[test]
fn isolation_and_storage_keep_their_promises_on_bookworm() {
    if wanted(Extent::Whole) && listed() {
        suites_pass(Release::Bookworm, &["isolation", "storage"], &[]);
    }
}

#[test]
fn the_balancer_keeps_its_promises_on_trixie() {
    if wanted(Extent::Whole) && listed() {
        suites_pass(Release::Trixie, &["balancer"], &BALANCER_SUITES);
    }
}

#[test]
fn the_balancer_keeps_its_promises_on_bookworm() {
    if wanted(Extent::Whole) && listed() {
        suites_pass(Release::Bookworm, &["balancer"], &BALANCER_SUITES);
    }
}

#[test]
fn apps_deploys_and_kills_keep_their_promises_on_trixie() {
    if wanted(Extent::Whole) && listed() {
        suites_pass(Release::Trixie, &["tests"], &AGENT_SUITES);
    }
}

#[test]
fn apps_deploys_and_kills_keep_their_promises_on_bookworm() {
    if wanted(Extent::Whole) && listed() {
        suites_pass(Release::Bookworm, &["tests"], &AGENT_SUITES);
    }
}

#[test]
fn kills_routes_and_verdicts_keep_their_promises_on_trixie() {
    if wanted(Extent::Whole) && listed() {
        suites_pass(Release::Trixie, &["tests"], &LONG_SUITES);
    }
}

/// Runs the behaviour tests of some crates inside, and says what ran and what did not. Of their binaries those that
/// `named` names, or all. `EPAGENT_VM_BINARY` and `EPAGENT_VM_TEST` choose among them by parts of their names.
fn suites_pass(release: Release, crates: &[&str], named: &[&str]) {
    let (mut binaries, programs) = suite::built(crates);
    binaries.retain(|one| named.is_empty() || named.contains(&one.name.as_str()));
    assert!(!binaries.is_empty(), "no test binaries of {crates:?}");
    let chosen = |name: &str| std::env::var(name).unwrap_or_default();
    let (binary, test) = (chosen("EPAGENT_VM_BINARY"), chosen("EPAGENT_VM_TEST"));
    let binaries: Vec<_> = binaries.into_iter().filter(|one| one.name.contains(&binary)).collect();
    let payload = suite::payload(&binaries, &programs);
    let vm = Vm::with(release, Options { payload, ..Options::default() });
    let mut results = Vec::new();
    for binary in &binaries {
        for result in vm.run_tests(binary, &test, &NOT_HERE) {
            println!("{} {result}", release.name());
            if let Outcome::Failed(why) = &result.outcome {
                println!("{why}");
            }
            results.push(result);
        }
    }
    let count = |is: fn(&Outcome) -> bool| results.iter().filter(|result| is(&result.outcome)).count();
    println!(
        "{}: {} passed, {} skipped, {} failed",
        release.name(),
        count(|outcome| *outcome == Outcome::Passed),
        count(|outcome| matches!(outcome, Outcome::Skipped(_))),
        count(|outcome| matches!(outcome, Outcome::Failed(_)))
    );
    let failed: Vec<&str> = results
        .iter()
        .filter(|result| matches!(result.outcome, Outcome::Failed(_)))
        .map(|result| result.test.as_str())
        .collect();
    assert!(failed.is_empty(), "failed:\n{}", failed.join("\n"));
}

/// What a front's own memory may come to with the crowd below, in KiB.
const FRONT_KIB_MAX: u64 = 64 * 1024;

#[test]
fn ten_thousand_idle_and_a_thousand_busy_connections_fit_in_64_mib() {
    if !wanted(Extent::Whole) {
        return;
    }
    let (idle, busy) = (10_000, 1_000);
    let mut payload = Payload::default();
    for program in ["epagent-balancer", "epagent-load"] {
        payload.program(&epagent_tests::host::binary(program), &format!("/usr/local/bin/{program}"));
    }
    let vm = Vm::with(Release::Trixie, Options { payload, ..Options::default() });
    vm.succeed("sysctl -qw net.ipv4.ip_local_port_range='1024 65535'");
    let unit = |name: &str, command: &str| {
        vm.succeed(&format!("systemd-run --quiet --unit={name} --property=LimitNOFILE=100000 {command}"));
    };
    unit("backend", "epagent-load backend 127.0.0.1:700 /run/backend.sock 127.0.0.1:701");
    unit("front", "epagent-balancer run --mode tcp --listen 127.0.0.1:800 --upstream 127.0.0.1:700");
    vm.wait_until_succeeds(
        "ss -Hltn 'sport = :800' | grep -q . && ss -Hltn 'sport = :700' | grep -q .",
        Duration::from_secs(10),
    );
    let crowd = format!("epagent-load crowd 127.0.0.1:800 {idle} {busy} 60");
    unit("crowd", &format!("--property=StandardOutput=file:/run/crowd --remain-after-exit {crowd}"));
    vm.wait_until_succeeds(&format!("grep -q '^idle.{idle}$' /run/crowd"), Duration::from_secs(120));
    // While the busy ones are at it.
    let pss =
        "pid=$(systemctl show --value -p MainPID front); awk '/^Pss:/ {print $2}' /proc/$pid/smaps_rollup";
    let mut most_kib = 0;
    vm.wait_until_succeeds(
        "ss -Htn state established 'dport = :800' | wc -l | grep -qx 11000",
        Duration::from_secs(60),
    );
    for _ in 0..5 {
        most_kib = most_kib.max(vm.succeed(pss).trim().parse().unwrap());
    }
    vm.wait_until_succeeds("grep -q ^served /run/crowd", Duration::from_secs(180));
    println!("{}", vm.succeed("cat /run/crowd; cat /sys/fs/cgroup/system.slice/front.service/memory.stat | grep -E '^(anon|sock|slab|kernel) '"));
    println!("most memory of the front, PSS: {most_kib} KiB");
    vm.succeed(&format!("grep -q '^served.{idle}$' /run/crowd && grep -q 'failed.0.p50' /run/crowd"));
    assert!(most_kib <= FRONT_KIB_MAX, "{most_kib} KiB");
}
