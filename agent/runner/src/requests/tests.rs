//! The check, request by request: what the tables allow becomes a plan, everything else a refusal.

use std::collections::{BTreeMap, BTreeSet};

use epagent_wire::name::{AppName, JailId, ReleaseNumber};
use epagent_wire::runner::{ArchiveFormat, Command, Exit, Start};
use epagent_wire::spec::Limits;

use super::*;
use crate::config::{self, Config};
use crate::order::{Program, Root, Source};
use crate::tables::{
    AppRecord, JAILS_MAX, JOBS_MAX, Jail, JailRecord, Phase, ReleaseRecord, Tables, is_jail_of,
};

/// Two apps on one node: `shop` with a sealed release, one being built, a volume, an instance that runs and a job that
/// ended; `blog` with a sealed release and a volume of its own.
struct Node {
    config: Config,
    tables: Tables,
}

fn name<T: std::str::FromStr>(text: &str) -> T
where
    T::Err: std::fmt::Debug,
{
    text.parse().unwrap()
}

const INSTANCE: &str = "shop-aaaaaaaa";
const ENDED_JOB: &str = "shop-bbbbbbbb";

impl Node {
    fn new() -> Node {
        let mut tables = Tables::default();
        for (app, range) in [("shop", 1), ("blog", 2)] {
            tables.insert_app(AppRecord { app: name(app), range });
        }
        for (app, release, image, sealed) in
            [("shop", 1, "py@3", true), ("shop", 2, "py@3", false), ("blog", 5, "host@1", true)]
        {
            let image = name(image);
            tables.insert_release(ReleaseRecord {
                app: name(app),
                release: ReleaseNumber(release),
                image,
                sealed,
            });
        }
        tables.images = [("py", "py@3"), ("host", "host@1"), ("spare", "spare@1")]
            .map(|(image, id)| (name(image), name(id)))
            .into();
        tables.volumes = [(("shop", "data"), 1 << 30), (("blog", "posts"), 1 << 30)]
            .map(|((app, volume), quota)| ((name(app), name(volume)), quota))
            .into();
        let mut node = Node { config: config::tests::example(), tables };
        node.jail(INSTANCE, 1, Purpose::Start, Phase::Running { pid: 77, started_at_ms: 5 });
        let exit = Exit { code: Some(0), ..Exit::default() };
        node.jail(ENDED_JOB, 2, Purpose::BuildUnpack, Phase::Exited { exit, started_at_ms: None });
        node
    }

    fn jail(&mut self, id: &str, release: u32, purpose: Purpose, phase: Phase) {
        let record = JailRecord {
            jail: name(id),
            app: Some(name("shop")),
            release: Some(ReleaseNumber(release)),
            slot: (purpose == Purpose::Start).then_some(9),
            volumes: if purpose == Purpose::Start { BTreeSet::from([name("data")]) } else { BTreeSet::new() },
            purpose,
            created_at_ms: 0,
            boot: String::new(),
            concluded: None,
        };
        self.tables.logs.insert(name(id));
        self.tables.insert_jail(Jail::new(record, phase));
    }

    fn check(&self, request: &Request) -> Result<Plan, Refusal> {
        let kinds: &[Kind] = match request {
            Request::ImageImport { .. } | Request::BuildUnpack { .. } => &[Kind::Stream],
            Request::Start { start, .. } if start.with_secrets => &[Kind::Sealed],
            Request::Exec { terminal: None, .. } => &[Kind::Stream; 3],
            _ => &[],
        };
        self.check_with(request, kinds)
    }

    fn check_with(&self, request: &Request, kinds: &[Kind]) -> Result<Plan, Refusal> {
        let view = View { tables: &self.tables, config: &self.config, now_ms: 10, boot: "b", salt: 1 };
        check(request, kinds, view)
    }

    fn plan(&self, request: Request) -> Plan {
        self.check(&request).unwrap_or_else(|refusal| panic!("{request:?}: {}", refusal.message))
    }

    #[track_caller]
    fn refused(&self, code: RefusalCode, request: Request) {
        match self.check(&request) {
            Err(refusal) => assert_eq!(refusal.code, code, "{request:?}: {}", refusal.message),
            Ok(plan) => panic!("{request:?} became {plan:?}"),
        }
    }
}

fn start(app: &str, release: u32) -> Start {
    Start {
        app: name(app),
        release: ReleaseNumber(release),
        command: Command::Shell("./serve".to_owned()),
        env: BTreeMap::new(),
        limits: Limits::default(),
        volumes: BTreeMap::new(),
        with_secrets: false,
        socket: false,
        deadline_ms: None,
    }
}

