//! Whatever is cut short, by `kill -9` or by a power cut, ends in the old state or the new after the next sweep.
//!
//! `kill -9`: a process of its own performs the operation and is killed just before its n-th step, for each n until the
//! operation completes. Power cut: the pool's file is copied just before each step, and each copy opened.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use common::*;
use epagent_storage::*;

/// More steps than any operation has.
const STEPS_MAX: u32 = 64;

/// An operation under test, and what is true of the pool before and after it.
struct Case {
    name: &'static str,
    prepare: fn(&Pool),
    act: fn(&Pool) -> Result<()>,
    /// What a caller can see; compared between cut, old and new.
    view: fn(&Pool) -> String,
}

const CASES: &[Case] = &[
    Case {
        name: "publish an image",
        prepare: |pool| {
            publish_image(pool, "py", "one");
            let dir = pool.image_stage(&staging("next"), &image("py"), Quota::mib(16)).unwrap();
            write(&dir, "content", b"two");
        },
        act: |pool| pool.image_publish(&staging("next"), &image("py")).map(drop),
        view: view_image,
    },
    Case {
        name: "stage an image",
        prepare: |pool| drop(publish_image(pool, "py", "one")),
        act: |pool| pool.image_stage(&staging("next"), &image("py"), Quota::mib(16)).map(drop),
        view: view_image,
    },
    Case {
        name: "remove an image",
        prepare: |pool| drop(publish_image(pool, "py", "one")),
        act: |pool| pool.image_remove(&image("py"), &BTreeSet::new()),
        view: view_image,
    },
    Case {
        name: "stage and publish a release",
        prepare: |pool| drop(publish_image(pool, "py", "one")),
        act: |pool| {
            let id = pool.image_current(&image("py"))?.unwrap();
            let (stage, shop, r1) = (staging("rel-1"), app("shop"), release("r1"));
            let dir = match pool.release_stage(&stage, &shop, &r1, &Base::Image(id), Quota::mib(16)) {
                // A retry after the move: only the publication is to be completed.
                Err(Error::Conflict { .. }) => None,
                other => Some(other?),
            };
            if let Some(dir) = dir {
                write(&dir, "built", b"app");
            }
            pool.release_publish(&stage, &shop, &r1)
        },
        view: |pool| match pool.release_open(&app("shop"), &release("r1")) {
            Ok(dir) => format!("{}+{}", read(&dir, "content"), read(&dir, "built")),
            Err(_) => "none".into(),
        },
    },
    Case {
        name: "create an instance root",
        prepare: |pool| drop(publish_release(pool)),
        act: |pool| {
            pool.instance_root_create(&instance("i1"), &app("shop"), &release("r1"), Quota::mib(4)).map(drop)
        },
        view: |pool| match pool.instance_root_open(&instance("i1")) {
            Ok(dir) => format!("{} {}", read(&dir, "content"), pool.instance_root_list().unwrap().len()),
            Err(_) => "none".into(),
        },
    },
    Case {
        name: "make a volume",
        prepare: |_| {},
        act: |pool| pool.volume_ensure(&app("shop"), &volume("data"), Quota::mib(16)).map(drop),
        view: view_volume,
    },
    Case {
        name: "remove a volume",
        prepare: |pool| {
            let dir = pool.volume_ensure(&app("shop"), &volume("data"), Quota::mib(16)).unwrap();
            write(&dir, "row", b"1");
            let nested = fs::canonicalize(at(&dir, "")).unwrap().join("nested");
            assert!(
                Command::new("btrfs")
                    .args(["subvolume", "create"])
                    .arg(nested)
                    .output()
                    .unwrap()
                    .status
                    .success()
            );
        },
        act: |pool| pool.volume_remove(&app("shop"), &volume("data")),
        view: view_volume,
    },
];

fn view_image(pool: &Pool) -> String {
    match pool.image_current(&image("py")).unwrap() {
        Some(id) => read(&pool.image_open(&id).unwrap(), "content"),
        None => "none".into(),
    }
}

fn view_volume(pool: &Pool) -> String {
    let volumes = pool.volume_list().unwrap();
    let ids = volumes.iter().map(|v| (v.volume_id.len(), v.usage.limit_bytes));
    format!("{:?}", ids.collect::<Vec<_>>())
}

/// Names the pool, the case and the step for [`the_child_that_is_cut_short`].
const CHILD: &str = "EPAGENT_TEST_CUT";

/// Performs a case in a process of its own that is killed just before its `cut`-th step; true when it came to its end.
fn killed_at(site: &Site, cut: u32, index: usize) -> bool {
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_child_that_is_cut_short", "--ignored", "--nocapture", "--test-threads=1"])
        .env(CHILD, format!("{cut} {index} {}", site.dir.path().display()))
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success() || status.signal() == Some(9), "{}, step {cut}: {status}", CASES[index].name);
    status.success()
}

