//! A pool is made, found again, refused to a second agent, and taken down without a trace.

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;

use common::*;
use epagent_storage::*;

#[test]
fn a_loop_file_pool_comes_up_and_goes_without_a_trace() {
    let site = Site::new();
    let pool = site.open();
    assert!(pool.facts().created);
    assert_eq!(pool.facts().quota_mode, expected_quotas());
    let remarks = &pool.facts().remarks;
    match expected_quotas() {
        QuotaMode::Simple => assert_eq!(*remarks, Vec::<String>::new()),
        QuotaMode::Ordinary => assert!(remarks.join("; ").contains("ordinary qgroups"), "{remarks:?}"),
    }
    let device = site.loop_devices().pop().unwrap();
    let number = fs::read_to_string(format!("/sys/block/{device}/dev")).unwrap();
    let disks: Vec<String> =
        pool.disks().unwrap().iter().map(|disk| format!("{}:{}", disk.major, disk.minor)).collect();
    assert_eq!(disks, [number.trim()], "its traffic is limited on the loop device");
    let root = fs::metadata(site.mount_point().join("volumes")).unwrap();
    assert_eq!(root.permissions().mode() & 0o777, 0o700);
    let usage = pool.usage().unwrap();
    assert!(usage.tenant_limit_bytes < POOL_BYTES - RESERVE_BYTES, "{usage:?}");
    pool.close().unwrap();
    site.assert_nothing_left();
}

#[test]
fn opening_again_reuses_mount_and_loop_device() {
    let site = Site::new();
    let pool = site.open();
    pool.volume_ensure(&app("shop"), &volume("data"), Quota::mib(16)).unwrap();
    drop(pool); // As a killed agent would: the mount stays.
    let pool = site.open();
    assert!(!pool.facts().created);
    assert_eq!(pool.volume_list().unwrap().len(), 1);
    assert_eq!((site.loop_devices().len(), site.mounts().len()), (1, 1));
    pool.close().unwrap();
    site.assert_nothing_left();
    let pool = site.open();
    assert_eq!(pool.volume_list().unwrap().len(), 1);
    pool.close().unwrap();
}

#[test]
fn an_attached_but_unmounted_file_gets_no_second_device() {
    let site = Site::new();
    site.open().close().unwrap();
    let status = Command::new("losetup").arg("--find").arg(site.file()).status().unwrap();
    assert!(status.success());
    let pool = site.open();
    assert_eq!(site.loop_devices().len(), 1);
    pool.close().unwrap();
    site.assert_nothing_left();
}

#[test]
fn the_file_owns_its_blocks_and_keeps_them() {
    let site = Site::new();
    let pool = site.open();
    let dir = pool.volume_ensure(&app("shop"), &volume("data"), Quota::mib(64)).unwrap();
    fill(&at(&dir, "big"), 32 * MIB).unwrap();
    fs::remove_file(at(&dir, "big")).unwrap();
    drop(dir);
    pool.sync().unwrap();
    pool.close().unwrap();
    let owned = fs::metadata(site.file()).unwrap().blocks() * 512;
    assert!(owned >= POOL_BYTES, "{owned} of {POOL_BYTES} bytes are allocated");
}

#[test]
fn a_second_agent_on_one_pool_is_refused() {
    let site = Site::new();
    let pool = site.open();
    let refused = Pool::open_or_create(&site.config()).unwrap_err();
    assert!(matches!(refused, Error::PoolLocked { .. }), "{refused}");
    // Also when it comes by the other door.
    let mut config = PoolConfig::existing(site.mount_point());
    config.lock_wait_ms = 0;
    config.reserve_bytes = Some(RESERVE_BYTES);
    let refused = Pool::open_or_create(&config).unwrap_err();
    assert!(matches!(refused, Error::PoolLocked { .. }), "{refused}");
    drop(pool);
    Pool::open_or_create(&config).unwrap();
}

#[test]
fn a_path_that_is_not_on_btrfs_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let refused = Pool::open_or_create(&PoolConfig::existing(dir.path())).unwrap_err();
    assert!(matches!(refused, Error::NotBtrfs { .. }), "{refused}");
    assert!(refused.to_string().contains("not on btrfs"), "{refused}");
    assert_eq!(entries(dir.path()), Vec::<String>::new());
}

#[test]
fn a_file_that_is_no_pool_is_left_as_it_is() {
    let site = Site::new();
    fs::write(site.file(), vec![b'x'; 1 << 20]).unwrap();
    let refused = Pool::open_or_create(&site.config()).unwrap_err();
    assert!(matches!(refused, Error::NotBtrfs { .. }), "{refused}");
    assert_eq!(fs::read(site.file()).unwrap(), vec![b'x'; 1 << 20]);
    site.assert_nothing_left();
}

