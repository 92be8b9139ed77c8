//! Limits hold against a hostile tenant, the reserve against all of them, and nothing accumulates.

mod common;

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::time::{Duration, Instant};

use common::*;
use epagent_storage::*;

const EDQUOT: i32 = 122;

fn btrfs(args: &[&str], dir: &OwnedFd, path: &str) -> bool {
    let path = fs::canonicalize(at(dir, "")).unwrap().join(path);
    Command::new("btrfs").args(args).arg(path).output().unwrap().status.success()
}

#[test]
fn a_full_volume_stays_its_own_trouble() {
    let site = Site::new();
    let pool = site.open();
    publish_release(&pool);
    let full = pool.volume_ensure(&app("greedy"), &volume("data"), Quota::mib(16)).unwrap();
    let error = fill(&at(&full, "big"), 64 * MIB).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(EDQUOT), "{error}");
    pool.sync().unwrap();
    let usage = pool.volume_list().unwrap()[0].usage;
    assert!(usage.used_bytes <= 16 << 20 && usage.used_bytes > 12 << 20, "{usage:?}");

    let other = pool.volume_ensure(&app("modest"), &volume("data"), Quota::mib(16)).unwrap();
    assert_eq!(fill(&at(&other, "file"), 8 * MIB).unwrap(), 8 * MIB);
    let root =
        pool.instance_root_create(&instance("i1"), &app("shop"), &release("r1"), Quota::mib(8)).unwrap();
    assert_eq!(fill(&at(&root, "file"), 4 * MIB).unwrap(), 4 * MIB);
    // Its own way out works at the limit.
    fs::remove_file(at(&full, "big")).unwrap();
    pool.sync().unwrap();
    assert_eq!(fill(&at(&full, "small"), 4 * MIB).unwrap(), 4 * MIB);
    drop((full, other, root));
    pool.close().unwrap();
}

#[test]
fn a_full_instance_root_is_charged_only_what_it_wrote() {
    let site = Site::new();
    let pool = site.open();
    let stage = staging("big-image");
    let dir = pool.image_stage(&stage, &image("big"), Quota::mib(64)).unwrap();
    fill(&at(&dir, "base"), 40 * MIB).unwrap();
    drop(dir);
    let id = pool.image_publish(&stage, &image("big")).unwrap();
    let stage = staging("rel");
    pool.release_stage(&stage, &app("shop"), &release("r1"), &Base::Image(id), Quota::mib(8)).unwrap();
    pool.release_publish(&stage, &app("shop"), &release("r1")).unwrap();
    let root =
        pool.instance_root_create(&instance("i1"), &app("shop"), &release("r1"), Quota::mib(8)).unwrap();
    assert_eq!(fill(&at(&root, "own"), 4 * MIB).unwrap(), 4 * MIB);
    let error = fill(&at(&root, "more"), 32 * MIB).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(EDQUOT), "{error}");
    drop(root);
    pool.close().unwrap();
}

#[test]
fn nested_subvolumes_and_snapshots_do_not_escape_the_quota() {
    let site = Site::new();
    let pool = site.open();
    if !has_simple_quotas(&pool, "nested subvolumes are held to the limit") {
        return;
    }
    let dir = pool.volume_ensure(&app("shop"), &volume("data"), Quota::mib(24)).unwrap();
    assert!(btrfs(&["subvolume", "create"], &dir, "nested"));
    assert!(btrfs(&["subvolume", "create"], &dir, "nested/deeper"));
    let data = fs::canonicalize(at(&dir, "")).unwrap();
    let snapshot = Command::new("btrfs")
        .args(["subvolume", "snapshot"])
        .args([data.join("nested"), data.join("copy")])
        .output()
        .unwrap();
    assert!(snapshot.status.success());
    let mut written = 0;
    for place in ["nested/deeper/a", "copy/b", "nested/c"] {
        match fill(&at(&dir, place), 16 * MIB) {
            Ok(bytes) => written += bytes,
            Err(error) => assert_eq!(error.raw_os_error(), Some(EDQUOT), "{error}"),
        }
    }
    assert!(written <= 24 * MIB, "{written} bytes escaped a quota of 24 MiB");
    pool.sync().unwrap();
    assert!(pool.volume_list().unwrap()[0].usage.used_bytes <= 24 << 20);
    drop(dir);
    pool.close().unwrap();
}

