//! The packages on fresh machines: installed, set up, served from, cut off, upgraded under load, removed.
//!
//! Only with `EPAGENT_TEST_VM` and packages in `target/deb` (or `EPAGENT_DEBS`): `make test` runs those on trixie,
//! `make vm-test [T=name]` all.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use epagent_tests::vm::payload::Payload;
use epagent_tests::vm::{Extent, Options, Release, Vm, wanted};

/// Where the packages lie in a machine.
const DEBS: &str = "/root/debs";
const NEW_DEBS: &str = "/root/new-debs";
const FETCH: &str = "curl -sS --fail --max-time 30 -H 'Host: hello.localhost' http://127.0.0.1/";
const VISIT: &str = "curl -sS --fail --max-time 30 -H Host:counter.localhost http://127.0.0.1/";
const EXAMPLES: &str = "/usr/share/doc/epagent/examples";
/// Requests on a kept connection and on new ones, one after the other, until `/run/enough` is there. What fails is
/// written to `/run/failed`, how many were answered to `/run/answered`.
const LOAD: &str = r#"
import http.client, os, time
answered, failed, kept = 0, [], None
while not os.path.exists("/run/enough"):
    for fresh in (False, True):
        try:
            conn = http.client.HTTPConnection("127.0.0.1", 80, timeout=60) if fresh or kept is None else kept
            conn.request("GET", "/", headers={"Host": "hello.localhost"})
            answer = conn.getresponse()
            body = answer.read()
            if answer.status != 200 or not body.startswith(b"Hello"):
                raise Exception(f"{answer.status} {body[:80]}")
            answered += 1
            closing = answer.headers.get("Connection") == "close"
            if fresh or closing: conn.close()
            kept = kept if fresh else (None if closing else conn)
        except Exception as error:
            failed.append(f"{time.time()} fresh={fresh} {error!r}")
            if not fresh: kept = None
    with open("/run/answered.new", "w") as file: file.write(str(answered))
    os.rename("/run/answered.new", "/run/answered")
open("/run/failed", "w").write("\n".join(failed))
"#;

/// The packages, without those for debuggers.
fn debs() -> Vec<PathBuf> {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/deb");
    let folder = std::env::var_os("EPAGENT_DEBS").map_or_else(default, PathBuf::from);
    let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_ours = |name: &str| name.ends_with(".deb") && !name.contains("-dbgsym_");
    let debs: Vec<PathBuf> =
        entries.filter(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(is_ours)).collect();
    assert!(!debs.is_empty(), "no packages in {}; `make deb` makes them", folder.display());
    debs
}

/// A machine that has the packages, but not installed.
#[track_caller]
fn machine(release: Release) -> Vm {
    let mut payload = Payload::default();
    for deb in debs() {
        payload.file(&deb, DEBS);
    }
    payload.text("/root/load.py", LOAD);
    payload.text("/root/autopkgtest", include_str!("../../debian/tests/deploy"));
    let vm = Vm::with(release, Options { payload, ..Options::default() });
    println!("{}: {} forked={} in {:?}", vm.name, release.name(), vm.forked, vm.took);
    vm
}

#[track_caller]
fn install(vm: &Vm, folder: &str) {
    let command = format!(
        "DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends {folder}/*.deb"
    );
    vm.run_within(&command, Duration::from_secs(60)).ok();
}

#[track_caller]
fn set_up(vm: &Vm) {
    install(vm, DEBS);
    // Inert until it is set up.
    assert_eq!(vm.succeed("systemctl list-units --no-legend --state=active 'epagent*' || true").trim(), "");
    // Hardened hosts have such a umask; the agent is not root and has to read its configuration.
    vm.run_within("umask 077; epagent init --size 3G", Duration::from_secs(60)).ok();
}

#[track_caller]
fn deploy(vm: &Vm, example: &str) {
    let command = format!("epagent deploy {EXAMPLES}/{example}");
    vm.run_within(&command, Duration::from_secs(60)).ok();
}

/// Nothing has failed, nothing was refused by the kernel, and nothing of ours complains.
#[track_caller]
fn all_is_well(vm: &Vm) {
    nothing_failed(vm);
    let complaints = vm.succeed(
        "journalctl -b -p warning --no-pager -t epagentd -t epagent-runner -t epagent-balancer -t epagent-lease \
         | grep -v '^-- ' || true",
    );
    assert_eq!(complaints, "", "in the journal");
}