fn start_request(jail: &str, start: Start) -> Request {
    Request::Start { jail: name(jail), start }
}

fn on_volume(app: &str, release: u32, volume: &str, path: &str) -> Start {
    Start { volumes: [(name(volume), path.to_owned())].into(), ..start(app, release) }
}

use RefusalCode::{BadRequest, Conflict, Exhausted, NotFound, NotYours};

#[test]
fn hello_speaks_one_protocol() {
    let node = Node::new();
    assert!(matches!(node.plan(Request::Hello { protocol: PROTOCOL }), Plan::Hello));
    node.refused(BadRequest, Request::Hello { protocol: PROTOCOL + 1 });
}

#[test]
fn an_app_gets_a_range_of_its_own_once() {
    let node = Node::new();
    assert!(matches!(node.plan(Request::AppEnsure { app: name("shop") }), Plan::Nothing));
    let Plan::Work(Work::AppEnsure(record)) = node.plan(Request::AppEnsure { app: name("new") }) else {
        panic!()
    };
    assert!(node.tables.apps.values().all(|app| app.range != record.range) && record.range != 0);

    let mut full = Node::new();
    full.config.ids.ranges = 3;
    full.refused(Exhausted, Request::AppEnsure { app: name("new") });
}

#[test]
fn an_app_is_removed_with_its_own_and_nothing_else() {
    let mut node = Node::new();
    node.refused(Conflict, Request::AppRemove { app: name("shop") });
    node.tables.jails.remove(&name::<JailId>(INSTANCE));
    let Plan::Work(Work::AppRemove(removal)) = node.plan(Request::AppRemove { app: name("shop") }) else {
        panic!()
    };
    assert_eq!(removal.jails, [name::<JailId>(ENDED_JOB)]);
    assert!(
        removal.releases.iter().all(|release| release.app == name("shop")) && removal.releases.len() == 2
    );
    assert_eq!(removal.volumes, [name("data")]);
    assert_eq!(removal.logs.len(), 2);
    assert!(matches!(node.plan(Request::AppRemove { app: name("nobody") }), Plan::Nothing));
}

#[test]
fn an_image_is_made_by_one_job_at_a_time_and_never_over_the_hosts() {
    let import = |image: &str| Request::ImageImport { image: name(image), format: ArchiveFormat::Layers };
    let mut node = Node::new();
    let Plan::Launch { work: Work::ImageStage { job, .. }, order } = node.plan(import("py")) else {
        panic!()
    };
    assert_eq!((job.app.clone(), job.slot, order.id_base), (None, None, node.config.ids.base));
    assert!(matches!(&order.program, Program::Unpack(argv) if argv.contains(&"layers".to_owned())));
    node.refused(Conflict, import("host"));
    node.tables.insert_jail(Jail::new(job, Phase::Starting));
    node.refused(Conflict, import("py"));
    node.refused(Conflict, Request::ImageRemove { image: name("py") });
}

#[test]
fn a_bootstrap_takes_words_and_no_options() {
    let bootstrap = |suite: &str, package: &str| Request::ImageBootstrap {
        image: name("deb"),
        suite: suite.to_owned(),
        include: [package.to_owned()].into(),
    };
    let mut node = Node::new();
    let Plan::Launch { order, .. } = node.plan(bootstrap("bookworm", "python3")) else { panic!() };
    assert!(matches!(order.root, Root::Image(_)) && order.jail.slot.is_some());
    node.refused(BadRequest, bootstrap("bookworm", "--setup-hook=id"));
    node.refused(BadRequest, bootstrap("--help", "python3"));
    // The skeleton serves bootstraps also where the image `host` is nobody's to use.
    node.config.host_image = false;
    assert!(node.check(&bootstrap("bookworm", "python3")).is_ok());
}

#[test]
fn an_image_in_use_stays() {
    let node = Node::new();
    node.refused(Conflict, Request::ImageRemove { image: name("py") });
    node.refused(Conflict, Request::ImageRemove { image: name("host") });
    assert!(matches!(node.plan(Request::ImageRemove { image: name("spare") }), Plan::Work(_)));
    assert!(matches!(node.plan(Request::ImageRemove { image: name("nobody") }), Plan::Nothing));
}

