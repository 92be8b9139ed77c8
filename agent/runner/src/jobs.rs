//! What jobs are like: unpacking an archive, running a build command, making an image. Pure.
//!
//! Whatever a tenant sends is only ever opened inside a jail: an archive goes, as it comes, to the standard input of
//! our unpacker in a jail whose root is the tree it fills. A bootstrap job alone sees another root: the
//! runner's own skeleton with the host's /usr, in which mmdebstrap fills the tree at `/target`.

use std::collections::{BTreeMap, BTreeSet};

use epagent_conf::Private;
use epagent_isolation::spec::{Limits as JailLimits, Profile};
use epagent_storage::{ImageId, StagingId};
use epagent_wire::runner::ArchiveFormat;

use crate::config::Config;
use crate::order::{
    APP_DIR, CA_IN_JAIL, HostFolder, Mount, Order, Program, Root, Source, TARGET_DIR, default_env,
    host_mounts,
};
use crate::start::shell;
use crate::tables::{JailRecord, ReleaseRecord};

/// The image that is the host's own /usr; the runner makes its skeleton, nobody else may.
pub const HOST_IMAGE: &str = "host";
/// Files in one archive. Bytes are bounded by the tree's quota; this bounds its metadata.
const ENTRIES_MAX: u32 = 400_000;
/// Open files of a build, as npm and linkers like it.
const NOFILE: u64 = 65_536;
/// In `[build] env`: the mirror images are made from.
const MIRROR_NAME: &str = "MIRROR";

/// Unpacks an app's archive into `/app` of a new release.
pub fn unpack(
    job: JailRecord,
    release: &ReleaseRecord,
    format: ArchiveFormat,
    id_base: u32,
    config: &Config,
) -> Order {
    let program = unpacker(APP_DIR, format, "app", config);
    build_order(job, Root::Staging(release.staging()), program, default_env(), id_base, config)
}

/// Runs a command in the tree of a release, with what `[build]` adds.
pub fn run(
    job: JailRecord,
    release: &ReleaseRecord,
    command: &str,
    env: &BTreeMap<String, String>,
    id_base: u32,
    config: &Config,
) -> Order {
    let mut all = build_env(config);
    all.extend(env.clone());
    let program = Program::Command(shell(command));
    let mut order = build_order(job, Root::Staging(release.staging()), program, all, id_base, config);
    order.takes_ca_bundle = true;
    if release.image.name.as_str() == HOST_IMAGE {
        order.mounts.extend(host_mounts());
    }
    order
}

/// Unpacks the stream of an image import into an empty tree.
pub fn import(job: JailRecord, format: ArchiveFormat, id_base: u32, config: &Config) -> Order {
    let root = Root::Staging(job.image_staging());
    build_order(job, root, unpacker("/", format, "image", config), default_env(), id_base, config)
}

/// Makes a Debian tree. `skeleton` is the current version of the runner's own.
pub fn bootstrap(
    job: JailRecord,
    skeleton: ImageId,
    suite: &str,
    include: &BTreeSet<String>,
    id_base: u32,
    config: &Config,
) -> Order {
    let staging: StagingId = job.image_staging();
    let program = Program::Command(mmdebstrap(suite, include, config));
    let mut order = build_order(job, Root::Image(skeleton), program, build_env(config), id_base, config);
    order.profile = Profile::Bootstrap;
    order.takes_ca_bundle = true;
    order.mounts = host_mounts();
    order.mounts.push(Mount::read_only(HostFolder::Apt.path(), Source::Host(HostFolder::Apt)));
    order.mounts.push(Mount::writable(TARGET_DIR, Source::Staging(staging)));
    order
}

fn build_order(
    job: JailRecord,
    root: Root,
    program: Program,
    env: BTreeMap<String, String>,
    id_base: u32,
    config: &Config,
) -> Order {
    let build = &config.build;
    Order {
        jail: job,
        id_base,
        profile: Profile::Build,
        root,
        mounts: Vec::new(),
        program,
        env,
        limits: JailLimits {
            memory_bytes: build.memory.0,
            cpu_percent: build.cpu.0,
            pids: build.pids,
            io_bytes_per_s: build.io.bytes_per_s,
            open_files: NOFILE,
            // pip and npm unpack in /tmp; what is there counts as memory and leaves no trace in the release.
            tmpfs_bytes: build.memory.0 / 2,
            ..JailLimits::default()
        },
        deadline_ms: Some(build.deadline.ms),
        takes_ca_bundle: false,
    }
}

fn unpacker(into: &str, format: ArchiveFormat, policy: &str, config: &Config) -> Program {
    let format = match format {
        ArchiveFormat::Tar => "auto",
        ArchiveFormat::Layers => "layers",
    };
    let (bytes, entries) = (config.build.disk.0.to_string(), ENTRIES_MAX.to_string());
    let argv = [
        "epagent-unpack",
        "--into",
        into,
        "--format",
        format,
        "--policy",
        policy,
        "--max-bytes",
        &bytes,
        "--max-entries",
        &entries,
    ];
    Program::Unpack(argv.map(str::to_owned).into())
}

/// What a build finds: the operator's settings, the bundle under the names by which tools look for it, and homes for
/// caches outside of the release.
fn build_env(config: &Config) -> BTreeMap<String, String> {
    let mut env = default_env();
    let mut set = |name: &str, value: &str| env.insert(name.to_owned(), value.to_owned());
    set("HOME", "/tmp");
    set("TMPDIR", "/tmp");
    set("CI", "1");
    set("PIP_NO_CACHE_DIR", "1");
    set("PIP_DISABLE_PIP_VERSION_CHECK", "1");
    set("PIP_ROOT_USER_ACTION", "ignore");
    set("npm_config_update_notifier", "false");
    if config.build.ca_bundle.is_some() {
        for name in [
            "SSL_CERT_FILE",
            "PIP_CERT",
            "REQUESTS_CA_BUNDLE",
            "NODE_EXTRA_CA_CERTS",
            "CURL_CA_BUNDLE",
            "GIT_SSL_CAINFO",
        ] {
            set(name, CA_IN_JAIL);
        }
    }
    env.extend(config.build.env.iter().map(|(name, value)| (name.clone(), value.reveal().to_owned())));
    env
}

fn mmdebstrap(suite: &str, include: &BTreeSet<String>, config: &Config) -> Vec<String> {
    let mut packages: BTreeSet<&str> = include.iter().map(String::as_str).collect();
    packages.insert("ca-certificates");
    let packages: Vec<&str> = packages.into_iter().collect();
    let include = format!("--include={}", packages.join(","));
    let fixed = ["/usr/bin/mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory"];
    // Without a mirror, mmdebstrap takes Debian's, with its security and update archives.
    let mirror = config.build.env.get(MIRROR_NAME).map(Private::reveal);
    fixed.into_iter().chain([include.as_str(), suite, TARGET_DIR]).chain(mirror).map(str::to_owned).collect()
}
