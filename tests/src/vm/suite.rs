//! The workspace's own test binaries, run inside a guest: one process per test, as on the host.
//!
//! They come with what they were built with: the programs they start lie in the guest at the very paths that cargo
//! compiled into them, and the sources where they were compiled. So nothing is built in the guest, and what runs
//! there is what ran here.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::Vm;
use super::payload::Payload;

/// Longest time of one test, were it run on the host.
const TEST: Duration = Duration::from_secs(30);

/// One test binary.
#[derive(Debug, Clone)]
pub struct Binary {
    /// As in `storage::quota`: the package without `epagent-`, and the test's file.
    pub name: String,
    path: PathBuf,
    folder: PathBuf,
}

/// How one test ended in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    /// It said itself what it could not show here: a line beginning with `SKIPPED`.
    Skipped(String),
    Failed(String),
}

#[derive(Debug, Clone)]
pub struct Result {
    pub test: String,
    pub outcome: Outcome,
    pub took: Duration,
}

/// What cargo has built for the tests of some packages, and where.
#[track_caller]
pub fn built(packages: &[&str]) -> (Vec<Binary>, Vec<PathBuf>) {
    let text = list();
    let listed: Value =
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("what nextest lists: {error}"));
    let is_wanted = |package: &str| packages.iter().any(|wanted| package.contains(&format!("/{wanted}#")));
    let binaries = listed["rust-binaries"].as_object().into_iter().flatten().map(|(_, binary)| binary);
    let binaries =
        binaries.filter(|binary| binary["package-id"].as_str().is_some_and(is_wanted)).map(|binary| {
            let word = |name: &str| binary[name].as_str().unwrap_or_default();
            Binary {
                name: word("binary-id").trim_start_matches("epagent-").to_owned(),
                path: word("binary-path").into(),
                folder: folder_of(word("package-id")),
            }
        });
    let target = Path::new(listed["rust-build-meta"]["target-directory"].as_str().unwrap_or_default());
    let programs = listed["rust-build-meta"]["non-test-binaries"].as_object().into_iter().flatten();
    let programs = programs
        .filter(|(package, _)| is_wanted(package))
        .flat_map(|(_, programs)| programs.as_array().into_iter().flatten())
        .filter_map(|program| program["path"].as_str())
        .map(|path| target.join(path));
    (binaries.collect(), programs.collect())
}

/// The test binaries of the workspace as `nextest list` told them, in the file that `EPAGENT_TEST_LIST` names.
/// Not asked of cargo here: a test that builds would wait for whoever else does.
#[track_caller]
fn list() -> String {
    let path = std::env::var_os("EPAGENT_TEST_LIST")
        .map(PathBuf::from)
        .unwrap_or_else(|| panic!("EPAGENT_TEST_LIST is not set; `make vm-test` sets it"));
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("reading {}: {error}", path.display()))
}

/// The binaries with all they need, for a guest.
#[track_caller]
pub fn payload(binaries: &[Binary], programs: &[PathBuf]) -> Payload {
    let mut payload = Payload::agent();
    payload.folder(&workspace(), &workspace().to_string_lossy());
    for path in binaries.iter().map(|binary| &binary.path).chain(programs) {
        payload.program(path, &path.to_string_lossy());
    }
    payload
}

impl Vm {
    /// Runs the tests of a binary whose names contain `word`, but for those `not_here` names, each with its reason.
    #[track_caller]
    pub fn run_tests(&self, binary: &Binary, word: &str, not_here: &[(&str, &str)]) -> Vec<Result> {
        let listed = self.succeed(&format!("{} --list --format terse", binary.path.display()));
        let tests = listed.lines().filter_map(|line| line.strip_suffix(": test"));
        tests
            .filter(|test| test.contains(word))
            .map(|test| {
                let name = format!("{}::{test}", binary.name);
                match not_here.iter().find(|(beginning, _)| name.starts_with(beginning)) {
                    Some((_, why)) => Result {
                        test: name,
                        outcome: Outcome::Skipped((*why).to_owned()),
                        took: Duration::ZERO,
                    },
                    None => self.run_test(binary, test),
                }
            })
            .collect()
    }

    fn run_test(&self, binary: &Binary, test: &str) -> Result {
        // Pools are made in temporary folders, and /tmp may be in memory.
        let script = format!(
            "cd {} && TMPDIR=/var/tmp EPAGENT_BIN_DIR={} EPAGENT_TEST_SLOWNESS={} RUST_BACKTRACE=0 {} --exact '{test}' --nocapture --test-threads=1",
            binary.folder.display(),
            super::payload::BINARIES,
            self.accel.scaled(Duration::from_secs(1)).as_secs(),
            binary.path.display()
        );
        let ran = self.run_within(&script, TEST);
        let said = format!("{}\n{}", ran.stdout, ran.stderr);
        let skipped = said
            .lines()
            .find_map(|line| line.trim().strip_prefix("SKIPPED"))
            .map(|why| why.trim_start_matches(':'));
        let outcome = match (ran.code, skipped) {
            (Some(0), Some(why)) => Outcome::Skipped(why.trim().to_owned()),
            (Some(0), None) if said.contains("1 ignored") => Outcome::Skipped("ignored".to_owned()),
            (Some(0), None) => Outcome::Passed,
            _ => Outcome::Failed(ran.to_string()),
        };
        Result { test: format!("{}::{test}", binary.name), outcome, took: ran.took }
    }
}

/// Where a package lies, from cargo's id of it: `path+file:///FOLDER#NAME@VERSION`. Its tests run there.
fn folder_of(package: &str) -> PathBuf {
    let path = package.strip_prefix("path+file://").and_then(|rest| rest.split('#').next());
    path.map_or_else(workspace, PathBuf::from)
}

/// The sources of this workspace.
fn workspace() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    path.canonicalize().unwrap_or(path)
}

impl std::fmt::Display for Result {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { test, outcome, took } = self;
        match outcome {
            Outcome::Passed => write!(f, "PASS [{took:6.1?}] {test}"),
            Outcome::Skipped(why) => write!(f, "SKIP [{took:6.1?}] {test}: {why}"),
            Outcome::Failed(_) => write!(f, "FAIL [{took:6.1?}] {test}"),
        }
    }
}