#[test]
fn a_build_begins_on_an_image_that_exists() {
    let unpack = |app: &str, release, image: &str| Request::BuildUnpack {
        app: name(app),
        release: ReleaseNumber(release),
        image: name(image),
        format: ArchiveFormat::Tar,
    };
    let mut node = Node::new();
    let Plan::Launch { work: Work::ReleaseStage { job, release, .. }, order } =
        node.plan(unpack("shop", 3, "py"))
    else {
        panic!()
    };
    assert!(is_jail_of(&job.jail, &name::<AppName>("shop")) && job.slot.is_none());
    assert_eq!((order.root, order.id_base), (Root::Staging(release.staging()), node.config.range_base(1)));
    assert!(node.check(&unpack("shop", 2, "py")).is_ok(), "a tree that is not sealed is made anew");
    node.refused(Conflict, unpack("shop", 1, "py"));
    node.refused(NotFound, unpack("shop", 3, "nobody"));
    node.refused(NotFound, unpack("nobody", 3, "py"));
    node.config.host_image = false;
    node.refused(NotFound, unpack("shop", 3, "host"));
}

#[test]
fn a_build_command_runs_alone_in_its_tree() {
    let run = |app: &str, release, command: &str| Request::BuildRun {
        app: name(app),
        release: ReleaseNumber(release),
        command: command.to_owned(),
        env: BTreeMap::from([("PIP_INDEX_URL".to_owned(), "mine".to_owned())]),
    };
    let mut node = Node::new();
    let Plan::Launch { order, .. } = node.plan(run("shop", 2, "make")) else { panic!() };
    assert_eq!(order.env["PIP_INDEX_URL"], "mine", "the manifest's word goes before the configuration's");
    assert_eq!(order.deadline_ms, Some(node.config.build.deadline.ms));
    node.refused(Conflict, run("shop", 1, "make"));
    node.refused(NotFound, run("shop", 9, "make"));
    node.refused(NotFound, run("blog", 2, "make"));
    node.refused(BadRequest, run("shop", 2, " "));

    node.jail("shop-cccccccc", 2, Purpose::BuildRun { command: "make".to_owned() }, Phase::Starting);
    assert!(
        matches!(node.plan(run("shop", 2, "make")), Plan::AlreadyStarted(jail) if jail == name("shop-cccccccc"))
    );
    node.refused(Conflict, run("shop", 2, "make install"));
    node.refused(Conflict, Request::BuildSeal { app: name("shop"), release: ReleaseNumber(2) });
    node.refused(Conflict, Request::BuildAbort { app: name("shop"), release: ReleaseNumber(2) });
}

#[test]
fn a_tree_is_sealed_once_and_aborted_only_before() {
    let node = Node::new();
    let (shop, blog): (AppName, AppName) = (name("shop"), name("blog"));
    let seal =
        |app: &AppName, release| Request::BuildSeal { app: app.clone(), release: ReleaseNumber(release) };
    let abort =
        |app: &AppName, release| Request::BuildAbort { app: app.clone(), release: ReleaseNumber(release) };
    assert!(matches!(node.plan(seal(&shop, 2)), Plan::Work(Work::ReleaseSeal(record)) if record.sealed));
    assert!(matches!(node.plan(seal(&shop, 1)), Plan::Nothing));
    node.refused(NotFound, seal(&blog, 2));
    assert!(matches!(node.plan(abort(&shop, 2)), Plan::Work(Work::ReleaseAbort(_))));
    assert!(matches!(node.plan(abort(&shop, 9)), Plan::Nothing));
    node.refused(Conflict, abort(&shop, 1));
}

#[test]
fn a_release_goes_when_no_jail_needs_it() {
    let node = Node::new();
    let remove =
        |app: &str, release| Request::ReleaseRemove { app: name(app), release: ReleaseNumber(release) };
    node.refused(Conflict, remove("shop", 1));
    node.refused(Conflict, remove("shop", 2));
    assert!(matches!(node.plan(remove("blog", 5)), Plan::Work(_)));
    assert!(matches!(node.plan(remove("blog", 1)), Plan::Nothing));
}

#[test]
fn a_volume_is_its_apps_alone() {
    let node = Node::new();
    let ensure = |app: &str, volume: &str, quota_bytes| Request::VolumeEnsure {
        app: name(app),
        volume: name(volume),
        quota_bytes,
    };
    let remove = |app: &str, volume: &str| Request::VolumeRemove { app: name(app), volume: name(volume) };
    assert!(matches!(node.plan(ensure("shop", "data", 1 << 30)), Plan::Nothing));
    let Plan::Work(Work::VolumeEnsure { quota, .. }) = node.plan(ensure("shop", "data", u64::MAX)) else {
        panic!()
    };
    assert_eq!(quota.limit_bytes, node.config.limits.volume.0);
    node.refused(NotFound, ensure("nobody", "data", 1 << 30));
    node.refused(Conflict, remove("shop", "data"));
    assert!(matches!(node.plan(remove("blog", "posts")), Plan::Work(_)));
    assert!(
        matches!(node.plan(remove("blog", "data")), Plan::Nothing),
        "shop's volume is not blog's to remove"
    );
}