#[test]
#[ignore = "run by the other tests as their child"]
fn the_child_that_is_cut_short() {
    let Ok(order) = std::env::var(CHILD) else { return };
    let mut words = order.splitn(3, ' ');
    let mut word = || words.next().unwrap();
    let (cut, index): (u32, usize) = (word().parse().unwrap(), word().parse().unwrap());
    let mut pool = Pool::open_or_create(&config_in(word().as_ref())).unwrap();
    let steps = AtomicU32::new(0);
    pool.observe_steps(Box::new(move |_| {
        if steps.fetch_add(1, Ordering::Relaxed) == cut {
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
        }
    }));
    (CASES[index].act)(&pool).unwrap();
}

/// The views before and after an operation that nothing interrupts.
fn old_and_new(case: &Case) -> (String, String) {
    let site = Site::new();
    let pool = site.open();
    (case.prepare)(&pool);
    let old = (case.view)(&pool);
    (case.act)(&pool).unwrap();
    let new = (case.view)(&pool);
    pool.close().unwrap();
    (old, new)
}

fn known_subvolumes(site: &Site, pool: &Pool) -> usize {
    let known = pool.image_list().unwrap().len()
        + pool.release_list().unwrap().len()
        + pool.instance_root_list().unwrap().len()
        + pool.volume_list().unwrap().len();
    // A nested one belongs to its volume.
    known + subvolumes(site).iter().filter(|path| path.ends_with("/nested")).count()
}

fn assert_whole(site: &Site, pool: &Pool, case: &Case, cut: u32, (old, new): &(String, String)) {
    let view = (case.view)(pool);
    assert!(view == *old || view == *new, "{} cut before step {cut}: {view}, not {old} or {new}", case.name);
    assert_idle(site);
    assert_eq!(subvolumes(site).len(), known_subvolumes(site, pool), "{} cut before step {cut}", case.name);
}

fn live(pool: &Pool) -> LiveSet {
    let mut live = pool.live_set().unwrap();
    // The brain would know the instance it was starting.
    live.instances.insert(instance("i1"));
    live
}

fn kill_everywhere(index: usize) {
    let case = &CASES[index];
    let states = old_and_new(case);
    let mut ended = 0;
    for cut in 0..STEPS_MAX {
        let site = Site::new();
        let pool = site.open();
        (case.prepare)(&pool);
        drop(pool);
        let done = killed_at(&site, cut, index);
        let pool = site.open();
        if done {
            assert!(cut > 2, "{} has only {cut} steps", case.name);
            assert!(ended > 0, "no cut of {} left anything to do, so nothing was shown", case.name);
            assert_eq!((case.view)(&pool), states.1);
            pool.close().unwrap();
            return;
        }
        if cut % 2 == 0 {
            // The caller simply asks again, without a sweep in between.
            (case.act)(&pool).unwrap_or_else(|e| panic!("{} again after step {cut}: {e:?}", case.name));
            assert_eq!((case.view)(&pool), states.1, "{} again after step {cut}", case.name);
        }
        let report = pool.sweep(&live(&pool)).unwrap();
        assert_eq!(report.failed, Vec::<String>::new());
        ended += report.finished.len() + report.undone.len();
        assert_whole(&site, &pool, case, cut, &states);
        pool.close().unwrap();
    }
    panic!("{} never came to its end", case.name);
}

/// Copies the pool's file at each step, as a power cut would leave it, and opens the copies.
fn power_cut_everywhere(index: usize) {
    let case = &CASES[index];
    let states = old_and_new(case);
    let site = Site::new();
    let pool = site.open();
    (case.prepare)(&pool);
    pool.sync().unwrap();
    drop(pool);
    let images = tempfile::tempdir().unwrap();
    let (from, to) = (site.file(), images.path().to_owned());
    let count = AtomicU32::new(0);
    let mut pool = site.open();
    pool.observe_steps(Box::new(move |_| {
        let to = to.join(count.fetch_add(1, Ordering::Relaxed).to_string());
        assert!(Command::new("cp").arg("--sparse=always").args([&from, &to]).status().unwrap().success());
    }));
    (case.act)(&pool).unwrap();
    let after = images.path().join("after");
    assert!(
        Command::new("cp").arg("--sparse=always").args([&site.file(), &after]).status().unwrap().success()
    );
    pool.close().unwrap();
    drop(site);

    for name in entries(images.path()) {
        let site = Site::new();
        fs::rename(images.path().join(&name), site.file()).unwrap();
        let pool = site.open();
        let report = pool.sweep(&live(&pool)).unwrap();
        assert_eq!(report.failed, Vec::<String>::new(), "{} cut at {name}", case.name);
        assert_whole(&site, &pool, case, name.parse().unwrap_or(STEPS_MAX), &states);
        if name == "after" {
            assert_eq!((case.view)(&pool), states.1, "{}: reported done, lost by the power cut", case.name);
        }
        pool.close().unwrap();
    }
}

