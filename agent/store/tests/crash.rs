//! Killed, cut off and crowded: whoever reads the file finds the old state or the new.

mod support;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use epagent_core::name::DeployId;
use epagent_core::phase::Phase;
use epagent_store::Store;
use support::{Home, app, begin_build, build, check_whole, finish, open, verdict};

const CHILD_FOLDER: &str = "STORE_TEST_FOLDER";

/// Deploys without end, and prints the number of each deploy that is done.
#[test]
#[ignore = "run by killed_at_any_moment_the_state_is_whole"]
fn child_deploys_until_it_is_killed() {
    let Some(folder) = std::env::var_os(CHILD_FOLDER) else { return };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let store = open(folder.as_ref()).await.unwrap();
        resume(&store).await;
        println!("ready");
        loop {
            let deploy = build(&store, "shop").await;
            println!("{}", deploy.id.0);
        }
    });
}

/// Fails what an earlier, killed run left.
async fn resume(store: &Store) {
    for deploy in store.deploys_unfinished().await.unwrap() {
        if deploy.phase.has_switched() {
            for (from, to) in [(Phase::Switching, Phase::Draining), (Phase::Draining, Phase::Done)] {
                if deploy.phase <= from {
                    store.deploy_advance(deploy.id, from, to, "resumed", 9).await.unwrap();
                }
            }
        } else {
            store.deploy_fail(deploy.id, deploy.phase, &verdict(deploy.phase), 9).await.unwrap();
        }
    }
}

#[tokio::test]
async fn killed_at_any_moment_the_state_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let mut unfinished = 0;
    for round in 0..25_u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_deploys_until_it_is_killed", "--ignored", "--nocapture"])
            .env(CHILD_FOLDER, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        // The first kills cut the making of the file, the others the work; no two of them at the same place.
        if round >= 5 {
            assert!(lines.any(|line| line == "ready"), "the child ended by itself");
        }
        std::thread::sleep(Duration::from_millis(round * 11));
        child.kill().unwrap();
        child.wait().unwrap();
        let answered = lines.filter_map(|line| line.trim().parse().ok()).max();

        let store = open(dir.path()).await.unwrap();
        if let Some(answered) = answered {
            let deploy = store.deploy(DeployId(answered)).await.unwrap().unwrap();
            assert_eq!(deploy.phase, Phase::Done, "an answered deploy was lost");
        }
        unfinished += store.deploys_unfinished().await.unwrap().len();
        let raw = sqlx::SqlitePool::connect(dir.path().join("state.db").to_str().unwrap()).await.unwrap();
        check_whole(&raw).await;
        raw.close().await;
        store.close().await;
    }
    println!("{unfinished} of 25 kills cut a deploy");
    assert!(unfinished > 5, "only {unfinished} of 25 kills cut a deploy: this test shows little");
}

#[tokio::test]
async fn a_log_that_was_cut_anywhere_gives_a_whole_state() {
    let home = Home::new().await;
    for _ in 0..4 {
        build(&home.store, "shop").await;
    }
    // What a power cut leaves of the log: some prefix of it. The file itself is synced before the log is reused.
    let log = std::fs::read(home.dir.path().join("state.db-wal")).unwrap();
    assert!(log.len() > 100_000, "the log is short: {}", log.len());
    let mut phases = std::collections::BTreeSet::new();
    for cut in 0..60 {
        let dir = tempfile::tempdir().unwrap();
        for file in ["state.db", "key"] {
            std::fs::copy(home.dir.path().join(file), dir.path().join(file)).unwrap();
        }
        // The first part of the log is the migration; the rest is cut in 60 places, in the middle of pages too.
        let len = log.len() / 3 + (log.len() * 2 / 3) * cut / 60 + cut * 7;
        std::fs::write(dir.path().join("state.db-wal"), &log[..len.min(log.len())]).unwrap();
        let store = open(dir.path()).await.unwrap();
        phases
            .extend(store.deploys(None, 1).await.unwrap().first().map(|deploy| (deploy.id.0, deploy.phase)));
        let raw = sqlx::SqlitePool::connect(dir.path().join("state.db").to_str().unwrap()).await.unwrap();
        check_whole(&raw).await;
        raw.close().await;
        store.close().await;
    }
    assert!(phases.len() > 10, "the cuts met only {phases:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn readers_see_whole_states_while_the_writer_writes() {
    let home = Home::new().await;
    let store = home.store.clone();
    let (done, is_done) = tokio::sync::watch::channel(false);
    let writer = tokio::spawn(async move {
        for _ in 0..20 {
            build(&store, "shop").await;
        }
        done.send_replace(true);
    });
    let readers: Vec<_> = (0..8)
        .map(|_| {
            let (store, is_done) = (home.store.clone(), is_done.clone());
            tokio::spawn(async move {
                let (mut reads, mut newest) = (0, 0);
                while !*is_done.borrow() {
                    let events = store.events_newest(None, 50).await.unwrap();
                    let last = events.last().map_or(0, |event| event.id);
                    assert!(last >= newest, "a reader went back in time");
                    assert!(events.windows(2).all(|pair| pair[0].id + 1 == pair[1].id));
                    newest = last;
                    if let Some(serving) = store.release_serving(&app("shop")).await.unwrap() {
                        assert!(
                            store.releases(&app("shop")).await.unwrap().len() >= serving.number.0 as usize
                        );
                    }
                    reads += 1;
                }
                reads
            })
        })
        .collect();
    writer.await.unwrap();
    let mut reads = 0;
    for reader in readers {
        reads += reader.await.unwrap();
    }
    assert!(reads > 100, "only {reads} reads took place");
    check_whole(&home.raw().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn writers_wait_for_each_other_and_for_others() {
    let home = Home::new().await;
    // A second process on the file: an operator who looks into it, or a brain that is about to end.
    let other = open(home.dir.path()).await.unwrap();
    let tasks: Vec<_> = (0..8)
        .map(|task| {
            let store = if task % 4 == 0 { other.clone() } else { home.store.clone() };
            tokio::spawn(async move {
                for n in 0..25 {
                    store.event_add(None, None, "test.event", &format!("{task} {n}"), 1).await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(home.store.events_newest(None, 1_000).await.unwrap().len(), 200);
}

#[tokio::test]
async fn a_cancelled_operation_leaves_nothing_behind() {
    let home = Home::new().await;
    let mut cut = 0;
    for round in 0..100 {
        // Each round the future is dropped a little later than in the round before.
        let after = Duration::from_micros(40 * round);
        let finished = tokio::time::timeout(after, begin_build(&home.store, "shop")).await.ok();
        match finished {
            Some(deploy) => finish(&home.store, &deploy.unwrap()).await,
            None => cut += 1,
        }
        // One that was cut off in its commit takes place, before the next write; it is taken on like any other.
        home.store.event_add(None, None, "test.event", "", 1).await.unwrap();
        resume(&home.store).await;
    }
    assert!(cut > 0, "nothing was cut off");
    check_whole(&home.raw().await).await;
}
