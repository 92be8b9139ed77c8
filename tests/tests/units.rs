//! The units as systemd reads them: without a fault, and as closed as they say.
//!
//! Both are asked of `systemd-analyze`, which needs no running systemd for it. What the units do is shown in machines
//! (packages.rs).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use epagent_tests::Ran;
use epagent_tests::command;

/// What a unit may be exposed to at most, as `systemd-analyze security` counts it, from 0 to 100. The runner makes
/// namespaces, mounts and devices, and its unit says for each missing line why it is missing; it must not get worse.
const EXPOSURE_MAX: [(&str, u32); 4] =
    [("epagentd", 15), ("epagent-balancer", 15), ("epagent-lease", 15), ("epagent-runner", 90)];

fn units() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../systemd")
}

/// Whether systemd-analyze is here; says so when not.
fn can_analyze() -> bool {
    let found = Command::new("systemd-analyze").arg("--version").output().is_ok();
    if !found {
        eprintln!("SKIPPED: no systemd-analyze here; `make setup` installs it");
    }
    found
}

/// A copy of all units whose programs are the ones that were built, since none is installed here.
fn copied() -> tempfile::TempDir {
    let folder = tempfile::Builder::new().prefix("epagent-units-").tempdir().unwrap();
    let built = epagent_tests::host::binaries().canonicalize().unwrap();
    for entry in fs::read_dir(units()).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        if name.starts_with("epagent") {
            let text = fs::read_to_string(entry.path()).unwrap();
            let text = text.replace("/usr/lib/epagent/", &format!("{}/", built.display()));
            fs::write(folder.path().join(name), text).unwrap();
        }
    }
    folder
}

fn security(unit: &Path, exposure_max: u32) -> Ran {
    let threshold = format!("--threshold={exposure_max}");
    let mut analyze = Command::new("systemd-analyze");
    analyze.args(["security", "--no-pager", "--offline=yes", &threshold]).arg(unit);
    command::run(&mut analyze)
}

#[test]
fn systemd_finds_no_fault_in_any_unit() {
    if !can_analyze() {
        return;
    }
    let folder = copied();
    let units = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
    let units: Vec<PathBuf> = units
        .filter(|path| path.extension().is_some_and(|kind| kind != "sysusers" && kind != "tmpfiles"))
        .collect();
    assert!(units.len() > 10, "{units:?}");
    let mut analyze = Command::new("systemd-analyze");
    // The units of ours among those of the system, ours first.
    analyze.env("SYSTEMD_UNIT_PATH", format!("{}:", folder.path().display()));
    let ran = command::run(analyze.args(["verify", "--man=no"]).args(&units));
    // It ends with 0 after a key that it does not know, too.
    let ours: Vec<&str> = ran.stderr.lines().filter(|line| line.contains("epagent")).collect();
    assert_eq!(ran.code, Some(0), "{ran}");
    assert!(ours.is_empty(), "{ran}");
}

#[test]
fn units_are_as_closed_as_promised() {
    if !can_analyze() {
        return;
    }
    for (name, exposure_max) in EXPOSURE_MAX {
        let ran = security(&units().join(format!("{name}.service")), exposure_max);
        let last = ran.stdout.lines().last().unwrap_or_default().to_owned();
        assert_eq!(ran.code, Some(0), "{name}: at most {exposure_max} of 100 were promised\n{ran}");
        println!("{}", last.trim());
    }
}

#[test]
fn a_protection_that_is_taken_away_is_noticed() {
    if !can_analyze() {
        return;
    }
    let folder = copied();
    for (name, protection) in [
        ("epagentd", "ProtectSystem=strict\n"),
        ("epagentd", "SystemCallFilter=~@privileged @resources\n"),
        ("epagent-balancer", "NoNewPrivileges=yes\n"),
        ("epagent-balancer", "CapabilityBoundingSet=CAP_NET_BIND_SERVICE\n"),
    ] {
        let path = folder.path().join(format!("{name}.service"));
        let whole = fs::read_to_string(units().join(format!("{name}.service"))).unwrap();
        let weaker = whole.replace(protection, "");
        assert_ne!(weaker, whole, "{name} has no {protection}");
        fs::write(&path, weaker).unwrap();
        let ran = security(&path, 15);
        assert_ne!(ran.code, Some(0), "{name} without {protection} passes\n{ran}");
    }
}