#[test]
fn all_tenants_together_leave_the_reserve() {
    let site = Site::new();
    let pool = site.open();
    if !has_simple_quotas(&pool, "what runs leaves the reserve") {
        return;
    }
    let (mut dirs, mut refused) = (Vec::new(), 0);
    for n in 0..6 {
        let name = volume(&format!("v{n}"));
        // Each may have the whole pool; together they may not.
        let Ok(dir) = pool.volume_ensure(&app("greedy"), &name, Quota::bytes(POOL_BYTES)) else {
            refused += 1;
            continue;
        };
        if let Err(error) = fill(&at(&dir, "big"), 96 * MIB) {
            assert_eq!(error.raw_os_error(), Some(EDQUOT), "quota, not a full disk: {error}");
            refused += 1;
        }
        dirs.push(dir);
    }
    assert!(refused > 0, "the pool of {POOL_BYTES} bytes never filled");
    pool.sync().unwrap();
    let usage = pool.usage().unwrap();
    assert!(usage.tenant_used_bytes <= usage.tenant_limit_bytes, "{usage:?}");
    // What the agent itself keeps in the pool still has room, and objects can go.
    let own = site.mount_point().join("records/.agent");
    assert_eq!(fill(&own, 24 * MIB).unwrap(), 24 * MIB);
    fs::remove_file(own).unwrap();
    drop(dirs);
    for info in pool.volume_list().unwrap() {
        pool.volume_remove(&info.app, &info.name).unwrap();
    }
    pool.close().unwrap();
}

/// The fallback of older kernels, which every kernel has.
#[test]
fn without_simple_quotas_nothing_new_is_made_from_the_reserve() {
    let site = Site::new();
    let mut config = site.config();
    config.quota.mode = Some(QuotaMode::Ordinary);
    let pool = Pool::open_or_create(&config).unwrap();
    let usage = pool.usage().unwrap();
    assert!(
        usage.tenant_limit_bytes > POOL_BYTES / 2 && usage.tenant_limit_bytes < POOL_BYTES - RESERVE_BYTES
    );
    assert!(usage.tenant_used_bytes < POOL_BYTES / 10, "{usage:?}");
    let greedy = pool.volume_ensure(&app("greedy"), &volume("data"), Quota::bytes(POOL_BYTES)).unwrap();
    fill(&at(&greedy, "big"), usage.tenant_limit_bytes as usize).unwrap_or_default();
    pool.sync().unwrap();
    let refused = pool.volume_ensure(&app("modest"), &volume("data"), Quota::mib(1)).unwrap_err();
    assert!(matches!(refused, Error::PoolFull { .. }), "{refused}");
    drop(greedy);
    pool.volume_remove(&app("greedy"), &volume("data")).unwrap();
    eventually("there is room again", || {
        pool.volume_ensure(&app("modest"), &volume("data"), Quota::mib(1)).is_ok()
    });
    pool.close().unwrap();
}

/// Fills data, empties most of it again, then makes small files until something gives way.
fn flood(pool: &Pool, dir: &OwnedFd) -> std::io::Error {
    let block = vec![7u8; 256 << 10];
    let mut files = 0;
    while fs::write(at(dir, &format!("data-{files}")), &block).is_ok() {
        files += 1;
        if files % 256 == 0 {
            pool.sync().unwrap();
        }
    }
    for n in (0..files).filter(|n| n % 10 != 0) {
        fs::remove_file(at(dir, &format!("data-{n}"))).unwrap();
    }
    pool.sync().unwrap();
    let inline = [1u8; 2000];
    (0..1_000_000).find_map(|n| fs::write(at(dir, &format!("small-{n}")), inline).err()).unwrap()
}

#[test]
fn a_flood_of_small_files_leaves_the_neighbours_and_the_agent_their_room() {
    let site = Site::new();
    let pool = site.open();
    if !has_simple_quotas(&pool, "what runs leaves its neighbours their room") {
        return;
    }
    let neighbour = pool.volume_ensure(&app("modest"), &volume("data"), Quota::mib(16)).unwrap();
    let limit = pool.usage().unwrap().tenant_limit_bytes - (16 << 20);
    let greedy = pool.volume_ensure(&app("greedy"), &volume("data"), Quota::bytes(limit)).unwrap();
    let error = flood(&pool, &greedy);
    assert_eq!(error.raw_os_error(), Some(EDQUOT), "his own quota, not a full disk: {error}");
    for n in 0..500 {
        fs::write(at(&neighbour, &format!("small-{n}")), [1u8; 2000]).unwrap();
    }
    fill(&at(&neighbour, "big"), 4 * MIB).unwrap();
    pool.log_dir_ensure(&instance("web-1"), Quota::mib(1)).unwrap();
    drop((neighbour, greedy));
    pool.volume_remove(&app("greedy"), &volume("data")).unwrap();
    pool.close().unwrap();
}

#[test]
fn a_volume_can_be_removed_when_nothing_else_works_any_more() {
    let site = Site::new();
    // As mkfs makes it: metadata apart and twice, which a flood can exhaust.
    let made = Command::new("sh")
        .args([
            "-c",
            "truncate -s 256M \"$1\" && mkfs.btrfs -q \"$1\" && mkdir \"$2\" && mount \"$1\" \"$2\"",
            "-",
        ])
        .arg(site.file())
        .arg(site.mount_point())
        .output()
        .unwrap();
    assert!(made.status.success());
    let mut config = PoolConfig::existing(site.mount_point());
    config.reserve_bytes = Some(RESERVE_BYTES);
    let pool = Pool::open_or_create(&config).unwrap();
    let dir = pool.volume_ensure(&app("greedy"), &volume("data"), Quota::bytes(POOL_BYTES)).unwrap();
    let error = flood(&pool, &dir);
    assert_eq!(error.raw_os_error(), Some(28), "{error}");
    let refused = pool.log_dir_ensure(&instance("web-1"), Quota::mib(1)).unwrap_err();
    assert!(matches!(refused, Error::PoolFull { .. }), "{refused}");
    drop(dir);
    pool.volume_remove(&app("greedy"), &volume("data")).unwrap();
    eventually("there is room again", || pool.log_dir_ensure(&instance("web-1"), Quota::mib(1)).is_ok());
    assert_eq!(pool.volume_list().unwrap(), []);
    // What of its record could not be written then goes with the next sweep.
    pool.sweep(&pool.live_set().unwrap()).unwrap();
    assert_idle(&site);
    pool.close().unwrap();
}