macro_rules! cases {
    ($($test:ident $power:ident $index:literal)*) => { $(
        #[test]
        fn $test() {
            kill_everywhere($index);
        }
        #[test]
        fn $power() {
            power_cut_everywhere($index);
        }
    )* };
}

cases! {
    killed_publishing_an_image power_cut_publishing_an_image 0
    killed_staging_an_image power_cut_staging_an_image 1
    killed_removing_an_image power_cut_removing_an_image 2
    killed_releasing power_cut_releasing 3
    killed_creating_a_root power_cut_creating_a_root 4
    killed_making_a_volume power_cut_making_a_volume 5
    killed_removing_a_volume power_cut_removing_a_volume 6
}

#[test]
#[ignore = "run by the next test as its child"]
fn the_child_that_opens_a_pool() {
    if let Ok(dir) = std::env::var(CHILD) {
        Pool::open_or_create(&config_in(dir.as_ref())).unwrap();
    }
}

#[test]
fn an_opening_killed_at_any_time_is_completed_by_the_next() {
    for delay_ms in (0..60).step_by(4) {
        let site = Site::new();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_child_that_opens_a_pool", "--ignored"])
            .env(CHILD, site.dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // Not waiting for luck: each delay cuts somewhere, and every cut has to be survived.
        std::thread::sleep(std::time::Duration::from_millis(delay_ms));
        child.kill().unwrap();
        child.wait().unwrap();
        let mut config = site.config();
        config.lock_wait_ms = 5_000; // mkfs may still run and hold nothing of ours.
        let pool = Pool::open_or_create(&config).unwrap();
        pool.volume_ensure(&app("shop"), &volume("data"), Quota::mib(8)).unwrap();
        assert_eq!((site.loop_devices().len(), site.mounts().len()), (1, 1), "killed after {delay_ms} ms");
        pool.close().unwrap();
        site.assert_nothing_left();
    }
}

#[test]
fn a_sweep_spares_what_is_live_locked_or_younger_than_its_list() {
    let site = Site::new();
    let pool = site.open();
    publish_release(&pool);
    let make = |name: &str| {
        pool.instance_root_create(&instance(name), &app("shop"), &release("r1"), Quota::mib(4))
            .map(drop)
            .unwrap();
    };
    make("known");
    make("orphan");
    pool.image_stage(&staging("known"), &image("py"), Quota::mib(4)).unwrap();
    pool.image_stage(&staging("orphan"), &image("py"), Quota::mib(4)).unwrap();
    let mut live = pool.live_set().unwrap();
    live.instances.insert(instance("known"));
    live.staging.insert(staging("known"));
    // Begun after the list was made, so the list cannot know them.
    make("younger");
    pool.image_stage(&staging("younger"), &image("py"), Quota::mib(4)).unwrap();
    let report = pool.sweep(&live).unwrap();
    assert_eq!(report.orphans, ["instance root orphan"]);
    assert_eq!(report.undone, ["staging area orphan"]);
    assert_eq!(report.failed, Vec::<String>::new());
    let names: Vec<String> =
        pool.instance_root_list().unwrap().iter().map(|i| i.instance.to_string()).collect();
    assert_eq!(names, ["known", "younger"]);
    pool.staging_open(&staging("known")).unwrap();
    pool.staging_open(&staging("younger")).unwrap();
    pool.close().unwrap();
}

#[test]
fn a_full_pool_fails_an_import_and_nothing_else() {
    let site = Site::new();
    let pool = site.open();
    publish_release(&pool);
    let stage = staging("import");
    let dir = pool.image_stage(&stage, &image("huge"), Quota::bytes(POOL_BYTES)).unwrap();
    let error = fill(&at(&dir, "blob"), 512 * MIB).unwrap_err();
    assert!(matches!(error.raw_os_error(), Some(28 | 122)), "{error}");
    // Everybody else's objects can still go and be read, and the failed import leaves nothing.
    let dir2 = pool.release_open(&app("shop"), &release("r1")).unwrap();
    assert_eq!(read(&dir2, "content"), "one");
    drop((dir, dir2));
    pool.staging_abort(&stage).unwrap();
    assert_idle(&site);
    eventually("there is room again", || {
        pool.sync().unwrap();
        pool.volume_ensure(&app("shop"), &volume("data"), Quota::mib(16)).is_ok()
    });
    assert_eq!(pool.image_list().unwrap().len(), 1);
    pool.close().unwrap();
}