#[test]
fn an_instance_gets_what_the_runner_chose() {
    let node = Node::new();
    let request = start_request(
        "shop-dddddddd",
        Start {
            limits: Limits { memory_bytes: u64::MAX, io_bytes_per_s: Some(5 << 20), ..Limits::default() },
            ..on_volume("shop", 1, "data", "/data")
        },
    );
    let Plan::Launch { work: Work::InstancePrepare { jail, .. }, order } = node.plan(request) else {
        panic!()
    };
    assert_eq!(order.id_base, node.config.range_base(1));
    assert_eq!(order.limits.memory_bytes, node.config.limits.memory.0);
    assert_eq!(order.limits.io_bytes_per_s, Some(5 << 20));
    assert!(jail.slot.is_some_and(|slot| slot != 9), "the running instance has slot 9");
    assert_eq!(order.mounts.len(), 1);
    assert_eq!(order.mounts[0].source, Source::Volume(name("shop"), name("data")));
    assert!(order.spec(&node.config).is_ok());

    let Plan::Launch { order, .. } = node.plan(start_request("blog-dddddddd", start("blog", 5))) else {
        panic!()
    };
    assert!(order.mounts.iter().all(|mount| mount.read_only), "the host's folders are not to be written to");
}

#[test]
fn another_apps_objects_are_out_of_reach() {
    let node = Node::new();
    node.refused(NotYours, start_request(INSTANCE, start("blog", 5)));
    node.refused(NotYours, start_request("shop-dddddddd", start("blog", 5)));
    node.refused(NotYours, start_request("image--dddddddd", start("shop", 1)));
    node.refused(NotFound, start_request("blog-dddddddd", start("blog", 1)));
    node.refused(NotFound, start_request("blog-dddddddd", on_volume("blog", 5, "data", "/data")));
    node.refused(NotFound, start_request("nobody-dddddddd", start("nobody", 1)));
}

#[test]
fn a_start_that_can_not_be_is_refused() {
    let mut node = Node::new();
    let jail = "shop-dddddddd";
    node.refused(Conflict, start_request(jail, start("shop", 2)));
    node.refused(BadRequest, start_request(jail, on_volume("shop", 1, "data", "/proc")));
    node.refused(BadRequest, start_request(jail, on_volume("shop", 1, "data", "/data/../etc")));
    node.refused(
        BadRequest,
        start_request(jail, Start { command: Command::Argv(vec![]), ..start("shop", 1) }),
    );
    node.refused(
        BadRequest,
        start_request(jail, Start { env: [("A B".to_owned(), String::new())].into(), ..start("shop", 1) }),
    );
    node.config.network.v4.len = 30;
    let Plan::Launch { work: Work::InstancePrepare { jail: taken, .. }, .. } =
        node.plan(start_request(jail, start("shop", 1)))
    else {
        panic!()
    };
    node.tables.insert_jail(Jail::new(taken, Phase::Starting));
    node.tables.jails.get_mut(&name::<JailId>(INSTANCE)).unwrap().record.slot = Some(1);
    node.refused(Exhausted, start_request("shop-eeeeeeee", start("shop", 1)));
}

#[test]
fn a_start_sent_again_is_the_same_start() {
    let node = Node::new();
    let again = start_request(INSTANCE, on_volume("shop", 1, "data", "/data"));
    assert!(matches!(node.plan(again), Plan::AlreadyStarted(_)));
    node.refused(Conflict, start_request(INSTANCE, start("shop", 1)));
}

#[test]
fn jails_are_stopped_with_known_signals_and_forgotten_when_ended() {
    let node = Node::new();
    let stop = |jail: &str, signal: &str| Request::Stop {
        jail: name(jail),
        signal: signal.to_owned(),
        grace_ms: u64::MAX,
    };
    let Plan::Stop { signal: 15, grace_ms, .. } = node.plan(stop(INSTANCE, "TERM")) else { panic!() };
    assert_eq!(grace_ms, fields::GRACE_MS_MAX);
    assert!(matches!(node.plan(stop(ENDED_JOB, "TERM")), Plan::Nothing));
    node.refused(BadRequest, stop(INSTANCE, "SIGSTOP"));
    node.refused(NotFound, stop("shop-zzzzzzzz", "TERM"));
    node.refused(Conflict, Request::Forget { jail: name(INSTANCE) });
    assert!(matches!(node.plan(Request::Forget { jail: name(ENDED_JOB) }), Plan::Work(Work::Discard(_))));
    assert!(matches!(node.plan(Request::Forget { jail: name("shop-zzzzzzzz") }), Plan::Nothing));
}