#[track_caller]
fn nothing_failed(vm: &Vm) {
    assert_eq!(vm.succeed("systemctl --failed --no-legend"), "");
    let ends = vm.succeed(
        "journalctl -b --no-pager _PID=1 | grep epagent | grep -E 'Watchdog timeout|dumped core|code=exited, status=[1-9]' || true",
    );
    assert_eq!(ends, "", "a unit ended by mistake");
    let noise =
        vm.succeed("journalctl -b -k --no-pager | grep -iE 'avc:|audit.*type=1326|audit: seccomp' || true");
    assert_eq!(noise, "", "the kernel refused something");
}

/// The number of this visit, which the example keeps in a database on its volume.
#[track_caller]
fn visit(vm: &Vm) -> u64 {
    let said = vm.wait_until_succeeds(VISIT, Duration::from_secs(60));
    let number = said.strip_prefix("visit ").and_then(|rest| rest.split(' ').next()?.parse().ok());
    number.unwrap_or_else(|| panic!("{said}"))
}

#[track_caller]
fn pids(vm: &Vm) -> String {
    let list = "epagent ps --json | python3 -c 'import json,sys; \
                print(*sorted(row[\"pid\"] for row in json.load(sys.stdin) if row[\"state\"] == \"healthy\"))'";
    vm.succeed(list).trim().to_owned()
}

#[test]
fn installed_it_serves_again_after_a_reboot_and_leaves_nothing_on_trixie() {
    if wanted(Extent::Short) {
        installed_it_serves_again_after_a_reboot_and_leaves_nothing(Release::Trixie);
    }
}

#[test]
fn installed_it_serves_again_after_a_reboot_and_leaves_nothing_on_bookworm() {
    if wanted(Extent::Whole) {
        installed_it_serves_again_after_a_reboot_and_leaves_nothing(Release::Bookworm);
    }
}

fn installed_it_serves_again_after_a_reboot_and_leaves_nothing(release: Release) {
    let mut vm = machine(release);
    let before = vm.succeed("ls /etc /etc/systemd/system /usr/lib /var/lib /run");
    set_up(&vm);
    vm.fail("epagent init").fails(1, &["already_set_up"]);
    // Handed over by systemd; the agent has made none of its own.
    vm.succeed("test -f /etc/epagent/credentials/key && test ! -e /var/lib/epagent/brain/key");
    vm.succeed("systemd-analyze verify --man=no /usr/lib/systemd/system/epagent*");
    for unit in ["epagentd", "epagent-balancer", "epagent-lease"] {
        vm.succeed(&format!("systemd-analyze security --no-pager --threshold=15 {unit}"));
    }
    deploy(&vm, "hello");
    assert!(vm.succeed(FETCH).starts_with("Hello from epagent"));
    deploy(&vm, "counter");
    assert_eq!((visit(&vm), visit(&vm)), (1, 2));
    all_is_well(&vm);
    println!("{}", vm.succeed("epagent status; systemd-cgls --no-pager /epagent.slice | head -40"));

    vm.reboot();
    let again = vm.wait_until_succeeds(FETCH, Duration::from_secs(60));
    assert!(again.starts_with("Hello from epagent"), "{again}");
    assert_eq!(visit(&vm), 3);
    all_is_well(&vm);

    // What the agent says of an app is found by the app's name, and what the administrator drops in is taken.
    vm.succeed("journalctl -q -n 1 -o cat EPAGENT_APP=hello | grep -q .");
    vm.succeed("printf '[epagentd.limits]\\nreleases_kept = 7\\n' > /etc/epagent/conf.d/50-site.toml");
    vm.succeed(
        "epagent debug config | grep 'limits.releases_kept' | grep '/etc/epagent/conf.d/50-site.toml:2'",
    );

    // Nothing but the holder is the instances' life.
    let running = pids(&vm);
    assert_eq!(running.split(' ').count(), 3, "{running:?}");
    for unit in ["epagentd", "epagent-runner", "epagent-lease", "epagent-balancer"] {
        vm.succeed(&format!("systemctl restart {unit}"));
        vm.wait_until_succeeds(FETCH, Duration::from_secs(20));
        vm.succeed(&format!("systemctl kill --kill-whom=main --signal=KILL {unit}"));
        vm.wait_until_succeeds(&format!("systemctl is-active {unit} && {FETCH}"), Duration::from_secs(20));
    }
    vm.succeed(
        "systemctl kill --kill-whom=main --signal=KILL epagent-instances; sleep 1; systemctl daemon-reexec",
    );
    assert_eq!(
        vm.wait_until_succeeds(FETCH, Duration::from_secs(20)).split(',').next(),
        Some("Hello from epagent")
    );
    vm.wait_until_succeeds("epagent ps --json | grep -q healthy", Duration::from_secs(20));
    assert_eq!(pids(&vm), running, "an instance did not survive");
    all_is_well(&vm);

    vm.succeed("rm /etc/epagent/conf.d/50-site.toml");
    remove(&vm, "purge");
    let left = vm.succeed(
        "find /sys/fs/cgroup -name '*epagent*'; ip -o link | grep 'ep[0-9]' || true; \
         nft list tables | grep epagent || true; grep epagent /proc/mounts || true; losetup -a; pgrep -a epagent || true; \
         find / -xdev -name '*epagent*' -not -path '/proc/*' -not -path '/root/*' -not -path '/var/log/*' \
           -not -path '/var/lib/dpkg/*' -not -path '/var/cache/*' -not -path '/var/lib/systemd/*'",
    );
    assert_eq!(left, "", "left behind");
    assert_eq!(vm.succeed("ls /etc /etc/systemd/system /usr/lib /var/lib /run"), before);
    assert_eq!(vm.succeed("systemctl --failed --no-legend"), "");
}

