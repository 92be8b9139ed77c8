//! Images, releases, instance roots, volumes and log folders: what each promises when nothing goes wrong.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;

use common::*;
use epagent_storage::*;

#[test]
fn an_image_version_replaces_its_predecessor_at_once() {
    let site = Site::new();
    let pool = site.open();
    let first = publish_image(&pool, "py", "one");
    let second = publish_image(&pool, "py", "two");
    assert!(second.version > first.version);
    assert_eq!(pool.image_current(&image("py")).unwrap(), Some(second.clone()));
    assert_eq!(read(&pool.image_open(&first).unwrap(), "content"), "one");
    assert_eq!(read(&pool.image_open(&second).unwrap(), "content"), "two");
    let write = fs::write(at(&pool.image_open(&second).unwrap(), "x"), b"x").unwrap_err();
    assert_eq!(write.raw_os_error(), Some(30), "EROFS, not {write}");
    // Published once, however often it is asked for.
    assert_eq!(pool.image_publish(&staging("img-py-two"), &image("py")).unwrap(), second);

    assert_eq!(pool.image_gc(&BTreeSet::from([first.clone()])).unwrap(), []);
    assert_eq!(pool.image_gc(&BTreeSet::new()).unwrap(), [first]);
    let listed = pool.image_list().unwrap();
    assert_eq!(listed.len(), 1);
    assert!(listed[0].current && listed[0].id == second);
    let refused = pool.image_remove(&image("py"), &BTreeSet::from([second])).unwrap_err();
    assert!(matches!(refused, Error::ImageInUse { .. }), "{refused}");
    pool.image_remove(&image("py"), &BTreeSet::new()).unwrap();
    assert_eq!(pool.image_list().unwrap(), []);
    assert_idle(&site);
    pool.close().unwrap();
}

#[test]
fn a_release_is_built_on_an_image_and_outlives_it() {
    let site = Site::new();
    let pool = site.open();
    let id = publish_release(&pool);
    let listed = pool.release_list().unwrap();
    assert_eq!((listed.len(), listed[0].image.as_ref()), (1, Some(&id)));
    let stage = staging("rel-2");
    let again = pool.release_stage(&stage, &app("shop"), &release("r1"), &Base::Empty, Quota::mib(1));
    assert!(matches!(again, Err(Error::Conflict { .. })), "{again:?}");
    pool.image_remove(&image("py"), &BTreeSet::new()).unwrap();
    let dir = pool.release_open(&app("shop"), &release("r1")).unwrap();
    assert_eq!((read(&dir, "content"), read(&dir, "built")), ("one".into(), "app".into()));
    drop(dir);
    pool.release_remove(&app("shop"), &release("r1")).unwrap();
    pool.release_remove(&app("shop"), &release("r1")).unwrap();
    assert_eq!(pool.release_list().unwrap(), []);
    assert_eq!(entries(&site.mount_point().join("releases")), Vec::<String>::new());
    pool.close().unwrap();
}

#[test]
fn an_unpublished_release_is_not_there() {
    let site = Site::new();
    let pool = site.open();
    let (stage, shop, r1) = (staging("s1"), app("shop"), release("r1"));
    let dir = pool.release_stage(&stage, &shop, &r1, &Base::Empty, Quota::mib(8)).unwrap();
    write(&dir, "x", b"1");
    // A repeated call finds the same area; another purpose for it is refused.
    let again = pool.release_stage(&stage, &shop, &r1, &Base::Empty, Quota::mib(8)).unwrap();
    assert_eq!(read(&again, "x"), "1");
    let other = pool.image_stage(&stage, &image("py"), Quota::mib(8));
    assert!(matches!(other, Err(Error::Conflict { .. })), "{other:?}");
    assert!(matches!(pool.release_open(&shop, &r1), Err(Error::NotFound { .. })));
    assert!(pool.instance_root_create(&instance("i"), &shop, &r1, Quota::mib(1)).is_err());
    drop((dir, again));
    pool.staging_abort(&stage).unwrap();
    pool.staging_abort(&stage).unwrap();
    assert!(matches!(pool.release_publish(&stage, &shop, &r1), Err(Error::NotFound { .. })));
    assert_idle(&site);
    pool.close().unwrap();
}

#[test]
fn instance_roots_are_throw_away_copies() {
    let site = Site::new();
    let pool = site.open();
    publish_release(&pool);
    let (one, two) = (instance("web-1"), instance("web-2"));
    let first = pool.instance_root_create(&one, &app("shop"), &release("r1"), Quota::mib(8)).unwrap();
    let second = pool.instance_root_create(&two, &app("shop"), &release("r1"), Quota::mib(8)).unwrap();
    write(&first, "content", b"changed");
    assert_eq!(read(&second, "content"), "one");
    let again = pool.instance_root_create(&one, &app("shop"), &release("r1"), Quota::mib(8)).unwrap();
    assert_eq!(read(&again, "content"), "changed");
    assert_eq!(pool.instance_root_list().unwrap().len(), 2);
    // An open descriptor, like a jail's mount, does not keep a root from being removed.
    pool.instance_root_remove(&one).unwrap();
    assert_eq!(pool.instance_root_list().unwrap().len(), 1);
    drop((first, second, again));
    pool.close().unwrap();
}