#[test]
fn a_host_disk_without_room_leaves_no_partial_file() {
    let site = Site::new();
    let mut config = site.config();
    config.location = Location::LoopFile {
        file: site.file(),
        mount_point: site.mount_point(),
        size_bytes: 1 << 50,
        allocation: Allocation::Full,
    };
    let refused = Pool::open_or_create(&config).unwrap_err();
    assert!(matches!(refused, Error::NoRoomForPool { .. }), "{refused:?}");
    assert_eq!(entries(site.dir.path()), ["pool.btrfs.lock"]);
}

#[test]
fn an_allocation_cut_short_is_done_over() {
    let site = Site::new();
    fs::write(site.dir.path().join("pool.btrfs.partial"), b"half").unwrap();
    let pool = site.open();
    pool.close().unwrap();
    assert_eq!(entries(site.dir.path()), ["pool", "pool.btrfs", "pool.btrfs.lock"]);
}

#[test]
fn a_mount_point_taken_by_something_else_is_refused() {
    let site = Site::new();
    fs::create_dir(site.mount_point()).unwrap();
    let status =
        Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(site.mount_point()).status().unwrap();
    assert!(status.success());
    let refused = Pool::open_or_create(&site.config()).unwrap_err();
    assert!(matches!(refused, Error::MountPointTaken { .. }), "{refused}");
    assert_eq!(entries(&site.mount_point()), Vec::<String>::new());
}

#[test]
fn a_pool_too_small_for_its_reserve_says_so() {
    let site = Site::new();
    let mut config = site.config();
    config.reserve_bytes = None;
    let refused = Pool::open_or_create(&config).unwrap_err();
    assert!(matches!(refused, Error::PoolTooSmall { .. }), "{refused}");
    assert_eq!(entries(site.dir.path()), ["pool.btrfs.lock"], "nothing is allocated for it");
}

#[test]
fn a_shared_btrfs_without_quotas_is_only_changed_when_allowed() {
    let site = Site::new();
    let made = Command::new("sh")
        .args([
            "-c",
            "truncate -s 400M \"$1\" && mkfs.btrfs -q \"$1\" && mkdir \"$2\" && mount \"$1\" \"$2\"",
            "-",
        ])
        .arg(site.file())
        .arg(site.mount_point())
        .status()
        .unwrap();
    assert!(made.success());
    let mut config = PoolConfig::existing(site.mount_point());
    config.reserve_bytes = Some(RESERVE_BYTES);
    config.quota.enable_on_existing = false;
    let refused = Pool::open_or_create(&config).unwrap_err();
    assert!(matches!(refused, Error::QuotaOff { .. }), "{refused}");
    config.quota.enable_on_existing = true;
    config.quota.mode = wanted_quotas();
    let pool = Pool::open_or_create(&config).unwrap();
    assert_eq!(pool.facts().quota_mode, expected_quotas());
    let remarks = pool.facts().remarks.join("; ");
    for word in ["nosuid", "nodev", "chunks apart"] {
        assert!(remarks.contains(word), "{remarks}");
    }
    pool.close().unwrap();
    assert_eq!(site.mounts().len(), 1, "what others mounted stays mounted");
}

#[test]
fn quotas_switched_off_behind_our_back_stop_new_objects_but_not_old_ones() {
    let site = Site::new();
    let pool = site.open();
    pool.volume_ensure(&app("shop"), &volume("data"), Quota::mib(16)).unwrap();
    let status = Command::new("btrfs").args(["quota", "disable"]).arg(site.mount_point()).status().unwrap();
    assert!(status.success());
    let refused = pool.volume_ensure(&app("shop"), &volume("more"), Quota::mib(16)).unwrap_err();
    assert!(matches!(refused, Error::QuotaOff { .. }), "{refused}");
    pool.volume_ensure(&app("shop"), &volume("data"), Quota::mib(16)).unwrap();
    drop(pool);
    let mut pool = site.open();
    assert_eq!(pool.facts().quota_health, QuotaHealth::Off);
    pool.quota_restore().unwrap();
    assert_eq!(pool.facts().quota_health, QuotaHealth::Good);
    pool.volume_ensure(&app("shop"), &volume("more"), Quota::mib(16)).unwrap();
    pool.close().unwrap();
}

#[test]
fn the_fallback_limits_with_ordinary_qgroups() {
    let site = Site::new();
    let mut config = site.config();
    config.quota.mode = Some(QuotaMode::Ordinary);
    let pool = Pool::open_or_create(&config).unwrap();
    assert_eq!(pool.facts().quota_mode, QuotaMode::Ordinary);
    publish_release(&pool);
    let data = pool.volume_ensure(&app("shop"), &volume("data"), Quota::mib(16)).unwrap();
    let root =
        pool.instance_root_create(&instance("i1"), &app("shop"), &release("r1"), Quota::mib(8)).unwrap();
    for dir in [&data, &root] {
        let error = fill(&at(dir, "big"), 64 * MIB).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(122), "EDQUOT, not {error}");
    }
    assert!(pool.volume_list().unwrap()[0].usage.used_bytes > 8 << 20);
    drop((data, root));
    pool.close().unwrap();
}
