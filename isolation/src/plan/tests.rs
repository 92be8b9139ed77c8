//! What the plan promises about any spec.

use std::collections::BTreeMap;

use super::*;
use crate::id::{IdRange, JailId};
use crate::spec::*;

fn spec() -> JailSpec {
    JailSpec {
        id: JailId::new("t").unwrap(),
        ids: IdRange::new(1 << 20).unwrap(),
        hostname: "t".into(),
        profile: Profile::App,
        root: RootSpec::Directory { read_only: false, idmap: true },
        mounts: Vec::new(),
        files: Vec::new(),
        resolv_conf: None,
        hosts: None,
        program: Program::Exec { argv: vec!["true".into()], cwd: path("/"), env: BTreeMap::new() },
        user: User::default(),
        limits: Limits::default(),
        network: Some(NetSpec::nth(7, 3, "10.89.0.0".parse().unwrap(), "fd77::".parse().ok())),
        deadline_ms: None,
        umask: crate::spec::UMASK_DEFAULT,
    }
}

fn volume(target: &str, index: usize) -> MountSpec {
    let source = MountSource::Descriptor { index, idmap: true, recursive: false };
    MountSpec { target: path(target), source, read_only: false, no_exec: false }
}

fn position(steps: &[Step], wanted: impl Fn(&Step) -> bool) -> usize {
    steps.iter().position(wanted).unwrap()
}

#[test]
fn proc_is_mounted_while_the_host_is_visible_and_locked_after_its_sysctls() {
    let steps = plan(&spec());
    let proc = position(&steps, |s| matches!(s, Step::Mount { kind: Kernel::Proc, .. }));
    let sysctls = position(&steps, |s| *s == Step::NetworkSysctls);
    let locked = position(&steps, |s| *s == Step::ReadOnlyProcDir { name: "sys" });
    assert!(proc < sysctls && sysctls < locked && locked < steps.len() - 1);
    assert_eq!(steps.last(), Some(&Step::Pivot));
}

#[test]
fn no_mount_hides_another() {
    let mounts = ["/data/deep/er", "/run/epagent/api", "/data", "/run/x"];
    let mounts = mounts.iter().enumerate().map(|(index, target)| volume(target, index)).collect();
    let steps = plan(&JailSpec { mounts, ..spec() });
    let attached = |target: &str| {
        position(&steps, |s| matches!(s, Step::Attach { target: t, .. } if t.as_str() == target))
    };
    let scratch =
        |dir: &str| position(&steps, |s| matches!(s, Step::Tmpfs { target, .. } if target.as_str() == dir));
    assert!(attached("/data") < attached("/data/deep/er"));
    assert!(scratch("/run") < attached("/run/x"));
    assert!(
        scratch("/run") < scratch("/run/epagent") && scratch("/run/epagent") < attached("/run/epagent/api")
    );
}

#[test]
fn read_only_comes_after_everything_made_below() {
    let root = RootSpec::Tmpfs { size_bytes: 1 << 20, symlinks: Vec::new() };
    let steps = plan(&JailSpec { root, ..spec() });
    let flips: Vec<usize> = steps
        .iter()
        .enumerate()
        .filter(|(_, s)| matches!(s, Step::ReadOnly { .. }))
        .map(|(i, _)| i)
        .collect();
    let last_made = steps
        .iter()
        .rposition(|s| matches!(s, Step::BindFile { .. } | Step::Tmpfs { .. } | Step::Attach { .. }));
    assert!(flips.len() == 3 && Some(flips[0]) > last_made);
}

#[test]
fn name_service_points_to_the_gateway() {
    assert_eq!(resolv_conf(spec().network.as_ref()), "nameserver 10.89.0.6\n");
    assert!(hosts("t", spec().network.as_ref()).contains("10.89.0.7 t\n"));
    assert_eq!(resolv_conf(None), "");
}

#[test]
fn specs_that_cannot_be_are_refused_by_field() {
    let refused = |change: fn(&mut JailSpec)| {
        let mut spec = spec();
        change(&mut spec);
        spec.check().unwrap_err().field
    };
    assert_eq!(spec().check(), Ok(()));
    assert_eq!(refused(|s| s.hostname = "a\nb".into()), "hostname");
    assert_eq!(refused(|s| s.mounts = vec![volume("/proc/sys", 0)]), "mounts[/proc/sys]");
    assert_eq!(refused(|s| s.mounts = vec![volume("/", 0)]), "mounts[/]");
    assert_eq!(refused(|s| s.mounts = vec![volume("/a", 0), volume("/a", 1)]), "mounts[/a]");
    assert_eq!(refused(|s| s.limits.memory_bytes = 1), "limits.memory_bytes");
    assert_eq!(refused(|s| s.limits.cpu_percent = 0), "limits.cpu_percent");
    assert_eq!(refused(|s| s.limits.io_bytes_per_s = Some(0)), "limits.io_bytes_per_s");
    assert_eq!(refused(|s| s.user.uid = 65_536), "user");
    assert_eq!(
        refused(|s| s.program = Program::Exec { argv: vec![], cwd: path("/"), env: BTreeMap::new() }),
        "program.argv"
    );
    assert_eq!(
        refused(
            |s| s.files = vec![FileSpec { path: path("/etc/passwd"), content: String::new(), mode: 0o644 }]
        ),
        "files[/etc/passwd]"
    );
    assert_eq!(
        refused(|s| s.network = s.network.take().map(|n| NetSpec { slot: u32::MAX, node: 65535, ..n })),
        "network"
    );
}

#[test]
fn a_spec_survives_its_own_encoding_and_strangers_do_not() {
    let json = serde_json::to_string(&spec()).unwrap();
    assert_eq!(serde_json::from_str::<JailSpec>(&json).unwrap(), spec());
    assert!(serde_json::from_str::<JailSpec>(&json.replace("\"hostname\"", "\"host_path\"")).is_err());
    assert!(serde_json::from_str::<JailSpec>(&json.replace("\"id\":\"t\"", "\"id\":\"../t\"")).is_err());
}