/// From a bare Debian to a served app.
const README_TIME: Duration = Duration::from_secs(120);

#[test]
fn the_read_me_alone_leads_to_a_served_app() {
    if !wanted(Extent::Whole) {
        return;
    }
    let readme = include_str!("../../README.md");
    let installed = readme.split_once("\n## Installed\n").expect("the section").1;
    let block = installed.split("```").nth(1).expect("commands").strip_prefix("sh\n").expect("of a shell");
    for release in Release::ALL {
        let vm = machine(release);
        // Nobody is there to say yes, and no network to recommend from.
        vm.succeed(
            "printf 'APT::Get::Assume-Yes \"true\";\\nAPT::Install-Recommends \"false\";\\n' > /etc/apt/apt.conf.d/90alone",
        );
        let mut took = Duration::ZERO;
        for command in block.lines() {
            let script = format!("cd {DEBS}; export DEBIAN_FRONTEND=noninteractive; {command}");
            let ran = vm.run_within(&script, README_TIME);
            took += ran.took;
            println!("{}: {:5.1?} {command}", release.name(), ran.took);
            ran.ok();
        }
        assert!(vm.succeed(FETCH).starts_with("Hello from epagent"));
        println!("{}: {} commands, {took:.1?}", release.name(), block.lines().count());
        assert!(block.lines().count() <= 3 && took < README_TIME, "{took:?}");
    }
}

#[test]
fn what_was_purged_leaves_the_machine_as_it_was_on_trixie() {
    if wanted(Extent::Whole) {
        what_was_purged_leaves_the_machine_as_it_was(Release::Trixie);
    }
}

#[test]
fn what_was_purged_leaves_the_machine_as_it_was_on_bookworm() {
    if wanted(Extent::Whole) {
        what_was_purged_leaves_the_machine_as_it_was(Release::Bookworm);
    }
}