#[test]
fn commands_run_only_in_running_jails() {
    let exec = |jail: &str, terminal| Request::Exec {
        jail: name(jail),
        argv: vec!["id".to_owned()],
        env: BTreeMap::new(),
        terminal,
    };
    let mut node = Node::new();
    assert!(matches!(node.plan(exec(INSTANCE, None)), Plan::Exec { .. }));
    node.refused(Conflict, exec(ENDED_JOB, None));
    node.refused(NotFound, exec("shop-zzzzzzzz", None));
    node.refused(BadRequest, exec(INSTANCE, Some(TerminalSize { rows: 0, columns: 80 })));
    node.refused(NotFound, Request::ExecKill { jail: name(INSTANCE), exec: 4 });
    node.tables.jails.get_mut(&name::<JailId>(INSTANCE)).unwrap().execs = (0..EXECS_MAX as u32).collect();
    node.refused(Exhausted, exec(INSTANCE, None));
    assert!(matches!(node.plan(Request::ExecKill { jail: name(INSTANCE), exec: 4 }), Plan::ExecKill { .. }));
    assert!(matches!(node.plan(Request::Inspect { jail: name(INSTANCE) }), Plan::Inspect { pid: 77, .. }));
    node.refused(Conflict, Request::Inspect { jail: name(ENDED_JOB) });
}

#[test]
fn logs_are_opened_and_removed_by_jail() {
    let node = Node::new();
    assert!(matches!(node.plan(Request::LogOpen { jail: name(INSTANCE) }), Plan::LogOpen(_)));
    node.refused(NotFound, Request::LogOpen { jail: name("shop-zzzzzzzz") });
    node.refused(Conflict, Request::LogRemove { jail: name(INSTANCE) });
    assert!(matches!(node.plan(Request::LogRemove { jail: name("shop-zzzzzzzz") }), Plan::Nothing));
}

#[test]
fn descriptors_are_as_many_and_of_the_kind_the_request_takes() {
    let node = Node::new();
    let unpack = Request::BuildUnpack {
        app: name("shop"),
        release: ReleaseNumber(3),
        image: name("py"),
        format: ArchiveFormat::Tar,
    };
    let secret = start_request("shop-dddddddd", Start { with_secrets: true, ..start("shop", 1) });
    let exec = Request::Exec {
        jail: name(INSTANCE),
        argv: vec!["id".to_owned()],
        env: BTreeMap::new(),
        terminal: None,
    };
    for (request, kinds) in [
        (&unpack, &[][..]),
        (&unpack, &[Kind::Other]),
        (&unpack, &[Kind::Stream, Kind::Stream]),
        (&secret, &[]),
        (&secret, &[Kind::Stream]),
        (&exec, &[Kind::Stream, Kind::Stream]),
        (&exec, &[Kind::Stream, Kind::Other, Kind::Stream]),
        (&Request::Observe, &[Kind::Stream]),
    ] {
        let refusal = node.check_with(request, kinds).expect_err("wrong descriptors were taken");
        assert_eq!(refusal.code, BadRequest);
        assert!(refusal.message.contains("descriptors"), "{}", refusal.message);
    }
}

#[test]
fn jobs_and_jails_are_bounded() {
    let mut node = Node::new();
    let run = Request::BuildRun {
        app: name("shop"),
        release: ReleaseNumber(2),
        command: "make".to_owned(),
        env: BTreeMap::new(),
    };
    for at in 0..JOBS_MAX {
        node.jail(&format!("shop-job{at}"), 7, Purpose::BuildUnpack, Phase::Starting);
    }
    node.refused(Exhausted, run.clone());
    assert!(
        node.check(&start_request("shop-dddddddd", start("shop", 1))).is_ok(),
        "jobs don't take the place of instances"
    );
    for at in 0..JAILS_MAX {
        node.jail(
            &format!("shop-old{at}"),
            7,
            Purpose::BuildUnpack,
            Phase::Exited { exit: Exit::default(), started_at_ms: None },
        );
    }
    node.refused(Exhausted, start_request("shop-dddddddd", start("shop", 1)));
}