#[test]
fn a_volume_keeps_its_id_and_takes_a_new_quota() {
    let site = Site::new();
    let pool = site.open();
    let (shop, data) = (app("shop"), volume("data"));
    let dir = pool.volume_ensure(&shop, &data, Quota::mib(16)).unwrap();
    assert_eq!(fs::metadata(at(&dir, "")).unwrap().mode() & 0o7777, 0o755);
    write(&dir, "row", b"1");
    drop(dir);
    let before = pool.volume_list().unwrap();
    let dir = pool.volume_ensure(&shop, &data, Quota::mib(24)).unwrap();
    assert_eq!(read(&dir, "row"), "1");
    pool.sync().unwrap();
    let after = pool.volume_list().unwrap();
    assert_eq!(before[0].volume_id, after[0].volume_id);
    assert_eq!((before[0].usage.limit_bytes, after[0].usage.limit_bytes), (16 << 20, 24 << 20));
    drop(dir);
    pool.volume_remove(&shop, &data).unwrap();
    pool.volume_ensure(&shop, &data, Quota::mib(16)).unwrap();
    assert_ne!(pool.volume_list().unwrap()[0].volume_id, after[0].volume_id);
    pool.close().unwrap();
}

#[test]
fn log_folders_have_a_quota_of_their_own() {
    let site = Site::new();
    let pool = site.open();
    let dir = pool.log_dir_ensure(&instance("web-1"), Quota::mib(4)).unwrap();
    let error = fill(&at(&dir, "current.log"), 16 * MIB).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(122), "EDQUOT, not {error}");
    assert_eq!(pool.log_dir_list().unwrap()[0].usage.limit_bytes, 4 << 20);
    drop(dir);
    pool.log_dir_remove(&instance("web-1")).unwrap();
    assert_eq!(pool.log_dir_list().unwrap(), []);
    pool.close().unwrap();
}

#[test]
fn operations_at_the_same_time_do_not_disturb_one_another() {
    let site = Site::new();
    let pool = site.open();
    publish_release(&pool);
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let pool = &pool;
            scope.spawn(move || {
                for n in 0..8 {
                    let id = instance(&format!("w{worker}-{n}"));
                    let (shop, r1) = (app("shop"), release("r1"));
                    drop(pool.instance_root_create(&id, &shop, &r1, Quota::mib(2)).unwrap());
                    drop(pool.log_dir_ensure(&id, Quota::mib(1)).unwrap());
                    pool.instance_root_remove(&id).unwrap();
                    // One and the same volume for all: the second to come is told, or finds it.
                    match pool.volume_ensure(&shop, &volume("data"), Quota::mib(8)) {
                        Ok(_) | Err(Error::Busy { .. }) => {}
                        Err(error) => panic!("{error:?}"),
                    }
                }
            });
        }
        // An empty list, but one older than all of that.
        let live = pool.live_set().unwrap();
        let pool = &pool;
        scope.spawn(move || {
            for _ in 0..10 {
                assert_eq!(pool.sweep(&live).unwrap().failed, Vec::<String>::new());
            }
        });
    });
    assert_eq!(pool.log_dir_list().unwrap().len(), 32);
    assert_eq!(pool.instance_root_list().unwrap().len(), 0);
    assert_eq!(pool.volume_list().unwrap().len(), 1);
    assert_eq!(pool.log_dir_list().unwrap().iter().filter(|dir| dir.usage.limit_bytes != 1 << 20).count(), 0);
    assert_idle(&site);
    pool.close().unwrap();
}

#[test]
fn a_symbolic_link_or_a_mount_on_the_way_is_refused() {
    let site = Site::new();
    let pool = site.open();
    let elsewhere = site.dir.path().join("elsewhere");
    fs::create_dir_all(elsewhere.join("data")).unwrap();
    std::os::unix::fs::symlink(&elsewhere, site.mount_point().join("volumes/shop")).unwrap();
    for result in [
        pool.volume_open(&app("shop"), &volume("data")),
        pool.volume_ensure(&app("shop"), &volume("data"), Quota::mib(8)),
    ] {
        assert!(matches!(result, Err(Error::Io { .. })), "{result:?}");
    }
    assert_eq!(entries(&elsewhere), ["data"]);
    drop(pool.volume_ensure(&app("mounted"), &volume("data"), Quota::mib(8)).unwrap());
    let over = site.mount_point().join("volumes/mounted/data");
    let bind = std::process::Command::new("mount").arg("--bind").args([&elsewhere, &over]).status().unwrap();
    assert!(bind.success());
    let refused = pool.volume_open(&app("mounted"), &volume("data"));
    assert!(matches!(refused, Err(Error::Io { .. })), "{refused:?}");
    assert!(std::process::Command::new("umount").arg(&over).status().unwrap().success());
    pool.close().unwrap();
}

#[test]
fn a_sweep_names_what_is_not_ours_and_leaves_it() {
    let site = Site::new();
    let pool = site.open();
    let foreign = site.mount_point().join("staging/somebody's");
    fs::create_dir(&foreign).unwrap();
    let report = pool.sweep(&pool.live_set().unwrap()).unwrap();
    assert_eq!(report.failed.len(), 1, "{report:?}");
    assert!(foreign.exists());
    pool.close().unwrap();
}