/// What piuparts does, and between two purges the packages' own test (autopkgtest).
fn what_was_purged_leaves_the_machine_as_it_was(release: Release) {
    let vm = machine(release);
    let before = files(&vm);
    install(&vm, DEBS);
    remove(&vm, "purge");
    assert_eq!(changes(&before, &files(&vm)), Vec::<String>::new(), "installed and purged");

    install(&vm, DEBS);
    vm.run_within("sh /root/autopkgtest", Duration::from_secs(120)).ok();
    remove(&vm, "remove");
    assert_eq!(
        vm.succeed("pgrep -a epagent || true; ls /etc/epagent/runner.toml"),
        "/etc/epagent/runner.toml\n"
    );
    // Removed and installed again, it goes on where it was.
    install(&vm, DEBS);
    vm.wait_until_succeeds("epagent status", Duration::from_secs(30));
    // A purge leaves the apps' files, and `init` goes on with them, pool, key and state, where it asks for the same.
    deploy(&vm, "counter");
    let visits = visit(&vm);
    apt(&vm, "purge", "");
    vm.succeed("test -e /var/lib/epagent/pool.img && test -e /etc/epagent/credentials/key");
    vm.fail("test -e /etc/epagent/runner.toml");
    install(&vm, DEBS);
    refuses_a_port_that_is_taken(&vm);
    vm.run_within("epagent init", Duration::from_secs(60)).ok();
    assert_eq!(visit(&vm), visits + 1, "the visits were forgotten");
    nothing_failed(&vm);
    remove(&vm, "purge");
    assert_eq!(
        changes(&before, &files(&vm)),
        Vec::<String>::new(),
        "installed, used, removed, installed, purged"
    );
    nothing_failed(&vm);
}

#[track_caller]
fn remove(vm: &Vm, how: &str) {
    apt(vm, how, "EPAGENT_PURGE_POOL=yes");
}

#[track_caller]
fn apt(vm: &Vm, how: &str, variable: &str) {
    let command = format!(
        "DEBIAN_FRONTEND=noninteractive {variable} apt-get {how} -y -q epagent epagent-cli epagent-doc"
    );
    vm.run_within(&command, Duration::from_secs(90)).ok();
}

/// Nothing is begun with where somebody else listens, and nothing is left of the attempt.
#[track_caller]
fn refuses_a_port_that_is_taken(vm: &Vm) {
    vm.succeed("systemd-run --quiet --unit=other python3 -m http.server 80");
    vm.wait_until_succeeds("curl -s -o /dev/null http://127.0.0.1:80/", Duration::from_secs(30));
    let ran = vm.run_within("epagent init", Duration::from_secs(60));
    assert!(ran.code == Some(1) && ran.stderr.contains("port_taken"), "{ran}");
    vm.succeed("systemctl stop other; test ! -e /etc/epagent/runner.toml");
}

/// Every file of the root's file system with its kind, mode and owner, but for what changes by itself. The accounts
/// of a package stay, as Debian's policy has it, and so do the copies that account tools keep of their files.
#[track_caller]
fn files(vm: &Vm) -> BTreeSet<String> {
    let list = "find / -xdev \\( -path /root -o -path /tmp -o -path /var/tmp -o -path /var/log -o -path /var/cache \
                -o -path /var/lib/apt -o -path /var/lib/dpkg -o -path /var/lib/systemd \\) -prune -o \
                -printf '%y %m %u:%g %p\\n' | grep -vE ' /etc/([.]pwd[.]lock|(passwd|group|shadow|gshadow|subuid|subgid)-?)$'";
    vm.succeed(list).lines().map(str::to_owned).collect()
}

fn changes(before: &BTreeSet<String>, after: &BTreeSet<String>) -> Vec<String> {
    let new = after.difference(before).map(|line| format!("+ {line}"));
    before.difference(after).map(|line| format!("- {line}")).chain(new).collect()
}

#[test]
fn power_cut_in_a_deploy_and_a_write_leaves_the_old_state_or_the_new_on_trixie() {
    if wanted(Extent::Whole) {
        power_cut_in_a_deploy_and_a_write_leaves_the_old_state_or_the_new(Release::Trixie);
    }
}

#[test]
fn power_cut_in_a_deploy_and_a_write_leaves_the_old_state_or_the_new_on_bookworm() {
    if wanted(Extent::Whole) {
        power_cut_in_a_deploy_and_a_write_leaves_the_old_state_or_the_new(Release::Bookworm);
    }
}