#[test]
fn hostile_nested_subvolumes_go_with_their_volume() {
    let site = Site::new();
    let pool = site.open();
    let dir = pool.volume_ensure(&app("shop"), &volume("data"), Quota::mib(64)).unwrap();
    let data = fs::canonicalize(at(&dir, "")).unwrap();
    let (newline, odd) = ("a\n-rf", std::ffi::OsStr::from_bytes(b"\xff\xfe;$(reboot)"));
    for name in [newline.as_ref(), odd, "--help".as_ref()] {
        // A path that starts with / keeps the tool from reading options out of it.
        let path = data.join(name);
        assert!(
            Command::new("btrfs").args(["subvolume", "create"]).arg(&path).output().unwrap().status.success()
        );
        fs::create_dir(path.join("dir")).unwrap();
        let deep = path.join("dir/deep");
        assert!(
            Command::new("btrfs").args(["subvolume", "create"]).arg(&deep).output().unwrap().status.success()
        );
        symlink("/", deep.join("out")).unwrap();
        let sealed = Command::new("btrfs")
            .args(["property", "set", "-ts"])
            .arg(&path)
            .args(["ro", "true"])
            .output()
            .unwrap();
        assert!(sealed.status.success());
    }
    assert_eq!(subvolumes(&site).len(), 7);
    drop(dir);
    pool.volume_remove(&app("shop"), &volume("data")).unwrap();
    assert_eq!(subvolumes(&site), Vec::<String>::new());
    assert_idle(&site);
    pool.close().unwrap();
}

#[test]
fn a_removed_volume_that_is_still_mounted_somewhere_is_gone_for_everybody_else() {
    let site = Site::new();
    let pool = site.open();
    drop(pool.volume_ensure(&app("shop"), &volume("data"), Quota::mib(16)).unwrap());
    let bind = site.dir.path().join("bind");
    fs::create_dir(&bind).unwrap();
    let source = site.mount_point().join("volumes/shop/data");
    assert!(Command::new("mount").arg("--bind").args([&source, &bind]).status().unwrap().success());
    pool.volume_remove(&app("shop"), &volume("data")).unwrap();
    assert_eq!(pool.volume_list().unwrap(), []);
    assert_idle(&site);
    let _ = Command::new("umount").arg(&bind).output();
    pool.close().unwrap();
}

#[test]
fn quota_groups_do_not_accumulate() {
    let site = Site::new();
    let pool = site.open();
    publish_release(&pool);
    let groups = || {
        let output =
            Command::new("btrfs").args(["qgroup", "show", "--raw"]).arg(site.mount_point()).output().unwrap();
        String::from_utf8(output.stdout).unwrap().lines().filter(|line| line.starts_with(['0', '1'])).count()
    };
    pool.sync().unwrap();
    let before = groups();
    for round in 0..3 {
        for n in 0..10 {
            let id = instance(&format!("i{round}-{n}"));
            let dir = pool.instance_root_create(&id, &app("shop"), &release("r1"), Quota::mib(4)).unwrap();
            write(&dir, "x", b"data of its own");
            drop(dir);
            pool.instance_root_remove(&id).unwrap();
        }
    }
    eventually("the groups of removed roots are gone", || {
        pool.sweep(&pool.live_set().unwrap()).unwrap();
        groups() <= before
    });
    pool.close().unwrap();
}

#[test]
fn a_hundred_instance_roots_come_and_go_quickly() {
    let site = Site::new();
    let pool = site.open();
    publish_release(&pool);
    let started = Instant::now();
    for n in 0..100 {
        let id = instance(&format!("i{n}"));
        pool.instance_root_create(&id, &app("shop"), &release("r1"), Quota::mib(4)).unwrap();
    }
    let created = started.elapsed();
    assert_eq!(pool.instance_root_list().unwrap().len(), 100);
    let started = Instant::now();
    for n in 0..100 {
        pool.instance_root_remove(&instance(&format!("i{n}"))).unwrap();
    }
    let removed = started.elapsed();
    println!("100 instance roots: created in {created:?}, removed in {removed:?}");
    let longest = Duration::from_secs(10) * slowness();
    assert!(created < longest && removed < longest, "{created:?} {removed:?}");
    pool.close().unwrap();
}