#[track_caller]
fn power_cut_in_a_deploy_and_a_write_leaves_the_old_state_or_the_new(release: Release) {
    let mut vm = machine(release);
    set_up(&vm);
    deploy(&vm, "counter");
    vm.succeed(&format!("cp -r {EXAMPLES}/hello /root/hello"));
    vm.run_within("epagent deploy /root/hello", Duration::from_secs(60)).ok();
    vm.succeed("sync; sed -i 's/version 1/version 2/' /root/hello/version.txt");
    // Visits one after the other. Each is in the database before it is answered.
    vm.succeed(&format!("systemd-run --quiet --unit=visits sh -c 'while {VISIT}; do :; done'"));
    // `d3`
    let cut = vm.succeed("epagent deploy --detach /root/hello 2>/dev/null");
    let answered = visit(&vm);
    vm.power_cut();
    let after = vm.wait_until_succeeds(FETCH, Duration::from_secs(60));
    assert!(after.contains("version 1") || after.contains("version 2"), "{after}");
    let now = visit(&vm);
    println!("after the power cut: {}, {answered} visits became {now}", after.trim());
    assert!(now > answered, "visit {answered} was answered and is forgotten: the next one is {now}");
    nothing_failed(&vm);
    // The deploy that was cut goes on and ends, well or not; then it can be deployed again.
    let watch = format!("epagent deploy --watch {}", cut.trim().trim_start_matches('d'));
    let watched = vm.run_within(&watch, Duration::from_secs(60));
    assert!(matches!(watched.code, Some(0 | 3)), "{watched}");
    vm.succeed("sed -i 's/version 1/version 2/' /root/hello/version.txt");
    vm.run_within("epagent deploy /root/hello", Duration::from_secs(60)).ok();
    assert!(vm.succeed(FETCH).contains("version 2"));
}

#[test]
fn an_upgrade_under_load_loses_no_request_and_no_instance_on_trixie() {
    if wanted(Extent::Short) {
        an_upgrade_under_load_loses_no_request_and_no_instance(Release::Trixie);
    }
}

#[test]
fn an_upgrade_under_load_loses_no_request_and_no_instance_on_bookworm() {
    if wanted(Extent::Whole) {
        an_upgrade_under_load_loses_no_request_and_no_instance(Release::Bookworm);
    }
}

fn an_upgrade_under_load_loses_no_request_and_no_instance(release: Release) {
    let vm = machine(release);
    set_up(&vm);
    deploy(&vm, "hello");
    // The same programs under a higher version: what an upgrade does is the scripts' and the units' affair.
    vm.run_within(
        &format!(
            "mkdir {NEW_DEBS} && for deb in {DEBS}/*.deb; do rm -rf /root/t; dpkg-deb -R $deb /root/t; \
             sed -i 's/^Version: .*/&+next/; s/\\((= [^)]*\\))/\\1+next)/' /root/t/DEBIAN/control; \
             dpkg-deb -Znone -b /root/t {NEW_DEBS}/$(basename $deb) >/dev/null; done"
        ),
        Duration::from_secs(60),
    )
    .ok();
    let (running, balancer) = (pids(&vm), vm.succeed("systemctl show -p MainPID --value epagent-balancer"));
    vm.succeed("systemd-run --quiet --unit=load python3 /root/load.py");
    let some = "test \"$(cat /run/answered)\" -gt 20";
    vm.wait_until_succeeds(some, Duration::from_secs(20));

    install(&vm, NEW_DEBS);
    assert!(vm.succeed("dpkg-query -W -f '${Version}' epagent").ends_with("+next"));
    vm.succeed("answered=$(cat /run/answered); echo $answered > /run/then");
    vm.wait_until_succeeds(
        "test \"$(cat /run/answered)\" -gt $(($(cat /run/then) + 20))",
        Duration::from_secs(20),
    );
    assert_ne!(
        vm.succeed("systemctl show -p MainPID --value epagent-balancer"),
        balancer,
        "the old balancer runs on"
    );
    // And back.
    let back = format!(
        "DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends --allow-downgrades {DEBS}/*.deb"
    );
    vm.run_within(&back, Duration::from_secs(60)).ok();
    vm.succeed("answered=$(cat /run/answered); echo $answered > /run/then");
    vm.wait_until_succeeds(
        "test \"$(cat /run/answered)\" -gt $(($(cat /run/then) + 20))",
        Duration::from_secs(20),
    );

    vm.succeed("touch /run/enough");
    vm.wait_until_succeeds("test -e /run/failed", Duration::from_secs(60));
    println!("answered: {}", vm.succeed("cat /run/answered"));
    assert_eq!(vm.succeed("cat /run/failed"), "", "requests failed");
    vm.wait_until_succeeds("epagent ps --json | grep -q healthy", Duration::from_secs(20));
    assert_eq!(pids(&vm), running, "an instance did not survive");
    all_is_well(&vm);
}
